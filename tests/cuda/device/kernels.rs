//! Every kernel, at the smallest shape that needs it.

use std::cmp::Reverse;

use anyhow::Result;
use infini_attn::DType;
use infini_attn::cuda::{Arch, Device, KERNELS, Kernel};

use crate::calls;
use crate::common::backend::entry::Entry;
use crate::common::buffers::Asked;
use crate::common::cases::{Batch, Case, Positions, Rotation, seed};
use crate::full::is_small;
use crate::groups::{Group, Work};
use crate::slots;
use crate::table::dims_name;

/// A group per operation, architecture and head dimensions.
pub fn groups() -> Vec<Group> {
    let role = |k: &Kernel| (k.operation, k.arch, k.key_dim, k.value_dim);
    let mut roles: Vec<_> = KERNELS.iter().map(role).collect();
    // Newer ones first: they have most to teach.
    roles.sort_by_key(|&(operation, arch, dk, dv)| (Reverse(arch), operation, dk, dv));
    roles.dedup();
    let group = |(operation, arch, dk, dv)| {
        let dims = match (dk, dv) {
            (0, _) => "any".into(),
            (dk, 0) => dims_name(dk, dk),
            (dk, dv) => dims_name(dk, dv),
        };
        let kernels = KERNELS.iter().filter(|k| role(k) == (operation, arch, dk, dv)).collect();
        let name = format!("kernel::{operation}_{arch}::{dims}");
        // On more the portable kernel would be chosen for one sequence.
        let multiprocessors = (operation == "segment").then_some(1);
        Group { name, kernels, multiprocessors, work: work(operation, arch, dk, dv) }
    };
    roles.into_iter().map(group).collect()
}

/// What launches an operation's kernels of these dimensions (0: any).
fn work(operation: &'static str, arch: Arch, dk: usize, dv: usize) -> Work {
    let shape = match (dk, dv) {
        (0, _) => (64, 64),
        (192, _) => (192, 128),
        (dk, 0) => (dk, dk),
        dims => dims,
    };
    let entry = match operation {
        "merge_partials" => return Work::Check(calls::merge_partials),
        "snapshot" | "sum" | "compose" => return Work::Check(calls::maps_and_merges),
        "copy_slots" => return Work::Check(slots::copies),
        "segment" => Entry::Segment,
        "decode" | "commit" => Entry::Decode,
        _ => Entry::Prefill,
    };
    let cases = move |device: &Device| -> Result<Vec<Case>> {
        let small = is_small(device)?;
        let of_type = |dtype| match entry {
            Entry::Segment => segments(arch, dtype, shape, small),
            Entry::Decode => vec![decode(dtype, shape)],
            _ if operation == "clear_padding" => vec![padded(dtype, shape)],
            _ => prefills(dtype, shape, small),
        };
        Ok([DType::BF16, DType::F16].into_iter().flat_map(of_type).collect())
    };
    Work::Cases(entry, Box::new(cases))
}

/// One sequence of `calls`, delta rule, N(0, 1).
fn case(
    what: &str,
    dtype: DType,
    (dk, dv): (usize, usize),
    group: usize,
    n: usize,
    calls: &[usize],
) -> Case {
    let name = format!("{what}, {dtype} {dk}x{dv}, {group} heads, N={n}");
    let mut case = Case::base(name)
        .with(|b| b.heads(group).kv_heads(1).key_dim(dk).value_dim(dv).segment_len(n))
        .with(|b| b.dtype(dtype));
    case.seed = seed(&case.name);
    case.calls = calls.iter().map(|tokens| vec![*tokens]).collect();
    case.asked = Asked::NONE;
    case
}

/// Two segments and a bit, then on from the open one: two heads, on newer devices in pairs of blocks,
/// rotated; one head; two. If they are to be small, the first alone.
fn prefills(dtype: DType, shape: (usize, usize), small: bool) -> Vec<Case> {
    let (channels, positions) = (shape.0, Positions::Continued);
    let rotation = Rotation { channels, interleaved: false, positions, magnitude: 1.0 };
    // The simulator runs all cases of the table by plans as well (tests/cuda/operations/table.rs).
    let tokens = if small { [70, 4] } else { [150, 9] };
    let n = if small { 32 } else { 64 };
    let pairs = case("two heads", dtype, shape, 2, n, &tokens);
    let single = case("one head", dtype, shape, 1, n, &tokens);
    let rotated =
        Case { name: format!("{}, rotated", pairs.name), rope: Some(rotation), ..pairs.clone() };
    if small { vec![rotated] } else { vec![rotated, single, pairs] }
}

/// Sequences of two lengths.
fn padded(dtype: DType, shape: (usize, usize)) -> Case {
    let case = case("padded", dtype, shape, 1, 64, &[70]);
    Case { batch: Batch::Padded, calls: vec![vec![70, 3]], ..case }
}

/// Segments in one launch, in clusters of 1, 2 and 8 blocks where there are clusters (a chunk has at
/// least 2 d tokens).
fn segments(arch: Arch, dtype: DType, shape: (usize, usize), small: bool) -> Vec<Case> {
    let chunk = (4 * shape.0 * shape.1 / (shape.0 + shape.1)).next_multiple_of(64);
    let chunks: &[usize] = match arch {
        Arch::Sm80 => &[1],
        _ if small && dtype == DType::F16 => &[1],
        _ if small => &[1, 2],
        // The reference would take too long.
        _ if shape.0 > 128 => &[1, 2],
        _ => &[1, 2, 8],
    };
    let of = |chunks: &usize| {
        let n = chunk * chunks;
        case(&format!("chunks: {chunks}"), dtype, shape, 2, n, &[n, n, 9])
    };
    chunks.iter().map(of).collect()
}

/// Steps across the end of two segments.
fn decode(dtype: DType, shape: (usize, usize)) -> Case {
    case("steps", dtype, shape, 4, 32, &[16, 15, 2, 16, 16, 1, 5])
}
