//! Plans of segment.

use crate::common::plans::{after, call, launches, mirror, params, problem, table, tensor};
use infini_attn::cuda::params::*;
use infini_attn::cuda::{Operand, Target, plan_segment};

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
