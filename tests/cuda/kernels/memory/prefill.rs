//! segment_state, normaliser_scan, segment_transition, memory_scan: each after the ones before it.

use half::{bf16, f16};
use infini_attn::Element;
use infini_attn::cuda::params::{
    INFINI_START_IDENTITY, INFINI_START_MEMORY, INFINI_START_ZERO, InfiniChain, InfiniMemoryScan,
    InfiniPiece,
};

use super::fixture::{CANARY, HEADS, Random, check_cost, check_snapshot, kernel, problem};
use super::launches::{NORMAL, Prefill, SLOTS, Scale, chain};
use super::model::{Memory, Policy, mean_sigma, sigma, transition};
use super::{DIMS, EXACT, POLICIES, SIZES, memory_tolerance};
use crate::common::metric::relative_rms;
use crate::common::{bits, narrow, widen};

/// Full pieces with and without cached tokens, pieces that are not full, an empty memory, one that
/// is not, a chain of one part.
fn mixed(n: usize) -> (Vec<InfiniPiece>, Vec<InfiniChain>) {
    let mut pieces = Vec::new();
    let cached = n / 4;
    let rest = n - cached;
    let chains = vec![
        chain(&mut pieces, n, (2, 0, false), &[(0, rest, cached), (rest, n, 0), (rest + n, 9, 0)]),
        chain(&mut pieces, n, (0, 1, true), &[(0, n, 0), (n, n, 0)]),
        chain(&mut pieces, n, (1, 1, false), &[(2 * n, 5, 3)]),
    ];
    (pieces, chains)
}

#[track_caller]
fn close(what: &str, got: &[f64], want: &[f64], columns: usize, tolerance: f64) {
    let shape = [got.len() / columns, columns];
    relative_rms(what, got, want, &shape, tolerance).unwrap_or_else(|e| panic!("{e}"));
}

/// What the chains find: M and z of every slot, as a segment would leave them; NaN in those that are
/// empty.
fn start<T>(p: &Prefill<T>, random: &mut Random, scale: Scale) -> (Vec<f32>, Vec<f32>) {
    let (dk, dv) = p.dims;
    let (sum, tokens) = (mean_sigma(scale.k) * p.n as f32, p.n as f32);
    let deviation = mean_sigma(scale.k) * tokens.sqrt() * scale.v.1;
    let mut m = random.normal(SLOTS * HEADS * dk * dv, sum * scale.v.0, deviation);
    let mut z = random.normal(SLOTS * HEADS * dk, sum, sum / 8.0);
    z.iter_mut().for_each(|x| *x = x.abs());
    for chain in p.chains.iter().filter(|c| c.empty != 0) {
        let slot = chain.slot as usize * HEADS;
        m[slot * dk * dv..][..HEADS * dk * dv].fill(f32::NAN);
        z[slot * dk..][..HEADS * dk].fill(f32::NAN);
    }
    (m, z)
}

/// All phases against the model, one after the other.
fn phases<T: Element>(mut p: Prefill<T>, delta: Option<Policy>, scale: Scale) {
    let (dk, dv) = p.dims;
    let what = format!("{} {dk}x{dv} {delta:?}", T::DTYPE);
    let tolerance = memory_tolerance(T::DTYPE);
    let (m, z) = start(&p, &mut Random::new(3), scale);

    let (b, sums, _) = p.segment_state(true);
    let parts = p.read(b, p.records() * p.splits * dk * dv);
    let part_sums = p.read(sums, p.records() * p.splits * dk);
    for record in 0..p.records() {
        for split in 0..p.splits {
            let at = record * p.splits + split;
            let (got, got_z) = (&parts[at * dk * dv..][..dk * dv], &part_sums[at * dk..][..dk]);
            if p.pieces[record / HEADS].full == 0 {
                assert!(got.iter().chain(got_z).all(|&x| x == CANARY), "{what}: not full");
                continue;
            }
            let (s, v) = p.segment(record / HEADS, record % HEADS);
            let range = |dim: usize| {
                dim * p.n.min(split * p.split_len)..dim * p.n.min((split + 1) * p.split_len)
            };
            let mut want = Memory::new(dk, dv);
            want.write(&s[range(dk)], &v[range(dv)], None);
            let name = format!("{what}: B of record {record}, split {split}");
            close(&name, &widen(got), &want.m, dv, 1e-4);
            close(&name, &widen(got_z), &want.z, dk, 1e-4);
        }
    }

    let z_start = p.sim.upload("z_start", &z);
    let z_end = p.filled("z_end", SLOTS * HEADS * dk);
    let (z_before, _) = p.normaliser_scan(sums, z_start, z_end);
    let transitions = delta.map(|_| p.segment_transition(z_before));
    let (g, g_scale) = transitions.as_ref().map_or((0, 0), |t| (t.0, t.1));

    let snapshots = SLOTS * HEADS;
    let start = p.sim.upload("start", &m);
    let end = p.filled("end", snapshots * dk * dv);
    let snapshot = p.sim.uninitialised::<T>("snapshot", p.records() * dk * dv);
    let snapshot_scale = p.sim.uninitialised::<f32>("snapshot_scale", p.records() * dv / 32);
    let end_snapshot = p.sim.uninitialised::<T>("end_snapshot", snapshots * dk * dv);
    let end_scale = p.sim.uninitialised::<f32>("end_scale", snapshots * dv / 32);
    p.memory_scan(InfiniMemoryScan {
        start_kind: INFINI_START_MEMORY as i32,
        b,
        g,
        g_scale,
        start,
        end,
        snapshot,
        snapshot_scale,
        end_snapshot,
        end_snapshot_scale: end_scale,
        columns: dv as i64,
        ..InfiniMemoryScan::default()
    });

    for chain in p.chains.clone() {
        for head in 0..HEADS {
            let matrix = chain.slot as usize * HEADS + head;
            let (m_at, z_at) = (matrix * dk * dv, matrix * dk);
            let mut want = match chain.empty {
                0 => Memory::of(&m[m_at..][..dk * dv], &z[z_at..][..dk]),
                _ => Memory::new(dk, dv),
            };
            for piece in chain.first_piece as usize..(chain.first_piece + chain.pieces) as usize {
                let record = (piece * HEADS + head) as u64;
                let name = format!("{what}: piece {piece}, head {head}");
                let got = p.read(z_before + record * dk as u64 * 4, dk);
                close(&format!("{name}, z"), &widen(&got), &want.z, dk, 1e-4);
                let form: Vec<T> = p.sim.read(snapshot + record * (dk * dv * 2) as u64, dk * dv);
                let scales = p.read(snapshot_scale + record * (dv / 8) as u64, dv / 32);
                let got: Vec<f64> = (widen(&form).iter().enumerate())
                    .map(|(i, x)| x / f64::from(scales[i % dv / 32]))
                    .collect();
                close(&format!("{name}, snapshot"), &got, &want.m, dv, 1.5 * tolerance);

                let (full, empty) = (p.pieces[piece].full != 0, p.pieces[piece].empty != 0);
                let (s, v) = p.segment(piece, head);
                if let (Some(policy), Some((g, g_scale, _))) = (delta, &transitions) {
                    let got: Vec<T> = p.sim.read(g + record * (dk * dk * 2) as u64, dk * dk);
                    let scales = p.read(g_scale + record * (dk / 4) as u64, dk / 16);
                    if full && !empty {
                        let got: Vec<f64> = (widen(&got).iter().enumerate())
                            .map(|(i, x)| x * f64::from(scales[i / dk / 16]))
                            .collect();
                        let want = transition(&s, &want.z, policy);
                        close(&format!("{name}, G"), &got, &want, dk, tolerance);
                    } else {
                        let untouched = narrow::<T>(&vec![CANARY; dk * dk]);
                        assert!(bits(&got) == bits(&untouched), "{name}: G");
                        assert!(scales.iter().all(|&x| x == CANARY), "{name}: scale of G");
                    }
                }
                if full {
                    want.write(&s, &v, delta.filter(|_| !empty));
                }
            }
            let name = format!("{what}: slot {}, head {head}", chain.slot);
            let got = p.read(z_end + z_at as u64 * 4, dk);
            close(&format!("{name}, z"), &widen(&got), &want.z, dk, 1e-4);
            let got = p.read(end + m_at as u64 * 4, dk * dv);
            close(&format!("{name}, M"), &widen(&got), &want.m, dv, tolerance);
            let form: Vec<T> = p.sim.read(end_snapshot + m_at as u64 * 2, dk * dv);
            let scales = p.read(end_scale + (matrix * dv / 8) as u64, dv / 32);
            check_snapshot(&format!("{name}, snapshot"), &got, dv, &form, &scales);
        }
    }
}

fn mixed_phases<T: Element>(index: usize, n: usize, schedules: u32) {
    let (dk, dv) = DIMS[index];
    let delta = (index % 4 != 3).then(|| POLICIES[index % 3]);
    // Partial tiles, several splits, a split without tokens.
    let splits = [(2, 128), (3, 64), (4, 64), (1, 192)][index % 4];
    let problem = problem(dk, dv, n, delta.is_some(), delta.unwrap_or(EXACT));
    let mut p = Prefill::<T>::new((dk, dv), problem, splits, NORMAL, mixed(n));
    p.sim = p.sim.schedules(schedules);
    phases(p, delta, NORMAL);
}

#[test]
fn phases_agree_with_the_model_in_bf16() {
    for index in 0..DIMS.len() {
        mixed_phases::<bf16>(index, 150, 1);
    }
}

#[test]
fn phases_agree_with_the_model_in_f16() {
    for index in 0..DIMS.len() {
        mixed_phases::<f16>(index, 150, 1);
    }
}

#[test]
fn phases_do_not_depend_on_the_order_of_blocks_and_copies() {
    mixed_phases::<bf16>(0, 100, 4);
    mixed_phases::<f16>(1, 100, 4);
    mixed_phases::<bf16>(2, 70, 4);
}

/// Values and keys far from 1 keep their relative precision.
#[test]
fn sizes_do_not_matter() {
    fn run<T: Element>(scale: Scale) {
        let problem = problem(64, 64, 100, true, EXACT);
        let p = Prefill::<T>::new((64, 64), problem, (1, 128), scale, mixed(100));
        phases(p, Some(EXACT), scale);
    }
    for (k, v) in SIZES {
        run::<f16>(Scale { k, v });
        run::<bf16>(Scale { k, v });
    }
}

/// A run of `count` full pieces of a new sequence.
fn long_run(n: usize, count: usize) -> (Vec<InfiniPiece>, Vec<InfiniChain>) {
    let mut pieces = Vec::new();
    let parts: Vec<_> = (0..count).map(|i| (i * n, n, 0)).collect();
    let chains = vec![chain(&mut pieces, n, (0, 0, true), &parts)];
    (pieces, chains)
}

/// M after thirty segments against the exact operator, whose σ is not rounded.
fn drift<T: Element>(delta: bool) {
    const N: usize = 64;
    let problem = problem(64, 64, N, delta, EXACT);
    let mut p = Prefill::<T>::new((64, 64), problem, (1, 64), NORMAL, long_run(N, 30));
    let (b, sums, _) = p.segment_state(true);
    let nan = p.sim.upload("start", &vec![f32::NAN; SLOTS * HEADS * 64 * 64]);
    let (z_end, end) =
        (p.filled("z_end", SLOTS * HEADS * 64), p.filled("end", SLOTS * HEADS * 4096));
    let (z, _) = p.normaliser_scan(sums, nan, z_end);
    let (g, g_scale) = if delta {
        let (g, scale, _) = p.segment_transition(z);
        (g, scale)
    } else {
        (0, 0)
    };
    p.memory_scan(InfiniMemoryScan {
        start_kind: INFINI_START_MEMORY as i32,
        b,
        g,
        g_scale,
        start: nan,
        end,
        columns: 64,
        ..InfiniMemoryScan::default()
    });
    for head in 0..HEADS {
        let mut want = Memory::new(64, 64);
        for piece in 0..30 {
            let k = p.k.rows(0, piece * N, N, head);
            let s: Vec<f64> = k.iter().map(|&x| sigma(x)).collect();
            let v = p.v.rows(0, piece * N, N, head);
            want.write(&s, &v, (delta && piece > 0).then_some(EXACT));
        }
        let got = p.read(end + head as u64 * 4096 * 4, 4096);
        let what = format!("{}, delta {delta}, head {head}", T::DTYPE);
        close(&what, &widen(&got), &want.m, 64, memory_tolerance(T::DTYPE));
    }
}

#[test]
fn memory_is_precise_after_thirty_segments() {
    drift::<bf16>(true);
    drift::<bf16>(false);
    drift::<f16>(true);
    drift::<f16>(false);
}

/// The affine map of a run of segments, M to A M + B: A from the identity, B from zero.
#[test]
fn maps_of_runs_agree_with_the_model() {
    map::<bf16>(64, 128);
    map::<f16>(128, 64);
    map::<bf16>(96, 96);
}

fn map<T: Element>(dk: usize, dv: usize) {
    const N: usize = 80;
    let mut pieces = Vec::new();
    let parts = [(0, N, 0), (N, N, 0), (2 * N, N, 0)];
    let chains = vec![chain(&mut pieces, N, (1, 0, false), &parts)];
    let problem = problem(dk, dv, N, true, EXACT);
    let mut p = Prefill::<T>::new((dk, dv), problem, (2, 64), NORMAL, (pieces, chains));
    let (_, z) = start(&p, &mut Random::new(5), NORMAL);
    let (b, sums, _) = p.segment_state(true);
    let (z_start, z_end) = (p.sim.upload("z_start", &z), p.filled("z_end", SLOTS * HEADS * dk));
    let (z_before, _) = p.normaliser_scan(sums, z_start, z_end);
    let (g, g_scale, _) = p.segment_transition(z_before);
    // Column sums alone are the same, and need no values.
    let (_, alone, _) = p.segment_state(false);
    let count = p.records() * p.splits * dk;
    assert_eq!(p.read(alone, count), p.read(sums, count));

    let ends = [dk, dv].map(|columns| p.filled("end", SLOTS * HEADS * dk * columns));
    let scan = InfiniMemoryScan { g, g_scale, ..InfiniMemoryScan::default() };
    p.memory_scan(InfiniMemoryScan {
        start_kind: INFINI_START_IDENTITY as i32,
        end: ends[0],
        columns: dk as i64,
        ..scan
    });
    p.memory_scan(InfiniMemoryScan {
        start_kind: INFINI_START_ZERO as i32,
        b,
        end: ends[1],
        columns: dv as i64,
        ..scan
    });
    for head in 0..HEADS {
        let matrix = HEADS + head;
        let z = &z[matrix * dk..][..dk];
        let identity: Vec<f32> =
            (0..dk * dk).map(|i| if i % (dk + 1) == 0 { 1.0 } else { 0.0 }).collect();
        let mut a = Memory::of(&identity, z);
        let mut b = Memory::of(&vec![0.0; dk * dv], z);
        for piece in 0..3 {
            let (s, v) = p.segment(piece, head);
            a.write(&s, &vec![0.0; N * dk], Some(EXACT));
            b.write(&s, &v, Some(EXACT));
        }
        for (name, want, end, columns) in [("A", a.m, ends[0], dk), ("B", b.m, ends[1], dv)] {
            let got = p.read(end + (matrix * dk * columns * 4) as u64, dk * columns);
            let what = format!("{} {dk}x{dv}: {name}, head {head}", T::DTYPE);
            close(&what, &widen(&got), &want, columns, memory_tolerance(T::DTYPE));
        }
    }
}

/// Every byte is moved once, but for the operands that several slices of columns share.
#[test]
fn phases_move_what_they_must() {
    for (dk, dv) in DIMS {
        const N: usize = 256;
        let problem = problem(dk, dv, N, true, EXACT);
        let mut p = Prefill::<bf16>::new((dk, dv), problem, (1, N), NORMAL, long_run(N, 3));
        let slices =
            |columns: usize| columns / kernel("segment_state", bf16::DTYPE, dk, dv).columns;
        let (b, sums, report) = p.segment_state(true);
        check_cost(&format!("segment_state {dk}x{dv}"), &report, &[("k", slices(dv))]);
        let nan = p.sim.upload("start", &vec![f32::NAN; SLOTS * HEADS * dk * dv]);
        let z_end = p.filled("z_end", SLOTS * HEADS * dk);
        let (z, _) = p.normaliser_scan(sums, nan, z_end);
        let (g, g_scale, report) = p.segment_transition(z);
        let slices = dk / kernel("segment_transition", bf16::DTYPE, dk, 0).columns;
        let shared = [("k", slices), ("z", 2 * slices)];
        check_cost(&format!("segment_transition {dk}"), &report, &shared);
        let snapshot = p.sim.uninitialised::<bf16>("snapshot", p.records() * dk * dv);
        let snapshot_scale = p.sim.uninitialised::<f32>("snapshot_scale", p.records() * dv / 32);
        let end = p.filled("end", SLOTS * HEADS * dk * dv);
        let report = p.memory_scan(InfiniMemoryScan {
            start_kind: INFINI_START_MEMORY as i32,
            b,
            g,
            g_scale,
            start: nan,
            end,
            snapshot,
            snapshot_scale,
            columns: dv as i64,
            ..InfiniMemoryScan::default()
        });
        check_cost(&format!("memory_scan {dk}x{dv}"), &report, &[("g", dv / 32)]);
    }
}
