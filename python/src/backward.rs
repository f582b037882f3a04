//! Gradients of a call: what the operators of `infini_attn.torch` that PyTorch differentiates run on.

use std::sync::atomic::AtomicBool;

use infini_attn::{
    Element, HostLayout, InputGradients, OutputGradients, State, StateGradient, Tape,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::attend::Arguments;
use crate::buffer::Buffer;
use crate::dlpack::{Memory, Scalar, by_dtype};
use crate::problem::parsed;
use crate::{error, keywords, tensor, threads};

/// Tensors beside q, k and v: what the call has put out, and the gradients with respect to it.
struct Outputs<'py> {
    o: Memory<'py>,
    lse: Memory<'py>,
    d_o: Memory<'py>,
    d_lse: Option<Memory<'py>>,
    a_dot: Option<[Memory<'py>; 2]>,
    d_a_mem: Option<Memory<'py>>,
}

impl<'py> Outputs<'py> {
    fn all(&self) -> impl Iterator<Item = &Memory<'py>> {
        let others = self.d_lse.iter().chain(self.a_dot.iter().flatten()).chain(&self.d_a_mem);
        [&self.o, &self.lse, &self.d_o].into_iter().chain(others)
    }
}

type Given<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

fn borrow<'py>(argument: &str, object: &Bound<'py, PyAny>) -> PyResult<Memory<'py>> {
    tensor::borrow(argument, object).map(|(_, memory)| memory)
}

fn borrowed<'py>(argument: &str, object: Given<'_, 'py>) -> PyResult<Option<Memory<'py>>> {
    object.map(|object| borrow(argument, object)).transpose()
}

/// dL/dq, dL/dk, dL/dv and dL/dbeta of an `_advance` on `state`, which stands where that call found it
/// (None: empty streams). `d_state`, dL/d(state after it) in a buffer of the state's form, becomes
/// dL/d(state before it); None is a loss that does not depend on the state.
#[pyfunction]
#[pyo3(signature = (q, k, v, beta, state, d_state, slots, problem, rotation, o, lse, d_o, *, d_lse = None, a_dot = None, d_a_dot = None, d_a_mem = None, bptt_segments = None, **tokens))]
#[allow(clippy::too_many_arguments)]
pub fn _backward<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    beta: &Bound<'py, PyAny>,
    state: Given<'_, 'py>,
    d_state: Given<'_, 'py>,
    slots: usize,
    problem: &str,
    rotation: bool,
    o: &Bound<'py, PyAny>,
    lse: &Bound<'py, PyAny>,
    d_o: &Bound<'py, PyAny>,
    d_lse: Given<'_, 'py>,
    a_dot: Given<'_, 'py>,
    d_a_dot: Given<'_, 'py>,
    d_a_mem: Given<'_, 'py>,
    bptt_segments: Option<usize>,
    tokens: Option<&Bound<'py, PyDict>>,
) -> PyResult<[Bound<'py, PyAny>; 4]> {
    let arguments = keywords::arguments(py, [q, k, v, beta], tokens)?;
    let a_dot = match (borrowed("a_dot", a_dot)?, borrowed("d_a_dot", d_a_dot)?) {
        (Some(a_dot), Some(d_a_dot)) => Some([a_dot, d_a_dot]),
        (None, Some(_)) => return Err(error::value("d_a_dot", "without a_dot", "a_dot with it")),
        _ => None,
    };
    let outputs = Outputs {
        o: borrow("o", o)?,
        lse: borrow("lse", lse)?,
        d_o: borrow("d_o", d_o)?,
        d_lse: borrowed("d_lse", d_lse)?,
        a_dot,
        d_a_mem: borrowed("d_a_mem", d_a_mem)?,
    };
    let layout = HostLayout::new(&parsed(problem)?, slots, rotation).map_err(error::python)?;
    let tape = match state {
        Some(state) => Tape::of(Buffer::new(state, slots, problem, rotation)?.view()?.state()),
        None => State::new(layout.problem(), slots).and_then(|empty| Tape::of(&empty)),
    };
    let tape = tape.map_err(error::python)?;
    let mut memory = borrowed("d_state", d_state)?;
    if let Some(memory) = &memory {
        arguments.check_apart(memory)?;
        outputs.all().try_for_each(|read| memory.check_apart(read))?;
    }
    let d_state = match &mut memory {
        Some(memory) => StateGradient::lent(&layout, memory.as_mut_slice()?),
        None => StateGradient::new(layout.problem(), slots),
    };
    let d_state = d_state.map_err(error::python)?;
    by_dtype!(arguments.q, run(py, &arguments, &tape, &outputs, d_state, bptt_segments))
}

fn run<'py, T: Element + Scalar>(
    py: Python<'py>,
    arguments: &Arguments<'py>,
    tape: &Tape,
    outputs: &Outputs<'py>,
    mut d_state: StateGradient<'_>,
    bptt_segments: Option<usize>,
) -> PyResult<[Bound<'py, PyAny>; 4]> {
    let problem = *d_state.problem();
    let like = |memory: &Memory<'_>| tensor::empty::<T>(py, arguments.kind, memory.shape());
    let (dq, mut dq_memory) = like(&arguments.q)?;
    let (dk, mut dk_memory) = like(&arguments.k)?;
    let (dv, mut dv_memory) = like(&arguments.v)?;
    let (d_beta, mut d_gate) = tensor::empty::<f32>(py, arguments.kind, &[problem.heads()])?;
    let mut gradients = InputGradients::new(
        dq_memory.view_mut::<T>()?,
        dk_memory.view_mut()?,
        dv_memory.view_mut()?,
        d_gate.as_mut_slice()?,
    );
    if let Some(segments) = bptt_segments {
        gradients = gradients.bptt_segments(segments);
    }
    let mut results =
        OutputGradients::new(outputs.o.view::<T>()?, outputs.lse.view()?, outputs.d_o.view()?);
    if let Some([a_dot, d_a_dot]) = &outputs.a_dot {
        results = results.a_dot(a_dot.view()?, d_a_dot.view()?);
    }
    if let Some(d_a_mem) = &outputs.d_a_mem {
        results = results.a_mem(d_a_mem.view()?);
    }
    if let Some(d_lse) = &outputs.d_lse {
        results = results.lse(d_lse.view()?);
    }
    let (q, k, v) = (arguments.q.view()?, arguments.k.view()?, arguments.v.view()?);
    let (cancel, gate) = (AtomicBool::new(false), &arguments.beta[..]);
    let inputs = arguments.inputs::<T>(q, k, v)?.cancel(&cancel);
    threads::cancellable(py, &cancel, || {
        infini_attn::prefill_backward(
            &problem,
            &inputs,
            gate,
            tape,
            &results,
            &mut d_state,
            gradients,
        )
    })?;
    Ok([dq, dk, dv, d_beta])
}
