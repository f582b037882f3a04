//! Attributes of the device, by number. Limits are those of an A100 or an H200 (an A10, an L4), as
//! published; abilities are those of this library, 0 for what it does not have.

use std::ffi::{c_int, c_uint};
use std::ops::RangeInclusive;

use ptxsim::Arch;

/// What the library has nothing of.
const ABSENT: &[RangeInclusive<c_uint>] = &[
    15..=15,   // copies beside kernels
    17..=18,   // a time limit, memory shared with the host
    20..=20,   // exclusive use
    31..=32,   // kernels at the same time, ECC
    35..=35,   // TCC
    40..=41,   // copy engines, one address space with the host
    78..=78,   // priorities of streams
    83..=84,   // managed memory, several devices on a board
    86..=86,   // atomics on the link to the host
    88..=94,   // pageable memory, preemption, operations of streams on memory
    96..=96,   // cooperative launches on several devices
    98..=105,  // registered and virtual memory, exported handles
    107..=110, // compression, persisting lines of L2, RDMA
    112..=114, // sparse arrays, semaphores
    116..=119, // RDMA, handles of pools
    121..=125, // deferred mapping, sharing between processes
    128..=129, // fabric handles, function pointers
    132..=133, // multicast, MPS
    135..=138, // graphics, decompression
    141..=147, // NUMA, pools on the host
];

/// An attribute; none for a number that has no answer here.
pub fn attribute(arch: Arch, number: c_uint) -> Option<c_int> {
    let (major, minor) = arch.capability();
    let value = match number {
        // Threads of a block: in all, along x and y, along z.
        1..=3 => 1024,
        4 => 64,
        // Blocks of a grid: along x, along y and z.
        5 => i32::MAX as u32,
        6 | 7 => 65_535,
        // Shared memory of a block: that of every kernel, and the most one can ask for.
        8 => 48 << 10,
        97 => arch.shared_per_block(),
        // What the system adds to it, and that of a multiprocessor.
        111 => arch.reserved_shared(),
        81 => arch.shared_per_multiprocessor(),
        // Constant memory.
        9 => 64 << 10,
        // Lanes of a warp.
        10 => 32,
        // Pitch of a copy.
        11 => i32::MAX as u32,
        // Registers of a block, of a multiprocessor.
        12 | 82 => arch.registers(),
        // kHz.
        13 => (arch.rates().clock / 1e3) as u32,
        // Multiprocessors, their threads and blocks.
        16 => arch.multiprocessors(),
        39 => arch.threads_per_multiprocessor(),
        106 => arch.blocks_per_multiprocessor(),
        38 => arch.l2_bytes(),
        75 => major,
        76 => minor,
        // L1 caches global and local memory.
        79 | 80 => 1,
        // Rate of f32 to that of f64.
        87 if matches!(arch, Arch::Sm86 | Arch::Sm89) => 64,
        87 => 2,
        // Host memory can be mapped, launches be cooperative, memory come from pools.
        19 | 95 | 115 => 1,
        // Clusters, tensor maps.
        120 | 127 => u32::from(arch.is_hopper()),
        _ if ABSENT.iter().any(|range| range.contains(&number)) => 0,
        _ => return None,
    };
    Some(value as c_int)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_figures() {
        let of = |arch, numbers: [c_uint; 8]| numbers.map(|n| attribute(arch, n).unwrap_or(-1));
        // Shared memory of a block, the most, of a multiprocessor; multiprocessors, threads, blocks;
        // L2; clusters.
        let numbers = [8, 97, 81, 16, 39, 106, 38, 120];
        let a100 = [49_152, 166_912, 167_936, 108, 2048, 32, 41_943_040, 0];
        assert_eq!(of(Arch::Sm80, numbers), a100);
        let h200 = [49_152, 232_448, 233_472, 132, 2048, 32, 52_428_800, 1];
        assert_eq!(of(Arch::Sm90a, numbers), h200);
        let l4 = [49_152, 101_376, 102_400, 58, 1536, 24, 50_331_648, 0];
        assert_eq!(of(Arch::Sm89, numbers), l4);
        assert_eq!([75, 76].map(|n| attribute(Arch::Sm86, n)), [Some(8), Some(6)]);
    }

    #[test]
    fn what_is_absent_is_0_and_what_is_unknown_nothing() {
        assert_eq!(attribute(Arch::Sm90a, 83), Some(0));
        // A texture's width, the end of the list, beyond it.
        assert_eq!([21, 148, 4711].map(|n| attribute(Arch::Sm90a, n)), [None; 3]);
    }
}
