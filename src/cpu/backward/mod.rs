//! Gradients of a prefill (docs/gradients.md): eq. (6) to (10) backwards, segment by segment.
//!
//! With Λ and λ the gradients to M and z, a segment gives the memory it found Λ ← Λ + E − G Λ, where E is
//! what its queries read and G the delta rule's own of the forward pass. As there, tasks walk through one
//! (sequence, KV head) each where these alone fill the cores ([`chains`]), or segments run in parallel
//! ([`phases`]); both by the same functions, equal to the bit.

mod chains;
mod elementwise;
mod phases;
mod records;
mod segment;
mod tile;

use crate::alloc;
use crate::call::check::{Tables, check_dtype};
use crate::call::form::{Piece, Sequence, piece, piece_count};
use crate::call::gradients::{GradientRows, InputGradients, OutputGradientRows, OutputGradients};
use crate::call::tape::Tape;
use crate::call::{Batch, InputRows, Inputs, resolve};
use crate::cpu::call::{gate_weights, weights_of};
use crate::cpu::cancel::Cancel;
use crate::cpu::pack::PieceTokens;
use crate::cpu::{pool, prefill};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::State;
use crate::memory::blocks::KeyBlocks;
use crate::memory::gradient::StateGradient;
use crate::memory::heads::{Heads, OpenRef};
use crate::problem::Problem;
use crate::trace::{Span, span};

/// What memory is for, in errors.
const WORKSPACE: &str = "the workspace of gradients";

/// Gradients of a loss with respect to the inputs of a [`prefill()`](crate::prefill()) and to the state
/// before it, from those with respect to its outputs and to the state after it (docs/gradients.md).
///
/// * `inputs`, `gate`: those of the call.
/// * `tape`: what the call left ([`Outputs::tape`](crate::Outputs::tape)), or [`Tape::of`] the state
///   before it.
/// * `outputs`: o and log-sum-exp of the call and dL/do, on request those of the other outputs.
/// * `state`: dL/d(state after the call), in whose place dL/d(state before it) comes. Slots that the call
///   does not name stay.
/// * `gradients`: dL/dq, dL/dk, dL/dv in the inputs' type, dL/dβ in f32. Arithmetic is f32.
///
/// Where the denominator is clamped its gradient is 0; a branch that the gate closes has none.
/// Memory beyond arguments and tape is bounded independently of T, but where the tape does not hold the
/// memory that segments found: then it is kept for one of many segments. The bits do not depend on the number of
/// threads.
///
/// # Errors
/// As [`prefill()`](crate::prefill()); [`Error::Value`](crate::Error::Value) for a tape of another call or one
/// that no call has filled; [`Error::Problem`](crate::Error::Problem) and
/// [`Error::Length`](crate::Error::Length) for a gradient of other states. Nothing has been written then.
/// After [`Error::Cancelled`](crate::Error::Cancelled) (no token) what was written means nothing, `state`
/// included.
///
/// ```
/// use infini_attn::*;
/// let problem = Problem::builder().heads(2).kv_heads(1).head_dim(8).segment_len(16).build()?;
/// let (q, kv) = (vec![0.1f32; 40 * 2 * 8], vec![0.2f32; 40 * 8]);
/// let (q, kv) = (TensorView::new(&q, &[1, 40, 2, 8])?, TensorView::new(&kv, &[1, 40, 1, 8])?);
/// let (inputs, gate) = (Inputs::new(q, kv, kv), [0.0; 2]);
/// let (mut o, mut lse) = (vec![0.0f32; 40 * 2 * 8], vec![0.0f32; 2 * 40]);
/// let (mut state, mut tape) = (State::new(&problem, 1)?, Tape::new());
/// let outputs = Outputs::new(TensorViewMut::new(&mut o, &[1, 40, 2, 8])?)
///     .lse(TensorViewMut::new(&mut lse, &[1, 2, 40])?)
///     .tape(&mut tape);
/// prefill(&problem, &inputs, &gate, &mut state, outputs)?;
///
/// let ones = vec![1.0f32; o.len()]; // of the loss Σ o
/// let results = OutputGradients::new(
///     TensorView::new(&o, &[1, 40, 2, 8])?,
///     TensorView::new(&lse, &[1, 2, 40])?,
///     TensorView::new(&ones, &[1, 40, 2, 8])?,
/// );
/// let (mut dq, mut dk, mut dv, mut dbeta) = (o.clone(), vec![0.0; 320], vec![0.0; 320], [0.0; 2]);
/// let gradients = InputGradients::new(
///     TensorViewMut::new(&mut dq, &[1, 40, 2, 8])?,
///     TensorViewMut::new(&mut dk, &[1, 40, 1, 8])?,
///     TensorViewMut::new(&mut dv, &[1, 40, 1, 8])?,
///     &mut dbeta,
/// );
/// let mut d_state = StateGradient::new(&problem, 1)?;
/// prefill_backward(&problem, &inputs, &gate, &tape, &results, &mut d_state, gradients)?;
/// assert!(dv.iter().all(|dv| *dv > 0.0));
/// # Ok::<(), infini_attn::Error>(())
/// ```
pub fn prefill_backward<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    tape: &Tape,
    outputs: &OutputGradients<'_, T>,
    state: &mut StateGradient<'_>,
    gradients: InputGradients<'_, T>,
) -> Result<()> {
    let span = span!("prefill_backward", problem.shapes());
    span.run(|| run(&span, problem, inputs, gate, tape, outputs, state, gradients))
}

#[allow(clippy::too_many_arguments)]
fn run<T: Element>(
    span: &Span,
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    tape: &Tape,
    outputs: &OutputGradients<'_, T>,
    state: &mut StateGradient<'_>,
    mut gradients: InputGradients<'_, T>,
) -> Result<()> {
    let start = tape.start()?;
    problem.check_same(start.problem())?;
    problem.check_same(state.problem())?;
    let mut tables = Tables::default();
    let batch = resolve(problem, inputs, gate, &start.counters, &mut tables)?;
    let mut sequences = tables.sequences;
    span.slots(sequences.iter().map(|s| s.slot));
    span.lens(sequences.iter().map(|s| s.len));
    check_dtype::<T>("q", problem.dtype())?;
    tape.check(&sequences)?;
    outputs.check(problem, inputs)?;
    gradients.check(problem, inputs)?;
    state.check(start.sequences())?;
    pool::start()?;
    if batch.rope.is_some() {
        state.ensure_rotated()?;
    }
    sequences.sort_unstable_by_key(|s| (std::cmp::Reverse(s.len), s.slot));
    let gates = gate.iter().copied().map(gate_weights);
    let gates = alloc::collected(gates, WORKSPACE)?;
    let d_gates = alloc::zeroed(&[sequences.len(), problem.heads()], WORKSPACE)?;
    Cancel::within_tasks(inputs.cancel).go_on(sequences.len())?;
    let (_, heads) = state.state.split()?;
    let open = start.open.read();
    let call = Backward {
        problem: *problem,
        batch,
        blocks: KeyBlocks::new(problem),
        inputs: inputs.rows(),
        outputs: outputs.rows(),
        gates: &gates,
        cancel: Cancel::within_tasks(inputs.cancel),
        bptt_segments: gradients.bptt_segments,
        tape,
        start,
        open: &open,
        sequences: &sequences,
        heads,
        gradients: GradientRows::of(&mut gradients),
    };
    let d_gates = match prefill::heads_per_chain(problem.kv_heads(), &sequences) {
        Some(_) => chains::run(&call, d_gates)?,
        None => phases::run(&call, d_gates)?,
    };
    call.cancel.go_on(sequences.len())?;
    call.clear_padding();
    for (h, gradient) in gradients.gate.iter_mut().enumerate() {
        let of_sequences = d_gates.chunks_exact(problem.heads()).map(|d_gates| d_gates[h]);
        *gradient = of_sequences.sum::<f64>() as f32;
    }
    Ok(())
}

/// Everything the tasks of one call share.
struct Backward<'a, T> {
    problem: Problem,
    batch: Batch<'a>,
    blocks: KeyBlocks,
    inputs: InputRows<'a, T>,
    outputs: OutputGradientRows<'a, T>,
    gradients: GradientRows<'a, T>,
    /// Per query head: weight of the memory branch, weight of the local branch.
    gates: &'a [[f32; 2]],
    cancel: Cancel<'a>,
    bptt_segments: Option<usize>,
    tape: &'a Tape,
    /// The state before the call, and its open segments.
    start: &'a State,
    open: &'a crate::memory::open::OpenSegments,
    /// Longest first.
    sequences: &'a [Sequence],
    /// Λ and λ, and the gradients to open segments.
    heads: Heads<'a>,
}

impl<T: Element> Backward<'_, T> {
    /// Gate weights of a head while reading a memory that may be empty.
    fn weights(&self, head: usize, empty: bool) -> [f32; 2] {
        weights_of(&self.problem, self.gates, head, empty)
    }

    /// Pieces of sequence `i`.
    fn count(&self, i: usize) -> usize {
        let seq = self.sequences[i];
        piece_count(&self.problem, seq, self.start.counters[seq.slot])
    }

    /// The `j`-th of them.
    fn piece(&self, i: usize, j: usize) -> Piece {
        let seq = self.sequences[i];
        piece(&self.problem, seq, self.start.counters[seq.slot], j)
    }

    /// Whether what the `j`-th piece of a sequence finds in the memory is a constant.
    fn is_cut(&self, j: usize) -> bool {
        self.bptt_segments.is_some_and(|segments| j.is_multiple_of(segments))
    }

    /// The open segment that a piece's sequence began with.
    fn open(&self, piece: &Piece, kv_head: usize) -> OpenRef<'_> {
        self.open.head(&self.problem, piece.seq.slot, kv_head)
    }

    /// A piece's tokens where they lie.
    fn tokens(&self, piece: &Piece, kv_head: usize) -> PieceTokens<'_, '_, T> {
        PieceTokens {
            inputs: &self.inputs,
            blocks: self.blocks,
            cancel: &self.cancel,
            piece: *piece,
            kv_head,
            open: self.open(piece, kv_head),
        }
    }

    /// M and z that the call found.
    fn found(&self, slot: usize, kv_head: usize) -> (&[f32], &[f32]) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        let i = slot * self.problem.kv_heads() + kv_head;
        (&self.start.m[i * dk * dv..][..dk * dv], &self.start.z[i * dk..][..dk])
    }

    /// Zeros to the gradients of padding.
    fn clear_padding(&self) {
        if self.batch.packed() {
            return;
        }
        let (gradients, p) = (&self.gradients, &self.problem);
        for seq in self.sequences {
            for t in (0..seq.first).chain(seq.first + seq.len..self.batch.tokens()) {
                // SAFETY: inside the shapes that were compared; padding belongs to no task.
                unsafe {
                    (0..p.heads()).for_each(|h| zero(gradients.q.row(seq.batch, t, h)));
                    for h in 0..p.kv_heads() {
                        zero(gradients.k.row(seq.batch, t, h));
                        zero(gradients.v.row(seq.batch, t, h));
                    }
                }
            }
        }
    }
}

fn zero<T: Element>(row: &mut [T]) {
    row.fill(bytemuck::Zeroable::zeroed());
}
