//! States in a tensor's memory: what `infini_attn.torch` calls on the CPU. Problems come as their text.

use infini_attn::{HostLayout, MAX_DECODE_TOKENS, StateViewMut};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::dlpack::{Memory, Scalar, by_dtype};
use crate::problem::parsed;
use crate::run::{Advanced, Wanted, run};
use crate::state::{self, State};
use crate::{error, keywords, tensor, threads};

/// The memory of a state and what lies in it.
pub struct Buffer<'py> {
    memory: Memory<'py>,
    layout: HostLayout,
}

impl<'py> Buffer<'py> {
    pub fn new(
        state: &Bound<'py, PyAny>,
        slots: usize,
        problem: &str,
        rotation: bool,
    ) -> PyResult<Self> {
        let (_, memory) = tensor::borrow("state", state)?;
        memory.extents::<1>("[bytes]")?;
        let layout = HostLayout::new(&parsed(problem)?, slots, rotation).map_err(error::python)?;
        Ok(Self { memory, layout })
    }

    pub fn view(&mut self) -> PyResult<StateViewMut<'_>> {
        let bytes = self.memory.as_mut_slice::<u8>()?;
        StateViewMut::new(&self.layout, bytes).map_err(error::python)
    }
}

type Part = (&'static str, &'static str, Vec<usize>, u64);

/// The parts of a state on the host, (name, dtype, shape, offset in bytes), and the bytes of all.
#[pyfunction]
pub fn _host_layout(problem: &str, slots: usize, rotation: bool) -> PyResult<(Vec<Part>, u64)> {
    let layout = HostLayout::new(&parsed(problem)?, slots, rotation).map_err(error::python)?;
    let part = |part: &infini_attn::HostPart| {
        let dtype = if part.element_bytes == 8 { "int64" } else { "float32" };
        (part.name, dtype, part.shape.clone(), part.offset)
    };
    Ok((layout.parts().iter().map(part).collect(), layout.bytes()))
}

/// Tokens into the streams of a state, in place; (out, lse), and a_dot, a_mem if `parts`. `short` refuses
/// more than a decode takes. Unless it is the caller's state that moves (`inplace`), an interrupt tells nothing
/// of it.
#[pyfunction]
#[pyo3(signature = (q, k, v, beta, state, slots, problem, rotation, *, short = false, out = None, parts = false, inplace = true, **tokens))]
#[allow(clippy::too_many_arguments)]
pub fn _advance<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    beta: &Bound<'py, PyAny>,
    state: &Bound<'py, PyAny>,
    slots: usize,
    problem: &str,
    rotation: bool,
    short: bool,
    out: Option<&Bound<'py, PyAny>>,
    parts: bool,
    inplace: bool,
    tokens: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyAny>> {
    let arguments = keywords::arguments(py, [q, k, v, beta], tokens)?;
    let longest = arguments.batch.lens().into_iter().max().unwrap_or(0);
    if short && longest > MAX_DECODE_TOKENS {
        let expected = format_args!("at most {MAX_DECODE_TOKENS}");
        return Err(error::value("q (tokens of a sequence)", longest, expected));
    }
    let mut buffer = Buffer::new(state, slots, problem, rotation)?;
    arguments.check_apart(&buffer.memory)?;
    if let Some(out) = out {
        tensor::borrow("out", out)?.1.check_apart(&buffer.memory)?;
    }
    let problem = *buffer.layout.problem();
    let mut view = buffer.view()?;
    let wanted = Wanted { out, lse: true, parts };
    let advanced = Advanced::View(&mut view);
    let (results, interrupt) =
        by_dtype!(arguments.q, run(py, &arguments, &problem, advanced, wanted))?;
    let results = results.pack(py, None)?;
    match interrupt {
        None => Ok(results),
        Some(interrupt) if inplace => Err(interrupt.with_results(py, results)),
        Some(interrupt) => Err(interrupt.error),
    }
}

/// Commits the open segments of the slots given, or of all.
#[pyfunction]
pub fn _flush_slots(
    py: Python<'_>,
    state: &Bound<'_, PyAny>,
    slots: usize,
    problem: &str,
    rotation: bool,
    seq_slots: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let chosen = state::slots(seq_slots, slots)?;
    let mut buffer = Buffer::new(state, slots, problem, rotation)?;
    let mut view = buffer.view()?;
    threads::run(py, || view.flush(&chosen))
}

/// Forgets what the slots given, or all, have seen.
#[pyfunction]
pub fn _reset_slots(
    py: Python<'_>,
    state: &Bound<'_, PyAny>,
    slots: usize,
    problem: &str,
    rotation: bool,
    seq_slots: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let chosen = state::slots(seq_slots, slots)?;
    let mut buffer = Buffer::new(state, slots, problem, rotation)?;
    let mut view = buffer.view()?;
    py.detach(|| view.reset(&chosen)).map_err(error::python)
}

/// Takes back the last tokens of a slot.
#[pyfunction]
pub fn _truncate_slot(
    state: &Bound<'_, PyAny>,
    slots: usize,
    problem: &str,
    rotation: bool,
    slot: usize,
    tokens: u64,
) -> PyResult<()> {
    let mut buffer = Buffer::new(state, slots, problem, rotation)?;
    buffer.view()?.truncate(slot, tokens).map_err(error::python)
}

/// The state as one with memory of its own.
#[pyfunction]
pub fn _state_from_buffer(
    py: Python<'_>,
    state: &Bound<'_, PyAny>,
    slots: usize,
    problem: &str,
    rotation: bool,
) -> PyResult<State> {
    let mut buffer = Buffer::new(state, slots, problem, rotation)?;
    let view = buffer.view()?;
    py.detach(|| view.state().try_clone()).map(State::new).map_err(error::python)
}

/// All streams of `source` into the memory of a state of as many slots.
#[pyfunction]
pub fn _state_into_buffer(
    py: Python<'_>,
    source: &Bound<'_, State>,
    state: &Bound<'_, PyAny>,
    slots: usize,
    problem: &str,
    rotation: bool,
) -> PyResult<()> {
    let mut buffer = Buffer::new(state, slots, problem, rotation)?;
    let mut view = buffer.view()?;
    let source = &*source.get().read()?;
    let pairs: Vec<_> = (0..source.sequences()).map(|slot| (slot, slot)).collect();
    py.detach(|| view.copy_slots(source, &pairs)).map_err(error::python)
}
