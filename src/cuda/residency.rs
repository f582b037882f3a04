//! What a device holds at a time of blocks that come in clusters.
//!
//! Multiprocessors lie in groups, and a cluster in one of them: an odd multiprocessor left over in a
//! group, or a part of the device that others have, leaves room for fewer clusters than the number of
//! multiprocessors says. A persistent kernel with more clusters than that would run the last of them
//! after all others.

use cudarc::driver::sys;

use super::device::driver;
use super::enqueue::{cluster_of, configuration};
use super::{Arch, Device, KERNELS, Kernel, Target};
use crate::Result;

/// Blocks that have a multiprocessor to themselves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Residency {
    /// As [`Target::pairs`].
    pub pairs: usize,
    /// As [`Target::cluster_blocks`].
    pub cluster_blocks: usize,
}

impl Residency {
    /// Asks the driver; the first time it loads a kernel of [`Arch::Sm90`] that takes a multiprocessor
    /// to itself, as all that come in clusters do.
    pub fn of(device: &Device) -> Result<Self> {
        let serves = |k: &&Kernel| k.arch == Arch::Sm90 && k.operation == "segment_attention";
        let Some(kernel) = KERNELS.iter().find(serves).filter(|_| device.arch() >= Arch::Sm90)
        else {
            let Target { pairs, cluster_blocks, .. } = Target::DEFAULT;
            return Ok(Self { pairs, cluster_blocks });
        };
        let function = device.function(kernel)?;
        device.bind()?;
        let stream = device.stream().cu_stream();
        let (mut pairs, mut cluster_blocks) = (0, 0);
        let mut pair = [cluster_of(2)];
        let in_pairs = configuration(kernel, [2, 1, 1], stream, &mut pair);
        let alone = configuration(kernel, [1, 1, 1], stream, &mut []);
        // SAFETY: the function is alive; the driver only reads the configurations, which outlive the
        // calls with the attribute in them, and writes one integer each.
        let asked = unsafe {
            let function = function.cu_function();
            let pairs =
                sys::cuOccupancyMaxActiveClusters(&raw mut pairs, function, &raw const in_pairs);
            pairs.result().and_then(|()| {
                let most = &raw mut cluster_blocks;
                sys::cuOccupancyMaxPotentialClusterSize(most, function, &raw const alone).result()
            })
        };
        asked.map_err(|e| driver("how many clusters the device holds", e))?;
        let [pairs, cluster_blocks] = [pairs, cluster_blocks].map(|n| n.max(0) as usize);
        Ok(Self { pairs, cluster_blocks })
    }
}
