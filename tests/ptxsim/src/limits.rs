//! Limits of a launch: those of the architecture and those of the kernel's directives.

use crate::arch::Arch;
use crate::launch::{Launch, LaunchError};
use crate::memory::RANK_SHIFT;
use crate::program::Kernel;

fn limit(what: &str, given: impl ToString, limit: impl ToString) -> LaunchError {
    LaunchError::Limit { what: what.into(), given: given.to_string(), limit: limit.to_string() }
}

/// Checks a launch whose threads start with so many registers, where that is known.
pub fn check(
    kernel: &Kernel,
    arch: Arch,
    launch: &Launch,
    registers: Option<u32>,
) -> Result<(), LaunchError> {
    let product = |v: [u32; 3]| v.iter().fold(1, |p: u64, n| p.saturating_mul((*n).into()));
    let threads = product(launch.block);
    if threads == 0 || product(launch.grid) == 0 || product(launch.cluster) == 0 {
        return Err(limit("a dimension of the grid, block or cluster", 0, "1 or more"));
    }
    if threads > 1024 || launch.block[2] > 64 {
        return Err(limit("the block", format!("{:?}", launch.block), "1024 threads, 64 in z"));
    }
    if launch.grid[0] > i32::MAX as u32 || launch.grid[1] > 65535 || launch.grid[2] > 65535 {
        return Err(limit("the grid", format!("{:?}", launch.grid), "[2147483647, 65535, 65535]"));
    }
    let warps = product(launch.grid).saturating_mul(threads.div_ceil(32));
    if warps >= 1 << 28 {
        return Err(limit("the number of warps", warps, (1 << 28) - 1));
    }
    let d = &kernel.directives;
    if let Some(max) = d.max_threads.map(product).filter(|max| threads > *max) {
        return Err(limit("the number of threads (.maxntid)", threads, max));
    }
    if let Some(required) = d.required_threads.filter(|r| *r != launch.block) {
        return Err(limit(
            "the block (.reqntid)",
            format!("{:?}", launch.block),
            format!("{required:?}"),
        ));
    }
    if let Some(required) = d.cluster.filter(|r| product(*r) > 0 && *r != launch.cluster) {
        let given = format!("{:?}", launch.cluster);
        return Err(limit("the cluster (.reqnctapercluster)", given, format!("{required:?}")));
    }
    let cluster = product(launch.cluster);
    if cluster > u64::from(arch.max_cluster()) {
        return Err(limit("the number of blocks in a cluster", cluster, arch.max_cluster()));
    }
    if (0..3).any(|i| !launch.grid[i].is_multiple_of(launch.cluster[i])) {
        let given = format!("{:?}", launch.grid);
        return Err(limit(
            "the grid",
            given,
            format!("a multiple of the cluster {:?}", launch.cluster),
        ));
    }
    if kernel.static_shared > 48 * 1024 {
        return Err(limit("static shared memory", kernel.static_shared, 48 * 1024));
    }
    let shared = u64::from(kernel.static_shared) + u64::from(launch.shared_bytes);
    if shared > u64::from(arch.shared_per_block()) {
        return Err(limit("shared memory per block", shared, arch.shared_per_block()));
    }
    if let Some(registers) = registers {
        // Warps are dealt to the four parts of a multiprocessor.
        let used = u64::from(registers).next_multiple_of(8) * threads.next_multiple_of(128);
        if used > u64::from(arch.registers()) {
            return Err(limit("registers per block", used, arch.registers()));
        }
    }
    const { assert!(RANK_SHIFT == 24) };
    Ok(())
}
