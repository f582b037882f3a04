//! How many blocks and clusters a device holds at the same time.

use crate::arch::Arch;

/// Parts of a multiprocessor with registers of their own, between which a block's warps are dealt.
const PARTITIONS: u32 = 4;
/// Registers that a warp takes at a time.
const REGISTER_UNIT: u32 = 256;
/// Bytes of shared memory that a block takes at a time.
const SHARED_UNIT: u32 = 128;

/// What one block takes of its multiprocessor.
///
/// ```
/// use ptxsim::Arch;
/// use ptxsim::occupancy::Block;
///
/// // Two blocks of 100 KiB and what the system adds to each fill a multiprocessor.
/// let block = Block { threads: 256, registers: Some(128), shared: 100 << 10 };
/// assert_eq!(block.per_multiprocessor(Arch::Sm90a), 2);
/// assert_eq!(block.clusters(Arch::Sm90a, 16), 16);
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Block {
    /// Threads.
    pub threads: u32,
    /// Registers per thread; None: few enough.
    pub registers: Option<u32>,
    /// Bytes of shared memory, static and dynamic.
    pub shared: u32,
}

impl Block {
    /// Blocks that a multiprocessor holds; 0 when one is too much for it.
    pub fn per_multiprocessor(&self, arch: Arch) -> u32 {
        let warps = self.threads.div_ceil(32).max(1);
        if self.threads > 1024 || self.shared > arch.shared_per_block() {
            return 0;
        }
        let shared = (self.shared + arch.reserved_shared()).next_multiple_of(SHARED_UNIT);
        let by_registers = match self.registers.map(|n| n.saturating_mul(32)) {
            None | Some(0) => u32::MAX,
            Some(warp) => {
                let warp = warp.div_ceil(REGISTER_UNIT).saturating_mul(REGISTER_UNIT);
                arch.registers() / PARTITIONS / warp * PARTITIONS / warps
            }
        };
        [
            arch.blocks_per_multiprocessor(),
            arch.threads_per_multiprocessor() / (32 * warps),
            arch.shared_per_multiprocessor() / shared,
            by_registers,
        ]
        .into_iter()
        .min()
        .unwrap_or(0)
    }

    /// Blocks that the device holds.
    pub fn per_device(&self, arch: Arch) -> u32 {
        self.per_multiprocessor(arch) * arch.multiprocessors()
    }

    /// Clusters of so many blocks that the device holds: those of a cluster share a processing
    /// cluster of multiprocessors.
    pub fn clusters(&self, arch: Arch, blocks: u32) -> u32 {
        let each = self.per_multiprocessor(arch);
        match arch.processing_clusters() {
            [] if blocks == 1 => self.per_device(arch),
            all => all.iter().map(|n| n * each / blocks.max(1)).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(threads: u32, registers: u32, shared: u32) -> Block {
        Block { threads, registers: Some(registers), shared }
    }

    #[test]
    fn what_limits_the_blocks_of_a_multiprocessor() {
        let on = |arch, block: Block| block.per_multiprocessor(arch);
        // Threads, blocks, registers, shared memory in turn.
        assert_eq!(on(Arch::Sm80, block(512, 32, 0)), 4);
        assert_eq!(on(Arch::Sm89, block(512, 32, 0)), 3);
        assert_eq!(on(Arch::Sm80, block(32, 32, 0)), 32);
        assert_eq!(on(Arch::Sm86, block(32, 32, 0)), 16);
        assert_eq!(on(Arch::Sm90a, block(384, 168, 0)), 1);
        assert_eq!(on(Arch::Sm90a, block(384, 80, 0)), 2);
        assert_eq!(on(Arch::Sm90a, block(384, 176, 0)), 0);
        assert_eq!(on(Arch::Sm90a, block(128, 32, 113 << 10)), 2);
        assert_eq!(on(Arch::Sm90a, block(128, 32, (113 << 10) + 1)), 1);
        assert_eq!(on(Arch::Sm90a, block(128, 32, 227 << 10)), 1);
        assert_eq!(on(Arch::Sm90a, block(128, 32, (227 << 10) + 1)), 0);
        assert_eq!(on(Arch::Sm90a, Block { registers: None, ..block(1024, 0, 0) }), 2);
        assert_eq!(on(Arch::Sm90a, block(1025, 32, 0)), 0);
    }

    #[test]
    fn warps_are_dealt_to_the_four_parts() {
        // 72 registers: 7 warps a part, so 28 in all.
        assert_eq!(block(256, 72, 0).per_multiprocessor(Arch::Sm90a), 3);
        assert_eq!(block(480, 72, 0).per_multiprocessor(Arch::Sm90a), 1);
        // 9 warps must fit as 12 do.
        assert_eq!(block(288, 168, 0).per_multiprocessor(Arch::Sm90a), 1);
        assert_eq!(block(288, 176, 0).per_multiprocessor(Arch::Sm90a), 0);
        assert_eq!(block(256, u32::MAX, 0).per_multiprocessor(Arch::Sm90a), 0);
    }

    #[test]
    fn clusters_stay_in_a_processing_cluster() {
        let whole = block(384, 168, 227 << 10);
        let of = |n| whole.clusters(Arch::Sm90a, n);
        assert_eq!([1, 2, 4, 8, 16].map(of), [132, 66, 32, 16, 8]);
        assert_eq!(block(384, 176, 0).clusters(Arch::Sm90a, 1), 0);
        assert_eq!((whole.clusters(Arch::Sm80, 1), whole.clusters(Arch::Sm80, 2)), (0, 0));
        assert_eq!(block(1024, 32, 0).clusters(Arch::Sm80, 1), 2 * 108);
    }
}
