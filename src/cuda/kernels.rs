//! The table of compiled kernels.

use std::sync::LazyLock;

use super::Arch;
use super::replaced::{replaced, table};
use crate::{DType, Error, Problem, Result};

/// A compiled kernel and what a launch of it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The devices it runs on.
    pub arch: Arch,
    /// Name of the operation, such as `segment_attention`.
    pub operation: &'static str,
    /// Name of the entry function.
    pub symbol: &'static str,
    /// The compiled file that holds it; see [`fatbin`] and [`ptx`].
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
    fn role(&self) -> (&'static str, Option<DType>, usize, usize) {
        (self.operation, self.dtype, self.key_dim, self.value_dim)
    }
}

/// Bytes of a compiled file, aligned for the driver's loader.
#[repr(C, align(16))]
#[allow(dead_code)] // where nothing was compiled: docs.rs
struct Image<B: ?Sized>(B);

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The newest kernel of an operation that devices of `arch` run, for a problem's element type and
/// dimensions. Where there is any there is a portable one, of [`Arch::Sm80`].
///
/// # Errors
/// [`Error::Unsupported`] naming the argument for which nothing is compiled (`operation`, `dtype`,
/// `key_dim` or `(key_dim, value_dim)`), its value and everything that is accepted.
pub fn find(operation: &str, problem: &Problem, arch: Arch) -> Result<&'static Kernel> {
    let portable = portable(operation, problem)?;
    let serves = |k: &&Kernel| k.arch <= arch && k.role() == portable.role();
    Ok(KERNELS.iter().filter(serves).max_by_key(|k| k.arch).unwrap_or(portable))
}

fn portable(operation: &str, problem: &Problem) -> Result<&'static Kernel> {
    let mut kernels = of_type(operation, problem.dtype())?;
    let (dk, dv) = (problem.key_dim(), problem.value_dim());
    match (kernels[0].key_dim, kernels[0].value_dim) {
        (0, _) => {}
        (_, 0) => retain(&mut kernels, "key_dim", &dk.to_string(), |k| k.key_dim.to_string())?,
        _ => retain(&mut kernels, "(key_dim, value_dim)", &format!("({dk}, {dv})"), |k| {
            format!("({}, {})", k.key_dim, k.value_dim)
        })?,
    }
    Ok(kernels[0])
}

/// The portable kernel of an operation that is compiled for all dimensions alike.
///
/// # Errors
/// As [`find`].
pub(crate) fn find_for(operation: &str, dtype: DType) -> Result<&'static Kernel> {
    of_type(operation, dtype).map(|kernels| kernels[0])
}

/// The portable kernels of an operation for an element type, at least one.
fn of_type(operation: &str, dtype: DType) -> Result<Vec<&'static Kernel>> {
    let portable = |k: &&Kernel| k.arch == Arch::Sm80;
    let mut kernels: Vec<&'static Kernel> = KERNELS.iter().filter(portable).collect();
    retain(&mut kernels, "operation", operation, |k| k.operation.to_owned())?;
    if kernels[0].dtype.is_some() {
        retain(&mut kernels, "dtype", &dtype.to_string(), |k| {
            k.dtype.map_or(String::new(), |d| d.to_string())
        })?;
    }
    Ok(kernels)
}

/// Keeps the kernels whose `name` is `wanted`; at least one, or an error.
fn retain(
    kernels: &mut Vec<&'static Kernel>,
    argument: &'static str,
    wanted: &str,
    name: impl Fn(&Kernel) -> String,
) -> Result<()> {
    let mut accepted: Vec<String> = kernels.iter().map(|kernel| name(kernel)).collect();
    kernels.retain(|kernel| name(kernel) == wanted);
    if !kernels.is_empty() {
        return Ok(());
    }
    let mut seen = std::collections::HashSet::new();
    accepted.retain(|name| seen.insert(name.clone()));
    Err(Error::Unsupported { argument, got: wanted.to_owned(), accepted: accepted.join(", ") })
}

/// The fatbin of a file of [`KERNELS`]: cubins of the architectures the crate was built for, and PTX
/// for all others.
pub fn fatbin(file: &str) -> Option<&'static [u8]> {
    replaced(file).or_else(|| embedded_fatbin(file))
}

/// The kernels that were compiled in, and a hash of the launch parameters.
pub(super) fn embedded() -> (&'static [Kernel], &'static str) {
    (EMBEDDED, PARAMS)
}

/// The PTX text of a file of [`KERNELS`], from which its cubins were assembled.
pub fn ptx(file: &str) -> Option<&'static str> {
    embedded_ptx(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Warps that wait for registers which nobody has would hang the device.
    #[test]
    fn other_registers_than_a_kernel_counts_on_are_refused() {
        let passes = KERNELS.iter().find(|k| k.launch_registers > 0).expect("Hopper attention");
        assert!(passes.check_registers(passes.launch_registers as i32).is_ok());
        let error = passes.check_registers(160).expect_err("refused").to_string();
        assert!(error.contains(passes.symbol), "{error}");
        assert!(error.contains("160 registers per thread given by the assembler, 168"), "{error}");
        let others = KERNELS.iter().find(|k| k.launch_registers == 0).expect("most kernels");
        assert!(others.check_registers(40).is_ok());
    }
}
