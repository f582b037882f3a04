//! States and calls in a device's memory that another library has allocated.
//!
//! Python makes every buffer (state, outputs, workspace) with the other library's allocator and gives
//! its stream; here a call is planned, checked and enqueued. Nothing is allocated on the device and
//! nothing waits, but where a host state is read or written.

pub mod mirror;
mod place;
pub mod plan;
mod tensors;

use pyo3::prelude::*;

/// An error of the device: RuntimeError, unlike that of an argument.
pub fn python(error: infini_attn::Error) -> PyErr {
    use infini_attn::Error::{Capturing, Driver, Launch, NoDevice, Status, Unfinished};
    match error {
        Capturing { .. }
        | Driver { .. }
        | Launch { .. }
        | NoDevice { .. }
        | Status { .. }
        | Unfinished { .. } => pyo3::exceptions::PyRuntimeError::new_err(error.to_string()),
        _ => crate::error::python(error),
    }
}

/// The first device, or why there is none.
pub fn status() -> String {
    use infini_attn::cuda::{CurrentContext, Device};
    let found = CurrentContext::keep().and_then(|_current| {
        let device = Device::new(0)?;
        let (major, minor) = device.capability();
        Ok(format!("{}, compute capability {major}.{minor}", device.name()?))
    });
    found.unwrap_or_else(|error| error.to_string())
}
