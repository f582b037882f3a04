//! merge_partials, sum, compose, snapshot.

use bytemuck::Zeroable;
use half::{bf16, f16};
use infini_attn::cuda::params::*;
use infini_attn::{DType, Element};

use super::*;
use crate::common::buffers::{Arrangement, CANARY, Strided};
use crate::common::metric::relative_rms;
use crate::common::{bits, narrow, scalar, widen};

/// Row merges in float64: the row and its log-sum-exp.
fn merged(parts: &[(f64, Vec<f64>)], width: usize) -> (Vec<f64>, f64) {
    let attended = parts.iter().filter(|(lse, _)| *lse != f64::NEG_INFINITY);
    let top = attended.clone().fold(f64::NEG_INFINITY, |top, (lse, _)| f64::max(top, *lse));
    let sum: f64 = attended.clone().map(|(lse, _)| (lse - top).exp()).sum();
    let mut out = vec![0.0; width];
    for (lse, row) in attended {
        let weight = (lse - top).exp() / sum;
        out.iter_mut().zip(row).for_each(|(out, x)| *out += weight * x);
    }
    (out, if sum == 0.0 { f64::NEG_INFINITY } else { top + sum.ln() })
}

/// What the log-sum-exp of a part is in a row.
fn log(part: usize, row: usize, drawn: f32) -> f32 {
    match (row, part) {
        (0, _) => f32::NEG_INFINITY,                 // nobody attends
        (1, part) if part != 2 => f32::NEG_INFINITY, // one part alone does
        (2, _) => drawn + 3e4,                       // large, close together
        (3, part) => drawn - 40.0 * part as f32,     // from 1 to nothing
        (4, part) => drawn + 40.0 * part as f32,     // later parts outweigh earlier ones
        (_, part) if (row + part).is_multiple_of(3) => f32::NEG_INFINITY,
        _ => drawn,
    }
}

fn check_merge<T: Element>(dv: usize, count: usize, how: Arrangement, wants_lse: bool) {
    const SHAPE: [usize; 3] = [2, 5, 3];
    let [batches, tokens, heads] = SHAPE;
    let index = |i: usize| [i / heads / tokens, i / heads % tokens, i % heads];
    let mut sim = simulator();
    let arrangements = [how, Arrangement::Contiguous, Arrangement::Gaps, Arrangement::HeadsFirst];
    let mut parts = Vec::new();
    for part in 0..count {
        let how = arrangements[part % 4];
        let mut x = Strided::<T>::with_margin(&[batches, tokens, heads, dv], how, f32::NAN, MARGIN);
        let mut lse = Strided::<f32>::with_margin(&[batches, heads, tokens], how, f32::NAN, 3);
        let drawn = random(part as u64, batches * tokens * heads * (dv + 1));
        for (i, drawn) in drawn.chunks(dv + 1).enumerate() {
            let [b, t, h] = index(i);
            lse.set(&[b, h, t], log(part, i, drawn[dv]));
            if log(part, i, drawn[dv]) != f32::NEG_INFINITY {
                x.set_row(&[b, t, h], &narrow::<T>(&drawn[..dv]));
            }
        }
        let x = OnDevice::rows(&mut sim, "a_dot", x);
        parts.push((x, OnDevice::logs(&mut sim, "lse", lse)));
    }
    let out = Strided::<T>::with_margin(&[batches, tokens, heads, dv], how, CANARY, MARGIN);
    let out = OnDevice::rows(&mut sim, "out", out);
    let out_lse = Strided::<f32>::with_margin(&[batches, heads, tokens], how, CANARY, 3);
    let out_lse = OnDevice::logs(&mut sim, "out_lse", out_lse);
    let tensors: Vec<_> = parts.iter().map(|(x, _)| x.tensor).collect();
    let logs: Vec<_> = parts.iter().map(|(_, x)| x.tensor).collect();
    let params = InfiniMergePartials {
        a_dot: sim.upload("tensors", &tensors),
        lse: sim.upload("logs", &logs),
        out: out.tensor,
        out_lse: if wants_lse { out_lse.tensor } else { Zeroable::zeroed() },
        batches: batches as i64,
        tokens: tokens as i64,
        heads: heads as i32,
        value_dim: dv as i32,
        parts: count as i32,
        reserved: 0,
    };
    let grid = [(batches * tokens).div_ceil(INFINI_MERGE_ROWS as usize), heads, 1];
    let report = launch(&mut sim, &symbol::<T>("merge_partials"), grid, &params);
    // Rows of more than 32 chunks read the logs again.
    assert_moved_once(&report, &["a_dot", "out", "out_lse"]);
    if dv <= 256 {
        assert_moved_once(&report, &["lse"]);
    }

    let (got, got_lse) = (out.read(&sim), out_lse.read(&sim));
    let tolerance = if T::DTYPE == DType::BF16 { 4e-3 } else { 5e-4 };
    for i in 0..batches * tokens * heads {
        let [b, t, h] = index(i);
        let row: Vec<_> = parts
            .iter()
            .map(|(x, lse)| (lse.host.get(&[b, h, t]).into(), widen(x.host.row(&[b, t, h]))))
            .collect();
        let (want, want_lse) = merged(&row, dv);
        let what = format!("row {i} of {count} parts");
        relative_rms(&what, &widen(got.row(&[b, t, h])), &want, &[dv], tolerance).unwrap();
        let lse = f64::from(got_lse.get(&[b, h, t]));
        let want_lse = if wants_lse { want_lse } else { CANARY.into() };
        let close = (lse - want_lse).abs() <= 1e-6 * want_lse.abs().max(1.0);
        assert!(lse == want_lse || close, "{what}: log-sum-exp {lse}, {want_lse} expected");
    }
}

#[test]
fn partials_merge() {
    check_merge::<bf16>(64, 1, Arrangement::Gaps, true);
    check_merge::<f16>(96, 3, Arrangement::Reversed, true);
    check_merge::<bf16>(128, 4, Arrangement::HeadsFirst, false);
    check_merge::<f16>(256, 2, Arrangement::Contiguous, true);
    // More parts than lanes, more chunks than lanes.
    check_merge::<f16>(64, 33, Arrangement::Gaps, true);
    check_merge::<bf16>(288, 70, Arrangement::Reversed, true);
}

#[test]
fn partials_spread_nan_and_nothing_else() {
    // Rows: a NaN log; NaN in a row; a log of +inf; values near the largest of the type.
    let logs = [
        [f32::NAN, 0.0],
        [0.0, 0.0],
        [f32::INFINITY, 0.0],
        [0.0, 0.0],
        [f32::NAN, f32::NEG_INFINITY],
    ];
    let large = 6e4;
    let rows = [[1.0, 1.0], [f32::NAN, 1.0], [1.0, 1.0], [large, large], [1.0, 1.0]];
    let mut sim = simulator();
    let (mut tensors, mut log_tensors) = (Vec::new(), Vec::new());
    for part in 0..2 {
        let x: Vec<f16> = rows.iter().flat_map(|row| [scalar::<f16>(row[part]); 32]).collect();
        let tensor = |data, token| InfiniTensor { data, batch: 0, token, head: 0 };
        tensors.push(tensor(sim.upload("a_dot", &x), 32));
        let log: Vec<f32> = logs.iter().map(|row| row[part]).collect();
        log_tensors.push(tensor(sim.upload("lse", &log), 1));
    }
    let out = sim.uninitialised::<f16>("out", 5 * 32);
    let out_lse = sim.uninitialised::<f32>("out_lse", 5);
    let params = InfiniMergePartials {
        a_dot: sim.upload("tensors", &tensors),
        lse: sim.upload("logs", &log_tensors),
        out: InfiniTensor { data: out, batch: 0, token: 32, head: 0 },
        out_lse: InfiniTensor { data: out_lse, batch: 0, token: 1, head: 0 },
        batches: 1,
        tokens: 5,
        heads: 1,
        value_dim: 32,
        parts: 2,
        reserved: 0,
    };
    launch(&mut sim, "infini_merge_partials_sm80_f16", [1, 1, 1], &params);
    let rows = widen(&sim.read::<f16>(out, 5 * 32));
    let all = |row: usize, f: &dyn Fn(f64) -> bool| rows[row * 32..][..32].iter().all(|&x| f(x));
    for row in [0, 1, 2, 4] {
        assert!(all(row, &f64::is_nan), "row {row}");
    }
    assert!(all(3, &|x| x == scalar::<f16>(large).to_f64()), "{:?}", &rows[96..128]);
    let logs = sim.read::<f32>(out_lse, 5);
    assert!([0, 2, 4].iter().all(|&i: &usize| logs[i].is_nan()), "{logs:?}");
    assert!([1, 3].iter().all(|&i: &usize| (logs[i] - 2f32.ln()).abs() < 1e-6), "{logs:?}");
}

#[test]
fn sums_are_rounded_once() {
    for (count, parts, blocks) in [(1, 1, 1), (7, 3, 2), (1028, 4, 1), (5003, 6, 3)] {
        let mut sim = simulator();
        let mut inputs: Vec<_> = (0..parts).map(|p| random(p, count)).collect();
        // What f32 additions would lose.
        for (i, x) in [1e8, 1.0, -1e8].into_iter().enumerate().take(inputs.len()) {
            inputs[i][count - 1] = x;
            inputs[i][0] = x;
        }
        let addresses: Vec<_> = inputs.iter().map(|x| sim.upload("inputs", x)).collect();
        let out = sim.upload("out", &vec![CANARY; count + 8]);
        let inputs_table = sim.upload("table", &addresses);
        let mut params = InfiniSum {
            inputs: inputs_table,
            out,
            count: count as i64,
            parts: parts as i32,
            reserved: 0,
        };
        let report = launch(&mut sim, "infini_sum_sm80", [blocks, 1, 1], &params);
        assert_moved_once(&report, &["inputs", "out"]);
        let mut want: Vec<f32> = (0..count)
            .map(|i| inputs.iter().map(|x| f64::from(x[i])).sum::<f64>() as f32)
            .collect();
        // In place.
        params.out = addresses[0];
        launch(&mut sim, "infini_sum_sm80", [blocks, 1, 1], &params);
        assert_eq!(sim.read::<f32>(addresses[0], count), want);
        want.extend([CANARY; 8]);
        assert_eq!(sim.read::<f32>(out, count + 8), want);
    }
}

fn check_compose(dk: usize, columns: usize, added: bool) {
    const MATRICES: usize = 2;
    let mut sim = simulator();
    let a = random(1, MATRICES * dk * dk);
    let [b, d] = [2, 3].map(|seed| random(seed, MATRICES * dk * columns));
    let c = sim.upload("c", &vec![CANARY; MATRICES * dk * columns + 8]);
    let params = InfiniCompose {
        a: sim.upload("a", &a),
        b: sim.upload("b", &b),
        d: if added { sim.upload("d", &d) } else { 0 },
        c,
        matrices: MATRICES as i64,
        key_dim: dk as i32,
        columns: columns as i32,
    };
    let grid = [columns / 32, dk / 32, MATRICES];
    let report = launch(&mut sim, "infini_compose_sm80", grid, &params);
    assert_eq!(report.shared_phases().excess, 0, "bank conflicts");
    assert_moved_once(&report, &["c", "d"]);

    let want: Vec<f64> = (0..MATRICES * dk * columns)
        .map(|i| {
            let (row, column) = (i / columns, i % columns);
            let product = (0..dk).map(|k| {
                f64::from(a[row * dk + k]) * f64::from(b[(row / dk * dk + k) * columns + column])
            });
            product.sum::<f64>() + if added { f64::from(d[i]) } else { 0.0 }
        })
        .collect();
    let got = sim.read::<f32>(c, want.len() + 8);
    let shape = [MATRICES, dk, columns];
    relative_rms("c", &widen(&got[..want.len()]), &want, &shape, 1e-6).unwrap();
    assert_eq!(got[want.len()..], [CANARY; 8]);
}

#[test]
fn maps_compose() {
    check_compose(32, 96, true);
    check_compose(64, 64, false);
    check_compose(96, 32, true);
}

fn check_snapshot<T: Element>(dk: usize, dv: usize) {
    const MATRICES: usize = 2;
    let mut sim = simulator();
    let mut memory = random(1, MATRICES * dk * dv);
    let slices = dv / 32;
    // What the columns of a slice are multiplied by: another magnitude in each, one 0, one not finite.
    for (i, x) in memory.iter_mut().enumerate() {
        *x *= match (i / (dk * dv), i % dv / 32) {
            (0, slice) => 1e-5 * 3e2f32.powi(slice as i32),
            (_, 0) => 0.0,
            (_, slice) => 1e-30 / 7e1f32.powi(slice as i32),
        };
    }
    let odd = memory.len() - 1;
    memory[odd] = f32::NEG_INFINITY;
    memory[odd - 40] = f32::NAN;
    let from = sim.upload("memory", &memory);
    let to = sim.upload("snapshot", &vec![scalar::<T>(CANARY); memory.len() + 8]);
    let scales = sim.upload("scales", &vec![CANARY; MATRICES * slices + 2]);
    let params = InfiniSnapshot {
        memory: from,
        snapshot: to,
        snapshot_scale: scales,
        matrices: MATRICES as i64,
        key_dim: dk as i32,
        value_dim: dv as i32,
    };
    let report = launch(&mut sim, &symbol::<T>("snapshot"), [slices, MATRICES, 1], &params);
    assert_moved_once(&report, &["memory", "snapshot", "scales"]);

    let got = sim.read::<T>(to, memory.len() + 8);
    let scale = sim.read::<f32>(scales, MATRICES * slices + 2);
    for (slice, &s) in scale[..MATRICES * slices].iter().enumerate() {
        let columns = (0..dk * 32)
            .map(|i| (slice / slices * dk + i / 32) * dv + slice % slices * 32 + i % 32);
        let top = columns.clone().fold(0.0, |top, i| f32::max(top, memory[i].abs()));
        assert_eq!(s.to_bits() & 0x7f_ffff, 0, "{s} is no power of two");
        match top == 0.0 || top.is_infinite() {
            true => assert_eq!(s, 1.0),
            false => assert!((1.0..2.0).contains(&(top * s)), "{top} * {s}"),
        }
        for i in columns {
            let want: T = narrow(&[memory[i] * s])[0];
            let same = bits(&[got[i]]) == bits(&[want])
                || memory[i].is_nan() && widen(&[got[i]])[0].is_nan();
            assert!(same, "element {i}: {:?}, {:?} expected", widen(&[got[i]]), widen(&[want]));
        }
    }
    assert_eq!(bits(&got[memory.len()..]), bits(&[scalar::<T>(CANARY); 8]));
    assert_eq!(scale[MATRICES * slices..], [CANARY; 2]);
}

#[test]
fn snapshots_are_scaled() {
    check_snapshot::<bf16>(64, 64);
    check_snapshot::<f16>(96, 128);
    check_snapshot::<bf16>(256, 96);
    check_snapshot::<f16>(32, 32);
}
