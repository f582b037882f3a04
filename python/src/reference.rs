//! The float64 reference: the paper's equations line by line, slow, the oracle of everything else.

use std::sync::atomic::AtomicBool;
use std::sync::{RwLock, RwLockReadGuard};

use half::{bf16, f16};
use infini_attn::{DType, Problem, TensorView, reference};
use pyo3::prelude::*;

use crate::attend::{Arguments, Tokens};
use crate::batch;
use crate::dlpack::{Memory, Scalar};
use crate::error::Flag;
use crate::problem::Policies;
use crate::run::Results;
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
    fn read(&self) -> PyResult<RwLockReadGuard<'_, reference::State>> {
        self.state.try_read().map_err(unusable)
    }
}

#[pymethods]
impl ReferenceState {
    /// Compressive memory, a copy: float64 [B, Hkv, Dk, Dv].
    #[getter(M)]
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let p = &self.problem;
        let shape = [self.sequences, p.kv_heads(), p.key_dim(), p.value_dim()];
        tensor::array(py, &shape, &self.read()?.m)
    }

    /// Normaliser, a copy: float64 [B, Hkv, Dk].
    #[getter(z)]
    fn normalizer<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let shape = [self.sequences, self.problem.kv_heads(), self.problem.key_dim()];
        tensor::array(py, &shape, &self.read()?.z)
    }

    /// Tokens each stream has seen: int64 [B].
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.read()?;
        tensor::counts(py, (0..self.sequences).map(|slot| state.tokens(slot)))
    }

    /// Tokens each stream has written into (M, z): int64 [B].
    #[getter]
    fn committed<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.read()?;
        tensor::counts(py, (0..self.sequences).map(|slot| state.committed(slot)))
    }

    /// Tokens in each stream's open segment: int64 [B].
    #[getter]
    fn open_len<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.read()?;
        tensor::counts(py, (0..self.sequences).map(|slot| state.open_len(slot) as u64))
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
#[pyo3(
    signature = (q, k, v, beta, *, segment_len = None, update = None, scale = None, empty_memory = None, denominator = None, state = None, slots = None, seq_lens = None, attention_mask = None, cu_seqlens = None, rope = None, positions = None, rope_interleaved = Flag::DEFAULT, return_state = Flag::DEFAULT, return_lse = Flag::DEFAULT, return_parts = Flag::DEFAULT),
    text_signature = "(q, k, v, beta, *, segment_len=None, update=None, scale=None, empty_memory=None, denominator=None, state=None, slots=None, seq_lens=None, attention_mask=None, cu_seqlens=None, rope=None, positions=None, rope_interleaved=False, return_state=True, return_lse=False, return_parts=False)"
)]
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
    slots: Option<&Bound<'py, PyAny>>,
    seq_lens: Option<&Bound<'py, PyAny>>,
    attention_mask: Option<&Bound<'py, PyAny>>,
    cu_seqlens: Option<&Bound<'py, PyAny>>,
    rope: Option<&Bound<'py, PyAny>>,
    positions: Option<&Bound<'py, PyAny>>,
    rope_interleaved: Flag<'py>,
    return_state: Flag<'py>,
    return_lse: Flag<'py>,
    return_parts: Flag<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    let rope_interleaved = rope_interleaved.or(false, "rope_interleaved")?;
    let return_state = return_state.or(true, "return_state")?;
    let return_lse = return_lse.or(false, "return_lse")?;
    let return_parts = return_parts.or(false, "return_parts")?;
    let batch = batch::Given { seq_lens, attention_mask, cu_seqlens, slots };
    let tokens = Tokens { batch, rope, positions, interleaved: rope_interleaved };
    let arguments = Arguments::new([q, k, v, beta], tokens)?;
    let policies = Policies { segment_len, update, scale, empty_memory, denominator };
    let state: Option<Bound<'py, ReferenceState>> =
        state.map(|s| error::typed("state", s, "an infini_attn.reference.State")).transpose()?;
    let base = state.as_ref().map(|s| s.get().problem);
    let problem = arguments.problem(base, &policies, DType::F32)?;
    if let Some(made_for) = base.filter(|made_for| *made_for != problem) {
        let got = format!("made for {made_for:?}");
        return Err(error::value("state", got, format!("the call's {problem:?}")));
    }
    let batch = &arguments.batch;
    let (mut next, sequences) = match &state {
        Some(state) => {
            let state = state.get();
            (state.read()?.try_clone().map_err(error::python)?, state.sequences)
        }
        None => {
            let empty = reference::State::new(&problem, batch.sequences());
            (empty.map_err(error::python)?, batch.sequences())
        }
    };
    let (q, k, v) = (widen(&arguments.q)?, widen(&arguments.k)?, widen(&arguments.v)?);
    fn view<'a>(elements: &'a [f64], memory: &Memory<'_>) -> PyResult<TensorView<'a, f64>> {
        TensorView::new(elements, memory.shape()).map_err(error::python)
    }
    let (q, k, v) = (view(&q, &arguments.q)?, view(&k, &arguments.k)?, view(&v, &arguments.v)?);
    let (cancel, gate) = (AtomicBool::new(false), &arguments.beta[..]);
    let inputs = arguments.inputs(q, k, v)?.cancel(&cancel);
    let output = threads::cancellable(py, &cancel, || {
        reference::prefill(&problem, &inputs, gate, &mut next)
    })?;

    let [shape, lse_shape] = batch.outputs(problem.heads(), problem.value_dim());
    let array = |values: &[f64]| tensor::array(py, &shape, values);
    let lse = || tensor::array(py, &lse_shape, &output.lse);
    let parts = || Ok::<_, PyErr>([array(&output.a_dot)?, array(&output.a_mem)?]);
    let results = Results {
        out: array(&output.o)?,
        lse: return_lse.then(lse).transpose()?,
        parts: return_parts.then(parts).transpose()?,
    };
    let next = ReferenceState { problem, sequences, state: RwLock::new(next) };
    results.pack(py, return_state.then_some(Bound::new(py, next)?.into_any()))
}

/// The elements of an input of any float type.
pub fn widen(memory: &Memory<'_>) -> PyResult<Vec<f64>> {
    fn as_f64<T: Scalar + Into<f64>>(memory: &Memory<'_>) -> PyResult<Vec<f64>> {
        tensor::collect(tensor::elements(memory.view::<T>()?)?.into_iter().map(Into::into))
    }
    match memory.data_type() {
        f64::DATA_TYPE => as_f64::<f64>(memory),
        f32::DATA_TYPE => as_f64::<f32>(memory),
        f16::DATA_TYPE => as_f64::<f16>(memory),
        bf16::DATA_TYPE => as_f64::<bf16>(memory),
        _ => Err(memory.wrong_dtype("f64, f32, f16 or bf16")),
    }
}
