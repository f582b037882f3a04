//! Plans of the CUDA backend, without a device: launches, parameters, workspaces.

use crate::common::plans::{Step, base, call, f32s, launches, mirror, params, problem, run, table};
use bytemuck::pod_read_unaligned as read;
use infini_attn::Problem;
use infini_attn::Update;
use infini_attn::cuda::params::*;
use infini_attn::cuda::{
    Call, DecodeOptions, DeviceRope, Mirror, Operand, Plan, PrefillOptions, Runs, StateLayout,
    Target, plan_decode, plan_prefill, plan_segment,
};

/// Any device of so many multiprocessors.
fn of(multiprocessors: usize) -> Target {
    Target { multiprocessors, ..Target::default() }
}

#[test]
fn phases_of_a_prefill() {
    let p = problem(|b| b);
    let state = mirror(&p, 1);
    let plan = plan_prefill(&p, &call(&p, &[1, 300]), &state, &PrefillOptions::default());
    let plan = plan.expect("valid");
    let expected: [(&str, [u32; 3]); 6] = [
        ("segment_state", [1, 2, 3]),
        ("normaliser_scan", [2, 1, 1]),
        ("segment_transition", [1, 2, 3]),
        ("memory_scan", [4, 2, 1]),
        ("segment_attention", [3 * 4, 1, 1]),
        ("append", [16, 2, 1]),
    ];
    assert_eq!(launches(&plan), expected, "{plan}");
    let run: InfiniAppend = params(&plan, "append", 0);
    let pieces = table::<InfiniPiece>(&plan, run.run.pieces, 3);
    let shown: Vec<_> =
        pieces.iter().map(|x| (x.first, x.position, x.len, x.cached, x.full, x.empty)).collect();
    let expected = [(0, 0, 128, 0, 1, 1), (128, 128, 128, 0, 1, 0), (256, 256, 44, 0, 0, 0)];
    assert_eq!(shown, expected);
    let [chain] = table::<InfiniChain>(&plan, run.run.chains, 1)[..] else { panic!("one") };
    assert_eq!((chain.first_piece, chain.pieces, chain.empty, chain.ends), (0, 3, 1, 1));
    assert_eq!((chain.tokens, chain.committed), (300, 256));
}

#[test]
fn phases_that_find_nothing_to_do_are_not_launched() {
    let names = |p: &Problem, call: Call<'_>| {
        let slots = 2;
        let plan = plan_prefill(p, &call, &mirror(p, slots), &PrefillOptions::default());
        let plan = plan.expect("valid");
        run(&plan); // its requirements suffice
        launches(&plan).into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    let delta = problem(|b| b);
    let linear = problem(|b| b.update(Update::Linear));
    let scans = ["normaliser_scan", "memory_scan", "segment_attention", "append"];
    assert_eq!(names(&delta, call(&delta, &[2, 127])), scans, "no full segment");
    let first = [&["segment_state"][..], &scans].concat();
    assert_eq!(names(&delta, call(&delta, &[2, 128])), first, "no segment finds a memory");
    assert_eq!(names(&linear, call(&linear, &[2, 300])), first, "linear");
    let rope = DeviceRope::new(f32s(&[512, 16]), f32s(&[512, 16]));
    let rotated = [&["rotate_keys"][..], &scans].concat();
    assert_eq!(names(&delta, call(&delta, &[2, 5]).rope(rope)), rotated);
    let padded = [&scans[..], &["clear_padding"]].concat();
    assert_eq!(names(&delta, call(&delta, &[2, 5]).seq_lens(&[5, 4])), padded);
    assert_eq!(names(&delta, call(&delta, &[2, 5]).seq_lens(&[5, 5])), scans, "no padding");
    assert_eq!(names(&delta, call(&delta, &[2, 5]).seq_lens(&[0, 0])), ["clear_padding"]);
    let ranges = [1..5, 0..5];
    assert_eq!(names(&delta, call(&delta, &[2, 5]).seq_ranges(&ranges)), padded);
    assert_eq!(names(&delta, call(&delta, &[2, 5]).seq_ranges(&[0..5, 0..5])), scans);
    let none: [&str; 0] = [];
    assert_eq!(names(&delta, call(&delta, &[2, 0])), none);
    assert_eq!(names(&delta, call(&delta, &[0]).cu_seqlens(&[0, 0, 0])), none);
    assert_eq!(names(&delta, call(&delta, &[0, 7]).slots(&[])), none);
}

#[test]
fn an_open_segment_goes_first() {
    let p = problem(|b| b);
    let mut state = mirror(&p, 3);
    let options = PrefillOptions::default();
    let cu = [0, 100, 100, 350];
    let first = plan_prefill(&p, &call(&p, &[350]).cu_seqlens(&cu), &state, &options).expect("a");
    state.advance(&first).expect("as planned");
    let counters =
        |s: &Mirror| [0, 1, 2].map(|slot| (s.tokens(slot), s.committed(slot), s.open_len(slot)));
    assert_eq!(counters(&state), [(100, 0, 100), (0, 0, 0), (250, 128, 122)]);
    let slots = [2, 0];
    let plan = plan_prefill(&p, &call(&p, &[2, 30]).slots(&slots), &state, &options).expect("b");
    let run: InfiniSegmentState = params(&plan, "segment_state", 0);
    let pieces = table::<InfiniPiece>(&plan, run.run.pieces, 4);
    let shown: Vec<_> = (pieces.iter())
        .map(|x| (x.slot, x.batch, x.first, x.position, [x.len, x.cached, x.full, x.empty]))
        .collect();
    let expected = [
        (2, 0, 0, 250, [6, 122, 1, 0]),
        (2, 0, 6, 256, [24, 0, 0, 0]),
        (0, 1, 0, 100, [28, 100, 1, 1]),
        (0, 1, 28, 128, [2, 0, 0, 0]),
    ];
    assert_eq!(shown, expected);
    state.advance(&plan).expect("as planned");
    assert_eq!(counters(&state), [(130, 128, 2), (0, 0, 0), (280, 256, 24)]);
    let error = state.advance(&plan).expect_err("a prefill runs once").to_string();
    assert!(error.starts_with("state (slot 2): 280 tokens seen"), "{error}");
    assert_eq!(counters(&state), [(130, 128, 2), (0, 0, 0), (280, 256, 24)]);
}

/// The pieces of every run, with the chains' (slot, pieces, empty, ends).
type Cut = Vec<(Vec<InfiniPiece>, Vec<[i32; 4]>)>;

fn runs(plan: &Plan) -> Cut {
    let count = launches(plan).iter().filter(|(name, _)| *name == "memory_scan").count();
    (0..count)
        .map(|n| {
            let scan: InfiniMemoryScan = params(plan, "memory_scan", n);
            let pieces = table(plan, scan.run.pieces, scan.run.piece_count as usize);
            let chains: Vec<InfiniChain> =
                table(plan, scan.run.chains, scan.run.chain_count as usize);
            (pieces, chains.iter().map(|c| [c.slot, c.pieces, c.empty, c.ends]).collect())
        })
        .collect()
}

#[test]
fn runs_are_cut_by_the_budget() {
    let p = problem(|b| b);
    let state = mirror(&p, 2);
    let lens = [400, 300];
    let plan = |workspace_bytes| {
        let options = PrefillOptions { workspace_bytes, ..PrefillOptions::default() };
        let call = call(&p, &[2, 400]).seq_lens(&lens);
        plan_prefill(&p, &call, &state, &options).expect("valid")
    };
    let whole = runs(&plan(1 << 30));
    assert_eq!(whole.len(), 1);
    assert_eq!(whole[0].1, [[0, 4, 1, 1], [1, 3, 1, 1]]);
    let all = |runs: &Cut| -> Vec<u8> {
        runs.iter().flat_map(|(pieces, _)| bytemuck::cast_slice(pieces).to_vec()).collect()
    };
    for bytes in [0, 1, 1 << 18, 1 << 19, 1 << 20] {
        let plan = plan(bytes);
        let cut = runs(&plan);
        assert_eq!(all(&cut), all(&whole), "the same pieces, in the same order");
        assert!(plan.workspace_bytes() <= bytes.max(1 << 18) + 4096, "{bytes}: {plan}");
        for (slot, pieces) in [(0, 4), (1, 3)] {
            let mine = || cut.iter().flat_map(|(_, c)| c).filter(move |c| c[0] == slot);
            assert_eq!(mine().map(|c| c[1]).sum::<i32>(), pieces);
            let last = mine().count() - 1;
            for (i, c) in mine().enumerate() {
                assert_eq!([c[2], c[3]], [i32::from(i == 0), i32::from(i == last)], "empty, ends");
            }
        }
        let appends = launches(&plan).iter().filter(|(name, _)| *name == "append").count();
        let ends = cut.iter().filter(|(_, chains)| chains.iter().any(|c| c[3] == 1)).count();
        assert_eq!(appends, ends);
    }
    assert_eq!(runs(&plan(1)).len(), 7);
    assert_eq!(runs(&plan(1))[1].1, [[0, 1, 0, 0]], "continues, memory filled");
}

#[test]
fn splits_depend_on_the_sequence_alone() {
    let splits = |p: &Problem, lead: &[usize; 2], multiprocessors| {
        let options = PrefillOptions { target: of(multiprocessors), workspace_bytes: 1 << 40 };
        let state = mirror(p, lead[0]);
        let plan = plan_prefill(p, &call(p, lead), &state, &options).expect("valid");
        let s: InfiniSegmentState = params(&plan, "segment_state", 0);
        assert_eq!(s.split_len % 64, 0);
        assert!(s.splits * s.split_len >= s.problem.segment_len);
        assert!((s.splits - 1) * s.split_len < s.problem.segment_len, "no empty split");
        (s.splits, s.split_len)
    };
    let p = problem(|b| b.segment_len(2048).value_dim(64));
    for sm in [1, 16, 132, 1000] {
        let alone = splits(&p, &[1, 2048], sm);
        for lead in [[1, 20_000], [7, 2048], [40, 5000]] {
            assert_eq!(splits(&p, &lead, sm), alone);
        }
        let more_heads = problem(|b| b.heads(64).kv_heads(32).segment_len(2048).value_dim(64));
        assert_eq!(splits(&more_heads, &[1, 2048], sm), alone);
    }
    assert_eq!(splits(&p, &[1, 2048], 132), (2, 1024));
    assert_eq!(splits(&p, &[1, 2048], 1), (1, 2048));
    assert_eq!(splits(&p, &[1, 2048], 100_000), (16, 128));
    let odd = problem(|b| b.segment_len(1000).value_dim(64));
    assert_eq!(splits(&odd, &[1, 1000], 132), (2, 512));
}

/// Byte ranges of every array that a launch of prefill or decode touches in state and workspace.
fn arrays(p: &Problem, slots: usize, step: &Step) -> Vec<(u64, u64)> {
    let Step::Launch { operation, params, .. } = step else { return Vec::new() };
    let (h, dk, dv) = (p.kv_heads(), p.key_dim(), p.value_dim());
    let mut found = Vec::new();
    let mut add = |address: u64, elements: usize, size: usize| {
        if address != 0 {
            found.push((address, (elements * size) as u64));
        }
    };
    let tables = |run: &InfiniRun, add: &mut dyn FnMut(u64, usize, usize)| {
        add(run.pieces, run.piece_count as usize, size_of::<InfiniPiece>());
        add(run.chains, run.chain_count as usize, size_of::<InfiniChain>());
    };
    match *operation {
        "rotate_keys" => {
            let x: InfiniRotateKeys = read(params);
            tables(&x.run, &mut add);
            add(x.status, 1, 4);
            add(x.rotated, x.run.piece_count as usize * h * p.segment_len() * dk, 2);
        }
        "segment_state" => {
            let x: InfiniSegmentState = read(params);
            tables(&x.run, &mut add);
            let records = x.run.piece_count as usize * h * x.splits as usize;
            add(x.b, records * dk * dv, 4);
            add(x.sums, records * dk, 4);
        }
        "normaliser_scan" => {
            let x: InfiniNormaliserScan = read(params);
            add(x.z, x.run.piece_count as usize * h * dk, 4);
            add(x.start, slots * h * dk, 4);
            assert_eq!(x.end, x.start);
        }
        "segment_transition" => {
            let x: InfiniSegmentTransition = read(params);
            add(x.g, x.run.piece_count as usize * h * dk * dk, 2);
            add(x.g_scale, x.run.piece_count as usize * h, 4);
        }
        "memory_scan" => {
            let x: InfiniMemoryScan = read(params);
            add(x.start, slots * h * dk * dv, 4);
            assert_eq!(x.end, x.start);
            add(x.snapshot, x.run.piece_count as usize * h * dk * dv, 2);
            add(x.snapshot_scale, x.run.piece_count as usize * h * dv / 32, 4);
            add(x.end_snapshot, slots * h * dk * dv, 2);
            add(x.end_snapshot_scale, slots * h * dv / 32, 4);
        }
        "append" => {
            let x: InfiniAppend = read(params);
            add(x.state.open_k, slots * h * p.segment_len() * dk, 2);
            add(x.state.open_k_rotated, slots * h * p.segment_len() * dk, 2);
            add(x.state.open_v, slots * h * p.segment_len() * dv, 2);
            add(x.state.counters, slots * size_of::<InfiniCounters>(), 1);
            add(x.state.status, 1, 4);
            assert_eq!(x.state.slots, slots as i64);
        }
        "decode" => {
            let x: InfiniDecode = read(params);
            let tiles = (x.row_tiles * (x.splits + 1)) as usize * x.sequences.count as usize * h;
            add(x.exchange.partials, tiles * 32 * (dv + 2), 4);
            add(x.exchange.head_tickets, slots * p.heads(), 4);
            add(x.exchange.sequence_tickets, slots, 4);
        }
        "commit" => {
            let x: InfiniCommit = read(params);
            let chunks = x.chunks as usize * x.sequences.count as usize * h;
            add(x.exchange.partials, chunks * (dk * dv + dk), 4);
        }
        "segment" => {
            let x: InfiniSegment = read(params);
            let chunks = x.chunks as usize * x.sequences.count as usize * h;
            add(x.exchange.partials, chunks * (dk * dv + dk), 4);
            add(x.exchange.head_tickets, slots * p.heads(), 4);
        }
        _ => {}
    }
    found
}

fn entry((at, len, table): (u64, u64, bool)) -> (u64, std::cmp::Reverse<u64>, bool) {
    (at, std::cmp::Reverse(len), table)
}

/// Every array lies inside its allocation, at a multiple of 256 bytes unless it is part of a table,
/// and no two of them overlap.
#[track_caller]
fn assert_laid_out(p: &Problem, slots: usize, plan: &Plan) {
    let mut found: Vec<(u64, std::cmp::Reverse<u64>, bool)> = Vec::new();
    for step in run(plan) {
        found.extend(arrays(p, slots, &step).into_iter().map(|(at, n)| (at, n, false)).map(entry));
        if let Step::Copy { to, from } = step {
            found.push(entry((to, from.len() as u64, true)));
        }
    }
    found.sort();
    // A run's part lies inside the copied table; all else is the same array, for fewer pieces
    // perhaps, or apart.
    let mut ends: Vec<(u64, u64, bool)> = Vec::new();
    for (start, std::cmp::Reverse(len), is_table) in found {
        let end = start + len;
        match ends.last() {
            Some(&(from, to, table)) if start < to => {
                let same = start == from && end <= to;
                let overlap = format!("{start:#x} to {end:#x} overlaps {from:#x} to {to:#x}");
                assert!(same || table && end <= to, "{overlap}");
            }
            _ => {
                assert_eq!(start % 256, 0, "{start:#x}");
                ends.push((start, end, is_table));
            }
        }
    }
    let inside = |operand, bytes: u64| {
        let all = base(operand)..=base(operand) + bytes;
        ends.iter().filter(|(start, end, _)| all.contains(start) && all.contains(end)).count()
    };
    let state = StateLayout::new(p, slots, true).expect("supported").bytes();
    let both = inside(Operand::State, state) + inside(Operand::Workspace, plan.workspace_bytes());
    assert_eq!(both, ends.len(), "{plan}");
}

#[test]
fn workspaces_and_states_hold_their_arrays_and_no_two_overlap() {
    let positions: Vec<i64> = (0..700).collect();
    let rope = || DeviceRope::new(f32s(&[4096, 32]), f32s(&[4096, 32]));
    let mut count = 0;
    for (dk, dv) in [(64, 64), (96, 96), (192, 128), (256, 256)] {
        for (update, n) in [(Update::Delta, 64), (Update::Linear, 200), (Update::Delta, 300)] {
            let p = problem(|b| b.key_dim(dk).value_dim(dv).update(update).segment_len(n));
            let state = mirror(&p, 3);
            for workspace_bytes in [1, 3 << 20, 1 << 30] {
                let options = PrefillOptions { workspace_bytes, target: of(1000) };
                let base = call(&p, &[3, 700]);
                for call in [base, base.rope(rope()), base.rope(rope().positions(&positions))] {
                    let plan = plan_prefill(&p, &call, &state, &options).expect("valid");
                    assert_laid_out(&p, 3, &plan);
                    count += 1;
                }
            }
            for runs in [Runs::Once, Runs::Replay, Runs::Table] {
                let options =
                    DecodeOptions { runs, target: Target { split_len: 64, ..Target::DEFAULT } };
                let call = call(&p, &[3, 16]).rope(rope().positions(&positions[..48]));
                let plan = plan_decode(&p, &call, &state, &options).expect("valid");
                assert_laid_out(&p, 3, &plan);
            }
            let plan =
                plan_segment(&p, &call(&p, &[3, n]), &state, &Target::default()).expect("valid");
            assert_laid_out(&p, 3, &plan);
        }
    }
    assert_eq!(count, 4 * 3 * 9);
}

#[test]
fn sizes_beyond_32_bits() {
    let p = problem(|b| b.heads(32).kv_heads(8).key_dim(256).value_dim(256).segment_len(2048));
    let slots = 4096;
    let layout = StateLayout::new(&p, slots, true).expect("fits");
    let per_slot = 8 * (256 * 256 * 6 + 256 * 4 + 8 * 4 + 3 * 2048 * 256 * 2) + 32 + 32 * 4 + 4;
    let parts = slots as u64 * per_slot + 4;
    assert!((parts..parts + 11 * 256).contains(&layout.bytes()), "{} {parts}", layout.bytes());
    let state = layout.params(1 << 40);
    assert_eq!(state.normalizer - state.memory, slots as u64 * 8 * 256 * 256 * 4);
    let offsets = layout.params(0);
    assert_eq!((offsets.memory, offsets.snapshot), (0, state.snapshot - state.memory));
    let most = 1 << 24;
    let huge = problem(|b| b.heads(most).kv_heads(1).segment_len(most));
    let error = StateLayout::new(&huge, 1 << 30, true).expect_err("too large").to_string();
    assert!(error.starts_with("bytes of state: "), "{error}");
    let error = StateLayout::new(&p, 1 << 31, true).expect_err("too many").to_string();
    assert_eq!(error, "slots: 2147483648 given, at most 2147483647 expected");

    // A million tokens at once: B alone takes more than 4 GiB.
    let options = PrefillOptions { workspace_bytes: 1 << 40, ..PrefillOptions::default() };
    let plan = plan_prefill(&p, &call(&p, &[1, 1 << 20]), &mirror(&p, 1), &options).expect("fits");
    let scan: InfiniMemoryScan = params(&plan, "memory_scan", 0);
    let pieces = 512;
    let record = 8 * (2 * (256 * 256 * 4 + 256 * 4));
    assert!(scan.splits == 1 && plan.workspace_bytes() > pieces * record / 2, "{plan}");
    let default = PrefillOptions::default();
    let cut = plan_prefill(&p, &call(&p, &[1, 1 << 20]), &mirror(&p, 1), &default).expect("fits");
    assert!(cut.workspace_bytes() < (256 << 20) + 64 * 1024, "{cut}");
    assert!(runs(&cut).len() > 4);
}
