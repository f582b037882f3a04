//! A few new tokens per sequence, in steps that end where a segment may fill.
//!
//! 1. `decode`, per step: all outputs of the step's tokens, the open segments, the counters.
//! 2. `commit`, after a step in which segments may have filled.
//! 3. `clear_padding`, where a batch has padding.

use super::commit::{Chunks, commit};
use super::phases::TILE;
use super::prefill::once;
use crate::call::MAX_DECODE_TOKENS;
use crate::call::form::pieces;
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Operand, Requirement};
use crate::cuda::plan::allocation::Allocation;
use crate::cuda::plan::call::{Call, Resolved};
use crate::cuda::plan::effect::Kind;
use crate::cuda::plan::kernel::Arch;
use crate::cuda::plan::kernels::find;
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::params::*;
use crate::cuda::plan::problem::problem_params;
use crate::cuda::plan::sequences::{clear_padding, padding, sequences};
use crate::cuda::plan::target::Target;
use crate::error::Result;
use crate::problem::Problem;

/// How a decode call is planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Which runs the plan is for. Default: one.
    pub runs: Runs,
    /// The device it is planned for.
    pub target: Target,
}

/// Which runs a decode plan is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Runs {
    /// One run, from the counters that the mirror has now: no launch that would find nothing to do.
    #[default]
    Once,
    /// Any number of runs, such as replays of a CUDA graph, from whatever counters the state has:
    /// open lengths and positions are read on the device, and segments are committed there.
    Replay,
    /// The same, and slots and lengths are read there as well: [`Operand::Sequences`] is a table of
    /// [`InfiniSequence`], one per sequence of the call, up to [`MAX_DECODE_TOKENS`] tokens each.
    /// The call's own lengths and slots only tell what it holds now. A sequence in slot −1
    /// ([`PAD_SLOT`](crate::cuda::PAD_SLOT)) is padding: it is skipped, and in a batch that is not packed
    /// its output rows become 0, as do those behind the tokens of the others.
    Table,
}

/// Plans [`decode`](crate::decode) on the device.
///
/// # Errors
/// Those of [`plan_prefill`](crate::cuda::plan_prefill), and [`crate::Error::Value`] for a sequence
/// of more than [`MAX_DECODE_TOKENS`] tokens.
pub fn plan_decode(
    problem: &Problem,
    call: &Call<'_>,
    state: &Mirror,
    options: &DecodeOptions,
) -> Result<Plan> {
    options.target.check()?;
    let call = call.resolve(problem, state, Some(MAX_DECODE_TOKENS))?;
    let kind = match options.runs {
        Runs::Once => once(&call, state),
        Runs::Replay => Kind::Replay,
        Runs::Table => Kind::Table(longest(&call, options)),
    };
    let title = format!("decode {}", call.shapes());
    let mut plan = Plan::new(title, state.layout(), call.effect(kind));
    let mut workspace = Allocation::new(Operand::Workspace);
    let mut requirements = call.requirements();
    let table = (options.runs == Runs::Table).then(|| longest(&call, options));
    if table.is_some() && !call.sequences.is_empty() {
        let after = (call.sequences.len() * size_of::<InfiniSequence>()) as u64;
        let (operand, align, before) = (Operand::Sequences, 8, 0);
        requirements.push(Requirement { operand, align, before, after });
    }
    if longest(&call, options) > 0 {
        launches(&call, state, options, &mut plan, &mut workspace)?;
    }
    if let Some(sequences) = padding(&call, table, &mut plan, &mut workspace)? {
        clear_padding(&call, call.params(0), sequences, &mut plan)?;
    }
    Ok(plan.finish(requirements, &workspace))
}

/// Most new tokens of a sequence in any run.
fn longest(call: &Resolved<'_>, options: &DecodeOptions) -> usize {
    match options.runs {
        Runs::Table => call.tokens().min(MAX_DECODE_TOKENS),
        _ => call.longest(),
    }
}

/// Steps of decoding, and after which of them a commit may find a full segment.
fn steps(call: &Resolved<'_>, state: &Mirror, options: &DecodeOptions) -> Vec<bool> {
    let p = &call.problem;
    if options.runs != Runs::Once {
        // The first step may end at the first token, each further one N tokens later.
        return vec![true; 1 + (longest(call, options) - 1).div_ceil(p.segment_len())];
    }
    let mut fills = Vec::new();
    for s in &call.sequences {
        for (step, piece) in pieces(p, *s, state.counters()[s.slot]).enumerate() {
            fills.resize(fills.len().max(step + 1), false);
            fills[step] |= piece.full;
        }
    }
    fills
}

/// Most keys of an open segment, new ones included, that a step may attend.
fn most_keys(call: &Resolved<'_>, state: &Mirror, options: &DecodeOptions) -> usize {
    let n = call.problem.segment_len();
    if options.runs != Runs::Once {
        return n;
    }
    let new = call.sequences.iter().filter(|s| s.len > 0);
    let keys = new.map(|s| state.counters()[s.slot].open_len + s.len);
    keys.max().unwrap_or(0).min(n)
}

pub(super) fn launches(
    call: &Resolved<'_>,
    state: &Mirror,
    options: &DecodeOptions,
    plan: &mut Plan,
    workspace: &mut Allocation,
) -> Result<()> {
    let (p, kernel) = (&call.problem, find("decode", &call.problem, Arch::Sm80)?);
    let params = call.copy_positions(plan, workspace)?;
    let table = (options.runs == Runs::Table).then(|| longest(call, options));
    let sequences = sequences(call, table, plan, workspace)?;
    let count = sequences.count as usize;
    let split_len = options.target.split_len.min(p.segment_len()).next_multiple_of(TILE);
    let splits = most_keys(call, state, options).div_ceil(split_len);
    let rows = p.group() * longest(call, options);
    let row_tiles = rows.div_ceil(kernel.rows);
    let part = kernel.rows * (p.value_dim() + 2);
    // Of every split, and of the retrieval.
    let parts = workspace.part(&[count, p.kv_heads(), row_tiles, splits + 1, part], 4)?;
    let steps = steps(call, state, options);
    let chunks = Chunks::of_open_segment(p, p.segment_len());
    let sums = match steps.contains(&true) {
        true => chunks.partials(p, count, workspace)?,
        false => 0,
    };
    for (step, fills) in steps.iter().enumerate() {
        let params = InfiniDecode {
            problem: problem_params(p),
            call: params,
            state: state.layout().symbols(),
            exchange: state.layout().exchange(parts),
            splits: splits as i32,
            split_len: split_len as i32,
            row_tiles: row_tiles as i32,
            step: step as i32,
            sequences,
        };
        let why =
            format!("step {step}; splits: {splits}, of {split_len} keys; rows per head: {rows}");
        let grid = [(splits + 1) * row_tiles, p.kv_heads(), count];
        plan.launch(kernel, grid, params, why)?;
        if *fills {
            commit(p, state, sequences, chunks, sums, Some(options.target.multiprocessors), plan)?;
        }
    }
    Ok(())
}
