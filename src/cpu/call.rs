//! One call and its counters.

use crate::call::form::{Sequence, pieces};
use crate::call::{Batch, InputRows, OutputRows};
use crate::memory::State;
use crate::memory::blocks::KeyBlocks;
use crate::problem::Problem;

/// Everything the tasks of one call share.
pub(crate) struct Call<'a, T> {
    pub problem: Problem,
    pub batch: Batch<'a>,
    pub blocks: KeyBlocks,
    pub inputs: InputRows<'a, T>,
    pub outputs: OutputRows<'a, T>,
    /// Per query head: weight of the memory branch, weight of the local branch.
    pub gates: Vec<[f32; 2]>,
}

/// The gate as weights of both branches, each rounded on its own: 1 − g keeps its precision.
pub(crate) fn gate_weights(logit: f32) -> [f32; 2] {
    let sigmoid = |x: f64| (1.0 / (1.0 + (-x).exp())) as f32;
    [sigmoid(logit.into()), sigmoid(-f64::from(logit))]
}

/// Moves the counters past a call whose tasks are done.
pub(super) fn advance<T>(call: &Call<'_, T>, sequences: &[Sequence], state: &mut State) {
    for seq in sequences {
        for piece in pieces(&call.problem, *seq, state.counters[seq.slot]) {
            state.counters[seq.slot].advance(&piece, call.batch.rope.is_some());
        }
    }
}
