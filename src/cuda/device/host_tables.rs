//! Host memory that copies to the device read after the call that enqueued them has returned.
//!
//! A copy from pageable memory may wait for the stream before it begins, and where the device reaches
//! such memory itself it may read it later. So tables lie in page-locked memory until an event says
//! that they were read.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaEvent, CudaStream, DriverError, PinnedHostSlice, result};

/// Page-locked buffers of a context, those in use and those that were read.
#[derive(Debug, Default)]
pub(super) struct HostTables(Mutex<Vec<HostTable>>);

#[derive(Debug)]
struct HostTable {
    bytes: PinnedHostSlice<u8>,
    read: CudaEvent,
}

impl HostTables {
    /// Enqueues a copy of `from` to the device address `to`; `from` may change afterwards. Waits for
    /// nothing where a table is free; for a new one, or to free one, the driver may.
    ///
    /// # Safety
    /// The device has `from.len()` bytes at `to`, which nothing else uses until the copy is done.
    pub unsafe fn copy(
        &self,
        to: u64,
        from: &[u8],
        stream: &Arc<CudaStream>,
    ) -> Result<(), DriverError> {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |t: &HostTable| t.bytes.len() >= from.len() && t.read.is_complete();
        let mut table = match tables.iter().position(free) {
            Some(index) => tables.swap_remove(index),
            None => {
                // Those that are free are too small.
                tables.retain(|table| !table.read.is_complete());
                HostTable::new(from.len(), stream)?
            }
        };
        let bytes = &mut table.bytes.as_mut_slice()?[..from.len()];
        bytes.copy_from_slice(from);
        // SAFETY: `to` by the caller's contract; the bytes stay as they are until `read`.
        unsafe { result::memcpy_htod_async(to, bytes, stream.cu_stream()) }?;
        if let Err(error) = table.read.record(stream) {
            _ = stream.synchronize();
            return Err(error);
        }
        tables.push(table);
        Ok(())
    }
}

impl HostTable {
    fn new(len: usize, stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        // SAFETY: bytes of any content are valid, and are written before they are read.
        let bytes = unsafe { stream.context().alloc_pinned(len) }?;
        Ok(Self { bytes, read: stream.context().new_event(None)? })
    }
}

impl Drop for HostTable {
    fn drop(&mut self) {
        // Whatever went wrong on the device, it does not read this memory any more then.
        _ = self.read.synchronize();
    }
}
