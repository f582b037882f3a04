//! The gate in device memory.

use cudarc::driver::{CudaSlice, DevicePtr};

use super::Device;
use crate::cuda::plan::address::Operand;
use crate::error::{Error, Result};

/// Gate logits β in device memory, one per query head, checked and uploaded once.
#[derive(Debug)]
pub struct Gate {
    pub(super) logits: CudaSlice<f32>,
    pub(super) address: u64,
}

impl Gate {
    /// Uploads the logits; ±∞ selects one branch alone.
    ///
    /// # Errors
    /// [`Error::Value`] for a NaN, [`Error::Driver`], [`Error::Capturing`].
    pub fn new(device: &Device, logits: &[f32]) -> Result<Self> {
        if let Some(h) = logits.iter().position(|b| b.is_nan()) {
            return Err(Error::value(format!("gate[{h}]"), "NaN", "a number or ±infinity"));
        }
        let logits = device.upload(logits)?;
        let address = logits.device_ptr(device.stream()).0;
        Ok(Self { logits, address })
    }

    /// Logits that are in device memory already, as they are: a NaN makes the rows of its head NaN.
    ///
    /// # Errors
    /// [`Error::Value`] for a buffer of another context, [`Error::Capturing`].
    pub fn from_slice(device: &Device, logits: CudaSlice<f32>) -> Result<Self> {
        device.refuse_capture("a gate", "make it before the capture")?;
        device.check_context(Operand::Gate, logits.stream())?;
        // Calls wait for what other streams still do with it.
        let address = logits.device_ptr(logits.stream()).0;
        Ok(Self { logits, address })
    }

    /// Number of query heads.
    pub fn heads(&self) -> usize {
        self.logits.len()
    }
}
