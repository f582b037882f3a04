//! The launcher that runs plans on a device's stream.

use std::ffi::c_void;
use std::sync::MutexGuard;

use cudarc::driver::sys::{self, CUfunction_attribute};
use cudarc::driver::{CudaFunction, DriverError, result};

use super::error::{driver, reason};
use super::observer::Event;
use super::ranges::range;
use super::{Device, Workspace};
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Addresses, Operand};
use crate::cuda::plan::kernel::Kernel;
use crate::cuda::plan::kernels::KERNELS;
use crate::cuda::plan::launcher::{Launch, Launcher};
use crate::cuda::plan::params::{INFINI_TABLE_BYTES, InfiniTable};
use crate::error::{Error, Result};

/// Blocks of a cluster that every kernel may have.
const PORTABLE_CLUSTER: u32 = 8;

/// Largest table that [`CudaLauncher`] writes from the parameters of launches; more is copied.
const TABLE_LIMIT: usize = 64 << 10;

/// Runs plans on a device's stream. Allocates nothing on the device and waits for nothing, so that
/// what it does can be captured in a graph.
#[derive(Debug)]
pub struct CudaLauncher<'a> {
    device: &'a Device,
    /// Steps that the driver has taken.
    taken: usize,
}

/// Why a run of a plan did not come to its end.
#[derive(Debug)]
pub(super) struct Stopped {
    pub error: Error,
    /// Whether the driver has taken some of its steps.
    pub midway: bool,
}

impl Device {
    /// The launcher for plans.
    pub fn launcher(&self) -> CudaLauncher<'_> {
        CudaLauncher { device: self, taken: 0 }
    }

    /// Loads a plan's kernels and makes room for its workspace, so that its run can be captured.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver has no code for the device, or the device does not have the
    /// memory; [`Error::Capturing`].
    pub fn prepare(&self, plan: &Plan) -> Result<()> {
        self.prepared(plan).map(drop)
    }

    /// The workspace, once all that the plan needs is there.
    fn prepared(&self, plan: &Plan) -> Result<MutexGuard<'_, Workspace>> {
        self.load(plan)?;
        self.workspace(plan.workspace_bytes())
    }

    /// Runs a plan on the stream, in the shared workspace, once everything that can be refused before
    /// the first step was asked for. The other addresses and everything else in the contract of
    /// [`Plan::run`] are the caller's part: state, tensors, order.
    pub(super) fn run(&self, plan: &Plan, addresses: Addresses) -> Result<()> {
        self.try_run(plan, addresses).map_err(|stopped| stopped.error)
    }

    /// [`Self::run`] for what outlives a failure.
    pub(super) fn try_run(
        &self,
        plan: &Plan,
        mut addresses: Addresses,
    ) -> std::result::Result<(), Stopped> {
        let _range = range(plan.title());
        // Held to the end: steps of two calls from two threads must not alternate in one workspace.
        let workspace = self.prepared(plan).map_err(|error| Stopped { error, midway: false })?;
        if let Some(current) = &workspace.current {
            addresses.set(Operand::Workspace, current.address);
        }
        // SAFETY: the workspace is this stream's alone, and large enough; the rest is the contract
        // of the safe calls, which borrow what they pass.
        let mut launcher = self.launcher();
        unsafe { plan.run(&addresses, &mut launcher) }
            .map_err(|error| Stopped { error, midway: launcher.taken() > 0 })
    }
}

impl CudaLauncher<'_> {
    /// Steps that the driver has taken so far: after a run that failed, whether
    /// [`Mirror::break_off`](crate::cuda::Mirror::break_off) is due.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// One launch of `table` per part: the bytes travel in the parameters, so a captured graph owns
    /// them.
    fn write_table(&mut self, to: u64, from: &[u8]) -> Result<()> {
        let Some(kernel) = table_kernel() else {
            let reason = "not compiled into this build".into();
            return Err(Error::Driver { what: "the kernel table".into(), reason });
        };
        let most = INFINI_TABLE_BYTES as usize;
        for (i, part) in from.chunks(most).enumerate() {
            let mut table: InfiniTable = bytemuck::Zeroable::zeroed();
            table.to = to + (i * most) as u64;
            table.bytes = part.len() as i64;
            bytemuck::cast_slice_mut(&mut table.data)[..part.len()].copy_from_slice(part);
            let what = format!("table of {} B", from.len());
            let (grid, cluster, early) = ([1, 1, 1], 1, false);
            let (maps, params) = (&[], bytemuck::bytes_of(&table));
            self.launch(&Launch { kernel, grid, cluster, early, maps, params, what: &what })?;
        }
        Ok(())
    }
}

impl Launcher for CudaLauncher<'_> {
    fn launch(&mut self, launch: &Launch<'_>) -> Result<()> {
        let Launch { kernel, grid, cluster, early, .. } = *launch;
        let function = self.device.function(kernel)?;
        self.device.bind()?;
        self.device.tell(Event::Launch(launch));
        let _range = range(kernel.symbol);
        let parameter = launch.parameter(|map| self.device.encoded(map).map_err(reason))?;
        let mut arguments = [parameter.as_ptr().cast_mut().cast::<c_void>()];
        let stream = self.device.stream().cu_stream();
        // SAFETY: the function is alive; it has one parameter, which the driver copies out of
        // `parameter` before it returns. What the addresses in it must satisfy is the caller's
        // contract with `run`.
        let launched = unsafe {
            if cluster > 1 || early {
                launch_with_attributes(launch, &function, stream, &mut arguments)
            } else {
                let threads = (kernel.threads, 1, 1);
                let (function, shared) = (function.cu_function(), kernel.shared_bytes);
                result::launch_kernel(
                    function,
                    grid.into(),
                    threads,
                    shared,
                    stream,
                    &mut arguments,
                )
            }
        };
        launched.map_err(|e| launch.error(self.device.reason(e)))?;
        self.taken += 1;
        Ok(())
    }

    fn fill(&mut self, to: u64, bytes: u64, value: u8) -> Result<()> {
        self.device.bind()?;
        let stream = self.device.stream().cu_stream();
        // SAFETY: the range is the caller's, by its contract with `run`.
        unsafe { result::memset_d8_async(to, value, bytes as usize, stream) }
            .map_err(|e| driver(format!("filling {bytes} B"), e))?;
        self.taken += 1;
        Ok(())
    }

    fn copy(&mut self, to: u64, from: &[u8]) -> Result<()> {
        if from.len() <= TABLE_LIMIT && from.len().is_multiple_of(4) {
            return self.write_table(to, from);
        }
        let what = format!("a table of {} B (more than {TABLE_LIMIT})", from.len());
        self.device.refuse_capture(&what, "use fewer sequences or pieces per captured call")?;
        self.device.bind()?;
        let (tables, stream) = (self.device.host_tables(), self.device.stream());
        // SAFETY: the range is the caller's, by its contract with `run`.
        unsafe { tables.copy(to, from, stream) }
            .map_err(|e| driver(format!("copying {} B to the device", from.len()), e))?;
        self.taken += 1;
        Ok(())
    }
}

pub(super) fn table_kernel() -> Option<&'static Kernel> {
    KERNELS.iter().find(|k| k.operation == "table")
}

/// A launch in clusters along x, or one that begins early.
///
/// # Safety
/// As for a launch that is neither.
unsafe fn launch_with_attributes(
    launch: &Launch<'_>,
    function: &CudaFunction,
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
) -> std::result::Result<(), DriverError> {
    if launch.cluster > PORTABLE_CLUSTER {
        let larger = CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        function.set_attribute(larger, 1)?;
    }
    let mut attributes = Vec::with_capacity(2);
    attributes.extend((launch.cluster > 1).then(|| cluster_of(launch.cluster)));
    attributes.extend(launch.early.then(beginning_early));
    let config = configuration(launch.kernel, launch.grid, stream, &mut attributes);
    let (function, nothing) = (function.cu_function(), std::ptr::null_mut());
    // SAFETY: the caller's contract; configuration and attributes live until the driver returns.
    unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), nothing) }.result()
}

/// Clusters of `blocks` blocks along x.
pub(super) fn cluster_of(blocks: u32) -> sys::CUlaunchAttribute {
    let dimension = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 };
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: dimension },
    }
}

/// The launch begins once every block of the one before has let it, or has ended.
fn beginning_early() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// A launch of a kernel, with attributes, which must outlive it.
pub(super) fn configuration(
    kernel: &Kernel,
    grid: [u32; 3],
    stream: sys::CUstream,
    attributes: &mut [sys::CUlaunchAttribute],
) -> sys::CUlaunchConfig {
    let [x, y, z] = grid;
    sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: kernel.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: kernel.shared_bytes,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}
