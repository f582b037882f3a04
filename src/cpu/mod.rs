//! The CPU backend: f32 arithmetic, rayon tasks, the `gemm` crate's products, run-time SIMD choice.
//!
//! Work runs in the rayon pool the caller is in (`pool.install(|| prefill(..))`), else the global
//! one.

mod attention;
mod decode;
mod maps;
mod matmul;
mod prefill;
mod segment;
mod simd;

pub use maps::{KeySums, SegmentMap, apply, compose, key_sums, segment_map};

use attention::{Call, Piece, gate_weights};

use crate::call::{self, Sequence};
use crate::memory::{Counters, KeyBlocks};
use crate::{Element, Error, Inputs, Outputs, Problem, Result, State};

/// Most new tokens per sequence that [`decode`] takes.
pub const MAX_DECODE_TOKENS: usize = 16;

/// Any number of tokens per sequence; see [`crate::prefill`].
///
/// # Errors
/// As [`crate::prefill`].
pub fn prefill<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
    outputs: Outputs<'_, T>,
) -> Result<()> {
    run(problem, inputs, gate, state, outputs, None)
}

/// 1 to 16 new tokens per sequence; see [`crate::decode`].
///
/// # Errors
/// As [`crate::decode`].
pub fn decode<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
    outputs: Outputs<'_, T>,
) -> Result<()> {
    run(problem, inputs, gate, state, outputs, Some(MAX_DECODE_TOKENS))
}

/// Commits open segments; see [`crate::flush`].
///
/// # Errors
/// As [`crate::flush`].
pub fn flush(problem: &Problem, state: &mut State, slots: &[usize]) -> Result<()> {
    problem.check_same(&state.problem)?;
    call::check_slots(slots, state.sequences())?;
    decode::flush(problem, state, slots);
    Ok(())
}

/// The one way in: everything is checked here, before anything is written.
fn run<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
    mut outputs: Outputs<'_, T>,
    max_tokens: Option<usize>,
) -> Result<()> {
    problem.check_same(&state.problem)?;
    let (batch, sequences) = call::resolve(problem, inputs, gate, &state.counters)?;
    call::check_outputs(problem, inputs, &outputs)?;
    let longest = sequences.iter().enumerate().max_by_key(|(_, s)| s.len);
    if let (Some(max), Some((b, s))) = (max_tokens, longest)
        && s.len > max
    {
        let expected = format!("0 to {max} new tokens (use prefill for more)");
        return Err(Error::value(format!("q (sequence {b})"), s.len, expected));
    }
    if batch.rope.is_some() {
        state.ensure_rotated();
    }
    let call = Call {
        problem: *problem,
        batch,
        blocks: KeyBlocks::new(problem),
        inputs: inputs.rows(),
        outputs: outputs.rows(),
        gates: gate.iter().copied().map(gate_weights).collect(),
    };
    if max_tokens.is_some() {
        decode::run(&call, &sequences, state);
    } else {
        prefill::run(&call, &sequences, state);
    }
    for seq in sequences.iter().filter(|_| !batch.packed) {
        call.clear_padding(seq, batch.tokens);
    }
    Ok(())
}

/// Cuts one sequence's call at segment ends.
fn pieces(p: &Problem, seq: Sequence, counters: Counters) -> impl Iterator<Item = Piece> + use<> {
    let n = p.segment_len();
    let (mut start, mut cached, mut empty) = (0, counters.open_len, counters.committed == 0);
    std::iter::from_fn(move || {
        let len = (seq.len - start).min(n - cached);
        let full = cached + len == n;
        let piece = Piece { seq, start, len, cached, full, empty };
        (start, cached, empty) = (start + len, 0, empty && !full);
        (len > 0).then_some(piece)
    })
}

impl Counters {
    /// Accounts for a piece.
    fn advance(&mut self, piece: &Piece, rotated: bool) {
        self.tokens += piece.len as u64;
        self.open_len = piece.cached + piece.len;
        self.rotated = rotated;
        if piece.full {
            self.committed += self.open_len as u64;
            self.open_len = 0;
        }
    }
}
