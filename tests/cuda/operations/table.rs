//! The table of cases through the crate's CUDA plans and kernels, executed by the simulator.

use crate::common::backend::entry::Entry;
use crate::common::backend::simulated::Simulated;
use crate::common::cases::{Batch, Case, Positions, Rotation, seed};
use crate::common::driver::{Summary, run_cases};
use crate::common::extremes::{extremes, long_segments, magnitudes, short_segments};
use crate::common::simulator::Simulator;
use crate::common::tensor_cases::{Shape, every_level, every_nth, full, pairwise, work};
use infini_attn::cuda::params::{INFINI_STATUS_LENGTH, InfiniCounters};
use infini_attn::cuda::{
    Addresses, Arch, Call, DecodeOptions, DeviceTensor, KERNELS, Mirror, Operand, Runs,
    StateLayout, Target, plan_decode,
};
use infini_attn::{DType, Problem};

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
        let mut cases = [64, 128].map(|d| extremes((DType::BF16, d, d))).concat();
        cases.extend([64, 128, 256].map(|d| short_segments((DType::BF16, d, d))));
        run_on(arch, Entry::Prefill, cases.clone());
        run_on(arch, Entry::Segment, cases.into_iter().map(Case::within_segments).collect());
    }
}

#[test]
fn magnitudes_beyond_f32() {
    let cases = magnitudes((DType::BF16, 64, 64));
    for arch in [Arch::Sm80, Arch::Sm90] {
        run_on(arch, Entry::Prefill, cases.clone());
        run_on(arch, Entry::Segment, cases.iter().cloned().map(Case::within_segments).collect());
    }
    run(Entry::Decode, short(cases));
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

/// Batches that a plan decodes in part and prefills in part.
#[test]
fn prompts_and_tokens() {
    let case = |batch: Batch| {
        let name = format!("prompts and tokens {batch:?}");
        let mut case = Case::base(&name).with(|b| b.heads(2).head_dim(64).segment_len(33));
        case = case.with(|b| b.dtype(DType::BF16));
        (case.batch, case.seed) = (batch, seed(&name));
        case.calls = vec![vec![20, 0, 41, 7], vec![13, 1, 17, 33], vec![1, 40, 1, 1]];
        case.slots = Some((vec![5, 0, 3, 1], 6));
        let (channels, positions, magnitude) = (64, Positions::PerToken, 1.0);
        let rotation = Rotation { channels, interleaved: false, positions, magnitude };
        case.rope = (batch != Batch::Padded).then_some(rotation);
        case
    };
    run(Entry::Forward, [Batch::Padded, Batch::Ranges, Batch::Packed].map(case).into());
    run_on(Arch::Sm90, Entry::Forward, vec![case(Batch::Packed)]);
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

/// Counters that the plan was not made for: the sequence is skipped and reported, nothing else
/// changes, least of all a ticket.
#[test]
fn decode_skips_a_sequence_with_more_open_tokens_than_it_was_cut_for() {
    let p = Problem::builder().heads(2).kv_heads(1).head_dim(64).segment_len(256);
    let p = p.dtype(DType::BF16).build().expect("valid");
    let layout = StateLayout::new(&p, 1, false).expect("valid");
    let mut mirror = Mirror::new(&layout);
    let mut sim = Simulator::of(Arch::Sm80);
    let state = sim.allocate("state", layout.bytes());
    let address = sim.device.address(state);
    let init = layout.plan_init().expect("valid");
    // SAFETY: the allocation has the layout's size.
    unsafe { init.run(&Addresses::new().with(Operand::State, address), &mut sim) }
        .expect("it runs");
    mirror.advance(&init).expect("its own plan");

    let rows = |heads| DeviceTensor::contiguous(DType::BF16, &[1, 1, heads, 64]).expect("valid");
    let gate = DeviceTensor::contiguous(DType::F32, &[2]).expect("valid");
    let target = Target { split_len: 64, ..Target::default() };
    let call = Call::new(rows(2), rows(1), rows(1), gate, rows(2));
    let plan = plan_decode(&p, &call, &mirror, &DecodeOptions { runs: Runs::Once, target });
    let plan = plan.expect("valid");

    let at = layout.params(address);
    let counters = InfiniCounters { tokens: 200, open_len: 200, ..Default::default() };
    sim.device.write(at.counters, bytemuck::bytes_of(&counters)).expect("inside");
    let mut expected: Vec<u8> = sim.read(address, layout.bytes() as usize);
    let status = (at.status - address) as usize;
    expected[status..status + 4].copy_from_slice(&INFINI_STATUS_LENGTH.to_le_bytes());

    let mut addresses = Addresses::new().with(Operand::State, address);
    for (operand, elements) in
        [(Operand::Q, 128), (Operand::K, 64), (Operand::V, 64), (Operand::O, 128)]
    {
        addresses.set(operand, sim.upload(&operand.to_string(), &vec![0u16; elements]));
    }
    addresses.set(Operand::Gate, sim.upload("gate", &[0.0f32; 2]));
    let workspace = sim.allocate("workspace", plan.workspace_bytes());
    addresses.set(Operand::Workspace, sim.device.address(workspace));
    // SAFETY: the buffers have the sizes of the tensors that the plan was made for.
    unsafe { plan.run(&addresses, &mut sim) }.expect("it runs");
    let found: Vec<u8> = sim.read(address, layout.bytes() as usize);
    assert!(found == expected, "{plan}");
}
