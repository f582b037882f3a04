//! Tensors in cudarc's buffers: borrowed, checked against the buffer's length.
//!
//! **Streams.** A view says which buffer a call reads or writes. While the context tracks events
//! (cudarc's default, in effect from the second stream on), a call waits on its own stream for
//! whatever other streams still do with these buffers, and other streams wait for the call. A stream
//! that captures a graph can wait for nothing outside of it: there the addresses are taken as they
//! were when the view was made, nothing is waited for and nothing recorded, and ordering replays
//! after other work is the caller's. Make views before the capture begins.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};

use super::Device;
use super::error::driver;
use crate::cuda::plan::address::{Addresses, Operand};
use crate::cuda::plan::tensor::DeviceTensor;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::tensor::check_len;

/// A read-only strided tensor of rank 1 to 4 in a cudarc buffer: `CudaSlice`, `CudaView` or
/// `CudaViewMut`.
pub struct TensorView<'a, T> {
    data: &'a dyn DevicePtr<T>,
    /// Of element (0, …, 0).
    address: u64,
    tensor: DeviceTensor,
}

impl<T> Clone for TensorView<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for TensorView<'_, T> {}

impl<T> std::fmt::Debug for TensorView<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorView({:?} at {:#x})", self.tensor, self.address)
    }
}

impl<'a, T: Element + DeviceRepr> TensorView<'a, T> {
    /// A row-major view of the whole of `data`.
    ///
    /// # Errors
    /// As [`crate::TensorView::new`].
    pub fn new(data: &'a impl DevicePtr<T>, shape: &[usize]) -> Result<Self> {
        let tensor = DeviceTensor::contiguous(T::DTYPE, shape)?;
        check_len(data.len(), shape)?;
        Ok(Self { data, address: address(data, 0), tensor })
    }

    /// A view whose element (0, …, 0) is `data[offset]`; strides in elements.
    ///
    /// # Errors
    /// As [`crate::TensorView::strided`].
    pub fn strided(
        data: &'a impl DevicePtr<T>,
        offset: usize,
        shape: &[usize],
        strides: &[i64],
    ) -> Result<Self> {
        let tensor = DeviceTensor::strided(T::DTYPE, shape, strides)?;
        tensor.layout().check_within(offset, data.len())?;
        Ok(Self { data, address: address(data, offset), tensor })
    }
}

impl<T> TensorView<'_, T> {
    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    /// Strides in elements, outermost first.
    pub fn strides(&self) -> &[i64] {
        self.tensor.strides()
    }

    pub(super) fn tensor(&self) -> DeviceTensor {
        self.tensor
    }
}

/// A strided tensor that may be written; no two of its indices reach the same element.
pub struct TensorViewMut<'a, T> {
    data: &'a mut dyn DevicePtrMut<T>,
    address: u64,
    tensor: DeviceTensor,
}

impl<T> std::fmt::Debug for TensorViewMut<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorViewMut({:?} at {:#x})", self.tensor, self.address)
    }
}

impl<'a, T: Element + DeviceRepr> TensorViewMut<'a, T> {
    /// A row-major view of the whole of `data`.
    ///
    /// # Errors
    /// As [`crate::TensorViewMut::new`].
    pub fn new(data: &'a mut impl DevicePtrMut<T>, shape: &[usize]) -> Result<Self> {
        let tensor = DeviceTensor::contiguous(T::DTYPE, shape)?;
        check_len(data.len(), shape)?;
        let address = address_mut(data, 0);
        Ok(Self { data, address, tensor })
    }

    /// A view whose element (0, …, 0) is `data[offset]`; strides in elements.
    ///
    /// # Errors
    /// As [`crate::TensorViewMut::strided`].
    pub fn strided(
        data: &'a mut impl DevicePtrMut<T>,
        offset: usize,
        shape: &[usize],
        strides: &[i64],
    ) -> Result<Self> {
        let tensor = DeviceTensor::strided(T::DTYPE, shape, strides)?;
        tensor.layout().check_within(offset, data.len())?;
        tensor.layout().check_injective("strides")?;
        let address = address_mut(data, offset);
        Ok(Self { data, address, tensor })
    }
}

impl<T> TensorViewMut<'_, T> {
    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    /// Strides in elements, outermost first.
    pub fn strides(&self) -> &[i64] {
        self.tensor.strides()
    }

    pub(super) fn tensor(&self) -> DeviceTensor {
        self.tensor
    }
}

/// The address of an element. The buffer's own stream may wait for its last writer, which is
/// harmless outside of a capture.
fn address<T>(data: &impl DevicePtr<T>, offset: usize) -> u64 {
    data.device_ptr(data.stream()).0 + (offset * size_of::<T>()) as u64
}

fn address_mut<T>(data: &mut impl DevicePtrMut<T>, offset: usize) -> u64 {
    let stream = data.stream().clone();
    data.device_ptr_mut(&stream).0 + (offset * size_of::<T>()) as u64
}

/// The addresses of a call's operands, and the guards that order its work with that of other
/// streams: they are dropped, and thereby recorded, when everything is enqueued.
pub(super) struct Operands<'s> {
    device: &'s Device,
    capturing: bool,
    pub addresses: Addresses,
    guards: Vec<SyncOnDrop<'s>>,
}

impl<'s> Operands<'s> {
    pub fn new(device: &'s Device) -> Result<Self> {
        let capturing = device.is_capturing()?;
        Ok(Self { device, capturing, addresses: Addresses::new(), guards: Vec::new() })
    }

    /// A buffer that the call reads.
    pub fn read<T>(&mut self, operand: Operand, view: &'s TensorView<'_, T>) -> Result<()> {
        self.buffer(operand, view.data, view.address)
    }

    pub fn buffer<T>(
        &mut self,
        operand: Operand,
        data: &'s dyn DevicePtr<T>,
        address: u64,
    ) -> Result<()> {
        self.device.check_context(operand, data.stream())?;
        self.addresses.set(operand, address);
        if !self.capturing {
            self.guards.push(data.device_ptr(self.device.stream()).1);
        }
        Ok(())
    }

    /// That the call's work waits for what others still do with its buffers. Before the first step.
    ///
    /// # Errors
    /// [`Error::Driver`] where the driver has refused an event.
    pub fn ordered(&self) -> Result<()> {
        self.device.pending("waiting for other streams")
    }

    /// Lets others wait for the call's work. After the last step. Where the driver refuses an event, the
    /// host waits in their place.
    ///
    /// # Errors
    /// [`Error::Driver`] where that is refused as well.
    pub fn finish(self) -> Result<()> {
        drop(self.guards);
        if self.device.pending("recording an event").is_ok() {
            return Ok(());
        }
        let waited = self.device.stream().synchronize();
        waited.map_err(|e| self.device.failed("waiting for the call's end", e))
    }

    /// A buffer that the call writes.
    pub fn write<T>(&mut self, operand: Operand, view: &'s mut TensorViewMut<'_, T>) -> Result<()> {
        self.device.check_context(operand, view.data.stream())?;
        self.addresses.set(operand, view.address);
        if !self.capturing {
            self.guards.push(view.data.device_ptr_mut(self.device.stream()).1);
        }
        Ok(())
    }
}

impl Device {
    /// A buffer with a copy of `data`, for tables and tensors.
    ///
    /// # Errors
    /// [`Error::Driver`] when the device's memory does not suffice, [`Error::Capturing`].
    pub fn upload<T: Element + DeviceRepr>(&self, data: &[T]) -> Result<CudaSlice<T>> {
        let what = format!("uploading {} elements", data.len());
        self.refuse_capture(&what, "upload before the capture")?;
        let copy = self.stream().clone_htod(data).map_err(|e| driver(what, e))?;
        // Then the host's memory is read, whatever kind it is of.
        self.synchronize()?;
        Ok(copy)
    }

    /// What an operand lives on must be this device's stream.
    pub(super) fn check_stream(&self, argument: &str, got: &Device) -> Result<()> {
        if got.stream() == self.stream() {
            return Ok(());
        }
        Err(Error::value(argument, "of another stream", "of the same stream"))
    }

    pub(super) fn check_context(
        &self,
        operand: Operand,
        stream: &cudarc::driver::CudaStream,
    ) -> Result<()> {
        let (theirs, ours) = (stream.context(), self.stream().context());
        if Arc::ptr_eq(theirs, ours) {
            return Ok(());
        }
        // Another object of the same context knows nothing of this one's streams: no event would
        // order the buffer's uses there with those here.
        let other = if theirs == ours { ", of another CudaContext object" } else { "" };
        let got = format!("a buffer of device {}{other}", theirs.ordinal());
        let expected =
            format!("one of the CudaContext of the call's stream, device {}", self.ordinal());
        Err(Error::value(operand.to_string(), got, expected))
    }
}
