//! The table of cases through the crate's CUDA plans and kernels, executed by the simulator.
#![cfg(feature = "cuda")]

mod common;

use common::cases::Case;
use common::cuda::Simulated;
use common::driver::{Summary, run_cases};
use common::tensor_cases::{Shape, full, pairwise};
use infini_attn::cuda::KERNELS;

/// Multiply-adds of a case: a fraction of a second of the simulator.
const BUDGET: u64 = 12_000_000;

/// Shapes that kernels are compiled for.
fn shapes() -> Vec<Shape> {
    let attention = KERNELS.iter().filter(|k| k.operation == "segment_attention");
    attention.filter_map(|k| k.dtype.map(|dtype| (dtype, k.key_dim, k.value_dim))).collect()
}

fn run(backend: Simulated, cases: Vec<Case>) -> Summary {
    cases.iter().for_each(|case| println!("{}", case.name));
    let summary = run_cases(&backend, &cases).finish(&format!("simulated {backend:?}"));
    assert_eq!((summary.ran, summary.refused.len()), (cases.len(), 0));
    summary
}

/// Calls that decoding takes.
fn short(cases: Vec<Case>) -> Vec<Case> {
    let most = |i: usize| [16, 5, 1, 11][i % 4];
    cases.into_iter().enumerate().map(|(i, case)| case.recut(most(i))).collect()
}

#[test]
fn prefill() {
    run(Simulated::Prefill, pairwise(&shapes(), BUDGET));
}

#[test]
fn segment() {
    let cases = pairwise(&shapes(), BUDGET).into_iter().map(Case::within_segments);
    run(Simulated::Segment, cases.collect());
}

#[test]
fn decode() {
    run(Simulated::Decode, short(pairwise(&shapes(), BUDGET / 3)));
}

#[test]
fn entries_take_turns() {
    let many = |c: &Case| c.calls.len() > 1;
    run(Simulated::Mixed, pairwise(&shapes(), BUDGET / 2).into_iter().filter(many).collect());
}

#[test]
#[ignore = "hours"]
fn every_case_in_every_shape() {
    let all = full(&shapes(), BUDGET);
    run(Simulated::Prefill, all.clone());
    run(Simulated::Segment, all.iter().cloned().map(Case::within_segments).collect());
    run(Simulated::Decode, short(all));
}
