//! The operator.

use infini_attn::{DType, Element, Inputs, Rope, TensorView};
use pyo3::prelude::*;

use crate::batch::{self, Batch};
use crate::dlpack::{Memory, Scalar, by_dtype};
use crate::error::Flag;
use crate::problem::Policies;
use crate::run::{Advanced, Wanted, run};
use crate::state::State;
use crate::tensor::{self, Kind};
use crate::{delegate, error, rope};

/// One call's arguments, their memory borrowed.
pub struct Arguments<'py> {
    pub kind: Kind,
    pub q: Memory<'py>,
    pub k: Memory<'py>,
    pub v: Memory<'py>,
    pub beta: Vec<f32>,
    pub batch: Batch,
    rope: Option<(Memory<'py>, Memory<'py>)>,
    positions: Option<Vec<i64>>,
    interleaved: bool,
}

/// q, k, v and beta as given.
pub type Tensors<'a, 'py> = [&'a Bound<'py, PyAny>; 4];

/// The optional arguments that say which tokens there are, as given.
pub struct Tokens<'a, 'py> {
    pub batch: batch::Given<'a, 'py>,
    pub rope: Option<&'a Bound<'py, PyAny>>,
    pub positions: Option<&'a Bound<'py, PyAny>>,
    pub interleaved: bool,
}

impl<'py> Arguments<'py> {
    pub fn new([q, k, v, beta]: Tensors<'_, 'py>, tokens: Tokens<'_, 'py>) -> PyResult<Self> {
        let (kind, q) = tensor::borrow("q", q)?;
        let batch = Batch::new(q.shape(), tokens.batch)?;
        let [heads, key_dim] = columns(&q);
        let same_kind = |argument, object| {
            let (got, memory) = tensor::borrow(argument, object)?;
            tensor::check_kind(argument, got, "q", kind)?;
            if memory.data_type() != q.data_type() {
                return Err(memory.wrong_dtype(format_args!("{} as q has", q.data_type())));
            }
            match batch.packed() {
                true => memory.extents::<3>("[total, Hkv, D]").map(drop)?,
                false => memory.extents::<4>("[B, T, Hkv, D]").map(drop)?,
            }
            Ok(memory)
        };
        let (k, v) = (same_kind("k", k)?, same_kind("v", v)?);
        if tokens.rope.is_none() && tokens.positions.is_some() {
            return Err(error::value("positions", "without rope", "rope=(cos, sin) with them"));
        }
        let [b, t] = batch.rows();
        let rope = tokens.rope.map(|tables| rope::tables(tables, [b, t, key_dim])).transpose()?;
        Ok(Self {
            kind,
            k,
            v,
            beta: gate(beta, heads)?,
            rope,
            positions: tokens.positions.map(|p| positions(p, batch.lead())).transpose()?,
            interleaved: tokens.interleaved,
            q,
            batch,
        })
    }

    /// Refuses memory to write to that reaches into the memory of q, k, v or the tables.
    pub fn check_apart(&self, memory: &Memory<'_>) -> PyResult<()> {
        let tables = self.rope.iter().flat_map(|(cos, sin)| [cos, sin]);
        let mut inputs = [&self.q, &self.k, &self.v].into_iter().chain(tables);
        inputs.try_for_each(|input| memory.check_apart(input))
    }

    /// The problem of this call: `base` (the state's, or the defaults), with the extents and the
    /// element type of the tensors and the policies given. That it is the state's problem is for
    /// the core to check.
    pub fn problem(
        &self,
        base: Option<infini_attn::Problem>,
        policies: &Policies<'_, '_>,
        dtype: DType,
    ) -> PyResult<infini_attn::Problem> {
        let [heads, key_dim] = columns(&self.q);
        let ([kv_heads, _], [_, value_dim]) = (columns(&self.k), columns(&self.v));
        let builder = base.map_or_else(infini_attn::Problem::builder, |p| p.to_builder());
        policies.problem(builder, [heads, kv_heads, key_dim, value_dim], dtype)
    }

    /// The core's inputs: views `q`, `k`, `v`, and the rest from here.
    pub fn inputs<'a, T>(
        &'a self,
        q: TensorView<'a, T>,
        k: TensorView<'a, T>,
        v: TensorView<'a, T>,
    ) -> PyResult<Inputs<'a, T>> {
        let mut inputs = self.batch.of(Inputs::new(q, k, v));
        if let Some((cos, sin)) = &self.rope {
            let mut rope = Rope::new(cos.view()?, sin.view()?).interleaved(self.interleaved);
            if let Some(positions) = &self.positions {
                rope = rope.positions(positions);
            }
            inputs = inputs.rope(rope);
        }
        Ok(inputs)
    }
}

/// The gate's logits, one per head: as many numbers along one dimension, or one for all heads.
fn gate(object: &Bound<'_, PyAny>, heads: usize) -> PyResult<Vec<f32>> {
    let (shape, logits) = tensor::floats("beta", object)?;
    let mut longer = shape.iter().filter(|&&extent| extent != 1);
    match (longer.next(), longer.next()) {
        (None, _) => tensor::collect(std::iter::repeat_n(logits[0], heads)),
        (Some(&extent), None) if extent == heads => Ok(logits),
        _ => {
            let expected = format_args!("[Hq] = [{heads}], extents of 1 besides, or one number");
            Err(error::shape("beta", &shape, expected))
        }
    }
}

/// Heads and channels of q, k or v, whose rank was checked.
fn columns(memory: &Memory<'_>) -> [usize; 2] {
    let shape = memory.shape();
    [shape[shape.len() - 2], shape[shape.len() - 1]]
}

/// Rows of the rotation tables, as the host gives them.
pub fn positions(object: &Bound<'_, PyAny>, lead: &[usize]) -> PyResult<Vec<i64>> {
    let (shape, positions) = tensor::integers("positions", object)?;
    let t = &lead[lead.len() - 1..];
    if shape != t && shape != lead {
        let expected = match lead {
            [b, t] => format!("[T] = [{t}] or [B, T] = [{b}, {t}]"),
            _ => format!("[total] = {lead:?}"),
        };
        return Err(error::shape("positions", &shape, expected));
    }
    tensor::narrow("positions", positions, "an integer of 64 bits")
}

/// Infini-attention: causal attention within segments of N tokens, and a compressive memory of all
/// earlier segments, mixed by a gate per head.
///
/// Parameters
/// ----------
/// q : [B, T, Hq, Dk], k : [B, T, Hkv, Dk], v : [B, T, Hkv, Dv]; with cu_seqlens [total, H, D]
///     PyTorch CPU tensors, NumPy arrays, or other arrays in CPU memory that have `__dlpack__`, all
///     float32, float16 or bfloat16 (in NumPy by the package ml_dtypes), **unrotated**. PyTorch's do not
///     mix with others, whose results are NumPy's. The last dimension is contiguous, all other strides
///     are free: a [B, H, T, D] tensor comes in by `.transpose(1, 2)`. Nothing is copied. T may be 0. Query
///     head h reads key/value head h // (Hq // Hkv).
/// beta : [Hq], any float or integer dtype
///     Gate logits: out = g * A_mem + (1 - g) * A_dot with g = sigmoid(beta). Extents of 1 may stand
///     beside Hq; one number is the gate of all heads. +inf and -inf select one branch; what f32 does
///     not hold is as good as infinite.
/// segment_len, update, scale, empty_memory, denominator
///     None means the state's value, else 2048, "delta" (or "linear"), Dk ** -0.5, "gate" (or
///     "bypass"), "exact" (or ("clamp", eps), ("add", eps)). A value that contradicts the state is
///     an error.
/// state : State, optional
///     Where the streams stand; new, empty streams by default.
/// slots : int [B], optional
///     The stream of `state` that each sequence continues, all distinct; by default sequence b continues
///     stream b, and there are as many. The others stay as they are.
/// seq_lens : int [B], optional
///     Tokens of each sequence, the rest of T is padding: its outputs are 0, its lse is -inf.
/// attention_mask : zeros and ones [B, T], bool, int or float, optional
///     The same for padding on either side, as Hugging Face's tokenizers make it (of the call's tokens: of
///     generate's mask the last T columns). Ones lie side by side; under zeros there are no tokens, and
///     positions count without them.
/// cu_seqlens : int [B + 1], optional
///     Sequences one after another in [total, H, D], without padding: sequence b is tokens cu_seqlens[b]
///     to cu_seqlens[b + 1] - 1. Begins with 0 and ends with total.
/// rope : (cos, sin), optional
///     float32 [positions, R / 2], one column per frequency, unlike the tables of Hugging Face's models,
///     which are refused with the line that converts them. Rotates the first R channels of q and k, in
///     the local attention only; the memory sees them as given.
/// positions : int [T], [B, T] or [total], optional
///     Rows of the tables; by default they count on from state.position.
/// rope_interleaved : bool
///     Channel 2i pairs with 2i + 1, instead of i with i + R / 2.
/// inplace : bool
///     Advance `state` itself; otherwise it stays as it is, and a copy advances.
/// out : [B, T, Hq, Dv] (packed [total, Hq, Dv]), optional
///     Where the output goes, of q's kind and dtype: its last dimension contiguous, its memory apart from
///     what q, k and v span. Returned in the place of a new one.
/// return_state, return_lse, return_parts : bool
///     What to return besides `out`.
/// bptt_segments : int, optional
///     Gradients (below) reach through the memory within blocks of so many segments of the call, and not
///     into the memory of `state`; by default through all.
///
/// Returns
/// -------
/// out, or a tuple in the order (out, state, lse, a_dot, a_mem) of what was asked for
///     out, a_dot, a_mem : [B, T, Hq, Dv] of q's kind and dtype; lse : float32 [B, Hq, T] of q's
///     kind, the natural logarithm of the local attention's sum. With cu_seqlens [total, Hq, Dv] and
///     [Hq, total].
///
/// Raises
/// ------
/// ValueError, TypeError
///     Naming the argument, what was given and what is accepted. Nothing has been changed then.
///     A tensor with a forward-mode tangent is refused, and so is a call within a transform of torch.func
///     (vmap, grad, jvp).
/// MemoryError
///     Saying what there is no memory for. Nothing has been changed then.
/// RuntimeError
///     When another call is using `state`.
/// KeyboardInterrupt
///     Soon after Ctrl-C, also within a long call; `state` is as it was. With inplace=True the exception
///     says how many tokens of each sequence it has taken in (`tokens_taken`) and holds what the call
///     returns (`results`): both are valid up to there, and the stream can go on.
///
/// A call goes to infini_attn.torch.infini_attention, and its state is an infini_attn.torch.State, when it is
/// given such a state or tensors that are not in CPU memory, when q, k, v or beta requires grad (with grad
/// enabled), or while PyTorch records it (torch.jit.trace, make_fx, torch.export, a FakeTensorMode;
/// torch.compile if infini_attn.torch is imported). That is where gradients are. Under autocast
/// q, k and v are cast: to the state's dtype, else to autocast's.
///
/// Other Python threads run while it computes; they must neither write to the inputs meanwhile nor
/// resize them or give them other storage.
#[pyfunction]
#[pyo3(
    signature = (q, k, v, beta, *, segment_len = None, update = None, scale = None, empty_memory = None, denominator = None, state = None, slots = None, seq_lens = None, attention_mask = None, cu_seqlens = None, rope = None, positions = None, rope_interleaved = Flag::DEFAULT, inplace = Flag::DEFAULT, out = None, return_state = Flag::DEFAULT, return_lse = Flag::DEFAULT, return_parts = Flag::DEFAULT, bptt_segments = None),
    text_signature = "(q, k, v, beta, *, segment_len=None, update=None, scale=None, empty_memory=None, denominator=None, state=None, slots=None, seq_lens=None, attention_mask=None, cu_seqlens=None, rope=None, positions=None, rope_interleaved=False, inplace=False, out=None, return_state=True, return_lse=False, return_parts=False, bptt_segments=None)"
)]
#[allow(clippy::too_many_arguments)]
pub fn infini_attention<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    beta: &Bound<'py, PyAny>,
    segment_len: Option<&Bound<'py, PyAny>>,
    update: Option<&Bound<'py, PyAny>>,
    scale: Option<&Bound<'py, PyAny>>,
    empty_memory: Option<&Bound<'py, PyAny>>,
    denominator: Option<&Bound<'py, PyAny>>,
    state: Option<&Bound<'py, PyAny>>,
    slots: Option<&Bound<'py, PyAny>>,
    seq_lens: Option<&Bound<'py, PyAny>>,
    attention_mask: Option<&Bound<'py, PyAny>>,
    cu_seqlens: Option<&Bound<'py, PyAny>>,
    rope: Option<&Bound<'py, PyAny>>,
    positions: Option<&Bound<'py, PyAny>>,
    rope_interleaved: Flag<'py>,
    inplace: Flag<'py>,
    out: Option<&Bound<'py, PyAny>>,
    return_state: Flag<'py>,
    return_lse: Flag<'py>,
    return_parts: Flag<'py>,
    bptt_segments: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let call = delegate::Call {
        tensors: [q, k, v, beta],
        state,
        options: &[
            ("segment_len", segment_len),
            ("update", update),
            ("scale", scale),
            ("empty_memory", empty_memory),
            ("denominator", denominator),
            ("slots", slots),
            ("seq_lens", seq_lens),
            ("attention_mask", attention_mask),
            ("cu_seqlens", cu_seqlens),
            ("rope", rope),
            ("positions", positions),
            ("rope_interleaved", rope_interleaved.given()),
            ("inplace", inplace.given()),
            ("out", out),
            ("return_state", return_state.given()),
            ("return_lse", return_lse.given()),
            ("return_parts", return_parts.given()),
            ("bptt_segments", bptt_segments),
        ],
    };
    if let Some(results) = call.delegated(py)? {
        return Ok(results);
    }
    let rope_interleaved = rope_interleaved.or(false, "rope_interleaved")?;
    let inplace = inplace.or(false, "inplace")?;
    let return_state = return_state.or(true, "return_state")?;
    let return_lse = return_lse.or(false, "return_lse")?;
    let return_parts = return_parts.or(false, "return_parts")?;
    if let Some(segments) = bptt_segments {
        let segments: i64 = error::typed("bptt_segments", segments, "an integer")?;
        if segments < 1 {
            return Err(error::value("bptt_segments", segments, "at least 1"));
        }
    }
    let batch = batch::Given { seq_lens, attention_mask, cu_seqlens, slots };
    let tokens = Tokens { batch, rope, positions, interleaved: rope_interleaved };
    let state: Option<Bound<'py, State>> =
        state.map(|s| error::typed("state", s, "an infini_attn.State")).transpose()?;
    let cast = delegate::autocast([q, k, v], state.as_ref())?;
    let [q, k, v] = cast.as_ref().map_or([q, k, v], |cast| cast.each_ref());
    let arguments = Arguments::new([q, k, v, beta], tokens)?;
    let policies = Policies { segment_len, update, scale, empty_memory, denominator };
    let base = state.as_ref().map(|s| s.get().read().map(|s| *s.problem())).transpose()?;
    let dtype = by_dtype!(arguments.q, dtype_of())?;
    let problem = arguments.problem(base, &policies, dtype)?;
    let state = match &state {
        Some(state) => State::to_advance(state, inplace)?,
        None => {
            let empty = infini_attn::State::new(&problem, arguments.batch.sequences());
            Bound::new(py, State::new(empty.map_err(error::python)?))?
        }
    };
    let wanted = Wanted { out, lse: return_lse, parts: return_parts };
    let (results, interrupt) = {
        let mut guard = state.get().write()?;
        let advanced = Advanced::State(&mut guard);
        by_dtype!(arguments.q, run(py, &arguments, &problem, advanced, wanted))?
    };
    let results = results.pack(py, return_state.then(|| state.into_any()))?;
    match interrupt {
        None => Ok(results),
        Some(interrupt) if inplace => Err(interrupt.with_results(py, results)),
        Some(interrupt) => Err(interrupt.error),
    }
}

fn dtype_of<T: Element>() -> PyResult<DType> {
    Ok(T::DTYPE)
}
