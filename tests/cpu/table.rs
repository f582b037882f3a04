//! The table of cases on the CPU backend.

use crate::common::backend::Cpu;
use crate::common::cases::{Case, cases};
use crate::common::driver::{Summary, run_cases};
use crate::common::extremes::{extremes, magnitudes};
use infini_attn::DType;

fn run(backend: Cpu, wanted: impl Fn(&Case) -> bool) -> Summary {
    let table: Vec<Case> = cases().into_iter().filter(wanted).collect();
    run_cases(&backend, &table).finish(&format!("{backend:?}"))
}

#[test]
fn prefill_runs_the_whole_table() {
    let summary = run(Cpu::Prefill, |_| true);
    assert_eq!((summary.ran, summary.refused.len()), (cases().len(), 0));
}

#[test]
fn decode_runs_all_that_it_takes() {
    let summary = run_cases(&Cpu::Decode, &cases()).finish("decode");
    let reason = "decode takes at most 16 new tokens per sequence";
    assert_eq!(summary.refused.into_iter().collect::<Vec<_>>(), [(reason, 561)]);
    assert_eq!(summary.ran, 196);
}

#[test]
fn decode_runs_the_table_in_short_calls() {
    // All but the streams so long that token-wise work takes minutes, the rest in calls of 16 or 5.
    let short = |c: &Case| c.calls.iter().flatten().sum::<usize>() <= 600;
    let table: Vec<Case> = (cases().into_iter().filter(short).enumerate())
        .map(|(i, case)| case.recut(if i % 2 == 0 { 16 } else { 5 }))
        .collect();
    assert_eq!(table.len(), 744);
    let summary = run_cases(&Cpu::Decode, &table).finish("decode in short calls");
    assert_eq!((summary.ran, summary.refused.len()), (table.len(), 0));
}

#[test]
fn beyond_the_table() {
    let cases = |dtype| [&extremes((dtype, 64, 64))[..], &magnitudes((dtype, 64, 64))].concat();
    let cases = [DType::F32, DType::BF16].map(cases).concat();
    let summary = run_cases(&Cpu::Prefill, &cases).finish("prefill beyond the table");
    assert_eq!(summary.ran, cases.len());
}

#[test]
fn prefill_and_decode_take_turns() {
    run(Cpu::Forward, |case| case.calls.len() > 1);
}
