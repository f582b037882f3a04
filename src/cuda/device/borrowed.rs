//! Beside another library in one process: its streams, its memory, and the context that was current.

use std::ptr::null_mut;

use cudarc::driver::{result, sys};

use super::error::driver;
use super::launcher::table_kernel;
use super::state::State;
use super::{Buffer, Device, library, open};
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Addresses, Operand, Requirement};
use crate::cuda::plan::allocation::PART_ALIGN;
use crate::cuda::plan::mirror::Mirror;
use crate::error::Result;

/// Makes the context that was current in this thread current again when it is dropped, or none.
/// Every call on a [`Device`] leaves the device's own context current.
#[derive(Debug)]
#[must_use = "the context is restored when this is dropped"]
pub struct CurrentContext(sys::CUcontext);

impl CurrentContext {
    /// The context that is current now.
    ///
    /// # Errors
    /// [`Error::NoDevice`](crate::Error::NoDevice) without a driver,
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn keep() -> Result<Self> {
        library::check()?;
        let failed = |e| driver("the current context", e);
        result::init().map_err(failed)?;
        Ok(Self(result::ctx::get_current().map_err(failed)?.unwrap_or(null_mut())))
    }
}

impl Drop for CurrentContext {
    fn drop(&mut self) {
        // SAFETY: it was current in this thread; should it be gone meanwhile, the driver refuses.
        let _ = unsafe { sys::cuCtxSetCurrent(self.0) };
    }
}

impl Device {
    /// The device of the given ordinal with a stream that another library made in the device's primary
    /// context, as the CUDA runtime and PyTorch use it; 0 is the legacy default stream.
    /// [`CurrentContext`] keeps what is current in the thread.
    ///
    /// # Errors
    /// Those of [`Self::new`] and [`Self::from_stream`].
    ///
    /// # Safety
    /// The stream is of that context, and lives as long as work is enqueued through the device or its
    /// clones. No events order what other streams do, of this device or others, with the same memory:
    /// that is the caller's part, also for buffers that are allocated on the device's stream.
    pub unsafe fn borrowed(ordinal: usize, stream: u64) -> Result<Self> {
        let context = open(ordinal)?;
        // SAFETY: of this context object no buffers are made but those that `lend` borrows: whoever
        // owns the stream orders the work.
        unsafe { context.disable_event_tracking() };
        // SAFETY: the caller's promise.
        Self::from_stream(unsafe { context.wrap_borrowed_stream(stream as sys::CUstream) })
    }

    /// The same device, loaded kernels included, with another such stream.
    ///
    /// # Errors
    /// Those of [`Self::on`].
    ///
    /// # Safety
    /// As [`Self::borrowed`].
    pub unsafe fn on_borrowed(&self, stream: u64) -> Result<Self> {
        // SAFETY: the caller's promise.
        self.on(unsafe { self.stream.context().wrap_borrowed_stream(stream as sys::CUstream) })
    }

    /// Loads a plan's kernels, for a run of [`Plan::run`] with a workspace of the caller's:
    /// [`Self::prepare`] without memory.
    ///
    /// # Errors
    /// Those of [`Self::prepare`].
    pub fn load(&self, plan: &Plan) -> Result<()> {
        for kernel in plan.launches().map(|launch| launch.kernel).chain(table_kernel()) {
            self.function(kernel)?;
        }
        Ok(())
    }

    /// Lends memory of another allocator to a [`State`], for what takes one; the mirror moves with it,
    /// also where that fails.
    ///
    /// # Errors
    /// [`Error::Address`](crate::Error::Address) for an address that is no multiple of 256;
    /// [`Error::Driver`](crate::Error::Driver); what `work` returns.
    ///
    /// # Safety
    /// As [`State::from_buffer`], of the bytes of the mirror's layout from `address` on; `work` does not
    /// replace the state.
    pub unsafe fn lend<T>(
        &self,
        address: u64,
        mirror: &mut Mirror,
        work: impl FnOnce(&mut State) -> Result<T>,
    ) -> Result<T> {
        let bytes = mirror.layout().bytes();
        let given = Addresses::new().with(Operand::State, address);
        Requirement { operand: Operand::State, align: PART_ALIGN, before: 0, after: bytes }
            .check(&given)?;
        self.bind()?;
        // SAFETY: the caller's promise; `Lent` gives it back instead of freeing it.
        let data = unsafe { self.stream.upgrade_device_ptr(address, bytes as usize) };
        let mut lent = Lent(Some(State::of(self, mirror.clone(), Buffer { address, data })));
        let state = lent.0.as_mut().expect("just made");
        let result = work(state);
        mirror.clone_from(state.mirror());
        result
    }
}

/// A state whose memory is not its own.
struct Lent(Option<State>);

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(state) = self.0.take() {
            state.into_data().leak();
        }
    }
}
