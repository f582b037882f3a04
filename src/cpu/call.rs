//! One call and its counters.

use super::cancel::Cancel;
use crate::call::form::{Piece, Sequence, pieces};
use crate::call::tape::Notes;
use crate::call::{Batch, InputRows, OutputRows};
use crate::memory::Counters;
use crate::memory::blocks::KeyBlocks;
use crate::problem::{EmptyMemory, Problem, Update};

/// Everything the tasks of one call share.
pub(crate) struct Call<'a, T> {
    pub problem: Problem,
    pub batch: Batch<'a>,
    pub blocks: KeyBlocks,
    pub inputs: InputRows<'a, T>,
    pub outputs: OutputRows<'a, T>,
    /// The tape, if it wants to know what segments find.
    pub notes: Option<Notes<'a>>,
    /// Per query head: weight of the memory branch, weight of the local branch.
    pub gates: &'a [[f32; 2]],
    pub cancel: Cancel<'a>,
    /// Whether it is so little work that the calling thread does it alone.
    pub inline: bool,
}

/// Tokens of each sequence that the state has taken in since the call began, in the order of the
/// call's sequences.
pub(super) fn taken_in(sequences: &mut [Sequence], counters: &[Counters]) -> Vec<usize> {
    sequences.sort_by_key(|s| (s.batch, s.first, s.len));
    sequences.iter().map(|s| (counters[s.slot].tokens as usize) - s.position).collect()
}

/// The gate as weights of both branches, each rounded on its own: 1 − g keeps its precision.
pub(crate) fn gate_weights(logit: f32) -> [f32; 2] {
    let sigmoid = |x: f64| (1.0 / (1.0 + (-x).exp())) as f32;
    [sigmoid(logit.into()), sigmoid(-f64::from(logit))]
}

/// Those of a head while it reads a memory that may be empty.
pub(super) fn weights_of(p: &Problem, gates: &[[f32; 2]], head: usize, empty: bool) -> [f32; 2] {
    match empty && p.empty_memory() == EmptyMemory::Bypass {
        true => [0.0, 1.0],
        false => gates[head],
    }
}

/// Moves the counters past a call whose tasks are done.
pub(super) fn advance<T>(call: &Call<'_, T>, sequences: &[Sequence], counters: &mut [Counters]) {
    for seq in sequences {
        let c = &mut counters[seq.slot];
        pieces(&call.problem, *seq, *c)
            .for_each(|piece| c.advance(&piece, call.batch.rope.is_some()));
    }
}

/// Flop of a decode of so many new tokens per sequence, each given with its open tokens.
pub(super) fn decode_flops(p: &Problem, sequences: impl Iterator<Item = (usize, usize)>) -> f64 {
    let [heads, kv_heads, dk, dv, n] =
        [p.heads(), p.kv_heads(), p.key_dim(), p.value_dim(), p.segment_len()].map(|x| x as f64);
    let sequence = |(new, open): (usize, usize)| {
        let (new, keys) = (new as f64, (new + open) as f64);
        let row = 2.0 * keys.min(n) * (dk + dv) + 2.0 * dk * dv;
        heads * new * row + kv_heads * (keys / n).floor() * 4.0 * n * dk * dv
    };
    sequences.map(sequence).sum()
}

impl<T> Call<'_, T> {
    /// Puts what a piece finds on the tape.
    ///
    /// # Safety
    /// Of one task per piece and KV head.
    pub unsafe fn note(&self, piece: &Piece, kv_head: usize, m: &[f32], z: &[f32]) {
        if let Some(notes) = &self.notes {
            // SAFETY: the caller's promise.
            unsafe { notes.note(piece, kv_head, m, z) };
        }
    }

    /// Sequences of a decode after which it looks whether it was cancelled, of so many.
    pub fn per_check(&self, sequences: usize) -> usize {
        match self.cancel.is_possible() && !self.inline {
            true => (4 * rayon::current_num_threads()).div_ceil(self.problem.kv_heads()),
            false => sequences.max(1),
        }
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
