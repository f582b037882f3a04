//! What all plans have: limits of a grid, a printed form.

use crate::common::plans::{after, call, f32s, launches, mirror, problem};
use infini_attn::cuda::{
    Arch, DeviceRope, PrefillOptions, Target, find, plan_flush, plan_prefill, plan_segment,
};

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
