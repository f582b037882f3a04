//! The table of compiled kernels.

use std::sync::LazyLock;

use super::kernel::{Arch, EMBEDDED, Kernel, embedded_fatbin, embedded_ptx};
use super::replaced::{replaced, table};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::problem::Problem;

/// Every kernel; of those that serve a problem, the newest that the target runs is used.
///
#[doc = include_str!(concat!(env!("OUT_DIR"), "/kernels.md"))]
pub static KERNELS: LazyLock<&[Kernel]> = LazyLock::new(|| table(EMBEDDED));

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

/// The PTX text of a file of [`KERNELS`], from which its cubins were assembled.
pub fn ptx(file: &str) -> Option<&'static str> {
    embedded_ptx(file)
}
