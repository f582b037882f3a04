//! Partial attentions and linear memories.

use infini_attn::cuda::{plan_merge_memories, plan_merge_partials};
use infini_attn::{TensorViewMut, merge_memories, merge_partials};

use super::*;
use crate::common::stream::normals;

/// Parts [B, T, H, 96] of bf16 by the device and by the CPU. `packed`: without B.
fn check_partials(parts: usize, packed: bool) {
    const SHAPE: [usize; 4] = [2, 9, 3, 96];
    let rows: usize = SHAPE[..3].iter().product();
    let (shape, lse_shape) = match packed {
        true => (vec![18, 3, 96], vec![3, 18]),
        false => (SHAPE.to_vec(), vec![2, 3, 9]),
    };
    let values: Vec<Vec<bf16>> =
        (0..parts).map(|i| narrow(&normals(i as u64, rows * 96))).collect();
    let mut logs: Vec<Vec<f32>> = (0..parts).map(|i| normals(50 + i as u64, rows)).collect();
    logs.iter_mut().for_each(|log| log[4] = f32::NEG_INFINITY);
    logs[0][7] = f32::NEG_INFINITY;

    let mut gpu = Gpu::new();
    let tensor = DeviceTensor::contiguous(DType::BF16, &shape).unwrap();
    let log_tensor = DeviceTensor::contiguous(DType::F32, &lse_shape).unwrap();
    let plan = plan_merge_partials(
        &vec![tensor; parts],
        &vec![log_tensor; parts],
        &tensor,
        Some(&log_tensor),
    )
    .unwrap();
    let out = gpu.0.uninitialised::<bf16>("out", rows * 96);
    let out_lse = gpu.0.uninitialised::<f32>("out_lse", rows);
    let mut operands = vec![(Operand::O, out), (Operand::Lse, out_lse)];
    for (i, (x, log)) in values.iter().zip(&logs).enumerate() {
        operands.push((Operand::Part(i as u16), gpu.0.upload("part", x)));
        operands.push((Operand::PartLse(i as u16), gpu.0.upload("log", log)));
    }
    gpu.run(&plan, &operands);

    let views: Vec<_> = values.iter().map(|x| TensorView::new(x, &shape).unwrap()).collect();
    let log_views: Vec<_> = logs.iter().map(|x| TensorView::new(x, &lse_shape).unwrap()).collect();
    let (mut want, mut want_lse) = (vec![bf16::ZERO; rows * 96], vec![0.0f32; rows]);
    merge_partials(
        &views,
        &log_views,
        TensorViewMut::new(&mut want, &shape).unwrap(),
        Some(TensorViewMut::new(&mut want_lse, &lse_shape).unwrap()),
    )
    .unwrap();
    let got = widen(&gpu.0.read::<bf16>(out, rows * 96));
    relative_rms("out", &got, &widen(&want), &shape, 4e-3).unwrap();
    let got = gpu.f32s(out_lse, rows);
    relative_rms("out_lse", &got, &widen(&want_lse), &lse_shape, 1e-5).unwrap();
    assert_eq!(got[4], f64::NEG_INFINITY);
}

#[test]
fn partials_merge_as_on_the_cpu() {
    check_partials(1, false);
    check_partials(3, true);
    check_partials(35, false);
}

#[test]
fn partials_are_refused_as_on_the_cpu() {
    let data = vec![bf16::ZERO; 4 * 8 * 2 * 64];
    let logs = vec![0.0f32; 4 * 8 * 2];
    let check = |parts: &[&[usize]], lse: &[&[usize]], out: &[usize], out_lse: &[usize]| {
        let view = |s: &[usize]| TensorView::new(&data[..s.iter().product()], s).unwrap();
        let log_view = |s: &[usize]| TensorView::new(&logs[..s.iter().product()], s).unwrap();
        let (mut o, mut l) = (data.clone(), logs.clone());
        let (o, l) = (&mut o[..out.iter().product()], &mut l[..out_lse.iter().product()]);
        let want = merge_partials(
            &parts.iter().map(|s| view(s)).collect::<Vec<_>>(),
            &lse.iter().map(|s| log_view(s)).collect::<Vec<_>>(),
            TensorViewMut::new(o, out).unwrap(),
            Some(TensorViewMut::new(l, out_lse).unwrap()),
        );
        let tensor = |s: &[usize]| DeviceTensor::contiguous(DType::BF16, s).unwrap();
        let log_tensor = |s: &[usize]| DeviceTensor::contiguous(DType::F32, s).unwrap();
        let got = plan_merge_partials(
            &parts.iter().map(|s| tensor(s)).collect::<Vec<_>>(),
            &lse.iter().map(|s| log_tensor(s)).collect::<Vec<_>>(),
            &tensor(out),
            Some(&log_tensor(out_lse)),
        );
        assert_eq!(got.unwrap_err().to_string(), want.unwrap_err().to_string());
    };
    let (x, l) = (&[2, 8, 2, 64][..], &[2, 2, 8][..]);
    check(&[], &[], x, l);
    check(&[x], &[l, l], x, l);
    check(&[x, &[2, 8, 2, 32]], &[l, l], x, l);
    check(&[x, x], &[l, &[2, 8, 2]], x, l);
    check(&[x], &[l], x, &[2, 8, 2]);
    check(&[x], &[l], &[8, 64], l);

    let tensor = |dtype, shape: &[usize]| DeviceTensor::contiguous(dtype, shape).unwrap();
    let log = tensor(DType::F32, l);
    let (b, h, f) = (tensor(DType::BF16, x), tensor(DType::F16, x), tensor(DType::F32, x));
    let mixed = plan_merge_partials(&[h], &[log], &b, None).unwrap_err();
    assert!(matches!(mixed, Error::DType { argument: "a_dot", .. }), "{mixed}");
    let single = plan_merge_partials(&[f], &[log], &f, None).unwrap_err();
    assert!(matches!(single, Error::Unsupported { argument: "dtype", .. }), "{single}");
    let odd = tensor(DType::BF16, &[2, 8, 2, 60]);
    assert!(plan_merge_partials(&[odd], &[log], &odd, None).is_err());
}

#[test]
fn linear_memories_add() {
    let p = problem(Update::Linear, [64, 128], DType::BF16);
    let mut gpu = Gpu::new();
    let options = PrefillOptions::default();
    let mut pools = Vec::new();
    for (i, len) in [100, 30, 192].into_iter().enumerate() {
        let run = Run::<bf16>::new(&mut gpu, &p, len, i as u64);
        let (before, none) = zero(&mut gpu, &p);
        let mut pool = Pool::new(&mut gpu, &p);
        Map::new(&mut gpu, &p, &run, (&before, none), &options).apply(&mut gpu, &mut pool);
        pools.push(pool);
    }
    let memories: Vec<_> = pools.iter().map(|pool| pool.memories(&gpu)).collect();
    let mut last = pools.pop().unwrap();
    let earlier: Vec<_> = pools.iter().map(|pool| &pool.mirror).collect();
    let plan = plan_merge_memories(&earlier, &last.mirror).unwrap();
    let sources = [0, 1].map(|i: u16| (Operand::Source(i), pools[i as usize].address));
    last.run(&mut gpu, &plan, &sources);
    last.check::<bf16>(&gpu);
    assert_eq!((last.mirror.tokens(1), last.mirror.committed(0)), (322, 322));
    for (part, got) in last.memories(&gpu).iter().enumerate() {
        let sum = |i: usize| memories.iter().map(|m| m[part][i]).sum::<f64>() as f32;
        let want: Vec<f64> = (0..got.len()).map(|i| sum(i).into()).collect();
        assert!(*got == want, "part {part} is not the sum rounded once");
    }
}

#[test]
fn memories_that_do_not_add_are_refused_as_on_the_cpu() {
    let p = problem(Update::Delta, [64, 64], DType::F16);
    let k = DeviceTensor::contiguous(DType::F16, &[BATCH, 5, HEADS, 64]).unwrap();
    let before = KeySumsMirror::zero(&p, BATCH);
    let map = plan_segment_map(&p, &k, &k, &before, &PrefillOptions::default()).unwrap().1;
    let mut filled = Mirror::new(&StateLayout::new(&p, BATCH, false).unwrap());
    filled.advance(&plan_apply(&map, &filled).unwrap()).unwrap();
    let error = plan_merge_memories(&[&filled], &filled).unwrap_err();
    assert!(
        matches!(error, Error::DeltaMerge { first: 0, second: 1, slot: 0, first_tokens: 5, .. }),
        "{error}"
    );
    let smaller = Mirror::new(&StateLayout::new(&p, 1, false).unwrap());
    let want = {
        let states =
            [infini_attn::State::new(&p, 1).unwrap(), infini_attn::State::new(&p, BATCH).unwrap()];
        merge_memories(&[&states[0], &states[1]]).unwrap_err().to_string()
    };
    assert_eq!(plan_merge_memories(&[&smaller], &filled).unwrap_err().to_string(), want);
    // An empty state changes nothing, under the delta rule as well.
    let empty = Mirror::new(&StateLayout::new(&p, BATCH, false).unwrap());
    let plan = plan_merge_memories(&[&empty], &filled).unwrap();
    let mut merged = filled.clone();
    merged.advance(&plan).unwrap();
    assert_eq!(merged, filled);
}
