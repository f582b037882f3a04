//! The gate in device memory.

use cudarc::driver::{CudaSlice, DevicePtr};

use super::Device;
use crate::cuda::plan::address::Operand;
use crate::error::{Error, Result};

/// Gate logits β in device memory, one per query head: checked and uploaded once, or somebody else's.
pub struct Gate<'a> {
    logits: Logits<'a>,
    pub(super) address: u64,
}

enum Logits<'a> {
    Owned(CudaSlice<f32>),
    Lent(&'a (dyn DevicePtr<f32> + Send + Sync)),
}

impl std::fmt::Debug for Gate<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gate([{}] at {:#x})", self.heads(), self.address)
    }
}

impl Gate<'static> {
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
        Ok(Self { logits: Logits::Owned(logits), address })
    }

    /// Logits that are in device memory already, as they are: a NaN makes the rows of its head NaN.
    ///
    /// # Errors
    /// [`Error::Value`] for a buffer of another context, [`Error::Capturing`].
    pub fn from_slice(device: &Device, logits: CudaSlice<f32>) -> Result<Self> {
        let address = checked(device, &logits)?;
        Ok(Self { logits: Logits::Owned(logits), address })
    }
}

impl<'a> Gate<'a> {
    /// The same of a buffer that stays somebody else's: `CudaSlice`, `CudaView` or `CudaViewMut`.
    ///
    /// # Errors
    /// Those of [`Self::from_slice`].
    pub fn lent(
        device: &Device,
        logits: &'a (impl DevicePtr<f32> + Send + Sync),
    ) -> Result<Gate<'a>> {
        Ok(Self { logits: Logits::Lent(logits), address: checked(device, logits)? })
    }

    /// Number of query heads.
    pub fn heads(&self) -> usize {
        self.data().len()
    }

    pub(super) fn data(&self) -> &dyn DevicePtr<f32> {
        match &self.logits {
            Logits::Owned(logits) => logits,
            Logits::Lent(logits) => *logits,
        }
    }
}

/// The address of logits that calls on the device may read.
fn checked(device: &Device, logits: &impl DevicePtr<f32>) -> Result<u64> {
    device.refuse_capture("a gate", "make it before the capture")?;
    device.check_context(Operand::Gate, logits.stream())?;
    // Calls wait for what other streams still do with it.
    Ok(logits.device_ptr(logits.stream()).0)
}
