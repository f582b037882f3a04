//! The reference on tensors of float64, and its gradients: what PyTorch's gradients are checked by. A state is
//! a tensor of float64 [slots, numbers], the rows of `reference::State::to_rows`.

use std::sync::atomic::AtomicBool;

use infini_attn::{Problem, TensorView, reference};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::attend::Arguments;
use crate::dlpack::Memory;
use crate::problem::parsed;
use crate::reference::widen;
use crate::{error, keywords, tensor, threads};

type Given<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// Numbers of a slot of a state.
#[pyfunction]
pub fn _row_len(problem: &str) -> PyResult<usize> {
    parsed(problem).map(|problem| reference::row_len(&problem))
}

/// q, k and v as numbers.
struct Operands<'a, 'py> {
    arguments: &'a Arguments<'py>,
    numbers: [Vec<f64>; 3],
}

impl<'a, 'py> Operands<'a, 'py> {
    fn new(arguments: &'a Arguments<'py>) -> PyResult<Self> {
        let numbers = [widen(&arguments.q)?, widen(&arguments.k)?, widen(&arguments.v)?];
        Ok(Self { arguments, numbers })
    }

    fn inputs(&self) -> PyResult<infini_attn::Inputs<'_, f64>> {
        fn view<'b>(numbers: &'b [f64], memory: &Memory<'_>) -> PyResult<TensorView<'b, f64>> {
            TensorView::new(numbers, memory.shape()).map_err(error::python)
        }
        let (a, [q, k, v]) = (self.arguments, &self.numbers);
        a.inputs(view(q, &a.q)?, view(k, &a.k)?, view(v, &a.v)?)
    }
}

/// A state of rows, or of empty streams.
fn state(problem: &Problem, slots: usize, rows: Given<'_, '_>) -> PyResult<reference::State> {
    let state = match rows {
        Some(rows) => {
            reference::State::from_rows(problem, slots, &widen(&tensor::borrow("state", rows)?.1)?)
        }
        None => reference::State::new(problem, slots),
    };
    state.map_err(error::python)
}

/// A new tensor of the arguments' kind.
fn made<'py>(
    py: Python<'py>,
    arguments: &Arguments<'py>,
    shape: &[usize],
    numbers: &[f64],
) -> PyResult<Bound<'py, PyAny>> {
    let (object, mut memory) = tensor::empty::<f64>(py, arguments.kind, shape)?;
    memory.as_mut_slice()?.copy_from_slice(numbers);
    Ok(object)
}

/// (o, lse, the state's rows after the call, a_dot, a_mem).
#[pyfunction]
#[pyo3(signature = (q, k, v, beta, rows, slots, problem, **tokens))]
#[allow(clippy::too_many_arguments)]
pub fn _advance_float64<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    beta: &Bound<'py, PyAny>,
    rows: Given<'_, 'py>,
    slots: usize,
    problem: &str,
    tokens: Option<&Bound<'py, PyDict>>,
) -> PyResult<[Bound<'py, PyAny>; 5]> {
    let arguments = keywords::arguments(py, [q, k, v, beta], tokens)?;
    let problem = parsed(problem)?;
    let mut next = state(&problem, slots, rows)?;
    let (operands, cancel) = (Operands::new(&arguments)?, AtomicBool::new(false));
    let (inputs, gate) = (operands.inputs()?.cancel(&cancel), &arguments.beta[..]);
    let output = threads::cancellable(py, &cancel, || {
        reference::prefill(&problem, &inputs, gate, &mut next)
    })?;
    let rows = next.to_rows().map_err(error::python)?;
    let [shape, lse_shape] = arguments.batch.outputs(problem.heads(), problem.value_dim());
    let new = |shape: &[usize], numbers| made(py, &arguments, shape, numbers);
    Ok([
        new(&shape, &output.o)?,
        new(&lse_shape, &output.lse)?,
        new(&[slots, reference::row_len(&problem)], &rows)?,
        new(&shape, &output.a_dot)?,
        new(&shape, &output.a_mem)?,
    ])
}

/// dL/dq, dL/dk, dL/dv and dL/d(rows before the call), from the gradients with respect to what the call
/// returns, of which None are zeros.
#[pyfunction]
#[pyo3(signature = (q, k, v, beta, rows, slots, problem, d_o, d_lse, d_rows, d_a_dot, d_a_mem, *, bptt_segments = None, **tokens))]
#[allow(clippy::too_many_arguments)]
pub fn _backward_float64<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    beta: &Bound<'py, PyAny>,
    rows: Given<'_, 'py>,
    slots: usize,
    problem: &str,
    d_o: Given<'_, 'py>,
    d_lse: Given<'_, 'py>,
    d_rows: Given<'_, 'py>,
    d_a_dot: Given<'_, 'py>,
    d_a_mem: Given<'_, 'py>,
    bptt_segments: Option<usize>,
    tokens: Option<&Bound<'py, PyDict>>,
) -> PyResult<[Bound<'py, PyAny>; 4]> {
    let arguments = keywords::arguments(py, [q, k, v, beta], tokens)?;
    let problem = parsed(problem)?;
    let state = state(&problem, slots, rows)?;
    let [shape, lse_shape] = arguments.batch.outputs(problem.heads(), problem.value_dim());
    let given = |name, object: Given<'_, 'py>, len: usize| match object {
        Some(object) => widen(&tensor::borrow(name, object)?.1),
        None => Ok(vec![0.0; len]),
    };
    let len: usize = shape.iter().product();
    let outputs = reference::Output {
        o: given("d_o", d_o, len)?,
        a_dot: given("d_a_dot", d_a_dot, len)?,
        a_mem: given("d_a_mem", d_a_mem, len)?,
        lse: given("d_lse", d_lse, lse_shape.iter().product())?,
    };
    let mut after: Vec<usize> = (0..slots).map(|slot| state.open_len(slot)).collect();
    for (slot, len) in arguments.batch.slots().into_iter().zip(arguments.batch.lens()) {
        // What is not a slot of the state is refused below.
        if let Some(open_len) = after.get_mut(slot) {
            *open_len = (*open_len + len) % problem.segment_len();
        }
    }
    let row_len = reference::row_len(&problem);
    let d_rows = given("d_rows", d_rows, slots * row_len)?;
    let mut gradient =
        reference::StateGradient::from_rows(&problem, &after, &d_rows).map_err(error::python)?;
    let (operands, cancel) = (Operands::new(&arguments)?, AtomicBool::new(false));
    let (inputs, gate) = (operands.inputs()?.cancel(&cancel), &arguments.beta[..]);
    let gradients = threads::cancellable(py, &cancel, || {
        reference::prefill_backward(
            &problem,
            &inputs,
            gate,
            &state,
            &outputs,
            &mut gradient,
            bptt_segments,
        )
    })?;
    let rows = gradient.to_rows(&problem).map_err(error::python)?;
    let new = |shape: &[usize], numbers| made(py, &arguments, shape, numbers);
    Ok([
        new(arguments.q.shape(), &gradients.q)?,
        new(arguments.k.shape(), &gradients.k)?,
        new(arguments.v.shape(), &gradients.v)?,
        new(&[slots, row_len], &rows)?,
    ])
}
