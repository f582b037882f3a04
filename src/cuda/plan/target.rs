//! What a plan is made for, and the choice of kernels that follows from it.

use super::kernel::{Arch, Kernel};
use super::kernels::{KERNELS, find};
use super::tensor_map::{Source, TensorMap};
use crate::error::{Error, Result};
use crate::problem::Problem;

/// The device that a plan is made for, and how work is cut for it;
/// [`Device::target`](crate::cuda::Device::target) gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The newest kernels it runs. Default: those for every device.
    pub arch: Arch,
    /// Multiprocessors of the device, by which work is split. Default 132.
    pub multiprocessors: usize,
    /// Clusters of two blocks, each block with a multiprocessor to itself, that the device holds at a
    /// time; 0: none, and nothing is loaded together. Default 66.
    pub pairs: usize,
    /// Most blocks of a cluster, each with a multiprocessor to itself. Default 8.
    pub cluster_blocks: usize,
    /// Blocks of segment_attention on [`Arch::Sm90`] that load keys and values together, where the
    /// number of query heads per KV head is even: 1 or 2. Default 2.
    pub shared_by: usize,
    /// Bytes of L2 that the keys and values of tiles which run together may take. Default 16 MiB.
    pub l2_bytes: usize,
    /// Keys of the open segment that one block of decode attends; rounded up to a multiple of 64.
    /// Smaller is faster for few sequences, larger moves fewer bytes. Default 256.
    pub split_len: usize,
    /// Per cent of the multiprocessors that one sequence must give blocks for
    /// [`segment`](crate::cuda::segment()) to run on [`Arch::Sm90`]: the portable kernel spreads
    /// over all of them. Default 40, a guess until it is measured.
    pub segment_fill: usize,
    /// Whether the memory phases of [`prefill`](crate::cuda::prefill()) on [`Arch::Sm90`] begin
    /// while the launch before ends, and wait for it on the device (programmatic dependent launch).
    /// Default false, until it is measured.
    pub early: bool,
}

impl Target {
    /// The default, for constants.
    pub const DEFAULT: Self = Self {
        arch: Arch::Sm80,
        multiprocessors: 132,
        pairs: 66,
        cluster_blocks: 8,
        shared_by: 2,
        l2_bytes: 16 << 20,
        split_len: 256,
        segment_fill: 40,
        early: false,
    };

    /// Whether plans can be made for it; every planner asks.
    ///
    /// # Errors
    /// [`Error::Value`] for 0 where something is counted, and a `shared_by` other than 1 and 2.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("multiprocessors", self.multiprocessors),
            ("l2_bytes", self.l2_bytes),
            ("split_len", self.split_len),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Error::value(format!("target.{name}"), 0, "1 or more"));
        }
        if ![1, 2].contains(&self.shared_by) {
            return Err(Error::value("target.shared_by", self.shared_by, "1 or 2"));
        }
        Ok(())
    }
}

impl Default for Target {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// A kernel and how it is launched.
pub(crate) struct Chosen {
    pub kernel: &'static Kernel,
    /// Its tensor maps, in the order of its parameter.
    pub maps: Vec<TensorMap>,
    /// Blocks of a cluster, along x.
    pub cluster: u32,
    /// It begins while the launch before ends.
    pub early: bool,
    /// Most blocks in x: more would find no work.
    pub most_blocks: usize,
    /// Why a newer kernel was passed over.
    pub passed_over: Option<String>,
}

impl From<&'static Kernel> for Chosen {
    fn from(kernel: &'static Kernel) -> Self {
        Self {
            kernel,
            maps: Vec::new(),
            cluster: 1,
            early: false,
            most_blocks: usize::MAX,
            passed_over: None,
        }
    }
}

impl Chosen {
    /// The newest kernel of an operation that the target runs, where tensor maps can describe the
    /// `sources` that it names, with the rows of a box of each; otherwise the portable one.
    pub fn new(
        operation: &str,
        problem: &Problem,
        target: Target,
        sources: impl FnOnce(&Kernel) -> Vec<(Source, usize)>,
    ) -> Result<Self> {
        let portable = find(operation, problem, Arch::Sm80)?;
        let kernel = find(operation, problem, target.arch)?;
        let maps = if kernel == portable {
            not_compiled(portable, target.arch).map_or(Ok(Vec::new()), Err)
        } else {
            let sources = sources(kernel).into_iter();
            sources.map(|(source, rows)| source.map(problem.dtype(), rows)).collect()
        };
        Ok(match maps {
            Ok(maps) => Self { maps, ..kernel.into() },
            Err(reason) => Self { passed_over: Some(reason), ..portable.into() },
        })
    }

    /// Newer kernels, which wait for the launch before themselves, begin while it ends, if the target
    /// wants that.
    pub fn following(mut self, target: Target) -> Self {
        self.early = target.early && self.kernel.arch > Arch::Sm80;
        self
    }

    /// Newer kernels go through the work with as many blocks as the target holds at a time, in clusters
    /// of `cluster`, 1 or 2.
    pub fn persistent(mut self, target: Target, cluster: usize) -> Self {
        if self.kernel.arch > Arch::Sm80 {
            let clusters = match cluster {
                1 => target.multiprocessors,
                _ => target.pairs.min(target.multiprocessors / 2),
            };
            let blocks = clusters.saturating_mul(self.kernel.blocks_per_sm as usize);
            self.most_blocks = blocks.max(1).saturating_mul(cluster);
            self.cluster = cluster as u32;
        }
        self
    }
}

/// That an operation has kernels for `arch`, but none for these dimensions.
fn not_compiled(portable: &Kernel, arch: Arch) -> Option<String> {
    let newer = |k: &&Kernel| k.operation == portable.operation && k.arch > portable.arch;
    KERNELS.iter().filter(newer).find(|k| k.arch <= arch)?;
    Some(match (portable.key_dim, portable.value_dim) {
        (dk, dv) if dk == dv || dv == 0 => format!("no {arch} kernel for d = {dk}"),
        (dk, dv) => format!("no {arch} kernel for Dk = {dk}, Dv = {dv}"),
    })
}
