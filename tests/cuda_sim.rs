//! The table of cases through the crate's CUDA plans and kernels, executed by the simulator.
#![cfg(feature = "cuda")]

mod common;

use common::cases::Case;
use common::cuda::{Entry, Simulated};
use common::driver::{Summary, run_cases};
use common::extremes::{extremes, long_segments};
use common::tensor_cases::{Shape, every_level, every_nth, full, pairwise, work};
use infini_attn::DType;
use infini_attn::cuda::{Arch, KERNELS};

/// Multiply-adds of a case: a fraction of a second of the simulator.
const BUDGET: u64 = 4_000_000;

/// Shapes that every device has kernels for.
fn shapes() -> Vec<Shape> {
    shapes_of(Arch::Sm80)
}

/// Shapes that an architecture has kernels for.
fn shapes_of(arch: Arch) -> Vec<Shape> {
    let attention = KERNELS.iter().filter(|k| k.operation == "segment_attention");
    let attention = attention.filter(|k| k.arch == arch);
    attention.filter_map(|k| k.dtype.map(|dtype| (dtype, k.key_dim, k.value_dim))).collect()
}

fn run(entry: Entry, cases: Vec<Case>) -> Summary {
    run_on(Arch::Sm80, entry, cases)
}

fn run_on(arch: Arch, entry: Entry, cases: Vec<Case>) -> Summary {
    cases.iter().for_each(|case| println!("{}", case.name));
    let name = format!("simulated {entry:?} on {arch}");
    let summary = run_cases(&Simulated { entry, arch }, &cases).finish(&name);
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
    run(Entry::Prefill, pairwise(&shapes(), BUDGET));
}

#[test]
fn prefill_on_sm90() {
    run_on(Arch::Sm90, Entry::Prefill, cases_on_sm90(8));
}

/// Half as many cases at the smaller dimensions as of prefill, whose attention it is.
#[test]
fn segment_on_sm90() {
    let cases = cases_on_sm90(16).into_iter().map(Case::within_segments);
    run_on(Arch::Sm90, Entry::Segment, cases.collect());
}

/// In clusters of 8 and 2 blocks.
#[test]
fn long_segments_on_sm90() {
    let cases = [(DType::BF16, 64, 64), (DType::F16, 256, 256)].map(long_segments);
    run_on(Arch::Sm90, Entry::Segment, cases.into());
}

#[test]
fn beyond_the_table() {
    for arch in [Arch::Sm80, Arch::Sm90] {
        let cases = [64, 128].map(|d| extremes((DType::BF16, d, d))).concat();
        run_on(arch, Entry::Prefill, cases.clone());
        run_on(arch, Entry::Segment, cases.into_iter().map(Case::within_segments).collect());
    }
}

/// One in `nth` of the pairwise cases at the smaller dimensions, without the longest; at the largest,
/// where a case takes several times as long, few in which all levels occur.
fn cases_on_sm90(nth: usize) -> Vec<Case> {
    let (large, small): (Vec<_>, Vec<_>) =
        shapes_of(Arch::Sm90).into_iter().partition(|(_, dk, _)| *dk == 256);
    let mut cases = every_level(&large, BUDGET);
    let some = every_nth(nth, &small, BUDGET).into_iter();
    cases.extend(some.filter(|case| work(case) <= 10 * BUDGET));
    cases
}

#[test]
#[ignore = "hours"]
fn every_case_in_every_shape_on_sm90() {
    let all = full(&shapes_of(Arch::Sm90), BUDGET);
    run_on(Arch::Sm90, Entry::Prefill, all.clone());
    run_on(Arch::Sm90, Entry::Segment, all.into_iter().map(Case::within_segments).collect());
}

/// A third of the cases, in all shapes, as of decode: prefill runs every pair.
#[test]
fn segment() {
    let cases = pairwise(&shapes(), BUDGET).into_iter().step_by(3).map(Case::within_segments);
    run(Entry::Segment, cases.collect());
}

#[test]
fn decode() {
    run(Entry::Decode, short(pairwise(&shapes(), BUDGET)).into_iter().step_by(3).collect());
}

#[test]
fn entries_take_turns() {
    let many = |c: &Case| c.calls.len() > 1;
    run(Entry::Mixed, pairwise(&shapes(), BUDGET).into_iter().filter(many).collect());
}

#[test]
#[ignore = "hours"]
fn every_case_in_every_shape() {
    let all = full(&shapes(), BUDGET);
    run(Entry::Prefill, all.clone());
    run(Entry::Segment, all.iter().cloned().map(Case::within_segments).collect());
    run(Entry::Decode, short(all));
}
