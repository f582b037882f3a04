//! The shared table of cases through every entry point of the typed calls.

use std::collections::BTreeSet;

use anyhow::Result;
use infini_attn::cuda::{Arch, Device, KERNELS};

use crate::common::backend::entry::Entry;
use crate::common::cases::Case;
use crate::common::switches::is_simulated;
use crate::common::tensor_cases::{Shape, pairwise};
use crate::groups::Group;

/// Multiply-adds of a case: some tenths of a second of the float64 reference.
const BUDGET: u64 = 200_000_000;
const SIMULATED_BUDGET: u64 = 2_000_000;

/// On the simulator one case in so many is run: it meets every dimension that a newer architecture
/// has kernels for. All cases run there by plans (tests/cuda/operations/table.rs).
const SIMULATED: usize = 31;

/// A group per entry point and head dimensions.
pub fn groups() -> Vec<Group> {
    let entries = [
        (Entry::Prefill, "prefill"),
        (Entry::Segment, "segment"),
        (Entry::Decode, "decode"),
        (Entry::Mixed, "mixed"),
    ];
    let dims: BTreeSet<_> = shapes(Arch::Sm80).iter().map(|s| (s.1, s.2)).collect();
    let all = entries.into_iter().flat_map(|entry| dims.iter().map(move |dims| (entry, *dims)));
    let group = |((entry, name), (dk, dv))| {
        let name = format!("table::{name}::{}", dims_name(dk, dv));
        Group::cases(name, entry, move |device| cases(device, entry, (dk, dv)))
    };
    all.map(group).collect()
}

/// `d64`, `d128x64`.
pub fn dims_name(dk: usize, dv: usize) -> String {
    if dk == dv { format!("d{dk}") } else { format!("d{dk}x{dv}") }
}

/// Shapes that kernels of an architecture are compiled for.
fn shapes(arch: Arch) -> Vec<Shape> {
    let attention = KERNELS.iter().filter(|k| k.operation == "segment_attention");
    let attention = attention.filter(|k| k.arch == arch);
    attention.filter_map(|k| k.dtype.map(|dtype| (dtype, k.key_dim, k.value_dim))).collect()
}

/// The cases of these dimensions, cut as the entry point takes them.
fn cases(device: &Device, entry: Entry, dims: (usize, usize)) -> Result<Vec<Case>> {
    let (budget, every, arch) = match is_simulated(device)? {
        false => (BUDGET, 1, Arch::Sm80),
        // Where few are run, they are those of the newest kernels.
        true => (SIMULATED_BUDGET, SIMULATED, device.target()?.arch),
    };
    let divisor = if entry == Entry::Decode { 4 } else { 1 };
    let table = pairwise(&shapes(arch), budget / divisor).into_iter().enumerate().step_by(every);
    let cases = table.filter_map(|(i, case)| match entry {
        Entry::Prefill | Entry::Forward => Some(case),
        Entry::Segment => Some(case.within_segments()),
        Entry::Decode => Some(case.recut([16, 5, 1, 11][i % 4])),
        Entry::Mixed => Some(case).filter(|c| c.calls.len() > 1),
    });
    let own = |c: &Case| (c.problem.key_dim(), c.problem.value_dim()) == dims;
    Ok(cases.filter(own).collect())
}
