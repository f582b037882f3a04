//! The CPU backend: f32 arithmetic, rayon tasks, the `gemm` crate's products, run-time SIMD choice.
//!
//! Work runs in the rayon pool the caller is in (`pool.install(|| prefill(..))`), else the global
//! one; a decode of very little work in the calling thread.

mod attention;
pub mod backward;
mod call;
mod cancel;
mod decode;
pub mod maps;
mod matmul;
pub mod merge;
mod pack;
mod phases;
mod pool;
mod prefill;
mod segment;
pub mod simd;
pub mod view;
mod weights;
mod workspace;

use call::{Call, decode_flops, gate_weights, taken_in};

use cancel::Cancel;
use workspace::Workspace;

use crate::alloc;
use crate::call::check::check_longest;
use crate::call::tape::Tape;
use crate::call::{Inputs, MAX_DECODE_TOKENS, Outputs, check_outputs, resolve};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::memory::blocks::KeyBlocks;
use crate::memory::{State, check_slots};
use crate::problem::Problem;
use crate::trace::{Span, span};

/// Infini-attention over any number of new tokens per sequence; continues where `state` stands.
///
/// Per segment of N tokens and query head (arXiv 2404.07143, eq. 6 to 10): o = g · A_mem + (1 − g)
/// · A_dot with A_dot the causal softmax attention inside the segment, A_mem = σ(q) M / σ(q)·z
/// retrieved from everything before it, g = sigmoid(β). A completed segment is written into (M, z)
/// by the problem's rule; tokens past the last full segment stay in the open segment and are
/// committed once, by the call that completes it. Any split of a stream into calls gives the same
/// result.
///
/// * `inputs`: q [B, T, Hq, Dk], k [B, T, Hkv, Dk], v [B, T, Hkv, Dv], or packed; unrotated.
/// * `gate`: β, one logit per query head, `[Hq]`; ±∞ selects one branch alone.
/// * `state`: advanced by the call.
/// * `outputs`: o [B, T, Hq, Dv] and on request log-sum-exp, A_dot, A_mem.
///
/// Runs in the caller's rayon pool, whose threads are busy with it until it ends: what must not wait,
/// decoding say, runs in another pool. Memory beyond inputs, outputs and state is bounded
/// independently of T. [`Inputs::cancel`] ends a call early.
///
/// # Errors
/// A shape, stride, length, dtype, slot, position or problem that does not fit is refused before
/// anything is written, by an [`Error`] that names the argument; so is a call for whose
/// workspace memory does not suffice ([`Error::OutOfMemory`]) or threads cannot
/// be started ([`Error::Threads`]).
///
/// ```
/// use infini_attn::{Inputs, Outputs, Problem, State, TensorView, TensorViewMut, prefill};
/// let problem = Problem::builder().heads(4).kv_heads(2).head_dim(64).segment_len(128).build()?;
/// let mut state = State::new(&problem, 1)?;
/// let (q, k, v) = (vec![0.1f32; 300 * 4 * 64], vec![0.2; 300 * 2 * 64], vec![0.3; 300 * 2 * 64]);
/// let mut o = vec![0.0f32; 300 * 4 * 64];
/// let inputs = Inputs::new(
///     TensorView::new(&q, &[1, 300, 4, 64])?,
///     TensorView::new(&k, &[1, 300, 2, 64])?,
///     TensorView::new(&v, &[1, 300, 2, 64])?,
/// );
/// let outputs = Outputs::new(TensorViewMut::new(&mut o, &[1, 300, 4, 64])?);
/// prefill(&problem, &inputs, &[0.0; 4], &mut state, outputs)?;
/// assert_eq!((state.tokens(0), state.committed(0), state.open_len(0)), (300, 256, 44));
/// # Ok::<(), infini_attn::Error>(())
/// ```
pub fn prefill<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
    outputs: Outputs<'_, T>,
) -> Result<()> {
    run(problem, inputs, gate, state, outputs, Entry::Prefill)
}

/// [`prefill()`] for generation: 1 to [`MAX_DECODE_TOKENS`] new tokens per sequence (0 in a ragged
/// batch), which may end several segments. Same meaning and arguments; the open segment is attended
/// where it lies and each (sequence, KV head) is one task.
///
/// # Errors
/// As [`prefill()`], and [`Error::Value`] for a sequence of more than
/// [`MAX_DECODE_TOKENS`] tokens.
pub fn decode<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
    outputs: Outputs<'_, T>,
) -> Result<()> {
    run(problem, inputs, gate, state, outputs, Entry::Decode)
}

/// [`prefill()`] or [`decode()`], whichever serves the batch: a step of continuous batching, in which some
/// sequences bring a prompt and others a token. (Which of the two it is can change the last bits.)
///
/// # Errors
/// As [`prefill()`].
///
/// ```
/// use infini_attn::{Inputs, Outputs, Problem, State, TensorView, TensorViewMut, forward};
/// let problem = Problem::builder().heads(4).kv_heads(2).head_dim(64).segment_len(128).build()?;
/// let mut state = State::new(&problem, 8)?;
/// let (q, kv) = (vec![0.1f32; 202 * 4 * 64], vec![0.2; 202 * 2 * 64]);
/// let mut o = vec![0.0f32; 202 * 4 * 64];
/// let inputs = Inputs::new(
///     TensorView::new(&q, &[202, 4, 64])?,
///     TensorView::new(&kv, &[202, 2, 64])?,
///     TensorView::new(&kv, &[202, 2, 64])?,
/// );
/// // A prompt of 200 tokens for slot 6, a token each for slots 1 and 3.
/// let inputs = inputs.cu_seqlens(&[0, 200, 201, 202]).slots(&[6, 1, 3]);
/// let outputs = Outputs::new(TensorViewMut::new(&mut o, &[202, 4, 64])?);
/// forward(&problem, &inputs, &[0.0; 4], &mut state, outputs)?;
/// assert_eq!([1, 3, 6].map(|slot| state.tokens(slot)), [1, 1, 200]);
/// # Ok::<(), infini_attn::Error>(())
/// ```
pub fn forward<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
    outputs: Outputs<'_, T>,
) -> Result<()> {
    run(problem, inputs, gate, state, outputs, Entry::Forward)
}

/// The function that was called.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    Prefill,
    Decode,
    Forward,
}

impl State {
    /// Whether [`decode()`] of `tokens` new tokens in every slot is so little work that the calling
    /// thread does it alone: it need not be taken into a pool then.
    pub fn decodes_inline(&self, tokens: usize) -> bool {
        let lens = self.counters.iter().map(|c| (tokens, c.open_len));
        tokens <= MAX_DECODE_TOKENS && pool::inline(decode_flops(&self.problem, lens))
    }
}

/// Writes the open segments of the given slots into their memories; the next token of such a slot
/// opens a new segment of full length. `tokens` (the position) does not change; an empty open
/// segment is left as it is.
///
/// # Errors
/// [`Error::Problem`] when the state belongs to another problem,
/// [`Error::Value`] for a slot out of range or named twice,
/// [`Error::OutOfMemory`]. Nothing is written then.
pub fn flush(problem: &Problem, state: &mut State, slots: &[usize]) -> Result<()> {
    let span = span!("flush", problem.shapes());
    span.run(|| {
        problem.check_same(&state.problem)?;
        check_slots(slots, state.sequences())?;
        span.slots(slots.iter().copied());
        span.lens(slots.iter().map(|&slot| state.open_len(slot)));
        pool::start()?;
        decode::flush(problem, state, slots)
    })
}

/// The one way in: everything is checked here, before anything is written.
fn run<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
    mut outputs: Outputs<'_, T>,
    entry: Entry,
) -> Result<()> {
    let span = match entry {
        Entry::Prefill => span!("prefill", problem.shapes()),
        Entry::Decode => span!("decode", problem.shapes()),
        Entry::Forward => span!("forward", problem.shapes()),
    };
    let mut workspace = Workspace::take();
    let (called, mut tape) = ((entry, &span), outputs.tape.take());
    let result = span.run(|| {
        let room = (&mut workspace, tape.as_deref_mut());
        run_in(room, called, problem, inputs, gate, state, outputs)
    });
    match result {
        Ok(()) => workspace.keep(),
        Err(_) => tape.into_iter().for_each(Tape::clear),
    }
    result
}

fn run_in<T: Element>(
    (workspace, tape): (&mut Workspace, Option<&mut Tape>),
    (entry, span): (Entry, &Span),
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
    mut outputs: Outputs<'_, T>,
) -> Result<()> {
    problem.check_same(&state.problem)?;
    let Workspace { tables, gates, decoding: scratch, spare } = workspace;
    let batch = resolve(problem, inputs, gate, &state.counters, tables)?;
    let sequences = &mut tables.sequences;
    span.slots(sequences.iter().map(|s| s.slot));
    span.lens(sequences.iter().map(|s| s.len));
    check_outputs(problem, inputs, &outputs)?;
    check_longest(sequences, (entry == Entry::Decode).then_some(MAX_DECODE_TOKENS))?;
    let short = || sequences.iter().all(|s| s.len <= MAX_DECODE_TOKENS);
    let decoding = entry == Entry::Decode || entry == Entry::Forward && short();
    let lens = || sequences.iter().map(|s| (s.len, state.counters[s.slot].open_len));
    let inline = decoding && pool::inline(decode_flops(problem, lens()));
    if !inline {
        pool::start()?;
    }
    let notes = match tape {
        Some(tape) => {
            tape.begin(state, sequences, !decoding)?;
            tape.notes()
        }
        None => None,
    };
    alloc::refill(gates, gate.iter().copied().map(gate_weights), "the gate's weights")?;
    let call = Call {
        problem: *problem,
        batch,
        blocks: KeyBlocks::new(problem),
        inputs: inputs.rows(),
        outputs: outputs.rows(),
        notes,
        gates,
        cancel: match decoding {
            true => Cancel::between_tasks(inputs.cancel),
            false => Cancel::within_tasks(inputs.cancel),
        },
        inline,
    };
    let first_rotation = batch.rope.is_some() && state.ensure_rotated()?;
    let mut result = match decoding {
        true => decode::run(&call, sequences, state, (scratch, spare)),
        false => prefill::run(&call, sequences, state),
    };
    if let Err(Error::Cancelled { taken }) = &mut result {
        *taken = taken_in(sequences, &state.counters);
    }
    let nothing_written = match &result {
        Err(Error::Cancelled { taken }) => taken.iter().all(|&taken| taken == 0),
        // Only for want of memory, before anything was.
        Err(_) => true,
        Ok(()) => false,
    };
    if first_rotation && nothing_written {
        state.forget_rotated();
    }
    state.note_filled(sequences.iter().map(|s| s.slot));
    result?;
    for seq in sequences.iter().filter(|_| !batch.packed()) {
        call.clear_padding(seq, batch.tokens());
    }
    Ok(())
}
