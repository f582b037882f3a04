//! Tensors in device memory, by what they say of themselves: `data_ptr()`, `shape`, `stride()`, `dtype`.

use infini_attn::DType;
use infini_attn::cuda::{DeviceTensor, Operand};
use pyo3::intern;
use pyo3::prelude::*;

use super::python;
use crate::error;

/// One of a call's tensors.
pub struct Given {
    pub name: &'static str,
    pub operand: Operand,
    pub tensor: DeviceTensor,
    pub address: u64,
}

impl Given {
    pub fn new(name: &'static str, operand: Operand, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let shape: Vec<usize> = object.getattr(intern!(py, "shape"))?.extract()?;
        let strides: Vec<i64> = object.call_method0(intern!(py, "stride"))?.extract()?;
        let tensor = DeviceTensor::strided(dtype(name, object)?, &shape, &strides);
        Ok(Self { name, operand, tensor: tensor.map_err(python)?, address: address(object)? })
    }

    /// The same, if it was given.
    pub fn optional(
        name: &'static str,
        operand: Operand,
        object: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Self>> {
        object.map(|object| Self::new(name, operand, object)).transpose()
    }

    /// The tensor, for those that may be left out.
    pub fn tensor(given: &Option<Self>) -> Option<DeviceTensor> {
        given.as_ref().map(|given| given.tensor)
    }
}

/// Where a tensor's first element lies.
pub fn address(object: &Bound<'_, PyAny>) -> PyResult<u64> {
    object.call_method0(intern!(object.py(), "data_ptr"))?.extract()
}

fn dtype(name: &str, object: &Bound<'_, PyAny>) -> PyResult<DType> {
    let dtype = object.getattr(intern!(object.py(), "dtype"))?.str()?;
    match dtype.to_str()? {
        "torch.bfloat16" => Ok(DType::BF16),
        "torch.float16" => Ok(DType::F16),
        "torch.float32" => Ok(DType::F32),
        other => Err(error::dtype(name, other, "f16 or bf16")),
    }
}
