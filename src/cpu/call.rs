//! One call and its counters.

use crate::call::form::{Sequence, pieces};
use crate::call::{Batch, InputRows, OutputRows};
use crate::memory::Counters;
use crate::memory::blocks::KeyBlocks;
use crate::problem::{Problem, Update};

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
pub(super) fn advance<T>(call: &Call<'_, T>, sequences: &[Sequence], counters: &mut [Counters]) {
    for seq in sequences {
        let c = &mut counters[seq.slot];
        pieces(&call.problem, *seq, *c)
            .for_each(|piece| c.advance(&piece, call.batch.rope.is_some()));
    }
}

/// What the tasks of a call come across: scratch is made for no more.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    /// Tokens of the longest segment, as far as it gets.
    pub longest: usize,
    /// Whether a segment is completed.
    pub completes: bool,
    /// Whether one has a G ([`super::segment::transits`]).
    pub transits: bool,
}

impl Extent {
    pub fn of(p: &Problem, sequences: &[Sequence], counters: &[Counters]) -> Self {
        let n = p.segment_len();
        let mut all = Self { longest: 0, completes: false, transits: false };
        for seq in sequences {
            let c = &counters[seq.slot];
            let tokens = c.open_len + seq.len;
            all.longest = all.longest.max(tokens.min(n));
            all.completes |= tokens >= n;
            // The second segment of an empty memory is the first that finds something.
            let found = if c.committed > 0 { n } else { 2 * n };
            all.transits |= p.update() == Update::Delta && tokens >= found;
        }
        all
    }
}
