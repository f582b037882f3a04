//! Plans of segment, decode, flush and states, without a device.

use crate::common::plans::{
    Step, base, call, f32s, launches, mirror, params, problem, run, table, tensor,
};
use infini_attn::cuda::params::*;
use infini_attn::cuda::{
    Arch, Call, DecodeOptions, DeviceRope, DeviceTensor, Mirror, Operand, Plan, PrefillOptions,
    Runs, StateLayout, Target, find, plan_decode, plan_flush, plan_prefill, plan_segment,
};
use infini_attn::{DType, Denominator, EmptyMemory, Problem, Update};

/// A mirror whose slots have seen so many tokens.
fn after(p: &Problem, tokens: &[i32]) -> Mirror {
    let mut state = mirror(p, tokens.len());
    let most = tokens.iter().copied().max().unwrap_or(0) as usize;
    let call = call(p, &[tokens.len(), most]).seq_lens(tokens);
    let plan = plan_prefill(p, &call, &state, &PrefillOptions::default()).expect("valid");
    state.advance(&plan).expect("as planned");
    state
}

fn decode(p: &Problem, call: &Call<'_>, state: &Mirror, runs: Runs) -> Plan {
    plan_decode(
        p,
        call,
        state,
        &DecodeOptions { runs, target: Target { split_len: 64, ..Target::DEFAULT } },
    )
    .expect("valid")
}

#[test]
fn segments_in_one_launch() {
    let p = problem(|b| b.segment_len(1024));
    let state = after(&p, &[0, 24, 1000]);
    let lens = [1000, 1000, 0];
    let plan = plan_segment(&p, &call(&p, &[3, 1000]).seq_lens(&lens), &state, &Target::default())
        .expect("valid");
    let segment: InfiniSegment = params(&plan, "segment", 0);
    // Tiles of 128 rows; parts of at least 170 tokens, so 6 of 192; 64 of 128 columns per block.
    assert_eq!((segment.tiles, segment.chunks, segment.chunk_len), (8, 6, 192));
    let blocks = 8 * 4 + 6 * 2 * 2;
    let expected = [("segment", [blocks, 3, 1]), ("clear_padding", [125, 4, 3])];
    assert_eq!(launches(&plan), expected);
    assert_eq!(plan.workspace_bytes(), 3 * 2 * 6 * (64 * 128 + 64) * 4);
    let s = &segment.sequences;
    assert_eq!((s.table, s.count, s.in_line, s.tokens, s.max_len), (0, 3, 1, 1000, 1000));
    let shown = s.inline_sequences.map(|s| (s.first, s.slot, s.batch, s.len));
    assert_eq!(shown[..4], [(0, 0, 0, 1000), (0, 1, 1, 1000), (0, 2, 2, 0), (0, 0, 0, 0)]);

    let a_mem = tensor(&p, &[3, 24], 4, 128);
    let plan = plan_segment(&p, &call(&p, &[3, 24]).a_mem(a_mem), &state, &Target::default())
        .expect("valid");
    let segment: InfiniSegment = params(&plan, "segment", 0);
    assert_eq!((segment.tiles, segment.chunks, segment.sequences.in_line), (1, 6, 0));
    assert_eq!(launches(&plan), [("segment", [2 * 4 + 24, 3, 1])], "twice the attention");
    let plan = plan_segment(&p, &call(&p, &[3, 23]), &state, &Target::default()).expect("valid");
    assert_eq!(launches(&plan), [("segment", [4, 3, 1])], "no segment is completed");
    assert_eq!(plan.workspace_bytes(), 0);
    assert!(plan.requirements().iter().all(|r| r.operand != Operand::Workspace));

    let error = plan_segment(&p, &call(&p, &[3, 25]), &state, &Target::default())
        .expect_err("25 > 24")
        .to_string();
    assert_eq!(
        error,
        "q (sequence 2): 25 given, 0 to 24 new tokens (the rest of the segment) expected"
    );
}

#[test]
fn many_sequences_travel_as_a_table() {
    let p = problem(|b| b.segment_len(64));
    for count in [64, 65, 300] {
        let state = mirror(&p, count);
        let cu: Vec<i32> = (0..=count as i32).map(|i| 3 * i).collect();
        let call = call(&p, &[3 * count]).cu_seqlens(&cu);
        let plan = plan_segment(&p, &call, &state, &Target::default()).expect("valid");
        let s = params::<InfiniSegment>(&plan, "segment", 0).sequences;
        assert_eq!((s.count, s.tokens, s.max_len), (count as i32, 3 * count as i32, 3));
        let all = if count > 64 {
            assert_eq!(s.in_line, 0);
            table::<InfiniSequence>(&plan, s.table, count)
        } else {
            assert_eq!((s.in_line, s.table), (1, 0));
            s.inline_sequences.to_vec()
        };
        for (i, s) in all.iter().enumerate() {
            let i = i as i32;
            assert_eq!((s.first, s.slot, s.batch, s.len), (3 * i64::from(i), i, 0, 3));
        }
    }
}

#[test]
fn decode_steps_and_commits() {
    let p = problem(|b| b.heads(48).segment_len(200));
    let state = after(&p, &[0, 190, 199]);
    let names = |plan: &Plan| launches(plan).iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let plan = decode(&p, &call(&p, &[3, 1]), &state, Runs::Once);
    assert_eq!(names(&plan), ["decode", "commit"], "slot 2 fills");
    let lens = [1, 1, 0];
    let plan = decode(&p, &call(&p, &[3, 1]).seq_lens(&lens), &state, Runs::Once);
    assert_eq!(names(&plan), ["decode", "clear_padding"], "no segment fills");
    let plan = decode(&p, &call(&p, &[3, 16]), &state, Runs::Once);
    assert_eq!(names(&plan), ["decode", "commit", "decode"]);
    // 24 heads of a group by 16 tokens are 12 tiles of 32 rows; 200 keys are 4 splits of 64, and
    // there is one block more for the retrieval.
    let first: InfiniDecode = params(&plan, "decode", 0);
    assert_eq!((first.row_tiles, first.splits, first.split_len, first.step), (12, 4, 64, 0));
    let second: InfiniDecode = params(&plan, "decode", 1);
    assert_eq!(second.step, 1);
    assert_eq!(launches(&plan)[0].1, [60, 2, 3]);
    let commit: InfiniCommit = params(&plan, "commit", 0);
    // At least 170 tokens per chunk.
    assert_eq!((commit.chunks, commit.chunk_len, commit.flush), (2, 192, 0));
    assert_eq!(launches(&plan)[1], ("commit", [2, 2, 3]));
    let exchange = plan.state().expect("of states").params(base(Operand::State));
    assert!(first.exchange.head_tickets > exchange.status);
    assert_ne!(first.exchange.partials, commit.exchange.partials);

    // As many splits as one run needs; any number of runs may reach the segment's end.
    let state = after(&p, &[0, 63, 64]);
    for (runs, splits) in [(Runs::Once, 2), (Runs::Replay, 4), (Runs::Table, 4)] {
        let plan = decode(&p, &call(&p, &[3, 1]), &state, runs);
        assert_eq!(params::<InfiniDecode>(&plan, "decode", 0).splits, splits, "{runs:?}");
    }
    // Few multiprocessors are filled by the blocks of few sequences at a time.
    for (multiprocessors, at_a_time) in [(1, 1), (5, 2), (132, 3)] {
        let target = Target { multiprocessors, ..Target::DEFAULT };
        let options = DecodeOptions { runs: Runs::Replay, target };
        let plan = plan_decode(&p, &call(&p, &[3, 1]), &state, &options).expect("valid");
        assert_eq!(launches(&plan)[1], ("commit", [2, 2, at_a_time]));
    }

    let short = problem(|b| b.segment_len(4));
    for (tokens, steps) in [(1, 1), (2, 2), (5, 2), (6, 3), (16, 5)] {
        for runs in [Runs::Replay, Runs::Table] {
            let plan = decode(&short, &call(&short, &[1, tokens]), &mirror(&short, 1), runs);
            assert_eq!(names(&plan), ["decode", "commit"].repeat(steps), "{tokens} tokens");
        }
        let plan = decode(&short, &call(&short, &[1, tokens]), &mirror(&short, 1), Runs::Once);
        let expected = 2 * (tokens / 4) + usize::from(tokens % 4 > 0);
        assert_eq!(names(&plan).len(), expected, "{tokens} tokens from an empty segment");
    }
    for runs in [Runs::Once, Runs::Replay, Runs::Table] {
        assert!(run(&decode(&short, &call(&short, &[1, 0]), &mirror(&short, 1), runs)).is_empty());
    }
}

#[test]
fn decode_with_a_table_of_the_caller() {
    let p = problem(|b| b);
    let state = mirror(&p, 4);
    let (slots, lens) = ([3, 1], [0, 2]);
    let call = call(&p, &[2, 3]).slots(&slots).seq_lens(&lens);
    let plan = decode(&p, &call, &state, Runs::Table);
    let s = params::<InfiniDecode>(&plan, "decode", 0).sequences;
    assert_eq!((s.table, s.count, s.max_len), (base(Operand::Sequences), 2, 3));
    let need = plan.requirements().iter().find(|r| r.operand == Operand::Sequences);
    let need = need.expect("the table is needed");
    assert_eq!((need.align, need.before, need.after), (8, 0, 2 * 24));
    assert_eq!(params::<InfiniCommit>(&plan, "commit", 0).sequences.table, s.table);
    assert_eq!(params::<InfiniClearPadding>(&plan, "clear_padding", 0).sequences.table, s.table);
}

#[test]
fn flush_takes_open_segments() {
    let p = problem(|b| b.segment_len(1024));
    let mut state = after(&p, &[1024, 300, 7, 1030]);
    let plan = plan_flush(&p, &state, &[3, 0, 1]).expect("valid");
    // Chunks of a quarter of N, as many as the longest of the two open segments needs.
    assert_eq!(launches(&plan), [("commit", [2, 2, 2])]);
    let commit: InfiniCommit = params(&plan, "commit", 0);
    assert_eq!((commit.chunks, commit.chunk_len, commit.flush), (2, 256, 1));
    let slots = commit.sequences.inline_sequences.map(|s| s.slot);
    assert_eq!((commit.sequences.count, slots[0], slots[1]), (2, 3, 1));
    state.advance(&plan).expect("as planned");
    let open = [0, 1, 2, 3].map(|slot| (state.committed(slot), state.open_len(slot)));
    assert_eq!(open, [(1024, 0), (300, 0), (0, 7), (1030, 0)]);
    assert!(run(&plan_flush(&p, &state, &[0, 1]).expect("valid")).is_empty(), "nothing is open");
}

#[test]
fn states_begin_empty_with_scales_of_one() {
    let p = problem(|b| b);
    let layout = StateLayout::new(&p, 40_000, true).expect("supported");
    let steps = run(&layout.plan_init().expect("valid"));
    let at = base(Operand::State);
    assert_eq!(steps[0], Step::Fill { to: at, bytes: layout.bytes(), value: 0 });
    // 80 000 memories, 65 535 to a launch.
    let snapshots: Vec<InfiniSnapshot> = (steps[1..].iter())
        .map(|step| match step {
            Step::Launch { operation: "snapshot", params, .. } => {
                bytemuck::pod_read_unaligned(params)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let state = layout.params(at);
    let memories = 65_535;
    assert_eq!(snapshots.iter().map(|s| s.matrices).collect::<Vec<_>>(), [memories, 14_465]);
    let second = &snapshots[1];
    assert_eq!(second.memory - state.memory, memories as u64 * 64 * 128 * 4);
    assert_eq!(second.snapshot - state.snapshot, memories as u64 * 64 * 128 * 2);
    assert_eq!(second.snapshot_scale - state.snapshot_scale, memories as u64 * 4 * 4);

    let layout = StateLayout::new(&p, 5, false).expect("supported");
    assert_eq!(layout.params(at).open_k_rotated, 0, "no room for rotation");
    let steps = run(&layout.plan_reset(&[4, 1]).expect("valid"));
    let state = layout.params(at);
    let fills = |slot: u64| {
        [(state.memory, 2 * 64 * 128 * 4), (state.normalizer, 2 * 64 * 4), (state.counters, 32)]
            .map(|(part, bytes)| Step::Fill { to: part + slot * bytes, bytes, value: 0 })
    };
    assert_eq!(steps[..3], fills(4));
    assert_eq!(steps[4..7], fills(1));
    assert!(matches!(steps[3], Step::Launch { operation: "snapshot", grid: [4, 2, 1], .. }));
}

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
    assert_eq!((scale(0.0), scale(-1e-300)), (1e-30, 1e-30), "masked scores stay −∞");
    assert_eq!(scale(1e300), f32::MAX);
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

#[test]
fn a_grid_beyond_the_device_is_refused() {
    let p = problem(|b| b.segment_len(1));
    let state = mirror(&p, 70_000);
    let error = plan_segment(&p, &call(&p, &[70_000, 1]), &state, &Target::default())
        .expect_err("y")
        .to_string();
    assert_eq!(
        error,
        "blocks of segment: [8, 70000, 1] given, at most [2147483647, 65535, 65535] expected"
    );
    // A prefill cuts its runs instead.
    let options = PrefillOptions { workspace_bytes: 1 << 45, ..PrefillOptions::default() };
    let plan = plan_prefill(&p, &call(&p, &[70_000, 1]), &state, &options).expect("valid");
    let scans: Vec<_> =
        launches(&plan).into_iter().filter(|(name, _)| *name == "memory_scan").collect();
    assert_eq!(scans.len(), 2, "{plan}");
}

#[test]
fn a_plan_prints_as_a_table() {
    let p = problem(|b| b);
    let state = after(&p, &[40, 300]);
    let lens = [200, 40];
    let rope = DeviceRope::new(f32s(&[512, 16]), f32s(&[512, 16]));
    let state = {
        let mut state = state;
        state.advance(&plan_flush(&p, &state, &[0, 1]).expect("valid")).expect("as planned");
        state
    };
    let call = call(&p, &[2, 200]).seq_lens(&lens).rope(rope);
    let plan = plan_prefill(&p, &call, &state, &PrefillOptions::default()).expect("valid");
    let text = plan.to_string();
    // Threads and shared bytes as the kernels' table has them.
    let launch = |operation, grid: &str, why: &str| {
        let k = find(operation, &p, Arch::Sm80).expect("compiled");
        format!("{} {grid} {} {} {why}", k.symbol, k.threads, k.shared_bytes)
    };
    let expected = [
        "prefill bf16, Hq 4, Hkv 2, Dk 64, Dv 128, N 128, delta; sequences: 2, new tokens: 40 to \
         200; segments: 3, runs: 1"
            .to_owned(),
        "kernels: sm80, for every device of compute capability 8.0 and later".to_owned(),
        "step grid threads shared why".to_owned(),
        "copy 120 bytes of tables".to_owned(),
        "copy 80 bytes of tables".to_owned(),
        launch("rotate_keys", "16 × 2 × 3", "keys of the local branch"),
        launch("segment_state", "1 × 2 × 3", "segments completed: 1 of 3; parts: 1, of 128 tokens"),
        launch("normaliser_scan", "2 × 2 × 1", "z before every segment"),
        launch("segment_transition", "1 × 2 × 3", "delta rule; segments that find a memory: 1"),
        launch("memory_scan", "4 × 2 × 2", "M before every segment"),
        launch(
            "segment_attention",
            "12 × 1 × 1",
            "query tiles per segment and head: 1, of 128 rows",
        ),
        launch("append", "16 × 2 × 2", "open segments and counters; sequences that end: 2"),
        launch("clear_padding", "25 × 4 × 2", "output rows of padding"),
        format!("workspace: {} bytes", plan.workspace_bytes()),
    ];
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(text.lines().map(words).collect::<Vec<_>>(), expected, "{text}");
    // Columns stand below each other.
    let column = |line: &str, what: &str| line.find(what).map(|at| line[..at].chars().count());
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(column(lines[5], "keys of"), column(lines[2], "why"), "{text}");
    assert_eq!(column(lines[3], "120 bytes"), column(lines[2], "why"), "{text}");
}
