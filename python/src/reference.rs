//! The float64 reference: the paper's equations line by line, slow, the oracle of everything else.

use std::sync::RwLock;

use half::{bf16, f16};
use infini_attn::{DType, Problem, TensorView, reference};
use pyo3::prelude::*;

use crate::attend::{Arguments, Results, Tokens, Wanted};
use crate::dlpack::{Memory, Scalar};
use crate::problem::Policies;
use crate::state::unusable;
use crate::{error, tensor, threads};

/// State of the reference, float64 throughout.
#[pyclass(frozen, module = "infini_attn._core")]
pub struct ReferenceState {
    problem: Problem,
    sequences: usize,
    state: RwLock<reference::State>,
}

impl ReferenceState {
    fn read<R>(&self, read: impl FnOnce(&reference::State) -> R) -> PyResult<R> {
        self.state.try_read().map(|state| read(&state)).map_err(unusable)
    }

    fn counts<'py>(
        &self,
        py: Python<'py>,
        count: impl Fn(&reference::State, usize) -> i64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let counts: Vec<i64> =
            self.read(|state| (0..self.sequences).map(|slot| count(state, slot)).collect())?;
        tensor::array(py, &[self.sequences], "int64", &counts)
    }
}

#[pymethods]
impl ReferenceState {
    /// Compressive memory, a copy: float64 [B, Hkv, Dk, Dv].
    #[getter(M)]
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let p = &self.problem;
        let shape = [self.sequences, p.kv_heads(), p.key_dim(), p.value_dim()];
        self.read(|state| tensor::array(py, &shape, "float64", &state.m))?
    }

    /// Normaliser, a copy: float64 [B, Hkv, Dk].
    #[getter(z)]
    fn normalizer<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let shape = [self.sequences, self.problem.kv_heads(), self.problem.key_dim()];
        self.read(|state| tensor::array(py, &shape, "float64", &state.z))?
    }

    /// Tokens each stream has seen: int64 [B].
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.counts(py, |state, slot| state.tokens(slot) as i64)
    }

    /// Tokens each stream has written into (M, z): int64 [B].
    #[getter]
    fn committed<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.counts(py, |state, slot| state.committed(slot) as i64)
    }

    /// Tokens in each stream's open segment: int64 [B].
    #[getter]
    fn open_len<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.counts(py, |state, slot| state.open_len(slot) as i64)
    }

    /// Commits the open segments of all streams, in place.
    fn flush(&self) -> PyResult<()> {
        let slots: Vec<usize> = (0..self.sequences).collect();
        let mut state = self.state.try_write().map_err(unusable)?;
        state.flush(&self.problem, &slots).map_err(error::python)
    }
}

/// The operator of infini_attn.infini_attention in float64: same arguments (but inplace), any float
/// dtype, the results float64 NumPy arrays, the state an infini_attn.reference.State.
///
/// Straight from the paper's equations, one token after another, single-threaded and slow: made to
/// test against.
#[pyfunction]
#[pyo3(signature = (q, k, v, beta, *, segment_len = None, update = None, scale = None, empty_memory = None, denominator = None, state = None, seq_lens = None, rope = None, positions = None, rope_interleaved = false, return_state = true, return_lse = false, return_parts = false))]
#[allow(clippy::too_many_arguments)]
pub fn reference_infini_attention<'py>(
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
    seq_lens: Option<&Bound<'py, PyAny>>,
    rope: Option<&Bound<'py, PyAny>>,
    positions: Option<&Bound<'py, PyAny>>,
    rope_interleaved: bool,
    return_state: bool,
    return_lse: bool,
    return_parts: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let tokens = Tokens { seq_lens, rope, positions, interleaved: rope_interleaved };
    let arguments = Arguments::new([q, k, v, beta], tokens)?;
    let policies = Policies { segment_len, update, scale, empty_memory, denominator };
    let state: Option<Bound<'py, ReferenceState>> =
        state.map(|s| error::typed("state", s, "an infini_attn.reference.State")).transpose()?;
    let state = state.as_ref();
    let base = state.map(|s| s.get().problem);
    let problem = arguments.problem(base, &policies, DType::F32)?;
    if let Some(made_for) = base.filter(|made_for| *made_for != problem) {
        let got = format!("made for {made_for:?}");
        return Err(error::value("state", got, format!("the call's {problem:?}")));
    }
    let (batch, length) = arguments.batch();
    let mut next = match state {
        Some(state) => state.get().read(Clone::clone)?,
        None => reference::State::new(&problem, batch),
    };
    let (q, k, v) =
        (widen(&arguments.q, "q")?, widen(&arguments.k, "k")?, widen(&arguments.v, "v")?);
    fn view<'a>(elements: &'a [f64], memory: &Memory<'_>) -> PyResult<TensorView<'a, f64>> {
        TensorView::new(elements, memory.shape()).map_err(error::python)
    }
    let (q, k, v) = (view(&q, &arguments.q)?, view(&k, &arguments.k)?, view(&v, &arguments.v)?);
    let (inputs, gate) = (arguments.inputs(q, k, v)?, &arguments.beta[..]);
    let output = threads::run(py, || reference::prefill(&problem, &inputs, gate, &mut next))?
        .map_err(error::python)?;

    let shape = [batch, length, problem.heads(), problem.value_dim()];
    let array = |values: &[f64]| tensor::array(py, &shape, "float64", values);
    let lse = || tensor::array(py, &[batch, shape[2], length], "float64", &output.lse);
    let parts = || Ok::<_, PyErr>([array(&output.a_dot)?, array(&output.a_mem)?]);
    let wanted = Wanted { state: return_state, lse: return_lse, parts: return_parts };
    let results = Results {
        out: array(&output.o)?,
        lse: return_lse.then(lse).transpose()?,
        parts: return_parts.then(parts).transpose()?,
    };
    let sequences = state.map_or(batch, |s| s.get().sequences);
    let next = ReferenceState { problem, sequences, state: RwLock::new(next) };
    wanted.pack(py, results, Bound::new(py, next)?.into_any())
}

/// The elements of an input of any float type.
fn widen(memory: &Memory<'_>, argument: &str) -> PyResult<Vec<f64>> {
    fn as_f64<T: Scalar + Into<f64>>(memory: &Memory<'_>) -> PyResult<Vec<f64>> {
        Ok(tensor::elements(memory.view::<T>()?).into_iter().map(Into::into).collect())
    }
    let got = memory.data_type();
    match got.dtype() {
        _ if got == f64::DATA_TYPE => as_f64::<f64>(memory),
        Some(DType::F32) => as_f64::<f32>(memory),
        Some(DType::F16) => as_f64::<f16>(memory),
        Some(DType::BF16) => as_f64::<bf16>(memory),
        _ => Err(error::dtype(argument, got, "f64, f32, f16 or bf16")),
    }
}
