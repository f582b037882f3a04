//! What plans for a device are made for.
//!
//! Among it what the device holds at a time of blocks that come in clusters. Multiprocessors lie in
//! groups, and a cluster in one of them: an odd multiprocessor left over in a group, or a part of
//! the device that others have, leaves room for fewer clusters than the number of multiprocessors
//! says. A persistent kernel with more clusters than that would run the last of them after all
//! others.

use cudarc::driver::sys::{self, CUdevice_attribute};

use super::Device;
use super::error::driver;
use super::launcher::{cluster_of, configuration};
use crate::cuda::operations::decode::{DecodeOptions, Runs};
use crate::cuda::operations::prefill::PrefillOptions;
use crate::cuda::plan::kernel::{Arch, Kernel};
use crate::cuda::plan::kernels::KERNELS;
use crate::cuda::plan::target::Target;
use crate::error::Result;

impl Device {
    /// What plans for this device are made for.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] when the driver does not tell how much of the device there is; on a
    /// device of [`Arch::Sm90`] those of loading a kernel, the first time.
    pub fn target(&self) -> Result<Target> {
        if let Some(target) = self.target {
            return Ok(target);
        }
        if let Some(target) = self.loaded.target.get() {
            return Ok(*target);
        }
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let (arch, multiprocessors) = (self.arch(), self.attribute(count)?.max(1));
        let [pairs, cluster_blocks] = clusters(self)?;
        let asked = Target { arch, multiprocessors, pairs, cluster_blocks, ..Target::DEFAULT };
        Ok(*self.loaded.target.get_or_init(|| asked))
    }

    /// How prefills are planned for this device.
    ///
    /// # Errors
    /// Those of [`Self::target`].
    pub fn prefill_options(&self) -> Result<PrefillOptions> {
        Ok(PrefillOptions { target: self.target()?, ..PrefillOptions::default() })
    }

    /// How decode calls are planned for this device.
    ///
    /// # Errors
    /// Those of [`Self::target`].
    pub fn decode_options(&self, runs: Runs) -> Result<DecodeOptions> {
        Ok(DecodeOptions { runs, target: self.target()? })
    }
}

/// [`Target::pairs`] and [`Target::cluster_blocks`], by the driver. Loads a kernel of
/// [`Arch::Sm90`] that takes a multiprocessor to itself, as all that come in clusters do.
fn clusters(device: &Device) -> Result<[usize; 2]> {
    let serves = |k: &&Kernel| k.arch == Arch::Sm90 && k.operation == "segment_attention";
    let Some(kernel) = KERNELS.iter().find(serves).filter(|_| device.arch() >= Arch::Sm90) else {
        let Target { pairs, cluster_blocks, .. } = Target::DEFAULT;
        return Ok([pairs, cluster_blocks]);
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
    Ok([pairs, cluster_blocks].map(|n| n.max(0) as usize))
}
