//! One call's arguments in host memory. What they look like without their data, and the validation
//! of that, is in [`form`] and [`check`]: other memories share it.

pub(crate) mod builders;
pub(crate) mod check;
pub(crate) mod form;
pub(crate) mod gradients;
pub(crate) mod maps;
pub(crate) mod merge;
pub(crate) mod tape;

use std::ops::{Add, Mul, Sub};
use std::sync::atomic::AtomicBool;

use crate::call::tape::Tape;
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::Counters;
use crate::problem::Problem;
use crate::tensor::{Rows, RowsMut, TensorView, TensorViewMut};
use builders::{input_builders, output_builders, rope_builders};
use check::{Tables, check_dtype};
use form::{Form, Gate, Lengths, OutputForm, Positions, RopeForm, Sequence};

/// Most new tokens per sequence that [`decode`](crate::decode()) takes.
pub const MAX_DECODE_TOKENS: usize = 16;

/// Queries, keys and values of one call, with their batch layout.
///
/// q [B, T, Hq, Dk], k [B, T, Hkv, Dk], v [B, T, Hkv, Dv], **unrotated**: rotation belongs to the
/// local branch only and is done inside ([`Self::rope`]). The last dimension is contiguous, all
/// other strides are free.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Queries [B, T, Hq, Dk] (packed: [total, Hq, Dk]).
    pub q: TensorView<'a, T>,
    /// Keys [B, T, Hkv, Dk] (packed: [total, Hkv, Dk]).
    pub k: TensorView<'a, T>,
    /// Values [B, T, Hkv, Dv] (packed: [total, Hkv, Dv]).
    pub v: TensorView<'a, T>,
    lengths: Lengths<'a>,
    slots: Option<&'a [usize]>,
    rope: Option<Rope<'a>>,
    pub(crate) cancel: Option<&'a AtomicBool>,
}

impl<'a, T> Inputs<'a, T> {
    /// A batch in which every sequence is T tokens long and sequence b uses slot b of the state.
    pub fn new(q: TensorView<'a, T>, k: TensorView<'a, T>, v: TensorView<'a, T>) -> Self {
        Self { q, k, v, lengths: Lengths::Full, slots: None, rope: None, cancel: None }
    }

    input_builders!('a, Rope<'a>);

    /// A flag that asks the call to end once another thread sets it: soon, by
    /// [`Error::Cancelled`](crate::Error::Cancelled), which says how many tokens of each sequence were
    /// taken in. State and outputs are valid up to there.
    ///
    /// ```
    /// # use infini_attn::{Error, Inputs, Outputs, Problem, State, TensorView, TensorViewMut, prefill};
    /// use std::sync::atomic::AtomicBool;
    /// # let problem = Problem::builder().head_dim(8).segment_len(16).build()?;
    /// # let mut state = State::new(&problem, 1)?;
    /// # let (x, mut o) = (vec![0.5f32; 100 * 8], vec![0.0f32; 100 * 8]);
    /// # let tensor = TensorView::new(&x, &[1, 100, 1, 8])?;
    /// # let outputs = Outputs::new(TensorViewMut::new(&mut o, &[1, 100, 1, 8])?);
    /// let stop = AtomicBool::new(true); // say, of a server whose client has hung up
    /// let inputs = Inputs::new(tensor, tensor, tensor).cancel(&stop);
    /// match prefill(&problem, &inputs, &[0.0], &mut state, outputs) {
    ///     Err(Error::Cancelled { taken }) => assert_eq!(taken[0] as u64, state.tokens(0)),
    ///     other => other?,
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    pub fn cancel(mut self, flag: &'a AtomicBool) -> Self {
        self.cancel = Some(flag);
        self
    }
}

/// What rows to rotate are made of.
pub(crate) trait Real:
    Copy + From<f32> + Mul<Output = Self> + Add<Output = Self> + Sub<Output = Self>
{
}

impl<F> Real for F where F: Copy + From<f32> + Mul<Output = F> + Add<Output = F> + Sub<Output = F> {}

/// Rotary position embedding of the local branch: the first R channels of q and k are rotated, the
/// rest pass. The memory always sees unrotated q and k.
#[derive(Clone, Copy, Debug)]
pub struct Rope<'a> {
    cos: TensorView<'a, f32>,
    sin: TensorView<'a, f32>,
    interleaved: bool,
    positions: Positions<'a>,
}

impl<'a> Rope<'a> {
    /// Tables [positions, R/2]; they may carry a magnitude factor. Channel i pairs with i + R/2
    /// (rotate-half). The row of a token is its absolute position, continued from the state.
    pub fn new(cos: TensorView<'a, f32>, sin: TensorView<'a, f32>) -> Self {
        Self { cos, sin, interleaved: false, positions: Positions::Continued }
    }

    rope_builders!('a);

    /// Rotates one row of at least R channels in place by table row `position`.
    pub(crate) fn rotate<F: Real>(&self, row: &mut [F], position: usize) {
        self.each_pair(row, position, |x, y, c, s| (x * c - y * s, y * c + x * s));
    }

    /// The transposed rotation: makes the gradient to a rotated row that to the row.
    pub(crate) fn rotate_back<F: Real>(&self, row: &mut [F], position: usize) {
        self.each_pair(row, position, |x, y, c, s| (x * c + y * s, y * c - x * s));
    }

    #[inline(always)]
    fn each_pair<F: Real>(
        &self,
        row: &mut [F],
        position: usize,
        turn: impl Fn(F, F, F, F) -> (F, F),
    ) {
        let half = self.cos.shape()[1];
        if half == 0 {
            return; // tables without columns have no rows to point at
        }
        // SAFETY: `resolve` compared both shapes and every position.
        let (cos, sin) =
            unsafe { (self.cos.rows().row(0, position, 0), self.sin.rows().row(0, position, 0)) };
        for i in 0..half {
            let (a, b) = if self.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            (row[a], row[b]) = turn(row[a], row[b], F::from(cos[i]), F::from(sin[i]));
        }
    }

    fn form(&self) -> RopeForm<'a> {
        RopeForm { cos: self.cos.layout(), sin: self.sin.layout(), positions: self.positions }
    }
}

/// Where the results go. o [B, T, Hq, Dv]; on request the log-sum-exp of the local branch (natural
/// log of Σ exp(scale · q·k), [B, Hq, T]) and the two branches before the gate. Packed: [total, Hq,
/// Dv] and [Hq, total].
#[derive(Debug)]
pub struct Outputs<'a, T> {
    pub(crate) o: TensorViewMut<'a, T>,
    pub(crate) lse: Option<TensorViewMut<'a, f32>>,
    pub(crate) a_dot: Option<TensorViewMut<'a, T>>,
    pub(crate) a_mem: Option<TensorViewMut<'a, T>>,
    pub(crate) tape: Option<&'a mut Tape>,
}

impl<'a, T> Outputs<'a, T> {
    /// Only the gated output.
    pub fn new(o: TensorViewMut<'a, T>) -> Self {
        Self { o, lse: None, a_dot: None, a_mem: None, tape: None }
    }

    /// Also what [`prefill_backward`](crate::prefill_backward) needs, on a tape. One that a call has filled is
    /// filled anew; a call that fails leaves it empty.
    pub fn tape(mut self, tape: &'a mut Tape) -> Self {
        self.tape = Some(tape);
        self
    }

    output_builders!(TensorViewMut<'a, T>, TensorViewMut<'a, f32>);

    /// Output rows for concurrent writers.
    pub(crate) fn rows(&mut self) -> OutputRows<'_, T> {
        OutputRows {
            o: self.o.rows(),
            lse: self.lse.as_mut().map(TensorViewMut::head_rows),
            a_dot: self.a_dot.as_mut().map(TensorViewMut::rows),
            a_mem: self.a_mem.as_mut().map(TensorViewMut::rows),
        }
    }
}

/// Writable rows of every requested output.
pub(crate) struct OutputRows<'a, T> {
    pub o: RowsMut<'a, T>,
    pub lse: Option<RowsMut<'a, f32>>,
    pub a_dot: Option<RowsMut<'a, T>>,
    pub a_mem: Option<RowsMut<'a, T>>,
}

/// A call whose every argument was checked.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// Rotation, if any.
    pub rope: Option<Rope<'a>>,
    form: Form<'a>,
}

impl Batch<'_> {
    /// Table row for token `t` of a sequence.
    pub fn position(&self, seq: &Sequence, t: usize) -> usize {
        self.form.position(seq, t)
    }

    /// Padded length of the token dimension: T, or total when packed.
    pub fn tokens(&self) -> usize {
        self.form.tokens()
    }

    /// Whether sequences follow each other without padding.
    pub fn packed(&self) -> bool {
        self.form.packed()
    }
}

/// Checks inputs and gate against the problem and a state's counters; the sequences go to `tables`.
pub(crate) fn resolve<'a, T>(
    problem: &Problem,
    inputs: &Inputs<'a, T>,
    gate: &'a [f32],
    counters: &[Counters],
    tables: &mut Tables,
) -> Result<Batch<'a>> {
    let form = Form {
        q: inputs.q.layout(),
        k: inputs.k.layout(),
        v: inputs.v.layout(),
        gate: Gate::Given(gate),
        lengths: inputs.lengths,
        slots: inputs.slots,
        rope: inputs.rope.as_ref().map(Rope::form),
    };
    form.resolve_into(problem, counters, tables)?;
    Ok(Batch { rope: inputs.rope, form })
}

/// Checks the element type and every output's shape.
pub(crate) fn check_outputs<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    outputs: &Outputs<'_, T>,
) -> Result<()> {
    check_dtype::<T>("q", problem.dtype())?;
    let form = OutputForm {
        o: outputs.o.layout(),
        lse: outputs.lse.as_ref().map(TensorViewMut::layout),
        a_dot: outputs.a_dot.as_ref().map(TensorViewMut::layout),
        a_mem: outputs.a_mem.as_ref().map(TensorViewMut::layout),
    };
    form.check(problem, &inputs.q.layout())
}

impl<'a, T> Inputs<'a, T> {
    /// q, k and v by rows; only after `resolve` has accepted them.
    pub(crate) fn rows(&self) -> InputRows<'a, T> {
        InputRows { q: self.q.rows(), k: self.k.rows(), v: self.v.rows() }
    }
}

/// Rows of q, k and v.
#[derive(Clone, Copy)]
pub(crate) struct InputRows<'a, T> {
    pub q: Rows<'a, T>,
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
}
