//! The operator on typed tensors: what the CPU functions are for the host, argument by argument.
//!
//! Every argument is checked before anything is enqueued, with the CPU functions' errors. A call
//! goes to the stream of its state's [`Device`] and returns when it is enqueued. A
//! call into a graph is recorded by [`record_decode`] or, for anything else, by the plans themselves.

use cudarc::driver::{DevicePtr, DeviceRepr};

use super::Device;
use super::buffers::{Operands, TensorView, TensorViewMut};
use super::gate::Gate;
use super::state::State;
use super::table::SequenceTable;
use crate::call::builders::{input_builders, output_builders, rope_builders};
use crate::call::form::{Lengths, Positions};
use crate::cuda::operations::commit::plan_flush;
use crate::cuda::operations::decode::{Runs, plan_decode};
use crate::cuda::operations::forward::plan_forward;
use crate::cuda::operations::prefill::plan_prefill;
use crate::cuda::operations::segment::plan_segment;
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Addresses, Operand};
use crate::cuda::plan::call::{Call, DeviceRope};
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::tensor::DeviceTensor;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::problem::Problem;
use crate::trace::{Span, span};

/// Queries, keys and values of one call in device memory; see [`crate::Inputs`]. Rows start at
/// multiples of 16 bytes. Lengths and slots are the host's.
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
    table: Option<&'a SequenceTable>,
}

impl<'a, T> Inputs<'a, T> {
    /// A batch in which every sequence is T tokens long and sequence b uses slot b of the state.
    pub fn new(q: TensorView<'a, T>, k: TensorView<'a, T>, v: TensorView<'a, T>) -> Self {
        Self { q, k, v, lengths: Lengths::Full, slots: None, rope: None, table: None }
    }

    input_builders!('a, Rope<'a>);

    /// Slots and lengths from device memory, in place of the host's: for [`record_decode`] alone. Output
    /// rows behind a sequence's tokens become 0, their log-sum-exp −∞, and so do all rows of a sequence
    /// that is [padding](crate::cuda::PAD_SLOT).
    pub fn sequences_table(mut self, table: &'a SequenceTable) -> Self {
        self.table = Some(table);
        self
    }
}

/// Rotary position embedding of the local branch, tables in device memory; see [`crate::Rope`].
#[derive(Clone, Copy)]
pub struct Rope<'a> {
    cos: TensorView<'a, f32>,
    sin: TensorView<'a, f32>,
    interleaved: bool,
    positions: Positions<'a>,
    /// Of positions in device memory, with its address.
    buffer: Option<(&'a dyn DevicePtr<i64>, u64)>,
}

impl std::fmt::Debug for Rope<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rope({:?}, {:?}, interleaved: {})", self.cos, self.sin, self.interleaved)
    }
}

impl<'a> Rope<'a> {
    /// Tables [positions, R/2]. Channel i pairs with i + R/2 (rotate-half). The row of a token is its
    /// absolute position, continued from the state.
    pub fn new(cos: TensorView<'a, f32>, sin: TensorView<'a, f32>) -> Self {
        Self { cos, sin, interleaved: false, positions: Positions::Continued, buffer: None }
    }

    rope_builders!('a);

    /// The same from device memory, read and checked there: a sequence with a position outside the
    /// tables is taken in without rotation there, and [`State::status`] says so.
    pub fn device_positions(mut self, positions: &'a impl DevicePtr<i64>) -> Self {
        let address = positions.device_ptr(positions.stream()).0;
        self.positions = Positions::Device(positions.len());
        self.buffer = Some((positions, address));
        self
    }

    fn describe(&self) -> DeviceRope<'a> {
        let rope = DeviceRope::new(self.cos.tensor(), self.sin.tensor());
        let rope = rope.interleaved(self.interleaved);
        match self.positions {
            Positions::Continued => rope,
            Positions::Given(positions) => rope.positions(positions),
            Positions::Device(count) => rope.device_positions(count),
        }
    }
}

/// Where the results go, in device memory; see [`crate::Outputs`].
#[derive(Debug)]
pub struct Outputs<'a, T> {
    o: TensorViewMut<'a, T>,
    lse: Option<TensorViewMut<'a, f32>>,
    a_dot: Option<TensorViewMut<'a, T>>,
    a_mem: Option<TensorViewMut<'a, T>>,
}

impl<'a, T> Outputs<'a, T> {
    /// Only the gated output.
    pub fn new(o: TensorViewMut<'a, T>) -> Self {
        Self { o, lse: None, a_dot: None, a_mem: None }
    }

    output_builders!(TensorViewMut<'a, T>, TensorViewMut<'a, f32>);
}

/// [`crate::prefill`] on the device: any number of new tokens per sequence.
///
/// # Errors
/// Those of [`crate::prefill`]; [`Error::Unsupported`] when no kernels are compiled for the problem,
/// [`Error::Stride`] for rows that do not start at multiples of 16 bytes, [`Error::Value`] for a
/// rotation that the state has no room for. Nothing was enqueued then. [`Error::Launch`],
/// [`Error::Driver`] and [`Error::Capturing`] come from the device.
///
/// ```no_run
/// use half::bf16;
/// use infini_attn::{DType, Problem, cuda};
/// let device = cuda::Device::new(0)?;
/// let b = Problem::builder().heads(4).kv_heads(2).head_dim(64).segment_len(128);
/// let problem = b.dtype(DType::BF16).build()?;
/// let mut state = cuda::State::new(&device, &problem, 1, false)?;
/// let gate = cuda::Gate::new(&device, &[0.0; 4])?;
/// let q = device.upload(&vec![bf16::ONE; 300 * 4 * 64])?;
/// let (k, v) = (device.upload(&vec![bf16::ONE; 300 * 2 * 64])?, q.slice(..300 * 2 * 64));
/// let mut o = q.clone();
/// let inputs = cuda::Inputs::new(
///     cuda::TensorView::new(&q, &[1, 300, 4, 64])?,
///     cuda::TensorView::new(&k, &[1, 300, 2, 64])?,
///     cuda::TensorView::new(&v, &[1, 300, 2, 64])?,
/// );
/// let outputs = cuda::Outputs::new(cuda::TensorViewMut::new(&mut o, &[1, 300, 4, 64])?);
/// cuda::prefill(&problem, &inputs, &gate, &mut state, outputs)?;
/// assert_eq!((state.tokens(0), state.committed(0), state.open_len(0)), (300, 256, 44));
/// # Ok::<(), infini_attn::Error>(())
/// ```
pub fn prefill<T: Element + DeviceRepr>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &Gate,
    state: &mut State,
    outputs: Outputs<'_, T>,
) -> Result<()> {
    let span = span!("prefill", problem.shapes());
    span.run(|| {
        let options = state.device().prefill_options()?;
        now(&span, inputs, gate, state, outputs, |call, mirror| {
            plan_prefill(problem, call, mirror, &options)
        })
    })
}

/// [`prefill`] in one launch, for at most what is left of each sequence's segment: streaming segment
/// by segment.
///
/// # Errors
/// Those of [`prefill`], and [`Error::Value`] for a sequence that would leave its segment.
pub fn segment<T: Element + DeviceRepr>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &Gate,
    state: &mut State,
    outputs: Outputs<'_, T>,
) -> Result<()> {
    let span = span!("segment", problem.shapes());
    span.run(|| {
        let target = state.device().target()?;
        now(&span, inputs, gate, state, outputs, |call, mirror| {
            plan_segment(problem, call, mirror, &target)
        })
    })
}

/// [`crate::decode`] on the device: 1 to [`crate::MAX_DECODE_TOKENS`] new tokens per sequence (0 in
/// a ragged batch).
///
/// # Errors
/// Those of [`prefill`], and [`Error::Value`] for a sequence of more tokens.
pub fn decode<T: Element + DeviceRepr>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &Gate,
    state: &mut State,
    outputs: Outputs<'_, T>,
) -> Result<()> {
    let span = span!("decode", problem.shapes());
    span.run(|| {
        let options = state.device().decode_options(Runs::Once)?;
        now(&span, inputs, gate, state, outputs, |call, mirror| {
            plan_decode(problem, call, mirror, &options)
        })
    })
}

/// [`crate::forward`] on the device: prompts and single tokens in one call and one plan
/// ([`plan_forward`]).
///
/// # Errors
/// Those of [`prefill`].
pub fn forward<T: Element + DeviceRepr>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &Gate,
    state: &mut State,
    outputs: Outputs<'_, T>,
) -> Result<()> {
    let span = span!("forward", problem.shapes());
    span.run(|| {
        let options = state.device().prefill_options()?;
        now(&span, inputs, gate, state, outputs, |call, mirror| {
            plan_forward(problem, call, mirror, &options)
        })
    })
}

/// [`decode`] into the graph that the state's stream captures. Every replay decodes what its tensors
/// then hold, from wherever the state then stands, across ends of segments; before each,
/// [`State::advance`] with the plan that this returns. [`prepare_decode`] comes before the capture.
///
/// With [`Inputs::sequences_table`] every replay also brings them to the slots that the table then names;
/// before each, [`State::advance_table`].
///
/// # Errors
/// Those of [`decode`]; [`Error::Value`] when the stream captures nothing. With a table [`Error::Length`]
/// where it has another number of sequences than the batch, or more than the state has slots;
/// [`Error::Value`] for one of another stream, beside lengths or slots of the host, or with a packed batch.
///
/// # Safety
/// As long as the graph is replayed: the buffers of inputs, gate and outputs, the table and the state live
/// and stay where they are, and the application orders replays after what writes the inputs and before
/// what reads the outputs; the graph runs on the device's stream, after a successful
/// [`State::advance`] each time, or [`State::advance_table`] with what the table then holds. A table
/// that the device writes names no slot twice.
pub unsafe fn record_decode<T: Element + DeviceRepr>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &Gate,
    state: &State,
    mut outputs: Outputs<'_, T>,
) -> Result<Plan> {
    let span = span!("record_decode", problem.shapes());
    span.run(|| {
        if !state.device().is_capturing()? {
            return Err(Error::value("stream", "a stream that captures nothing", "one in capture"));
        }
        let plan = plan_replay(problem, inputs, gate, state, &outputs)?;
        plan.note(&span);
        let operands = operands(state.device(), inputs, gate, &mut outputs)?;
        let addresses = operands.addresses.clone().with(Operand::State, state.address());
        state.device().run(&plan, addresses)?;
        operands.finish()?;
        Ok(plan)
    })
}

/// Loads the kernels and makes the room that [`record_decode`] of the same shapes needs. (A plan for
/// any counters needs more of both than a call does.)
///
/// # Errors
/// Those of [`decode`].
pub fn prepare_decode<T: Element + DeviceRepr>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &Gate,
    state: &State,
    outputs: &Outputs<'_, T>,
) -> Result<()> {
    state.device().prepare(&plan_replay(problem, inputs, gate, state, outputs)?)
}

/// A decode step for any number of runs.
fn plan_replay<T: Element + DeviceRepr>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &Gate,
    state: &State,
    outputs: &Outputs<'_, T>,
) -> Result<Plan> {
    let call = describe(inputs, gate, outputs)?;
    let Some(table) = inputs.table else {
        let options = state.device().decode_options(Runs::Replay)?;
        return plan_decode(problem, &call, &state.mirror, &options);
    };
    inputs.check_table(table, state)?;
    // What the table holds now is not known here: nothing.
    let (slots, lens): (Vec<_>, Vec<_>) = (0..table.sequences()).map(|slot| (slot, 0)).unzip();
    let call = call.seq_lens(&lens).slots(&slots);
    plan_decode(problem, &call, &state.mirror, &state.device().decode_options(Runs::Table)?)
}

impl<T> Inputs<'_, T> {
    fn check_table(&self, table: &SequenceTable, state: &State) -> Result<()> {
        let length = |expected: String| {
            let got = table.sequences();
            Err(Error::Length { argument: "sequences_table", got, expected })
        };
        state.device().check_stream("sequences_table", table.device())?;
        if self.slots.is_some() || !matches!(self.lengths, Lengths::Full) {
            let got = "with lengths or slots of the host";
            return Err(Error::value("sequences_table", got, "without: the table holds both"));
        }
        match *self.q.shape() {
            [batch, ..] if self.q.shape().len() == 4 && batch != table.sequences() => {
                length(format!("{batch} (sequences of q)"))
            }
            _ if table.sequences() > state.sequences() => {
                length(format!("at most {} (slots of the state)", state.sequences()))
            }
            _ => Ok(()),
        }
    }
}

/// [`crate::flush`] on the device: writes the open segments of the given slots into their memories.
///
/// # Errors
/// Those of [`crate::flush`], and the device's.
pub fn flush(problem: &Problem, state: &mut State, slots: &[usize]) -> Result<()> {
    let span = span!("flush", problem.shapes());
    span.run(|| {
        state.device().refuse_capture("a flush", "record the plan of plan_flush")?;
        let plan = plan_flush(problem, &state.mirror, slots)?;
        plan.note(&span);
        state.advance_with(&plan, Addresses::new())
    })
}

impl State {
    /// Accounts for the next replay of a graph into which [`record_decode`] put this plan. Call it
    /// before the replay, and skip that if this fails.
    ///
    /// # Errors
    /// Those of [`Mirror::advance`]; nothing changes then.
    pub fn advance(&mut self, plan: &Plan) -> Result<()> {
        self.mirror.advance(plan)
    }

    /// The same for a graph recorded with [`Inputs::sequences_table`]: slot, or
    /// [`PAD_SLOT`](crate::cuda::PAD_SLOT), and number of new tokens of every sequence, as the table
    /// will hold them in that replay. Where other work on the device chooses them, [`Self::refresh`]
    /// afterwards in place of this.
    ///
    /// # Errors
    /// Those of [`Mirror::advance_table`]; nothing changes then.
    pub fn advance_table(&mut self, plan: &Plan, sequences: &[(usize, usize)]) -> Result<()> {
        self.mirror.advance_table(plan, sequences)
    }
}

/// Plans, enqueues, and moves the mirror.
fn now<T: Element + DeviceRepr>(
    span: &Span,
    inputs: &Inputs<'_, T>,
    gate: &Gate,
    state: &mut State,
    mut outputs: Outputs<'_, T>,
    plan: impl FnOnce(&Call<'_>, &Mirror) -> Result<Plan>,
) -> Result<()> {
    state.device().refuse_capture("a call", "record it with record_decode, or run its plan")?;
    if inputs.table.is_some() {
        let expected = "slots and lengths of the host, but for record_decode";
        return Err(Error::value("sequences_table", "a table in device memory", expected));
    }
    let plan = plan(&describe(inputs, gate, &outputs)?, &state.mirror)?;
    plan.note(span);
    let device = state.device().clone();
    let operands = operands(&device, inputs, gate, &mut outputs)?;
    state.advance_with(&plan, operands.addresses.clone())?;
    operands.finish().or_else(|error| {
        state.mirror.break_off(&plan)?;
        Err(error)
    })
}

/// The call without its addresses.
fn describe<'a, T: Element + DeviceRepr>(
    inputs: &Inputs<'a, T>,
    gate: &Gate,
    outputs: &Outputs<'_, T>,
) -> Result<Call<'a>> {
    let gate = DeviceTensor::contiguous(DType::F32, &[gate.heads()])?;
    let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|t| t.tensor());
    let mut call = Call::new(q, k, v, gate, outputs.o.tensor());
    call = match inputs.lengths {
        Lengths::Full => call,
        Lengths::Padded(lens) => call.seq_lens(lens),
        Lengths::Ranges(ranges) => call.seq_ranges(ranges),
        Lengths::Packed(cu) => call.cu_seqlens(cu),
    };
    if let Some(slots) = inputs.slots {
        call = call.slots(slots);
    }
    if let Some(rope) = &inputs.rope {
        call = call.rope(rope.describe());
    }
    if let Some(lse) = &outputs.lse {
        call = call.lse(lse.tensor());
    }
    if let Some(a_dot) = &outputs.a_dot {
        call = call.a_dot(a_dot.tensor());
    }
    if let Some(a_mem) = &outputs.a_mem {
        call = call.a_mem(a_mem.tensor());
    }
    Ok(call)
}

/// The addresses of a call's operands but the state, and their order with other streams' work.
fn operands<'s, T: Element + DeviceRepr>(
    device: &'s Device,
    inputs: &'s Inputs<'_, T>,
    gate: &'s Gate,
    outputs: &'s mut Outputs<'_, T>,
) -> Result<Operands<'s>> {
    let mut operands = Operands::new(device)?;
    operands.read(Operand::Q, &inputs.q)?;
    operands.read(Operand::K, &inputs.k)?;
    operands.read(Operand::V, &inputs.v)?;
    operands.buffer(Operand::Gate, gate.data(), gate.address)?;
    if let Some(rope) = &inputs.rope {
        operands.read(Operand::Cos, &rope.cos)?;
        operands.read(Operand::Sin, &rope.sin)?;
        if let (Positions::Device(_), Some((positions, address))) = (rope.positions, rope.buffer) {
            operands.buffer(Operand::Positions, positions, address)?;
        }
    }
    if let Some(table) = inputs.table {
        // On the call's own stream: nothing to order.
        operands.addresses.set(Operand::Sequences, table.address());
    }
    operands.write(Operand::O, &mut outputs.o)?;
    if let Some(lse) = &mut outputs.lse {
        operands.write(Operand::Lse, lse)?;
    }
    if let Some(a_dot) = &mut outputs.a_dot {
        operands.write(Operand::ADot, a_dot)?;
    }
    if let Some(a_mem) = &mut outputs.a_mem {
        operands.write(Operand::AMem, a_mem)?;
    }
    operands.ordered()?;
    Ok(operands)
}
