//! Where a call runs: a device, and a stream of the library that owns the tensors.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use infini_attn::cuda::{CurrentContext, Device};
use pyo3::intern;
use pyo3::prelude::*;

use super::python;

/// A device and stream as Python gives them: `ordinal`, `stream` (the handle) and `empty(bytes)`, which
/// returns uninitialised memory on that stream, an object with `data_ptr()`.
#[derive(Clone)]
pub struct Place<'py> {
    device: Device,
    empty: Bound<'py, PyAny>,
}

/// A workspace, held until the work in it is enqueued: the allocator frees in the stream's order.
pub struct Workspace<'py> {
    pub address: u64,
    _owner: Option<Bound<'py, PyAny>>,
}

impl<'py> Place<'py> {
    /// The device is opened the first time that its ordinal comes, and kept for good.
    ///
    /// The second half restores the context that was current in this thread, when it is dropped.
    pub fn of(object: &Bound<'py, PyAny>) -> PyResult<(Self, CurrentContext)> {
        let py = object.py();
        let ordinal: usize = object.getattr(intern!(py, "ordinal"))?.extract()?;
        let stream: u64 = object.getattr(intern!(py, "stream"))?.extract()?;
        let empty = object.getattr(intern!(py, "empty"))?;
        let current = CurrentContext::keep().map_err(python)?;
        Ok((Self { device: device(ordinal, stream)?, empty }, current))
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Memory for a plan.
    pub fn workspace(&self, bytes: u64) -> PyResult<Workspace<'py>> {
        if bytes == 0 {
            return Ok(Workspace { address: 0, _owner: None });
        }
        let owner = self.empty.call1((bytes,))?;
        let address = owner.call_method0(intern!(owner.py(), "data_ptr"))?.extract()?;
        Ok(Workspace { address, _owner: Some(owner) })
    }
}

/// The device with one of its streams: of a library's pool of streams, so there are few.
fn device(ordinal: usize, stream: u64) -> PyResult<Device> {
    static DEVICES: Mutex<Option<HashMap<(usize, u64), Device>>> = Mutex::new(None);
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let devices = devices.get_or_insert_default();
    if let Some(device) = devices.get(&(ordinal, stream)) {
        return Ok(device.clone());
    }
    let other = devices.iter().find(|((known, _), _)| *known == ordinal).map(|(_, device)| device);
    // SAFETY: the library that gives the handle uses it for its own work now, in the primary context.
    let device = unsafe {
        match other {
            Some(device) => device.on_borrowed(stream),
            None => Device::borrowed(ordinal, stream),
        }
    };
    let device = device.map_err(python)?;
    devices.insert((ordinal, stream), device.clone());
    Ok(device)
}
