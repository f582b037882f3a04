//! Up to one segment per sequence in one launch.

use super::call::{Resolved, problem_params};
use super::commit::Chunks;
use super::params::*;
use super::plan::{Allocation, Plan};
use super::sequences::{clear_padding, padding, sequences};
use super::state::Kind;
use super::{Call, Mirror, Operand, Target, find};
use crate::{Error, Problem, Result};

/// Plans a call of [`prefill`](crate::prefill) in which no sequence goes beyond its current segment:
/// at most N − `open_len` new tokens each. One launch, and one more where a batch has padding.
///
/// # Errors
/// Those of [`plan_prefill`](super::plan_prefill), and [`Error::Value`] for a sequence of too many
/// tokens.
pub fn plan_segment(
    problem: &Problem,
    call: &Call<'_>,
    state: &Mirror,
    target: &Target,
) -> Result<Plan> {
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

fn launch(
    call: &Resolved<'_>,
    state: &Mirror,
    target: Target,
    plan: &mut Plan,
    workspace: &mut Allocation,
) -> Result<()> {
    let (p, kernel) = (&call.problem, find("segment", &call.problem, target.arch)?);
    let params = call.copy_positions(plan, workspace)?;
    let sequences = sequences(call, None, plan, workspace)?;
    let count = sequences.count as usize;
    let counters = state.counters();
    let completes =
        call.sequences.iter().any(|s| counters[s.slot].open_len + s.len == p.segment_len());
    let mut chunks = Chunks::of_segment(p);
    if !completes {
        chunks.count = 0;
    }
    let partials = chunks.partials(p, count, workspace)?;
    let tiles = call.longest().div_ceil(kernel.rows);
    let params = InfiniSegment {
        problem: problem_params(p),
        call: params,
        state: state.layout().symbols(),
        exchange: state.layout().exchange(partials),
        tiles: tiles as i32,
        chunks: chunks.count as i32,
        chunk_len: chunks.len as i32,
        reserved: 0,
        sequences,
    };
    let attention = tiles * p.heads() * (1 + usize::from(call.a_mem()));
    let update = chunks.count * p.kv_heads() * (p.value_dim() / kernel.columns);
    let why = if completes {
        format!(
            "blocks that attend: {attention}, that update: {update}, {} tokens each",
            chunks.len
        )
    } else {
        format!("blocks that attend: {attention}; no segment is completed")
    };
    plan.launch(kernel, [attention + update, count, 1], params, why)
}
