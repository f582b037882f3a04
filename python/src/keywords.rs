//! What the operators of `infini_attn.torch` say of tokens, as keyword arguments.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::attend::{Arguments, Tensors, Tokens};
use crate::error::Flag;
use crate::{batch, error};

/// As their schemas name them; each may be missing or None.
const NAMES: [&str; 8] = [
    "seq_slots",
    "seq_lens",
    "attention_mask",
    "cu_seqlens",
    "cos",
    "sin",
    "positions",
    "interleaved",
];

/// A call's arguments, of tensors and such keywords.
pub fn arguments<'py>(
    py: Python<'py>,
    tensors: Tensors<'_, 'py>,
    keywords: Option<&Bound<'py, PyDict>>,
) -> PyResult<Arguments<'py>> {
    let mut given: [Option<Bound<'py, PyAny>>; 8] = Default::default();
    for (name, value) in keywords.into_iter().flatten() {
        let name = name.cast::<PyString>()?.to_str()?;
        let Some(at) = NAMES.iter().position(|known| *known == name) else {
            return Err(PyTypeError::new_err(format!("unexpected keyword argument '{name}'")));
        };
        given[at] = (!value.is_none()).then_some(value);
    }
    let [slots, seq_lens, attention_mask, cu_seqlens, cos, sin, positions, interleaved] = given;
    let rope = match (cos, sin) {
        (Some(cos), Some(sin)) => Some(PyTuple::new(py, [cos, sin])?.into_any()),
        (None, None) => None,
        _ => return Err(error::value("rope", "one table", "a tuple (cos, sin)")),
    };
    let batch = batch::Given {
        seq_lens: seq_lens.as_ref(),
        attention_mask: attention_mask.as_ref(),
        cu_seqlens: cu_seqlens.as_ref(),
        slots: slots.as_ref(),
    };
    let interleaved = Flag::of(interleaved).or(false, "interleaved")?;
    let positions = positions.as_ref();
    Arguments::new(tensors, Tokens { batch, rope: rope.as_ref(), positions, interleaved })
}
