//! One call with its arguments borrowed: outputs made or taken, the state advanced, signals heeded.

use std::sync::atomic::AtomicBool;

use infini_attn::{Element, Error, MAX_DECODE_TOKENS, Outputs, Problem, State, StateViewMut};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::attend::Arguments;
use crate::dlpack::{Memory, Scalar};
use crate::threads::{Computed, Lane};
use crate::{error, tensor, threads, torch};

/// What a call advances: a state, or one in memory of another library.
pub enum Advanced<'a, 'b> {
    State(&'a mut State),
    View(&'a mut StateViewMut<'b>),
}

/// What is wanted of a call besides the state: `out` to write into, or a new array.
pub struct Wanted<'a, 'py> {
    pub out: Option<&'a Bound<'py, PyAny>>,
    pub lse: bool,
    pub parts: bool,
}

/// The arrays of one call's results: `out`, and what is asked for.
pub struct Results<'py> {
    pub out: Bound<'py, PyAny>,
    pub lse: Option<Bound<'py, PyAny>>,
    /// A_dot and A_mem.
    pub parts: Option<[Bound<'py, PyAny>; 2]>,
}

impl<'py> Results<'py> {
    /// `out` alone, or the tuple (out, state, lse, a_dot, a_mem) of what is asked for.
    pub fn pack(
        self,
        py: Python<'py>,
        state: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut results = vec![self.out];
        results.extend(state);
        results.extend(self.lse);
        results.extend(self.parts.into_iter().flatten());
        match <[_; 1]>::try_from(results) {
            Ok([out]) => Ok(out),
            Err(results) => Ok(PyTuple::new(py, results)?.into_any()),
        }
    }
}

/// A signal's exception that ended a call.
pub struct Interrupt {
    pub error: PyErr,
    /// Tokens of each sequence that the state has taken in.
    taken: Vec<usize>,
}

impl Interrupt {
    /// The exception, saying what a call in place has got done.
    pub fn with_results(self, py: Python<'_>, results: Bound<'_, PyAny>) -> PyErr {
        let note = format!(
            "infini_attention: the state has taken in {:?} tokens, and is valid, as are the outputs up \
             to there (tokens_taken and results of this exception)",
            self.taken
        );
        let exception = self.error.value(py);
        // An exception of the program's own may refuse attributes, and Python 3.10 knows no notes.
        let _ = exception.setattr("tokens_taken", &self.taken);
        let _ = exception.setattr("results", results);
        let _ = exception.call_method1("add_note", (note,));
        self.error
    }
}

/// The array that the caller gives for an output.
fn given<'py>(
    out: &Bound<'py, PyAny>,
    shape: &[usize],
    arguments: &Arguments<'py>,
) -> PyResult<(Bound<'py, PyAny>, Memory<'py>)> {
    let (kind, memory) = tensor::borrow("out", out)?;
    tensor::check_kind("out", kind, "q", arguments.kind)?;
    if memory.data_type() != arguments.q.data_type() {
        return Err(memory.wrong_dtype(format_args!("{} as q has", arguments.q.data_type())));
    }
    if memory.shape() != shape {
        return Err(error::shape("out", memory.shape(), format_args!("{shape:?}")));
    }
    arguments.check_apart(&memory)?;
    Ok((out.clone(), memory))
}

pub fn run<'py, T: Element + Scalar>(
    py: Python<'py>,
    arguments: &Arguments<'py>,
    problem: &Problem,
    mut state: Advanced<'_, '_>,
    wanted: Wanted<'_, 'py>,
) -> PyResult<(Results<'py>, Option<Interrupt>)> {
    let batch = &arguments.batch;
    let [shape, lse_shape] = batch.outputs(problem.heads(), problem.value_dim());
    let like = || tensor::empty::<T>(py, arguments.kind, &shape);
    let (out, mut out_memory) = wanted.out.map_or_else(like, |o| given(o, &shape, arguments))?;
    let lse = || tensor::empty::<f32>(py, arguments.kind, &lse_shape);
    let mut lse = wanted.lse.then(lse).transpose()?;
    let parts = || Ok::<_, PyErr>([like()?, like()?]);
    let mut parts = wanted.parts.then(parts).transpose()?;

    let mut outputs = Outputs::new(out_memory.view_mut::<T>()?);
    if let Some((_, memory)) = &mut lse {
        outputs = outputs.lse(memory.view_mut()?);
    }
    if let Some([(_, a_dot), (_, a_mem)]) = &mut parts {
        outputs = outputs.a_dot(a_dot.view_mut()?).a_mem(a_mem.view_mut()?);
    }
    let Computed { result, interrupt } = compute(py, arguments, problem, &mut state, outputs)?;
    if let (Some(out), tensor::Kind::Torch, Some(torch)) =
        (wanted.out, arguments.kind, torch::loaded(py)?)
    {
        torch.written(out)?;
    }
    let interrupt = match (result, interrupt) {
        (result, None) => result.map(|()| None).map_err(error::python)?,
        (Ok(()), Some(error)) => Some(Interrupt { error, taken: batch.lens() }),
        (Err(Error::Cancelled { taken }), Some(error)) => Some(Interrupt { error, taken }),
        (Err(_), Some(error)) => Some(Interrupt { error, taken: vec![0; batch.sequences()] }),
    };
    let results = Results {
        out,
        lse: lse.map(|(object, _)| object),
        parts: parts.map(|parts| parts.map(|(object, _)| object)),
    };
    Ok((results, interrupt))
}

fn compute<T: Element + Scalar>(
    py: Python<'_>,
    arguments: &Arguments<'_>,
    problem: &Problem,
    state: &mut Advanced<'_, '_>,
    outputs: Outputs<'_, T>,
) -> PyResult<Computed<()>> {
    let (q, k, v) = (arguments.q.view()?, arguments.k.view()?, arguments.v.view()?);
    let (cancel, gate) = (AtomicBool::new(false), &arguments.beta[..]);
    let inputs = arguments.inputs::<T>(q, k, v)?.cancel(&cancel);
    let longest = arguments.batch.lens().into_iter().max().unwrap_or(0);
    let decoding = longest <= MAX_DECODE_TOKENS;
    let standing = match state {
        Advanced::State(state) => &**state,
        Advanced::View(view) => view.state(),
    };
    let lane = match decoding {
        true if standing.decodes_inline(longest) => Lane::Inline,
        true => Lane::Decode,
        false => Lane::Long,
    };
    threads::compute(py, lane, &cancel, || match (state, decoding) {
        (Advanced::State(state), true) => {
            infini_attn::decode(problem, &inputs, gate, state, outputs)
        }
        (Advanced::State(state), false) => {
            infini_attn::prefill(problem, &inputs, gate, state, outputs)
        }
        (Advanced::View(view), true) => view.decode(problem, &inputs, gate, outputs),
        (Advanced::View(view), false) => view.prefill(problem, &inputs, gate, outputs),
    })
}
