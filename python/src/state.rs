//! The state of a batch of streams.

use std::path::PathBuf;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use infini_attn::State as Core;
use pyo3::exceptions::{PyIndexError, PyRuntimeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PySlice};

use crate::problem::{Policies, Problem, element_type, extent};
use crate::{error, tensor, threads};

/// The state of B independent streams: compressive memory, normaliser, counters, open segment.
///
/// State(problem, sequences=1) starts that many empty streams. A state is what infini_attention returns and
/// takes; its size does not depend on how many tokens were seen. It can be pickled, copied
/// (copy.deepcopy, fork) and saved. len(state) is B; state[i], state[a:b] and state[[i, j]] are states of
/// those streams, State.concat([a, b]) is one of all streams of several.
///
/// Copies of all streams (copy.copy, copy.deepcopy, fork()) take next to no time and memory: they share
/// what they hold until one of them changes it.
///
/// While one thread's call writes a state (inplace=True, flush, reset), a use of the same state in
/// another thread, or in a signal's handler, raises RuntimeError. Reading from several threads at once is
/// fine.
#[pyclass(frozen, weakref, module = "infini_attn")]
pub struct State(RwLock<Core>);

impl State {
    pub fn new(state: Core) -> Self {
        Self(RwLock::new(state))
    }

    // Never waits: a thread that waited here while attached to Python would keep the one it waits
    // for from finishing.
    pub fn read(&self) -> PyResult<RwLockReadGuard<'_, Core>> {
        self.0.try_read().map_err(unusable)
    }

    pub fn write(&self) -> PyResult<RwLockWriteGuard<'_, Core>> {
        self.0.try_write().map_err(unusable)
    }

    /// A state that Python is given, of what `make` makes of this one meanwhile.
    fn derive(
        &self,
        py: Python<'_>,
        make: impl FnOnce(&Core) -> infini_attn::Result<Core> + Send,
    ) -> PyResult<Self> {
        let state = &*self.read()?;
        py.detach(|| make(state)).map(Self::new).map_err(error::python)
    }

    /// What a call advances: `state` itself, or a copy.
    pub fn to_advance<'py>(state: &Bound<'py, Self>, inplace: bool) -> PyResult<Bound<'py, Self>> {
        if inplace {
            return Ok(state.clone());
        }
        let copy = state.get().read()?.try_clone().map_err(error::python)?;
        Bound::new(state.py(), Self::new(copy))
    }
}

/// Why a state cannot be had now.
pub fn unusable<Guard>(error: TryLockError<Guard>) -> PyErr {
    PyRuntimeError::new_err(match error {
        TryLockError::WouldBlock => "state: in use by another call",
        TryLockError::Poisoned(_) => "state: left half-written by a call that crashed",
    })
}

/// All slots, or those given: one, or a list.
pub fn slots(given: Option<&Bound<'_, PyAny>>, sequences: usize) -> PyResult<Vec<usize>> {
    let Some(given) = given else { return tensor::collect(0..sequences) };
    let (shape, slots) = tensor::integers("slots", given)?;
    if shape.len() > 1 {
        return Err(error::shape("slots", &shape, "one slot or a list [n]"));
    }
    tensor::narrow("slots", slots, format_args!("0 to {sequences} - 1"))
}

/// Tokens per sequence [B], at least 0.
fn token_counts(argument: &str, object: &Bound<'_, PyAny>, batch: usize) -> PyResult<Vec<u64>> {
    let (shape, counts) = tensor::integers(argument, object)?;
    if shape != [batch] {
        return Err(error::shape(argument, &shape, format_args!("[B] = [{batch}]")));
    }
    tensor::narrow(argument, counts, "at least 0")
}

/// One integer, at least 0.
fn count<T: TryFrom<i64>>(argument: &str, object: &Bound<'_, PyAny>) -> PyResult<T> {
    let given: i64 = error::typed(argument, object, "an integer")?;
    T::try_from(given).map_err(|_| error::value(argument, given, "at least 0"))
}

/// A file's name as Python shows it (a str or bytes), and the same for the system.
fn file_name<'py>(path: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, PathBuf)> {
    let os = path.py().import("os")?;
    let name = os.call_method1("fspath", (path,)).map_err(|e| {
        match (e.is_instance_of::<PyTypeError>(path.py()), path.get_type().fully_qualified_name()) {
            (true, Ok(class)) => error::wrong_type("path", class, "a str, bytes or os.PathLike"),
            _ => e,
        }
    })?;
    let decoded = os.call_method1("fsdecode", (&name,))?.extract()?;
    Ok((name, decoded))
}

#[pymethods]
impl State {
    #[new]
    #[pyo3(signature = (problem, sequences = None))]
    fn create(problem: &Problem, sequences: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let sequences = sequences.map_or(Ok(1), |n| extent("sequences", n))?;
        Core::new(&problem.0, sequences).map(Self::new).map_err(error::python)
    }

    /// A state from its parts, without an open segment.
    ///
    /// Parameters
    /// ----------
    /// M : float32 [B, Hkv, Dk, Dv]
    ///     Compressive memory.
    /// z : float32 [B, Hkv, Dk]
    ///     Normaliser.
    /// tokens : int [B]
    ///     Tokens each stream has seen.
    /// committed : int [B], optional
    ///     Tokens written into (M, z); all of them by default.
    /// heads : int, optional
    ///     Query heads, Hkv by default.
    /// segment_len, update, scale, empty_memory, denominator, dtype
    ///     As in Problem.
    #[staticmethod]
    #[pyo3(signature = (M, z, tokens, committed = None, *, heads = None, segment_len = None, update = None, scale = None, empty_memory = None, denominator = None, dtype = None))]
    #[allow(clippy::too_many_arguments, non_snake_case)]
    fn from_arrays(
        M: &Bound<'_, PyAny>,
        z: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        committed: Option<&Bound<'_, PyAny>>,
        heads: Option<&Bound<'_, PyAny>>,
        segment_len: Option<&Bound<'_, PyAny>>,
        update: Option<&Bound<'_, PyAny>>,
        scale: Option<&Bound<'_, PyAny>>,
        empty_memory: Option<&Bound<'_, PyAny>>,
        denominator: Option<&Bound<'_, PyAny>>,
        dtype: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let (_, m) = tensor::borrow("M", M)?;
        let (_, z) = tensor::borrow("z", z)?;
        let [batch, kv_heads, key_dim, value_dim] = m.extents("[B, Hkv, Dk, Dv]")?;
        let expected = [batch, kv_heads, key_dim];
        if z.shape() != expected {
            return Err(error::shape("z", z.shape(), format_args!("{expected:?}")));
        }
        let policies = Policies { segment_len, update, scale, empty_memory, denominator };
        let heads = heads.map_or(Ok(kv_heads), |n| extent("heads", n))?;
        let extents = [heads, kv_heads, key_dim, value_dim];
        let builder = infini_attn::Problem::builder();
        let problem = policies.problem(builder, extents, element_type(dtype)?)?;
        let tokens = token_counts("tokens", tokens, batch)?;
        let committed = match committed {
            Some(committed) => token_counts("committed", committed, batch)?,
            None => tokens.clone(),
        };
        let (m, z) = (m.view()?, z.view()?);
        M.py().detach(|| {
            let (m, z) = (tensor::elements(m)?, tensor::elements(z)?);
            let state = Core::from_parts(&problem, &m, &z, &tokens, &committed);
            state.map(Self::new).map_err(error::python)
        })
    }

    /// The problem this state belongs to.
    #[getter]
    fn problem(&self) -> PyResult<Problem> {
        Ok(Problem(*self.read()?.problem()))
    }

    /// Compressive memory, a copy: float32 [B, Hkv, Dk, Dv].
    #[getter(M)]
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        tensor::copy(py, self.read()?.memory())
    }

    /// Normaliser, a copy: float32 [B, Hkv, Dk].
    #[getter(z)]
    fn normalizer<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        tensor::copy(py, self.read()?.normalizer())
    }

    /// Tokens each stream has seen: int64 [B].
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.read()?;
        tensor::counts(py, (0..state.sequences()).map(|slot| state.tokens(slot)))
    }

    /// Tokens each stream has written into (M, z): int64 [B].
    #[getter]
    fn committed<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.read()?;
        tensor::counts(py, (0..state.sequences()).map(|slot| state.committed(slot)))
    }

    /// Tokens in each stream's open segment: int64 [B].
    #[getter]
    fn open_len<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.read()?;
        tensor::counts(py, (0..state.sequences()).map(|slot| state.open_len(slot) as u64))
    }

    /// Default position of each stream's next token (= tokens): int64 [B].
    #[getter]
    fn position<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.tokens(py)
    }

    /// Number of streams, B.
    #[getter]
    fn sequences(&self) -> PyResult<usize> {
        Ok(self.read()?.sequences())
    }

    /// Bytes held, open segments included.
    #[getter]
    fn nbytes(&self) -> PyResult<usize> {
        Ok(self.read()?.bytes())
    }

    /// Commits the open segments of all streams (or of those in `slots`), in place; the next token
    /// opens a new segment of full length. An interrupt is raised when that is done.
    #[pyo3(signature = (slots = None))]
    fn flush(&self, py: Python<'_>, slots: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let mut guard = self.write()?;
        let slots = self::slots(slots, guard.sequences())?;
        let (problem, state) = (*guard.problem(), &mut *guard);
        threads::run(py, || infini_attn::flush(&problem, state, &slots))
    }

    /// Forgets everything all streams (or those in `slots`) have seen, in place.
    #[pyo3(signature = (slots = None))]
    fn reset(&self, py: Python<'_>, slots: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let mut guard = self.write()?;
        let slots = self::slots(slots, guard.sequences())?;
        let state = &mut *guard;
        py.detach(|| state.reset(&slots)).map_err(error::python)
    }

    /// Takes back the last tokens of a stream, such as drafts that were not accepted, in place: it goes on
    /// behind its first `tokens`. That reaches back to where its open segment begins; tokens before are in
    /// the memory, and asking for fewer raises ValueError.
    fn truncate(&self, slot: &Bound<'_, PyAny>, tokens: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut state = self.write()?;
        let (slot, tokens) = (count("slot", slot)?, count("tokens", tokens)?);
        state.truncate(slot, tokens).map_err(error::python)
    }

    /// An independent copy, or a state whose stream i continues where stream slots[i] stands; a
    /// slot may be named several times (several continuations of one prompt).
    #[pyo3(signature = (slots = None))]
    fn fork(&self, py: Python<'_>, slots: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let Some(slots) = slots else { return self.derive(py, Core::try_clone) };
        let slots = self::slots(Some(slots), self.read()?.sequences())?;
        self.derive(py, |state| state.fork(&slots))
    }

    /// The streams of all the states, one state after another, as one state: requests join a batch.
    /// They leave it by index, slice or fork.
    #[staticmethod]
    fn concat(py: Python<'_>, states: &Bound<'_, PyAny>) -> PyResult<Self> {
        let states: Vec<Bound<'_, State>> = error::items("states", states, |name, state| {
            error::typed(name, state, "an infini_attn.State")
        })?;
        let guards = states.iter().map(|s| s.get().read()).collect::<PyResult<Vec<_>>>()?;
        let states: Vec<_> = guards.iter().map(|g| &**g).collect();
        py.detach(|| Core::concat(&states)).map(Self::new).map_err(error::python)
    }

    fn __len__(&self) -> PyResult<usize> {
        self.sequences()
    }

    /// A copy of one stream (an index, from the end if negative), of those of a slice, or of a list.
    fn __getitem__(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<Self> {
        let len = self.sequences()?;
        let slots = if let Ok(slice) = index.cast::<PySlice>() {
            let range = slice.indices(isize::try_from(len)?)?;
            let slot = |i| (range.start + i as isize * range.step) as usize;
            tensor::collect((0..range.slicelength).map(slot))?
        } else {
            let (shape, given) = tensor::integers("index", index)?;
            if shape.len() > 1 {
                return Err(error::shape(
                    "index",
                    &shape,
                    "a stream, a slice or a list of streams",
                ));
            }
            let of_stream = |i: i128| if i < 0 { i + len as i128 } else { i };
            let slots = given.into_iter().map(|i| match usize::try_from(of_stream(i)) {
                Ok(slot) if slot < len => Ok(slot),
                _ => Err(PyIndexError::new_err(format!(
                    "index: {i} given, one of {len} streams expected"
                ))),
            });
            slots.collect::<PyResult<_>>()?
        };
        self.derive(py, |state| state.fork(&slots))
    }

    /// Writes the state to a file (safetensors, with the problem in its metadata).
    ///
    /// A file that is there is replaced in one step once the new one is complete and on the disk, also
    /// where several save to it at once; after an error or a crash it is still whole. It keeps its mode
    /// and, where the system permits, its owner. Symbolic links are followed; pipes and devices are
    /// written into.
    fn save(&self, path: &Bound<'_, PyAny>) -> PyResult<()> {
        let (name, path) = file_name(path)?;
        let state = &*self.read()?;
        let saved = name.py().detach(|| state.save(&path));
        saved.map_err(|e| error::file(e, name.unbind()))
    }

    /// Reads a state from a file; with `problem`, refuses the state of another one before more of the
    /// file is read.
    #[staticmethod]
    #[pyo3(signature = (path, problem = None))]
    fn load(path: &Bound<'_, PyAny>, problem: Option<&Problem>) -> PyResult<Self> {
        let (name, path) = file_name(path)?;
        let problem = problem.map(|p| p.0);
        let state = name.py().detach(|| match problem {
            Some(problem) => Core::load_for(&problem, &path),
            None => Core::load(&path),
        });
        state.map(Self::new).map_err(|e| error::file(e, name.unbind()))
    }

    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let state = &*self.read()?;
        let bytes = py.detach(|| state.to_bytes()).map_err(error::python)?;
        let load = py.import("infini_attn._core")?.getattr("_state_from_bytes")?;
        let copy = |memory: &mut [u8]| {
            py.detach(|| memory.copy_from_slice(&bytes));
            Ok(())
        };
        Ok((load, (PyBytes::new_with(py, bytes.len(), copy)?,)))
    }

    fn __copy__(&self, py: Python<'_>) -> PyResult<Self> {
        self.fork(py, None)
    }

    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> PyResult<Self> {
        self.fork(py, None)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let state = self.read()?;
        let list = |count: &dyn Fn(usize) -> String| -> String {
            (0..state.sequences()).map(count).collect::<Vec<_>>().join(", ")
        };
        let problem = Bound::new(py, Problem(*state.problem()))?;
        Ok(format!(
            "State(tokens=[{}], committed=[{}], open_len=[{}], {})",
            list(&|s| state.tokens(s).to_string()),
            list(&|s| state.committed(s).to_string()),
            list(&|s| state.open_len(s).to_string()),
            problem.repr()?
        ))
    }
}

/// What pickle calls.
#[pyfunction]
pub fn _state_from_bytes(py: Python<'_>, bytes: &[u8]) -> PyResult<State> {
    py.detach(|| Core::from_bytes(bytes)).map(State::new).map_err(error::python)
}
