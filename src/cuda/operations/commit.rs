//! Folding open segments into the memories: `flush`, and the step that decoding needs when a
//! segment fills.
//!
//! 1. `commit`: partial sums of chunks of tokens, added up by the last block to finish; snapshots
//!    and counters.

use super::phases::TILE;
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::Operand;
use crate::cuda::plan::allocation::Allocation;
use crate::cuda::plan::effect::Effect;
use crate::cuda::plan::kernel::Arch;
use crate::cuda::plan::kernels::find;
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::params::*;
use crate::cuda::plan::problem::problem_params;
use crate::cuda::plan::sequences::listed;
use crate::error::Result;
use crate::memory::check_slots;
use crate::problem::Problem;

/// Plans [`flush`](crate::flush) on the device: the open segments of the given slots go into their
/// memories. Slots without one are left as they are.
///
/// # Errors
/// [`crate::Error::Problem`] when the state belongs to another problem, [`crate::Error::Value`] for a
/// slot out of range or named twice.
pub fn plan_flush(problem: &Problem, state: &Mirror, slots: &[usize]) -> Result<Plan> {
    problem.check_same(state.problem())?;
    check_slots(slots, state.layout().slots())?;
    let open: Vec<_> = (slots.iter().map(|&slot| (slot, state.counters()[slot])))
        .filter(|(_, counters)| counters.open_len > 0)
        .collect();
    let longest = open.iter().map(|(_, counters)| counters.open_len).max().unwrap_or(0);
    let sequences: Vec<_> = (open.iter().enumerate())
        .map(|(batch, (slot, _))| InfiniSequence {
            first: 0,
            slot: *slot as i32,
            batch: batch as i32,
            len: 0,
            reserved: 0,
        })
        .collect();
    let title = format!(
        "flush {}; open segments: {}, up to {longest} tokens",
        problem.shapes(),
        open.len()
    );
    let mut plan = Plan::new(title, state.layout(), Effect::Flush(open));
    let mut workspace = Allocation::new(Operand::Workspace);
    if longest > 0 {
        let sequences = listed(&sequences, &mut plan, &mut workspace)?;
        let chunk = Chunks::of_open_segment(problem, longest);
        let partials = chunk.partials(problem, sequences.count as usize, &mut workspace)?;
        commit(problem, state, sequences, chunk, partials, None, &mut plan)?;
    }
    Ok(plan.finish(Vec::new(), &workspace))
}

/// How the tokens of a segment are split over the blocks of an update. The length of a chunk depends
/// on N, Dk and Dv alone, so that a sequence's bits do not depend on the batch around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    pub count: usize,
    pub len: usize,
}

impl Chunks {
    /// For the segment kernel, where one segment is to fill the device: up to 8 chunks, none so
    /// short that exchanging its f32 sums costs as much as half of reading its keys and values.
    pub fn of_segment(p: &Problem) -> Self {
        Self::new(p, 8, p.segment_len())
    }

    /// For commits of `tokens` at most, which come with the whole batch or rarely: up to 4 chunks.
    pub fn of_open_segment(p: &Problem, tokens: usize) -> Self {
        Self::new(p, 4, tokens)
    }

    fn new(p: &Problem, most: usize, tokens: usize) -> Self {
        let (n, dk, dv) = (p.segment_len(), p.key_dim(), p.value_dim());
        let shortest = 4 * dk * dv / (dk + dv);
        let len = n.div_ceil(most).max(shortest).next_multiple_of(TILE);
        Self { count: tokens.div_ceil(len), len }
    }

    /// Room for the partial sums of every sequence and head.
    pub fn partials(
        &self,
        p: &Problem,
        sequences: usize,
        workspace: &mut Allocation,
    ) -> Result<u64> {
        let sums = p.key_dim() * (p.value_dim() + 1);
        workspace.part(&[sequences, p.kv_heads(), self.count, sums], 4)
    }
}

/// Launches `commit`: of full open segments, by blocks that fill `fill` multiprocessors and go
/// through the sequences, or without it of any open segment, by blocks of their own each.
pub fn commit(
    p: &Problem,
    state: &Mirror,
    sequences: InfiniSequences,
    chunks: Chunks,
    partials: u64,
    fill: Option<usize>,
    plan: &mut Plan,
) -> Result<()> {
    let kernel = find("commit", p, Arch::Sm80)?;
    let count = sequences.count as usize;
    let params = InfiniCommit {
        problem: problem_params(p),
        state: state.layout().symbols(),
        exchange: state.layout().exchange(partials),
        chunks: chunks.count as i32,
        chunk_len: chunks.len as i32,
        flush: fill.is_none().into(),
        reserved: 0,
        sequences,
    };
    let what = if fill.is_none() { "open segments" } else { "segments that filled" };
    let why = format!("{what}; chunks: {}, of {} tokens", chunks.count, chunks.len);
    let columns = p.kv_heads() * (p.value_dim() / kernel.columns);
    let at_a_time = fill.map_or(count, |n| n.div_ceil(chunks.count * columns).min(count));
    let grid = [chunks.count, columns, at_a_time];
    plan.launch(kernel, grid, params, why)
}
