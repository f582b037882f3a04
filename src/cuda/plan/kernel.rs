//! What a compiled kernel is, and those that were compiled in.

use crate::dtype::DType;
use crate::error::{Error, Result};
use std::fmt;

/// What kernels are compiled for, oldest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Arch {
    /// Every device of compute capability 8.0 and later.
    #[default]
    Sm80,
    /// Devices of compute capability 9.0: tensor copies and warpgroup products (sm_90a).
    Sm90,
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Arch::Sm80 => "sm80",
            Arch::Sm90 => "sm90",
        })
    }
}

/// A compiled kernel and what a launch of it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The devices it runs on.
    pub arch: Arch,
    /// Name of the operation, such as `segment_attention`.
    pub operation: &'static str,
    /// Name of the entry function.
    pub symbol: &'static str,
    /// The compiled file that holds it; see [`fatbin`](crate::cuda::fatbin) and
    /// [`ptx`](crate::cuda::ptx).
    pub file: &'static str,
    /// Element type it is compiled for; none if it touches f32 alone.
    pub dtype: Option<DType>,
    /// Dk it is compiled for; 0: any.
    pub key_dim: usize,
    /// Dv it is compiled for; 0: any.
    pub value_dim: usize,
    /// Threads of a block, all in x.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Blocks that an SM is to hold at a time; registers are bounded accordingly.
    pub blocks_per_sm: u32,
    /// Query rows of a tile; 0 where there are none.
    pub rows: usize,
    /// Columns of M that a block takes; 0 where it takes none or all.
    pub columns: usize,
    /// Rows of a box of keys or values that tensor copies bring; 0 where there are none.
    pub keys: usize,
    /// Registers of a thread at launch, where warps pass them to each other and would wait for ever
    /// with others; 0: as many as the assembler gave it.
    pub launch_registers: u32,
}

impl Kernel {
    /// Most registers a thread may have for [`Self::blocks_per_sm`] blocks to fit an SM of 65536.
    pub fn registers(&self) -> u32 {
        let share = 65536 / (self.threads * self.blocks_per_sm);
        (share / 8 * 8).min(255)
    }

    /// Whether it may be launched with so many registers per thread.
    ///
    /// # Errors
    /// [`Error::Driver`] when its warps count on others.
    pub(crate) fn check_registers(&self, registers: i32) -> Result<()> {
        if self.launch_registers == 0 || registers == self.launch_registers as i32 {
            return Ok(());
        }
        let (what, wanted) = (format!("loading the kernel {}", self.symbol), self.launch_registers);
        let reason = format!(
            "{registers} registers per thread given by the assembler, {wanted} expected: its warps \
             pass them to each other, and would wait for ever"
        );
        Err(Error::Driver { what, reason })
    }

    /// What it computes.
    pub(super) fn role(&self) -> (&'static str, Option<DType>, usize, usize) {
        (self.operation, self.dtype, self.key_dim, self.value_dim)
    }
}

/// Bytes of a compiled file, aligned for the driver's loader.
#[repr(C, align(16))]
#[allow(dead_code)] // where nothing was compiled: docs.rs
struct Image<B: ?Sized>(B);

// EMBEDDED, all kernels that were compiled in; PARAMS, a hash of the launch parameters; the compiled
// files.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    /// Warps that wait for registers which nobody has would hang the device.
    #[test]
    fn other_registers_than_a_kernel_counts_on_are_refused() {
        let passes = EMBEDDED.iter().find(|k| k.launch_registers > 0).expect("Hopper attention");
        assert!(passes.check_registers(passes.launch_registers as i32).is_ok());
        let error = passes.check_registers(160).expect_err("refused").to_string();
        assert!(error.contains(passes.symbol), "{error}");
        assert!(error.contains("160 registers per thread given by the assembler, 168"), "{error}");
        let others = EMBEDDED.iter().find(|k| k.launch_registers == 0).expect("most kernels");
        assert!(others.check_registers(40).is_ok());
    }
}
