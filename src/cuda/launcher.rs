//! What executes a plan: a CUDA stream, or the simulator of the tests.

use super::Kernel;
use crate::{Error, Result};

/// Executes the steps of a plan, in order, each after the one before has taken effect.
///
/// Nothing here allocates or waits for the device.
pub trait Launcher {
    /// Enqueues a launch.
    ///
    /// # Errors
    /// [`Launch::error`] with the device's reason.
    fn launch(&mut self, launch: &Launch<'_>) -> Result<()>;

    /// Sets `bytes` bytes from the device address `to` on to `value`.
    ///
    /// # Errors
    /// [`Error::Driver`] with the device's reason.
    fn fill(&mut self, to: u64, bytes: u64, value: u8) -> Result<()>;

    /// Copies `from` to the device address `to`. The bytes are read before this returns; under
    /// capture every replay writes them again.
    ///
    /// # Errors
    /// [`Error::Driver`] with the device's reason.
    fn copy(&mut self, to: u64, from: &[u8]) -> Result<()>;
}

/// One launch, complete.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel; its table entry has block size and shared memory.
    pub kernel: &'static Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Bytes of its one parameter structure, addresses filled in.
    pub params: &'a [u8],
    /// The shapes it works on, for messages.
    pub what: &'a str,
}

impl Launch<'_> {
    /// The error of a launch that the device refused.
    pub fn error(&self, reason: impl std::fmt::Display) -> Error {
        Error::Launch {
            kernel: self.kernel.symbol,
            grid: self.grid,
            threads: self.kernel.threads,
            what: self.what.to_owned(),
            reason: reason.to_string(),
        }
    }
}
