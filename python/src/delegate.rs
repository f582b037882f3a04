//! Calls that go to `infini_attn.torch`: what PyTorch records or differentiates, and tensors on devices. And
//! autocast.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::state::State;
use crate::torch;

/// A call's arguments, the optional ones by name.
pub struct Call<'a, 'py> {
    pub tensors: [&'a Bound<'py, PyAny>; 4],
    pub state: Option<&'a Bound<'py, PyAny>>,
    pub options: &'a [(&'static str, Option<&'a Bound<'py, PyAny>>)],
}

impl<'py> Call<'_, 'py> {
    /// What `infini_attn.torch.infini_attention` makes of the call, if it is one for it.
    pub fn delegated(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(torch) = torch::loaded(py)? else { return Ok(None) };
        let q = self.tensors[0];
        if !(torch.is_plain(q) || torch.is_tensor(q)?) {
            return Ok(None);
        }
        let here = q.getattr(intern!(py, "is_cpu"))?.is_truthy()?;
        let buffers = self.state.map_or(Ok(false), is_buffer)?;
        if here && !buffers && !torch.wants_gradients(&self.tensors)? && !torch.is_recording(py)? {
            return Ok(None);
        }
        let kwargs = PyDict::new(py);
        for (name, value) in self.options.iter().chain(&[("state", self.state)]) {
            if let Some(value) = value {
                kwargs.set_item(name, value)?;
            }
        }
        let function = py.import(intern!(py, "infini_attn.torch"))?.getattr("infini_attention")?;
        function.call(PyTuple::new(py, self.tensors)?, Some(&kwargs)).map(Some)
    }
}

/// What the operator makes of partial results on a device: (out, lse).
pub fn merged<'py>(
    a_dot: &Bound<'py, PyAny>,
    lse: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = a_dot.py();
    let Some(torch) = torch::loaded(py)? else { return Ok(None) };
    let Ok(first) = a_dot.get_item(0) else { return Ok(None) };
    if !(torch.is_plain(&first) || torch.is_tensor(&first)?)
        || first.getattr(intern!(py, "is_cpu"))?.is_truthy()?
    {
        return Ok(None);
    }
    let operators = py.import(intern!(py, "infini_attn.torch"))?.getattr("ops")?;
    operators.call_method1(intern!(py, "merge"), (a_dot, lse)).map(Some)
}

/// q, k and v as autocast has them, where it is enabled: of the state's element type, or else of autocast's.
pub fn autocast<'py>(
    tensors: [&Bound<'py, PyAny>; 3],
    state: Option<&Bound<'py, State>>,
) -> PyResult<Option<[Bound<'py, PyAny>; 3]>> {
    let py = tensors[0].py();
    let Some(torch) = torch::loaded(py)? else { return Ok(None) };
    let Some(dtype) = torch.autocast_dtype(py)? else { return Ok(None) };
    let dtype = match state {
        Some(state) => torch.dtype(py, state.get().read()?.problem().dtype())?,
        None => dtype,
    };
    let cast = |tensor: &Bound<'py, PyAny>| torch.cast(tensor, &dtype);
    let [q, k, v] = tensors;
    Ok(Some([cast(q)?, cast(k)?, cast(v)?]))
}

/// Whether a state is an `infini_attn.torch.State`.
fn is_buffer(state: &Bound<'_, PyAny>) -> PyResult<bool> {
    if state.is_instance_of::<State>() {
        return Ok(false);
    }
    let modules = state.py().import("sys")?.getattr("modules")?.cast_into::<PyDict>()?;
    match modules.get_item("infini_attn.torch.state")? {
        Some(module) => state.is_instance(&module.getattr("State")?),
        None => Ok(false),
    }
}
