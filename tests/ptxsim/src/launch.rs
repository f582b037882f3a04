//! One launch: its dimensions, options and limits, checked before anything runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::arch::Arch;
use crate::clock::SyncTable;
use crate::decode::DecodeError;
use crate::limits;
use crate::memory::{GlobalBuffer, SharedRange};
use crate::numeric::tensor::Accumulation;
use crate::program::{Kernel, Preset};
use crate::warp::Warp;

/// Number of the first module variable among the global buffers.
pub const FIRST_MODULE_VARIABLE: usize = 0x8000;
/// Shared addresses below this belong to the system, as on the hardware.
const SHARED_START: u32 = 1024;
/// Least bytes between two shared variables.
const RED_ZONE: u32 = 64;

/// When asynchronous operations move their data.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Timing {
    /// At once.
    #[default]
    Eager,
    /// When a wait needs it, or nothing else can run.
    Lazy,
}

impl Timing {
    /// Whether operations are put off.
    pub fn is_lazy(self) -> bool {
        self == Self::Lazy
    }
}

/// Which blocks run at the same time.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Residency {
    /// Each block (or cluster) to its end, in a random order, several cores at once: for kernels
    /// whose blocks do not wait for each other.
    #[default]
    Sequential,
    /// All blocks interleaved: for kernels whose blocks wait for each other.
    CoResident,
}

/// How a launch is simulated.
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Order of blocks and warps.
    pub seed: u64,
    /// When asynchronous operations move their data.
    pub timing: Timing,
    /// Which blocks run together.
    pub residency: Residency,
    /// The launch may begin before the one before it has ended (programmatic stream serialisation): a
    /// lane that has not executed griddepcontrol.wait must not touch global memory, let the next
    /// launch begin, or end.
    pub early: bool,
    /// Whether accesses are checked for races and uninitialised values; bounds and alignment always
    /// are.
    pub checks: bool,
    /// Whether what the instruction set asks for and hardware is known not to insist on is an error;
    /// otherwise it is a warning. Proxy fences first of all: between cp.async and wgmma or bulk
    /// copies that read its bytes, between mbarrier.init and bulk copies that complete there;
    /// docs/ptxsim.md lists the others.
    pub strict_proxies: bool,
    /// Perturbs the results of `.approx` instructions within their documented bounds.
    pub perturb: Option<u64>,
    /// Order of tensor-core sums.
    pub accumulation: Accumulation,
    /// Shared variables get no more alignment than the text promises: for kernels that align their
    /// dynamic shared memory themselves, or declare what they need.
    pub weak_alignment: bool,
    /// A gang that has executed more warp instructions than this is reported as endless.
    pub max_instructions: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 0,
            timing: Timing::Eager,
            residency: Residency::Sequential,
            early: false,
            checks: true,
            strict_proxies: false,
            perturb: None,
            accumulation: Accumulation::Exact,
            weak_alignment: false,
            max_instructions: 4_000_000_000,
        }
    }
}

/// Dimensions of a launch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads per block.
    pub block: [u32; 3],
    /// Blocks per cluster.
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// Registers per thread at entry, where the assembler has told. Without, they are known of kernels
    /// with setmaxnreg whose directives bound them; see [`Reallocation::at_entry`].
    ///
    /// [`Reallocation::at_entry`]: crate::registers::Reallocation::at_entry
    pub registers: Option<u32>,
}

impl Launch {
    /// A launch of `blocks` blocks of `threads` threads.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Self {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            cluster: [1; 3],
            shared_bytes: 0,
            registers: None,
        }
    }

    /// The same with dynamic shared memory.
    pub fn shared(self, bytes: u32) -> Self {
        Self { shared_bytes: bytes, ..self }
    }
}

/// Why a launch was refused.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No kernel of that name.
    #[error("no kernel {name} in the module; it has: {known}")]
    UnknownKernel {
        /// Asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// An instruction the simulator does not know.
    #[error("kernel {kernel}: {error}")]
    Decode {
        /// The kernel.
        kernel: String,
        /// Where and what.
        error: DecodeError,
    },
    /// The text is for another architecture.
    #[error("the text is for {target}, which {arch} does not run")]
    Target {
        /// `.target` of the text.
        target: String,
        /// The device's.
        arch: Arch,
    },
    /// Wrong number of arguments.
    #[error("kernel {kernel} takes {expected} arguments, {given} given")]
    ArgumentCount {
        /// The kernel.
        kernel: String,
        /// Declared parameters.
        expected: usize,
        /// Given.
        given: usize,
    },
    /// An argument of the wrong size.
    #[error("argument {index} ({name}) of kernel {kernel} has {given} bytes, {expected} expected")]
    ArgumentSize {
        /// The kernel.
        kernel: String,
        /// Number of the argument, from 0.
        index: usize,
        /// Name of the parameter.
        name: String,
        /// Declared size.
        expected: u32,
        /// Given size.
        given: usize,
    },
    /// A tensor map the driver would refuse.
    #[error("argument {index} of kernel {kernel}: {error}")]
    TensorMap {
        /// The kernel.
        kernel: String,
        /// Number of the argument, from 0.
        index: usize,
        /// What is wrong with it.
        error: crate::tensor_map::TensorMapError,
    },
    /// A limit of the architecture or of the kernel's directives.
    #[error("{what} is {given}, {limit} allowed")]
    Limit {
        /// What is limited.
        what: String,
        /// Given.
        given: String,
        /// Allowed.
        limit: String,
    },
}

/// What all blocks of a launch share.
pub struct Grid<'g> {
    /// The program.
    pub kernel: &'g Kernel,
    /// The architecture.
    pub arch: Arch,
    /// The dimensions.
    pub launch: Launch,
    /// Registers per thread at entry, where they are known.
    pub registers: Option<u32>,
    /// The parameter block.
    pub params: Vec<u8>,
    /// Layout of shared memory.
    pub shared: Vec<SharedRange>,
    /// Shared address of the dynamic array.
    pub dynamic: u32,
    /// Buffers of the device.
    pub buffers: &'g [GlobalBuffer],
    /// Variables of the module.
    pub variables: &'g [GlobalBuffer],
    /// Options.
    pub options: &'g Options,
    sync: Mutex<SyncTable>,
    /// Whether `sync` has been used at all.
    synchronised: AtomicBool,
    /// Block of every mbarrier actor.
    actors: Mutex<Vec<u32>>,
    stop: AtomicBool,
}

impl<'g> Grid<'g> {
    /// Checks the limits and lays out shared memory.
    pub fn new(
        kernel: &'g Kernel,
        arch: Arch,
        launch: Launch,
        params: Vec<u8>,
        buffers: &'g [GlobalBuffer],
        variables: &'g [GlobalBuffer],
        options: &'g Options,
    ) -> Result<Self, LaunchError> {
        let registers = launch.registers.or_else(|| kernel.registers_at_entry(arch));
        limits::check(kernel, arch, &launch, registers)?;
        let (shared, dynamic) = shared_layout(kernel, &launch, options.weak_alignment);
        Ok(Self {
            kernel,
            arch,
            launch,
            registers,
            params,
            shared,
            dynamic,
            buffers,
            variables,
            options,
            sync: Mutex::default(),
            synchronised: AtomicBool::new(false),
            actors: Mutex::default(),
            stop: AtomicBool::new(false),
        })
    }

    /// A global buffer or module variable.
    #[inline]
    pub fn buffer(&self, number: usize) -> Option<&GlobalBuffer> {
        match number.checked_sub(FIRST_MODULE_VARIABLE) {
            Some(i) => self.variables.get(i),
            None => self.buffers.get(number),
        }
    }

    /// A buffer whose number is known to be right.
    #[inline]
    pub fn existing(&self, number: usize) -> &GlobalBuffer {
        match number.checked_sub(FIRST_MODULE_VARIABLE) {
            Some(i) => &self.variables[i],
            None => &self.buffers[number],
        }
    }

    /// Threads per block.
    pub fn threads(&self) -> u32 {
        self.launch.block.iter().product()
    }

    /// Warps per block.
    pub fn warps_per_block(&self) -> u32 {
        self.threads().div_ceil(32)
    }

    /// Blocks per cluster.
    pub fn cluster_size(&self) -> u32 {
        self.launch.cluster.iter().product()
    }

    /// Blocks of the grid.
    pub fn blocks(&self) -> u32 {
        self.launch.grid.iter().product()
    }

    /// Coordinates of a block: blocks of a cluster are numbered one after the other.
    pub fn block_index(&self, linear: u32) -> [u32; 3] {
        let (cluster, rank) = (linear / self.cluster_size(), linear % self.cluster_size());
        let c = unflatten(cluster, self.clusters());
        let r = unflatten(rank, self.launch.cluster);
        std::array::from_fn(|d| c[d] * self.launch.cluster[d] + r[d])
    }

    /// Clusters of the grid.
    fn clusters(&self) -> [u32; 3] {
        std::array::from_fn(|d| self.launch.grid[d] / self.launch.cluster[d])
    }

    /// Table of what atomics in global memory carry.
    pub fn sync(&self) -> MutexGuard<'_, SyncTable> {
        self.synchronised.store(true, Ordering::Relaxed);
        self.sync.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any atomic has been published.
    #[inline]
    pub fn has_sync(&self) -> bool {
        self.synchronised.load(Ordering::Relaxed)
    }

    /// A number for a new mbarrier of a block.
    pub fn new_barrier(&self, block: u32) -> u32 {
        let mut actors = self.actors.lock().unwrap_or_else(PoisonError::into_inner);
        actors.push(block);
        actors.len() as u32 - 1
    }

    /// Block of an mbarrier by its number.
    pub fn barrier_block(&self, number: u32) -> u32 {
        let actors = self.actors.lock().unwrap_or_else(PoisonError::into_inner);
        actors.get(number as usize).copied().unwrap_or_default()
    }

    /// Asks every gang to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether a gang has asked to end.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Warp number `index` of a block, its preset registers set.
    pub fn warp(&self, block: usize, linear: u32, index: u32) -> Warp {
        let lanes = match self.threads() - 32 * index {
            n @ ..32 => (1 << n) - 1,
            _ => u32::MAX,
        };
        let global = linear * self.warps_per_block() + index;
        let mut warp = Warp::new(self.kernel, block, index, global, lanes);
        for (preset, slot) in &self.kernel.presets {
            let value = std::array::from_fn(|l| self.preset(*preset, linear, index, l as u32));
            warp.set(*slot, u32::MAX, u32::MAX, &value);
        }
        warp
    }

    fn preset(&self, preset: Preset, linear: u32, warp: u32, lane: u32) -> u64 {
        let Launch { grid, block, cluster, shared_bytes, .. } = self.launch;
        let rank = linear % self.cluster_size();
        let clusters = self.clusters();
        let value = match preset {
            Preset::Tid(d) => unflatten(32 * warp + lane, block)[d as usize],
            Preset::Ntid(d) => block[d as usize],
            Preset::Ctaid(d) => self.block_index(linear)[d as usize],
            Preset::Nctaid(d) => grid[d as usize],
            Preset::Clusterid(d) => unflatten(linear / self.cluster_size(), clusters)[d as usize],
            Preset::Nclusterid(d) => clusters[d as usize],
            Preset::ClusterCtaid(d) => unflatten(rank, cluster)[d as usize],
            Preset::ClusterNctaid(d) => cluster[d as usize],
            Preset::ClusterCtarank => rank,
            Preset::ClusterNctarank => self.cluster_size(),
            Preset::Laneid => lane,
            Preset::Warpid => warp,
            Preset::Nwarpid => self.warps_per_block(),
            Preset::Lanemask(0) => 1 << lane,
            Preset::Lanemask(1) => u32::MAX >> (31 - lane),
            Preset::Lanemask(2) => (1 << lane) - 1,
            Preset::Lanemask(3) => u32::MAX << lane,
            Preset::Lanemask(_) => u32::MAX << lane & !(1 << lane),
            Preset::Smid => linear % self.arch.multiprocessors(),
            Preset::Nsmid => self.arch.multiprocessors(),
            Preset::Gridid => 1,
            Preset::DynamicShared => shared_bytes,
            Preset::TotalShared => shared_bytes + self.kernel.static_shared,
            Preset::SharedVariable(i) => self.shared[i as usize].start,
            Preset::DynamicArray => self.dynamic,
        };
        value.into()
    }
}

fn unflatten(i: u32, dims: [u32; 3]) -> [u32; 3] {
    [i % dims[0], i / dims[0] % dims[1], i / dims[0] / dims[1]]
}

/// Addresses of the static variables, then of the dynamic array; red zones between them.
fn shared_layout(kernel: &Kernel, launch: &Launch, weak: bool) -> (Vec<SharedRange>, u32) {
    let mut ranges: Vec<SharedRange> = Vec::new();
    let mut end = SHARED_START;
    for v in &kernel.shared {
        // The offsets in one block keep every promised alignment; larger ones are a gift.
        let align = if v.offset == 0 { 1024 } else { 1 << v.offset.trailing_zeros().min(10) };
        let align = if weak { v.align } else { align.max(v.align) };
        let start = next_aligned(end, align, weak);
        ranges.push(SharedRange { name: v.name.clone(), start, bytes: v.bytes });
        end = start + v.bytes + RED_ZONE;
    }
    let align = if weak { kernel.dynamic_align } else { kernel.dynamic_align.max(1024) };
    let dynamic = next_aligned(end, align, weak);
    let bytes = launch.shared_bytes;
    if bytes > 0 {
        ranges.push(SharedRange { name: "dynamic".into(), start: dynamic, bytes });
    }
    (ranges, dynamic)
}

/// The next multiple of `align`; when `weak`, one that is no multiple of anything larger.
fn next_aligned(from: u32, align: u32, weak: bool) -> u32 {
    let at = from.next_multiple_of(align);
    if weak && at.is_multiple_of(2 * align) { at + align } else { at }
}
