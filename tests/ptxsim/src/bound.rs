//! A coarse bound on a kernel's time: what each resource alone would take.
//!
//! The fixed rates of [`Arch::rates`] divide what was counted, spread evenly over the
//! multiprocessors that have a block. It names the resource that limits a kernel; it predicts no
//! time.

use serde::Serialize;

use crate::arch::Arch;

/// L2 delivers about this many times what device memory does; no figure is published.
pub const L2_OVER_MEMORY: f64 = 2.0;

/// What a launch asks of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Blocks.
    pub blocks: u64,
    /// Tensor-core flop.
    pub flops: u64,
    /// Warp instructions.
    pub instructions: u64,
    /// Warp instructions of the special function unit.
    pub special: u64,
    /// Wavefronts of shared memory, 128 bytes each.
    pub wavefronts: u64,
    /// Distinct bytes of global memory read and written.
    pub distinct: u64,
    /// Bytes of all sectors read and written.
    pub moved: u64,
}

/// Seconds each resource takes, alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bound {
    /// Tensor cores.
    pub tensor: f64,
    /// Issue slots.
    pub issue: f64,
    /// Shared memory.
    pub shared: f64,
    /// Special function unit.
    pub special: f64,
    /// Device memory, every byte once.
    pub memory: f64,
    /// L2, every sector of every access; at the rate of device memory times [`L2_OVER_MEMORY`].
    pub l2: f64,
    /// The largest of them.
    pub limiter: &'static str,
}

impl Bound {
    /// The bound of some work.
    pub fn new(arch: Arch, work: &Work) -> Self {
        let rates = arch.rates();
        let busy = work.blocks.clamp(1, rates.multiprocessors.into()) as f64;
        let per_cycle = |amount: u64, rate: f64| amount as f64 / (busy * rate * rates.clock);
        let tensor = per_cycle(work.flops, rates.tensor);
        let issue = per_cycle(work.instructions, rates.issue);
        let shared = per_cycle(128 * work.wavefronts, rates.shared);
        let special = per_cycle(32 * work.special, rates.special);
        let memory = work.distinct as f64 / rates.bandwidth;
        let l2 = work.moved as f64 / (L2_OVER_MEMORY * rates.bandwidth);
        let named = [
            ("tensor", tensor),
            ("issue", issue),
            ("shared", shared),
            ("special", special),
            ("memory", memory),
            ("l2", l2),
        ];
        let limiter = named.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("", |n| n.0);
        Self { tensor, issue, shared, special, memory, l2, limiter }
    }

    /// Seconds by name.
    pub fn named(&self) -> [(&'static str, f64); 6] {
        [
            ("tensor", self.tensor),
            ("issue", self.issue),
            ("shared", self.shared),
            ("special", self.special),
            ("memory", self.memory),
            ("l2", self.l2),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_resource_can_limit() {
        let of = |work| Bound::new(Arch::Sm90a, &work).limiter;
        let base = Work { blocks: 132, ..Work::default() };
        assert_eq!(of(Work { flops: 1 << 30, instructions: 1 << 10, ..base }), "tensor");
        assert_eq!(of(Work { flops: 1 << 10, instructions: 1 << 20, ..base }), "issue");
        assert_eq!(of(Work { wavefronts: 1 << 20, instructions: 1 << 10, ..base }), "shared");
        assert_eq!(of(Work { special: 1 << 20, instructions: 1 << 20, ..base }), "special");
        assert_eq!(of(Work { distinct: 1 << 30, instructions: 1 << 10, ..base }), "memory");
        assert_eq!(of(Work { distinct: 1 << 20, moved: 1 << 30, ..base }), "l2");
    }

    #[test]
    fn rates_are_those_of_the_device() {
        // One second of tensor work of a full H200: 132 · 4096 · 1.755e9 flop.
        let flops = (132.0 * 4096.0 * 1.755e9) as u64;
        let b = Bound::new(Arch::Sm90a, &Work { blocks: 1000, flops, ..Work::default() });
        assert!((b.tensor - 1.0).abs() < 1e-6);
        // A single block has a single multiprocessor.
        let b = Bound::new(Arch::Sm90a, &Work { blocks: 1, flops, ..Work::default() });
        assert!((b.tensor - 132.0).abs() < 1e-4);
    }
}
