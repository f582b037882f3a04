//! Problems, tensors and rotations as launch parameters.

use crate::common::plans::{base, call, f32s, mirror, params, problem, table, tensor};
use infini_attn::cuda::params::*;
use infini_attn::cuda::{Call, DeviceRope, DeviceTensor, Operand, Target, plan_segment};
use infini_attn::{DType, Denominator, EmptyMemory, Problem, Update};

#[test]
fn problems_as_launch_parameters() {
    let of = |p: &Problem| {
        let state = mirror(p, 1);
        let plan = plan_segment(p, &call(p, &[1, 1]), &state, &Target::default()).expect("valid");
        params::<InfiniSegment>(&plan, "segment", 0).problem
    };
    let p = of(&problem(|b| b));
    assert_eq!((p.key_dim, p.value_dim, p.heads, p.kv_heads, p.group), (64, 128, 4, 2, 2));
    assert_eq!((p.segment_len, p.delta, p.bypass, p.denominator, p.negative), (128, 1, 0, 0, 0));
    assert_eq!(p.scale_log2, 0.125 * std::f32::consts::LOG2_E);
    let p =
        of(&problem(|b| b.update(Update::Linear).empty_memory(EmptyMemory::Bypass).scale(-2.0)));
    assert_eq!((p.delta, p.bypass, p.negative), (0, 1, 1));
    assert_eq!(p.scale_log2, 2.0 * std::f32::consts::LOG2_E);
    let scale = |scale| of(&problem(|b| b.scale(scale))).scale_log2;
    let least = f32::from_bits(1);
    assert_eq!((scale(0.0), scale(-1e-300)), (least, least), "masked scores stay −∞");
    let p = of(&problem(|b| b.denominator(Denominator::Clamp(0.5))));
    assert_eq!((p.denominator as u32, p.epsilon), (INFINI_DENOMINATOR_CLAMP, 0.5));
    let p = of(&problem(|b| b.denominator(Denominator::Add(0.25))));
    assert_eq!((p.denominator as u32, p.epsilon), (INFINI_DENOMINATOR_ADD, 0.25));
}

#[test]
fn tensors_and_rotations_as_launch_parameters() {
    let p = problem(|b| b);
    let state = mirror(&p, 2);
    let q = DeviceTensor::strided(p.dtype(), &[2, 3, 4, 64], &[8192, 64, 512, 1]).expect("valid");
    let plain = call(&p, &[2, 3]);
    let (k, v, o) =
        (tensor(&p, &[2, 3], 2, 64), tensor(&p, &[2, 3], 2, 128), tensor(&p, &[2, 3], 4, 128));
    let cos = DeviceTensor::strided(DType::F32, &[50, 8], &[17, 1]).expect("valid");
    let rope = DeviceRope::new(cos, f32s(&[50, 8])).interleaved(true);
    let get = |call: Call<'_>| {
        let plan = plan_segment(&p, &call, &state, &Target::default()).expect("valid");
        params::<InfiniSegment>(&plan, "segment", 0).call
    };
    let whole = Call::new(q, k, v, f32s(&[4]), o).lse(f32s(&[2, 4, 3])).a_dot(o);
    let c = get(whole.rope(rope));
    assert_eq!((c.q.data, c.q.batch, c.q.token, c.q.head), (base(Operand::Q), 8192, 64, 512));
    assert_eq!((c.lse.batch, c.lse.token, c.lse.head), (12, 1, 3));
    assert_eq!((c.a_dot.data, c.a_mem.data), (base(Operand::ADot), 0));
    let r = c.rope;
    assert_eq!((r.cos, r.sin), (base(Operand::Cos), base(Operand::Sin)));
    assert_eq!((r.cos_stride, r.sin_stride, r.rows, r.half, r.interleaved), (17, 8, 50, 8, 1));
    assert_eq!((r.positions, r.positions_batch), (0, 0));
    assert_eq!(get(plain).rope.rows, 0, "no rotation");
    let r = get(plain.rope(rope.device_positions(3))).rope;
    assert_eq!((r.positions, r.positions_batch), (base(Operand::Positions), 0));
    assert_eq!(get(plain.rope(rope.device_positions(6))).rope.positions_batch, 3);
    let positions = [0, 1, 2, 7, 8, 49];
    let plan =
        plan_segment(&p, &plain.rope(rope.positions(&positions)), &state, &Target::default())
            .expect("valid");
    let r = params::<InfiniSegment>(&plan, "segment", 0).call.rope;
    assert_eq!(table::<i64>(&plan, r.positions, 6), positions);
}
