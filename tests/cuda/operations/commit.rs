//! Plans of flush.

use crate::common::plans::{after, launches, params, problem, run};
use infini_attn::cuda::params::*;
use infini_attn::cuda::plan_flush;

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
