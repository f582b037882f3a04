//! 64-bit offsets: rows of the tensors lie in allocations of their own, 2^40 bytes apart, and every
//! entry point gives the bits that it gives on dense tensors.

use crate::common::narrow;
use crate::common::simulator::Simulator;
use crate::common::stream::normals;
use half::bf16;
use infini_attn::cuda::{
    Addresses, Call, DecodeOptions, DeviceTensor, Mirror, Operand, Plan, PrefillOptions,
    StateLayout, Target, plan_decode, plan_prefill, plan_segment,
};
use infini_attn::{DType, Problem, Result, Update};

const TOKENS: usize = 5;
const HEADS: usize = 2;
const D: usize = 64;

type Planner = fn(&Problem, &Call<'_>, &Mirror) -> Result<Plan>;

/// A tensor [1, TOKENS, heads, D]: one allocation, or one per token.
struct Rows {
    tensor: DeviceTensor,
    addresses: Vec<u64>,
    width: usize,
}

impl Rows {
    fn new(sim: &mut Simulator, seed: u64, heads: usize, apart: bool) -> Self {
        let width = heads * D;
        let values = narrow::<bf16>(&normals(seed, TOKENS * width));
        let chunk = if apart { width } else { values.len() };
        let blocks: Vec<u64> = values.chunks(chunk).map(|x| sim.upload("rows", x)).collect();
        let stride = if apart { (blocks[1] - blocks[0]) / 2 } else { width as u64 };
        assert_eq!(stride > 1 << 32, apart, "the simulator puts allocations far apart");
        let strides = [0, stride as i64, D as i64, 1];
        let tensor = DeviceTensor::strided(DType::BF16, &[1, TOKENS, heads, D], &strides);
        let addresses = (0..TOKENS as u64).map(|t| blocks[0] + 2 * t * stride).collect();
        Self { tensor: tensor.expect("valid"), addresses, width }
    }
}

/// The output's bits.
fn output(p: &Problem, plan: Planner, apart: bool) -> Vec<u16> {
    let mut sim = Simulator::new();
    let layout = StateLayout::new(p, 1, false).expect("kernels exist");
    let state = sim.uninitialised::<u8>("state", layout.bytes() as usize);
    let addresses = Addresses::new().with(Operand::State, state);
    let init = layout.plan_init().expect("valid");
    // SAFETY: the simulator checks every access, and what runs is over when this returns.
    unsafe { init.run(&addresses, &mut sim) }.expect("it runs");

    let mut rows = |seed, heads| Rows::new(&mut sim, seed, heads, apart);
    let (q, k, v, o) = (rows(1, HEADS), rows(2, 1), rows(3, 1), rows(4, HEADS));
    let gate = DeviceTensor::contiguous(DType::F32, &[HEADS]).expect("valid");
    let call = Call::new(q.tensor, k.tensor, v.tensor, gate, o.tensor);
    let plan = plan(p, &call, &Mirror::new(&layout)).expect("valid");
    let workspace = sim.uninitialised::<u8>("workspace", plan.workspace_bytes() as usize);
    let addresses = addresses
        .with(Operand::Q, q.addresses[0])
        .with(Operand::K, k.addresses[0])
        .with(Operand::V, v.addresses[0])
        .with(Operand::O, o.addresses[0])
        .with(Operand::Gate, sim.upload("gate", &[0.3f32, -0.4]))
        .with(Operand::Workspace, workspace);
    // SAFETY: as above.
    unsafe { plan.run(&addresses, &mut sim) }.unwrap_or_else(|e| panic!("{plan}\n{e}"));
    o.addresses.iter().flat_map(|at| sim.read::<u16>(*at, o.width)).collect()
}

#[test]
fn rows_may_lie_terabytes_apart() {
    let prefill: Planner =
        |p, call, state| plan_prefill(p, call, state, &PrefillOptions::default());
    let decode: Planner = |p, call, state| plan_decode(p, call, state, &DecodeOptions::default());
    let segment: Planner = |p, call, state| plan_segment(p, call, state, &Target::default());
    for (name, plan, n) in [("prefill", prefill, 2), ("segment", segment, 5), ("decode", decode, 2)]
    {
        let b = Problem::builder().heads(HEADS).kv_heads(1).head_dim(D).segment_len(n);
        let p = b.update(Update::Delta).dtype(DType::BF16).build().expect("valid");
        let [dense, apart] = [false, true].map(|apart| output(&p, plan, apart));
        assert!(dense == apart, "{name}");
        assert!(dense != vec![0; dense.len()], "{name}");
    }
}
