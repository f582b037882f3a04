//! The operator on candle's tensors: checks, copies where rows cannot be read, and candle's dispatch.

use std::cell::RefCell;
use std::sync::Mutex;

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Storage,
    StorageRef, Tensor,
};
use infini_attn::{Error, Slots};

use crate::batch::{self, Batch};
use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::{refused, wrapped};
use crate::gradient::{self, Record};
use crate::state::State;

pub(crate) const NAME: &str = "infini-attention";

/// What [`infini_attention_parts`] returns.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The gated output, [B, T, Hq, Dv] or packed [total, Hq, Dv].
    pub o: Tensor,
    /// Log-sum-exp of the local branch, natural log, f32 [B, Hq, T] or packed [Hq, total]; −∞ of padding.
    pub lse: Tensor,
    /// The local branch before the gate, shaped like o.
    pub a_dot: Tensor,
    /// The memory branch before the gate, shaped like o.
    pub a_mem: Tensor,
}

/// Infini-attention (arXiv 2404.07143, eq. 6 to 10) of new tokens, prompts and single ones alike
/// ([`infini_attn::forward`]); continues where the state stands, and advances it.
///
/// * `q` [B, T, Hq, Dk], `k` [B, T, Hkv, Dk], `v` [B, T, Hkv, Dv], or packed without B
///   ([`Batch::cu_seqlens`]); **unrotated** ([`Batch::rope`]). f32, f16 or bf16, on CUDA f16 or bf16: the
///   problem's type.
/// * `gate`: β, one logit per query head, f32 `[Hq]`, on the same device; ±∞ selects one branch alone. A NaN
///   is an error on the CPU; on CUDA, where nobody waits to read it, it makes the rows of its head NaN.
///
/// Tensors may be transposed or narrowed. Rows of channels are read where they lie; only tensors whose
/// last dimension is not contiguous, on CUDA also those whose rows do not start at multiples of 16 bytes,
/// are copied first, of which an event of the crate `tracing` tells (target `infini_attn_candle`, DEBUG).
///
/// On CUDA everything is enqueued on the stream of the state, ordered with that of the tensors by cudarc's
/// events, and the output comes from candle's allocator; nothing waits.
///
/// On the CPU the output has gradients to q, k, v and the gate, through the memory of all segments of the call
/// ([`infini_attn::prefill_backward`]); the state before the call is a constant. On CUDA there are none
/// yet: where an input tracks them, `backward` ends in candle's `BackwardNotSupported`.
///
/// # Errors
/// For tensors, lengths, slots or a gate that do not fit, by the name of the argument; for memory that is
/// not there. State and slots stay as they were.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use infini_attn_candle::{Batch, Problem, Slots, State, infini_attention};
/// let device = Device::Cpu;
/// let problem = Problem::builder().heads(8).kv_heads(2).head_dim(64).segment_len(128).build()?;
/// let mut state = State::new(&problem, 1, false, &device)?;
/// let q = Tensor::randn(0f32, 1.0, (1, 300, 8, 64), &device)?;
/// let kv = Tensor::randn(0f32, 1.0, (1, 300, 2, 64), &device)?;
/// let gate = Tensor::zeros(8, DType::F32, &device)?;
/// let o = infini_attention(&q, &kv, &kv, &gate, &mut state, &Batch::new())?;
/// assert_eq!(o.dims(), [1, 300, 8, 64]);
/// assert_eq!((state.tokens(0), state.open_len(0)), (300, 44));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn infini_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    gate: &Tensor,
    state: &mut State,
    batch: &Batch<'_>,
) -> Result<Tensor> {
    let mut outputs = run([q, k, v], gate, state, batch, false)?;
    Ok(outputs.remove(0))
}

/// [`infini_attention`], and the two branches before the gate with the local one's log-sum-exp; without
/// gradients, on any device.
///
/// # Errors
/// Those of [`infini_attention`].
pub fn infini_attention_parts(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    gate: &Tensor,
    state: &mut State,
    batch: &Batch<'_>,
) -> Result<Parts> {
    let outputs = run([q, k, v], gate, state, batch, true)?;
    let [o, lse, a_dot, a_mem] = outputs.try_into().expect("asked for");
    Ok(Parts { o, lse, a_dot, a_mem })
}

/// o, and on request lse, a_dot, a_mem.
fn run(
    qkv: [&Tensor; 3],
    gate: &Tensor,
    state: &mut State,
    batch: &Batch<'_>,
    parts: bool,
) -> Result<Vec<Tensor>> {
    check(qkv, gate, state, batch)?;
    let places = match (batch.rope, batch.positions) {
        (Some(_), None) => batch.places(qkv[0].dims(), state)?,
        _ => vec![],
    };
    let [q, k, v] =
        [("q", qkv[0]), ("k", qkv[1]), ("v", qkv[2])].map(|(name, t)| readable(name, t));
    let (q, k, v) = (q?.detach(), k?.detach(), v?.detach());
    let row = gate.detach().contiguous()?;
    let input = qkv.into_iter().chain([gate]).find(|t| t.track_op());
    // Locks that do not recurse come before candle's own.
    let call = Call {
        gate: Lent::new("gate", &row),
        rope: batch.rope.map(Rotation::new),
        batch,
        positions: batch.positions.unwrap_or(&places),
        parts,
        recorded: input.is_some(),
        record: RefCell::new(
            (input.is_some() && !parts && q.device().is_cpu()).then(Record::default),
        ),
        state: RefCell::new(state),
        kept: RefCell::default(),
    };
    let first = q.apply_op3_no_bwd(&k, &v, &call)?;
    let (record, problem) = (call.record.into_inner(), *call.state.borrow().problem());
    let mut kept = call.kept.into_inner();
    if let Some(record) = record {
        let positions = call.positions;
        let recorded =
            gradient::Recorded::new(problem, record, [q, k, v], row.clone(), batch, positions);
        return Ok(vec![gradient::put(kept.remove(0), qkv, gate, recorded)?]);
    }
    let kept = kept.into_iter();
    match input {
        None => {
            let plain =
                |(storage, shape)| Tensor::from_storage(storage, shape, BackpropOp::none(), false);
            Ok(std::iter::once(first).chain(kept.map(plain)).collect())
        }
        Some(input) => {
            kept.map(|output| input.apply_op1(Unsupported(Mutex::new(Some(output))))).collect()
        }
    }
}

/// What candle knows and the core does not: element types and devices.
fn check([q, k, v]: [&Tensor; 3], gate: &Tensor, state: &State, batch: &Batch<'_>) -> Result<()> {
    let place = state.place();
    let (rank, expected) = match batch.packed() {
        true => (3, "rank 3 [total, H, D]"),
        false => (4, "rank 4 [B, T, H, D]"),
    };
    for (argument, t) in [("q", q), ("k", k), ("v", v)] {
        if t.rank() != rank {
            let (got, expected) = (t.dims().to_vec(), expected.into());
            return Err(wrapped(Error::Shape { argument, got, expected }));
        }
    }
    if let (Some(positions), None) = (batch.positions, batch.rope) {
        let got = format!("{} rows without a rotation", positions.len());
        return Err(refused("positions", got, "none, or a rope beside them"));
    }
    for (name, t) in [("q", q), ("k", k), ("v", v), ("gate", gate)] {
        let got = format!("{:?}", t.device().location());
        if got != place {
            return Err(refused(name, format!("device {got}"), format!("{place} (the state's)")));
        }
    }
    let dtype = state.problem().dtype();
    for (name, t) in [("q", q), ("k", k), ("v", v)] {
        if !t.dtype().as_str().eq_ignore_ascii_case(&dtype.to_string()) {
            let (got, expected) = (t.dtype().as_str(), format!("{dtype} (the problem's)"));
            return Err(refused(name, format!("dtype {got}"), expected));
        }
    }
    if gate.dtype() != DType::F32 || gate.rank() != 1 {
        let got = format!("{} {:?}", gate.dtype().as_str(), gate.dims());
        return Err(refused("gate", got, format!("f32 [{}]", state.problem().heads())));
    }
    Ok(())
}

/// The tensor, or a copy of one whose rows of channels no backend reads where they lie.
fn readable(name: &str, t: &Tensor) -> Result<Tensor> {
    let Some((last, outer)) = t.stride().split_last() else { return Ok(t.clone()) };
    // Of CUDA's rows, which start at multiples of 16 bytes.
    let unit = if t.device().is_cuda() { 16 / t.dtype().size_in_bytes() } else { 1 };
    let moved = t.dims().iter().zip(outer).filter(|(extent, _)| **extent > 1);
    let aligned = moved.map(|(_, stride)| *stride).chain([t.layout().start_offset()]);
    if (*last == 1 || t.dims()[outer.len()] < 2) && aligned.into_iter().all(|at| at % unit == 0) {
        return Ok(t.clone());
    }
    let (shape, strides) = (t.dims(), t.stride());
    let offset = t.layout().start_offset();
    tracing::debug!(
        name,
        ?shape,
        ?strides,
        offset,
        "copied: rows that cannot be read where they lie"
    );
    t.force_contiguous()
}

/// One call, dispatched by candle, which holds the locks of q, k and v meanwhile.
pub(crate) struct Call<'a> {
    /// Contiguous.
    pub gate: Lent<'a>,
    pub rope: Option<Rotation<'a>>,
    pub batch: &'a Batch<'a>,
    /// With a rotation.
    pub positions: &'a [i64],
    pub parts: bool,
    /// Whether all outputs are kept, to be put into candle's graph, or all but the first.
    recorded: bool,
    /// What gradients need, if there are any.
    pub record: RefCell<Option<Record>>,
    state: RefCell<&'a mut State>,
    kept: RefCell<Vec<Output<Storage>>>,
}

/// A tensor of f32 while it is read.
pub(crate) struct Lent<'a> {
    pub name: &'static str,
    pub storage: StorageRef<'a>,
    pub layout: &'a Layout,
}

impl<'a> Lent<'a> {
    fn new(name: &'static str, tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { name, storage, layout }
    }
}

/// A rotation while its tables are read.
pub(crate) struct Rotation<'a> {
    pub cos: Lent<'a>,
    pub sin: Lent<'a>,
    pub interleaved: bool,
}

impl<'a> Rotation<'a> {
    pub fn new(rope: &'a batch::Rope) -> Self {
        let (cos, sin) = (Lent::new("cos", &rope.cos), Lent::new("sin", &rope.sin));
        Self { cos, sin, interleaved: rope.interleaved }
    }
}

/// As the core counts them.
pub(crate) fn strides(layout: &Layout) -> Vec<i64> {
    layout.stride().iter().map(|&stride| stride as i64).collect()
}

/// An output with its shape. A backend returns o, and on request lse, a_dot, a_mem.
pub(crate) type Output<S> = (S, Vec<usize>);

impl Call<'_> {
    /// Keeps what candle's dispatch has no place for, and returns what it has; `nothing` where that is not
    /// wanted.
    fn done<S>(
        &self,
        mut outputs: Vec<Output<S>>,
        nothing: Option<S>,
        wrap: fn(S) -> Storage,
    ) -> (S, Shape) {
        let (first, shape) = match nothing {
            Some(nothing) => (nothing, vec![]),
            None => outputs.remove(0),
        };
        let kept = outputs.into_iter().map(|(storage, shape)| (wrap(storage), shape));
        self.kept.replace(kept.collect());
        (first, shape.into())
    }
}

/// Shapes of the outputs: [B, T, Hq, Dv] and [B, Hq, T], or packed.
pub(crate) struct OutputShapes {
    pub o: Vec<usize>,
    pub lse: Vec<usize>,
}

impl OutputShapes {
    /// Of a q; what does not fit is refused by its name later.
    fn new(q: &Layout, problem: &infini_attn::Problem) -> Self {
        let mut o = q.dims().to_vec();
        if let Some(last) = o.last_mut() {
            *last = problem.value_dim();
        }
        Self { lse: lse_shape(&o), o }
    }
}

/// The log-sum-exp's shape beside an output's.
pub(crate) fn lse_shape(o: &[usize]) -> Vec<usize> {
    let mut lse = o.to_vec();
    lse.pop();
    if let [.., tokens, heads] = &mut lse[..] {
        std::mem::swap(tokens, heads);
    }
    lse
}

impl CustomOp3 for Call<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut state = self.state.borrow_mut();
        let shapes = OutputShapes::new(q_layout, state.problem());
        let qkv = [(q, q_layout), (k, k_layout), (v, v_layout)];
        #[cfg_attr(not(feature = "cuda"), expect(irrefutable_let_patterns))]
        let State::Cpu(state) = &mut **state else { unreachable!("devices were compared") };
        let outputs = match q.dtype() {
            DType::F32 => cpu::forward::<f32>(self, qkv, &shapes, state),
            DType::F16 => cpu::forward::<half::f16>(self, qkv, &shapes, state),
            DType::BF16 => cpu::forward::<half::bf16>(self, qkv, &shapes, state),
            other => unreachable!("{other:?}: types were compared"),
        }?;
        let nothing = self.recorded.then(|| CpuStorage::F32(vec![0.0]));
        Ok(self.done(outputs, nothing, Storage::Cpu))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let mut state = self.state.borrow_mut();
        let shapes = OutputShapes::new(q_layout, state.problem());
        let qkv = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let State::Cuda(state) = &mut **state else { unreachable!("devices were compared") };
        // Before the state advances.
        let nothing = self.recorded.then(|| cuda::nothing(&q.device)).transpose()?;
        let outputs = match q.dtype() {
            DType::F32 => cuda::forward::<f32>(self, qkv, &shapes, state),
            DType::F16 => cuda::forward::<half::f16>(self, qkv, &shapes, state),
            DType::BF16 => cuda::forward::<half::bf16>(self, qkv, &shapes, state),
            other => unreachable!("{other:?}: types were compared"),
        }?;
        Ok(self.done(outputs, nothing, Storage::Cuda))
    }
}

/// Stands in candle's graph for an output without gradients of a call on an input that tracks them: its
/// `backward` says so.
struct Unsupported(Mutex<Option<Output<Storage>>>);

impl Unsupported {
    fn take(&self) -> Output<Storage> {
        let mut output = self.0.lock().unwrap_or_else(|e| e.into_inner());
        output.take().expect("candle computes an operation once")
    }
}

impl CustomOp1 for Unsupported {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.take() {
            (Storage::Cpu(storage), shape) => Ok((storage, shape.into())),
            _ => unreachable!("computed where the input is"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.take() {
            (Storage::Cuda(storage), shape) => Ok((storage, shape.into())),
            _ => unreachable!("computed where the input is"),
        }
    }
}

/// Layout, slots, rotation of the batch into a call's inputs, which are of either backend's types.
macro_rules! described {
    ($inputs:expr, $batch:expr, $rope:expr) => {{
        let batch = $batch;
        let mut inputs = match batch.lengths {
            $crate::batch::Lengths::Full => $inputs,
            $crate::batch::Lengths::Padded(lens) => $inputs.seq_lens(lens),
            $crate::batch::Lengths::Ranges(ranges) => $inputs.seq_ranges(ranges),
            $crate::batch::Lengths::Packed(cu) => $inputs.cu_seqlens(cu),
        };
        if let Some(slots) = batch.slots {
            inputs = inputs.slots(slots);
        }
        if let Some(rope) = $rope {
            inputs = inputs.rope(rope);
        }
        inputs
    }};
}
pub(crate) use described;
