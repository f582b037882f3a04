//! Merging: partial local attentions, linear memories, and the affine maps of delta memories.

use std::sync::atomic::AtomicBool;

use infini_attn::Element;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::delegate;
use crate::dlpack::{Memory, Scalar, by_dtype};
use crate::error::Flag;
use crate::problem::{Problem, extent};
use crate::state::State;
use crate::tensor::{self, Kind};
use crate::{error, threads};

/// Merges local attentions over disjoint sets of keys by their log-sum-exp.
///
/// Parameters
/// ----------
/// a_dot : list of [B, T, Hq, Dv]
///     Ungated local attentions (`a_dot` of infini_attention, never its gated output).
/// lse : list of float32 [B, Hq, T]
///     Their log-sum-exps (natural logarithm).
/// return_lse : bool
///     Also return the merged log-sum-exp.
///
/// Returns
/// -------
/// out, or (out, lse)
///     Of the inputs' kind; `out` in their dtype, lse in float32.
#[pyfunction]
#[pyo3(
    signature = (a_dot, lse, *, return_lse = Flag::DEFAULT),
    text_signature = "(a_dot, lse, *, return_lse=False)"
)]
pub fn merge_partials<'py>(
    py: Python<'py>,
    a_dot: &Bound<'py, PyAny>,
    lse: &Bound<'py, PyAny>,
    return_lse: Flag<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let return_lse = return_lse.or(false, "return_lse")?;
    if let Some(both) = delegate::merged(a_dot, lse)? {
        return if return_lse { Ok(both) } else { both.get_item(0) };
    }
    let a_dot = error::items("a_dot", a_dot, tensor::borrow)?;
    let lse = error::items("lse", lse, tensor::borrow)?;
    let Some((kind, first)) = a_dot.first() else {
        return Err(error::value("a_dot", "an empty list", "at least one partial result"));
    };
    let kind = *kind;
    for (name, list) in [("a_dot", &a_dot), ("lse", &lse)] {
        for (i, (got, _)) in list.iter().enumerate() {
            tensor::check_kind(&format!("{name}[{i}]"), *got, "a_dot[0]", kind)?;
        }
    }
    let a_dot: Vec<_> = a_dot.iter().map(|(_, memory)| memory).collect();
    let lse: Vec<_> = lse.iter().map(|(_, memory)| memory).collect();
    by_dtype!(first, merge_typed(py, kind, &a_dot, &lse, return_lse))
}

fn merge_typed<'py, T: Element + Scalar>(
    py: Python<'py>,
    kind: Kind,
    a_dot: &[&Memory<'py>],
    lse: &[&Memory<'py>],
    return_lse: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let [b, t, heads, _] = a_dot[0].extents("[B, T, Hq, Dv]")?;
    let (out, mut memory) = tensor::empty::<T>(py, kind, a_dot[0].shape())?;
    let (out_lse, mut lse_memory) = tensor::empty::<f32>(py, kind, &[b, heads, t])?;
    let a_dot = a_dot.iter().map(|m| m.view::<T>()).collect::<PyResult<Vec<_>>>()?;
    let lse = lse.iter().map(|m| m.view::<f32>()).collect::<PyResult<Vec<_>>>()?;
    let (view, lse_view) = (memory.view_mut::<T>()?, lse_memory.view_mut()?);
    threads::run(py, || infini_attn::merge_partials(&a_dot, &lse, view, Some(lse_view)))?;
    if return_lse { Ok((out, out_lse).into_pyobject(py)?.into_any()) } else { Ok(out) }
}

/// Adds linear-rule states that saw disjoint parts of the same streams, in order: memories,
/// normalisers and counts add. Only the last state may hold an open segment.
///
/// Finished delta-rule memories do not add (ValueError): see segment_map and compose.
#[pyfunction]
pub fn merge_memories(py: Python<'_>, states: &Bound<'_, PyAny>) -> PyResult<State> {
    let states: Vec<Bound<'_, State>> = error::items("states", states, |name, state| {
        error::typed(name, state, "an infini_attn.State")
    })?;
    let guards = states.iter().map(|s| s.get().read()).collect::<PyResult<Vec<_>>>()?;
    let states: Vec<_> = guards.iter().map(|g| &**g).collect();
    threads::run(py, || infini_attn::merge_memories(&states)).map(State::new)
}

/// Sums of sigma(k) over a run of tokens, per sequence and key/value head. `+` adds two runs.
///
/// key_sums makes them, KeySums(problem, sums=..., tokens=...) puts them together again. They can be
/// pickled, and are equal when problem, sums and tokens are.
///
/// Parameters
/// ----------
/// problem : Problem
/// sums : [B, Hkv, Dk]
///     The sums, as float32.
/// tokens : int [B]
///     Tokens summed; sums over none are 0.
#[pyclass(frozen, eq, module = "infini_attn")]
#[derive(PartialEq)]
pub struct KeySums(infini_attn::KeySums);

#[pymethods]
impl KeySums {
    #[new]
    #[pyo3(signature = (problem, *, sums, tokens))]
    fn new(
        problem: &Problem,
        sums: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let p = &problem.0;
        let tokens = token_counts(tokens)?;
        let sums = part("sums", sums, &[tokens.len(), p.kv_heads(), p.key_dim()])?;
        infini_attn::KeySums::from_parts(p, &sums, &tokens).map(Self).map_err(error::python)
    }

    /// The sums over no tokens, for `batch` sequences.
    #[staticmethod]
    #[pyo3(signature = (problem, batch = None))]
    fn zero(problem: &Problem, batch: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let batch = batch.map_or(Ok(1), |n| extent("batch", n))?;
        infini_attn::KeySums::zero(&problem.0, batch).map(Self).map_err(error::python)
    }

    /// What a run that continues `state` finds: its z and its committed tokens.
    #[staticmethod]
    fn from_state(state: &Bound<'_, State>) -> PyResult<Self> {
        let state = &*state.get().read()?;
        infini_attn::KeySums::from_state(state).map(Self).map_err(error::python)
    }

    /// The problem whose keys were summed.
    #[getter]
    fn problem(&self) -> Problem {
        Problem(*self.0.problem())
    }

    /// The sums, a copy: float32 [B, Hkv, Dk].
    #[getter]
    fn sums<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        tensor::copy(py, self.0.sums())
    }

    /// Tokens summed: int64 [B].
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        tensor::counts(py, self.0.tokens().iter().copied())
    }

    fn __add__(&self, other: &Bound<'_, KeySums>) -> PyResult<Self> {
        self.0.add(&other.get().0).map(Self).map_err(error::python)
    }

    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        let parts = (self.problem(), bytes(self.sums(py)?, F4)?, bytes(self.tokens(py)?, I8)?);
        reduced(py, "_key_sums_from_bytes", parts.into_pyobject(py)?)
    }

    fn __repr__(&self) -> String {
        format!("KeySums(tokens={:?}, shape={:?})", self.0.tokens(), self.0.sums().shape())
    }
}

/// What a run of segments does to the memory it finds: M -> A M + B, z -> z + dz.
///
/// segment_map makes it, SegmentMap(before, A=..., B=..., dz=..., tokens=...) puts it together again.
/// It can be pickled, and is equal to another when all its parts are.
///
/// Parameters
/// ----------
/// before : KeySums
///     What the run finds.
/// A : [B, Hkv, Dk, Dk], B : [B, Hkv, Dk, Dv], dz : [B, Hkv, Dk]
///     As float32.
/// tokens : int [B]
///     Tokens of the run.
#[pyclass(frozen, eq, module = "infini_attn")]
#[derive(PartialEq)]
pub struct SegmentMap(infini_attn::SegmentMap);

#[pymethods]
impl SegmentMap {
    #[new]
    #[pyo3(signature = (before, *, A, B, dz, tokens))]
    #[allow(non_snake_case)]
    fn new(
        before: &KeySums,
        A: &Bound<'_, PyAny>,
        B: &Bound<'_, PyAny>,
        dz: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let p = before.0.problem();
        let tokens = token_counts(tokens)?;
        let [batch, h, dk] = [tokens.len(), p.kv_heads(), p.key_dim()];
        let a = part("A", A, &[batch, h, dk, dk])?;
        let b = part("B", B, &[batch, h, dk, p.value_dim()])?;
        let dz = part("dz", dz, &[batch, h, dk])?;
        let run = infini_attn::KeySums::from_parts(p, &dz, &tokens).map_err(error::python)?;
        let map = infini_attn::SegmentMap::from_parts(&before.0, &run, &a, &b);
        map.map(Self).map_err(error::python)
    }

    /// The problem whose segments were mapped.
    #[getter]
    fn problem(&self) -> Problem {
        Problem(*self.0.problem())
    }

    /// What the run finds.
    #[getter]
    fn before(&self) -> PyResult<KeySums> {
        self.0.before().try_clone().map(KeySums).map_err(error::python)
    }

    /// A, a copy: float32 [B, Hkv, Dk, Dk].
    #[getter(A)]
    fn a<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        tensor::copy(py, self.0.a())
    }

    /// B, a copy: float32 [B, Hkv, Dk, Dv].
    #[getter(B)]
    fn b<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        tensor::copy(py, self.0.b())
    }

    /// Change of the normaliser, a copy: float32 [B, Hkv, Dk].
    #[getter]
    fn dz<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        tensor::copy(py, self.0.dz())
    }

    /// Tokens of the run: int64 [B].
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        tensor::counts(py, self.0.tokens().iter().copied())
    }

    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        let (a, b, dz) =
            (bytes(self.a(py)?, F4)?, bytes(self.b(py)?, F4)?, bytes(self.dz(py)?, F4)?);
        let parts = (self.before()?, a, b, dz, bytes(self.tokens(py)?, I8)?);
        reduced(py, "_segment_map_from_bytes", parts.into_pyobject(py)?)
    }

    fn __repr__(&self) -> String {
        format!("SegmentMap(tokens={:?}, shape={:?})", self.0.tokens(), self.0.b().shape())
    }
}

/// The numbers of a part, if it has this shape.
fn part(argument: &str, object: &Bound<'_, PyAny>, shape: &[usize]) -> PyResult<Vec<f32>> {
    let (got, numbers) = tensor::floats(argument, object)?;
    if got != shape {
        return Err(error::shape(argument, &got, format_args!("{shape:?}")));
    }
    Ok(numbers)
}

/// Tokens per sequence, [B].
fn token_counts(object: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    let (shape, counts) = tensor::integers("tokens", object)?;
    if shape.len() != 1 {
        return Err(error::shape("tokens", &shape, "[B]"));
    }
    tensor::narrow("tokens", counts, "at least 0")
}

/// What `__reduce__` returns: a function of this module and its arguments.
type Reduced<'py> = (Bound<'py, PyAny>, Bound<'py, PyTuple>);

fn reduced<'py>(
    py: Python<'py>,
    function: &str,
    parts: Bound<'py, PyTuple>,
) -> PyResult<Reduced<'py>> {
    Ok((py.import("infini_attn._core")?.getattr(function)?, parts))
}

/// An array's bytes: what torch.load(weights_only=True) takes where it would refuse the array.
fn bytes<'py>(array: Bound<'py, PyAny>, dtype: &str) -> PyResult<Bound<'py, PyAny>> {
    array.call_method1("astype", (dtype,))?.call_method0("tobytes")
}

/// Element types of the arrays in a pickle, the same on every machine.
const F4: &str = "<f4";
const I8: &str = "<i8";

/// The array of bytes that `bytes` gave.
fn array<'py>(
    bytes: &Bound<'py, PyBytes>,
    dtype: &str,
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    let flat = tensor::numpy(bytes.py())?.call_method1("frombuffer", (bytes, dtype))?;
    flat.call_method1("reshape", (shape,))
}

/// What pickle calls.
#[pyfunction]
pub fn _key_sums_from_bytes(
    problem: &Problem,
    sums: &Bound<'_, PyBytes>,
    tokens: &Bound<'_, PyBytes>,
) -> PyResult<KeySums> {
    let batch = tokens.len()? / size_of::<i64>();
    let shape = [batch, problem.0.kv_heads(), problem.0.key_dim()];
    KeySums::new(problem, &array(sums, F4, &shape)?, &array(tokens, I8, &[batch])?)
}

/// What pickle calls.
#[pyfunction]
#[allow(non_snake_case)]
pub fn _segment_map_from_bytes(
    before: &KeySums,
    A: &Bound<'_, PyBytes>,
    B: &Bound<'_, PyBytes>,
    dz: &Bound<'_, PyBytes>,
    tokens: &Bound<'_, PyBytes>,
) -> PyResult<SegmentMap> {
    let (p, batch) = (before.0.problem(), tokens.len()? / size_of::<i64>());
    let [h, dk, dv] = [p.kv_heads(), p.key_dim(), p.value_dim()];
    let a = array(A, F4, &[batch, h, dk, dk])?;
    let b = array(B, F4, &[batch, h, dk, dv])?;
    let dz = array(dz, F4, &[batch, h, dk])?;
    SegmentMap::new(before, &a, &b, &dz, &array(tokens, I8, &[batch])?)
}

/// Sums of sigma(k) over a run of tokens.
///
/// Parameters
/// ----------
/// problem : Problem
/// k : [B, T, Hkv, Dk]
///     Keys, unrotated, of the problem's dtype.
#[pyfunction]
pub fn key_sums<'py>(
    py: Python<'py>,
    problem: &Problem,
    k: &Bound<'py, PyAny>,
) -> PyResult<KeySums> {
    let (_, k) = tensor::borrow("k", k)?;
    by_dtype!(k, key_sums_typed(py, problem, &k))
}

fn key_sums_typed<T: Element + Scalar>(
    py: Python<'_>,
    problem: &Problem,
    k: &Memory<'_>,
) -> PyResult<KeySums> {
    let (problem, k) = (problem.0, k.view::<T>()?);
    let cancel = AtomicBool::new(false);
    let work = || infini_attn::key_sums_until(&problem, k, &cancel);
    threads::cancellable(py, &cancel, work).map(KeySums)
}

/// The affine map of a run of tokens, cut into segments from its first token on; a shorter last
/// segment counts as flushed.
///
/// Parameters
/// ----------
/// problem : Problem
/// k : [B, T, Hkv, Dk], v : [B, T, Hkv, Dv]
///     Unrotated, of the problem's dtype.
/// before : KeySums
///     What the run finds: the sums over everything earlier (KeySums.zero, KeySums.from_state, and
///     `+`).
#[pyfunction]
pub fn segment_map<'py>(
    py: Python<'py>,
    problem: &Problem,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    before: &KeySums,
) -> PyResult<SegmentMap> {
    let ((_, k), (_, v)) = (tensor::borrow("k", k)?, tensor::borrow("v", v)?);
    by_dtype!(k, segment_map_typed(py, problem, &k, &v, before))
}

fn segment_map_typed<T: Element + Scalar>(
    py: Python<'_>,
    problem: &Problem,
    k: &Memory<'_>,
    v: &Memory<'_>,
    before: &KeySums,
) -> PyResult<SegmentMap> {
    let (problem, k, v, before) = (problem.0, k.view::<T>()?, v.view::<T>()?, &before.0);
    let cancel = AtomicBool::new(false);
    let work = || infini_attn::segment_map_until(&problem, k, v, before, &cancel);
    threads::cancellable(py, &cancel, work).map(SegmentMap)
}

/// The map of `first` followed by `second`.
#[pyfunction]
pub fn compose(py: Python<'_>, first: &SegmentMap, second: &SegmentMap) -> PyResult<SegmentMap> {
    threads::run(py, || infini_attn::compose(&first.0, &second.0)).map(SegmentMap)
}

/// The state after the run of `map`, as if its tokens had been attended and flushed. `state` holds
/// no open segment; it stays as it is unless inplace=True. An interrupt is raised when that is done.
#[pyfunction]
#[pyo3(
    signature = (map, state, *, inplace = Flag::DEFAULT),
    text_signature = "(map, state, *, inplace=False)"
)]
pub fn apply<'py>(
    py: Python<'py>,
    map: &SegmentMap,
    state: &Bound<'py, State>,
    inplace: Flag<'py>,
) -> PyResult<Bound<'py, State>> {
    let inplace = inplace.or(false, "inplace")?;
    let state = State::to_advance(state, inplace)?;
    let mut guard = state.get().write()?;
    let target = &mut *guard;
    threads::run(py, || infini_attn::apply(&map.0, target))?;
    drop(guard);
    Ok(state)
}
