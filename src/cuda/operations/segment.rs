//! Up to one segment per sequence in one launch.
//!
//! 1. `segment`: all outputs, the open segments, the counters, and the memory of segments that are
//!    completed.
//! 2. `clear_padding`, where a batch has padding.

use super::attention::AttentionOperands;
use super::commit::Chunks;
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::Operand;
use crate::cuda::plan::allocation::Allocation;
use crate::cuda::plan::call::{Call, Resolved};
use crate::cuda::plan::effect::Kind;
use crate::cuda::plan::kernel::Arch;
use crate::cuda::plan::kernels::find;
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::params::*;
use crate::cuda::plan::problem::problem_params;
use crate::cuda::plan::sequences::{clear_padding, padding, sequences};
use crate::cuda::plan::target::{Chosen, Target};
use crate::error::{Error, Result};
use crate::problem::Problem;

/// Plans a call of [`prefill`](crate::prefill) in which no sequence goes beyond its current segment:
/// at most N − `open_len` new tokens each. One launch, and one more where a batch has padding.
///
/// # Errors
/// Those of [`plan_prefill`](crate::cuda::plan_prefill), and [`Error::Value`] for a sequence of too
/// many tokens.
pub fn plan_segment(
    problem: &Problem,
    call: &Call<'_>,
    state: &Mirror,
    target: &Target,
) -> Result<Plan> {
    target.check()?;
    let call = call.resolve(problem, state, None)?;
    let counters = state.counters();
    for (b, s) in call.sequences.iter().enumerate() {
        let room = problem.segment_len() - counters[s.slot].open_len;
        if s.len > room {
            let expected = format!("0 to {room} new tokens (the rest of the segment)");
            return Err(Error::value(format!("q (sequence {b})"), s.len, expected));
        }
    }
    let title = format!("segment {}", call.shapes());
    let before = call.sequences.iter().map(|s| counters[s.slot]).collect();
    let mut plan = Plan::new(title, state.layout(), call.effect(Kind::Once(before)));
    let mut workspace = Allocation::new(Operand::Workspace);
    if call.longest() > 0 {
        launch(&call, state, *target, &mut plan, &mut workspace)?;
    }
    if let Some(sequences) = padding(&call, None, &mut plan, &mut workspace)? {
        clear_padding(&call, call.params(0), sequences, &mut plan)?;
    }
    Ok(plan.finish(call.requirements(), &workspace))
}

/// The one launch.
fn launch(
    call: &Resolved<'_>,
    state: &Mirror,
    target: Target,
    plan: &mut Plan,
    workspace: &mut Allocation,
) -> Result<()> {
    let (p, counters) = (&call.problem, state.counters());
    let params = call.copy_positions(plan, workspace)?;
    let sequences = sequences(call, None, plan, workspace)?;
    let count = sequences.count as usize;
    let completes =
        call.sequences.iter().any(|s| counters[s.slot].open_len + s.len == p.segment_len());
    let chunks = Chunks::of_segment(p);
    let updating = if completes { chunks.count } else { 0 };
    let mut launch = InfiniSegment {
        problem: problem_params(p),
        call: params,
        state: state.layout().symbols(),
        exchange: state.layout().exchange(0),
        rotated: 0,
        tiles: 0,
        chunks: updating as i32,
        chunk_len: chunks.len as i32,
        reserved: 0,
        sequences,
    };
    // Only the newer kernel takes it, and its tensor maps need the address before the choice.
    let mut rotated = *workspace;
    if target.arch > Arch::Sm80 && call.rotation().is_some() {
        launch.rotated = rotated
            .part(&[count, p.kv_heads(), p.segment_len(), p.key_dim()], p.dtype().bytes())?;
    }
    let chosen = choose(call, &launch, count, target)?;
    let tiles = call.longest().div_ceil(chosen.kernel.rows);
    let attention = tiles * p.heads() * (1 + usize::from(call.a_mem()));
    launch.tiles = tiles as i32;
    if chosen.kernel.arch > Arch::Sm80 {
        *workspace = rotated;
        let why = match updating {
            0 => format!("query tiles: {attention}; no segment is completed"),
            _ => format!("query tiles: {attention}; a block updates with {} tokens", chunks.len),
        };
        let chosen = Chosen { cluster: chunks.count as u32, ..chosen };
        return plan.launch(chosen, [p.kv_heads() * chunks.count, count, 1], launch, why);
    }
    let partials = Chunks { count: updating, ..chunks }.partials(p, count, workspace)?;
    launch.rotated = 0;
    launch.exchange = state.layout().exchange(partials);
    let update = updating * p.kv_heads() * (p.value_dim() / chosen.kernel.columns);
    let why = match updating {
        0 => format!("blocks that attend: {attention}; no segment is completed"),
        _ => format!(
            "blocks that attend: {attention}, that update: {update}, {} tokens each",
            chunks.len
        ),
    };
    plan.launch(chosen, [attention + update, count, 1], launch, why)
}

/// The Hopper kernel, whose clusters have a KV head of a sequence each, where they fill enough of the
/// device: whatever the batch, so that a sequence's bits do not depend on it.
fn choose(
    call: &Resolved<'_>,
    launch: &InfiniSegment,
    count: usize,
    target: Target,
) -> Result<Chosen> {
    let p = &call.problem;
    let operands = AttentionOperands {
        p,
        call: &launch.call,
        state: &launch.state,
        lead: call.lead(),
        rotated: call.rotation().map(|_| (launch.rotated, count)),
        snapshot: (launch.state.snapshot, launch.state.slots as usize),
        shared_by: 1,
    };
    let chosen = Chosen::new("segment", p, target, |kernel| operands.with_raw_keys(kernel))?;
    if chosen.kernel.arch == Arch::Sm80 {
        return Ok(chosen);
    }
    let (cluster, all) = (Chunks::of_segment(p).count, target.multiprocessors);
    let blocks = p.kv_heads() * cluster;
    let reason = if cluster > target.cluster_blocks {
        format!("clusters of {cluster} blocks, the device holds {} at most", target.cluster_blocks)
    } else if blocks * 100 < all.saturating_mul(target.segment_fill) {
        format!("{blocks} blocks per sequence for {all} multiprocessors")
    } else {
        return Ok(chosen);
    };
    let portable = find("segment", p, Arch::Sm80)?;
    Ok(Chosen { passed_over: Some(reason), ..portable.into() })
}
