//! CUDA kernels on the CPU: the PTX that the build made of a kernel file, run by the simulator.
//!
//! ```ignore
//! let mut sim = Simulator::new();
//! let (x, y) = (sim.upload("x", &values), sim.uninitialised::<f32>("y", values.len()));
//! sim.launch("infini_sum_sm80", [1, 1, 1], 256, 0, bytemuck::bytes_of(&params));
//! let result: Vec<f32> = sim.read(y, values.len());
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytemuck::Pod;
use infini_attn::cuda::{self, Launcher, MAP_BYTES};
use infini_attn::{DType, Error};
use ptxsim::layout::Swizzle;
use ptxsim::tensor_map::{Dtype, TensorMap, TensorMapError};
use ptxsim::{AddressError, Arg, Buffer, Device, Launch, Module, Report, Timing};

/// A simulated GPU, all checks on.
pub struct Simulator {
    pub device: Device,
    /// Orders of execution that every launch is run in; all must leave the same bits.
    pub schedules: u32,
}

impl Simulator {
    /// Of compute capability 8.0.
    pub fn new() -> Self {
        Self::of(cuda::Arch::Sm80)
    }

    /// One that runs the kernels of an architecture, and all older ones.
    pub fn of(arch: cuda::Arch) -> Self {
        let mut device = Device::new(match arch {
            cuda::Arch::Sm90 => ptxsim::Arch::Sm90a,
            _ => ptxsim::Arch::Sm80,
        });
        device.options.strict_proxies = true;
        Self { device, schedules: 1 }
    }

    /// When asynchronous copies move their data.
    pub fn timing(mut self, timing: Timing) -> Self {
        self.device.options.timing = timing;
        self
    }

    /// Order of blocks and warps.
    pub fn seed(mut self, seed: u64) -> Self {
        self.device.options.seed = seed;
        self
    }

    /// Whether races and uninitialised values are looked for; bounds and alignment always are.
    pub fn checks(mut self, checks: bool) -> Self {
        self.device.options.checks = checks;
        self
    }

    /// Runs every launch in several orders, asynchronous copies early and late in turn.
    pub fn schedules(mut self, schedules: u32) -> Self {
        self.schedules = schedules;
        self
    }

    /// A buffer that holds `data`; its address, a multiple of 256.
    pub fn upload<T: Pod>(&mut self, name: &str, data: &[T]) -> u64 {
        let buffer = self.device.buffer(name, data);
        self.device.address(buffer)
    }

    /// A buffer of `count` elements that nobody has written; its address, a multiple of 256.
    pub fn uninitialised<T: Pod>(&mut self, name: &str, count: usize) -> u64 {
        let buffer: Buffer = self.device.uninitialised::<T>(name, count);
        self.device.address(buffer)
    }

    /// A buffer of exactly `bytes` bytes that nobody has written.
    pub fn allocate(&mut self, name: &str, bytes: u64) -> Buffer {
        self.device.uninitialised_bytes(name, bytes)
    }

    /// `count` elements at an address; each must have been written.
    #[track_caller]
    pub fn read<T: Pod>(&self, address: u64, count: usize) -> Vec<T> {
        let bytes = self.device.read_bytes(address, (count * size_of::<T>()) as u64);
        bytemuck::allocation::pod_collect_to_vec(&bytes.unwrap_or_else(|e| panic!("{e}")))
    }

    /// Runs a kernel on its one parameter, given as bytes; whatever is found fails the test.
    #[track_caller]
    pub fn launch(
        &mut self,
        symbol: &str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        params: &[u8],
    ) -> Report {
        self.try_launch(symbol, grid, threads, shared_bytes, params)
            .unwrap_or_else(|finding| panic!("{finding}"))
    }

    /// As [`Self::launch`].
    ///
    /// # Errors
    /// Why the launch was refused, or what was found, as text.
    pub fn try_launch(
        &mut self,
        symbol: &str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        params: &[u8],
    ) -> Result<Report, String> {
        let launch = Launch { grid, block: [threads, 1, 1], ..Launch::linear(1, 1) };
        self.explore(symbol, launch.shared(shared_bytes), params)
    }

    /// A launch of a plan.
    ///
    /// # Errors
    /// Why it was refused, or what was found.
    pub fn run(&mut self, launch: &cuda::Launch<'_>) -> infini_attn::Result<Report> {
        let cuda::Launch { kernel, grid, cluster, .. } = *launch;
        let dimensions = Launch {
            grid,
            block: [kernel.threads, 1, 1],
            cluster: [cluster, 1, 1],
            shared_bytes: kernel.shared_bytes,
            registers: Some(kernel.registers()),
        };
        let parameter = launch.parameter(encode)?;
        self.device.options.early = launch.early;
        let explored = self.explore(kernel.symbol, dimensions, &parameter);
        self.device.options.early = false;
        explored.map_err(|finding| launch.error(finding))
    }

    fn explore(&mut self, symbol: &str, launch: Launch, params: &[u8]) -> Result<Report, String> {
        let (module, args) = (module(file_of(symbol)?)?, [Arg::Bytes(params.to_vec())]);
        let report = self
            .device
            .explore(&module, symbol, &launch, &args, self.schedules)
            .map_err(|error| format!("{symbol}: {error}"))?;
        match report.is_clean() {
            true => Ok(report),
            false => Err(format!("{symbol}, grid {:?}:\n{report}", launch.grid)),
        }
    }
}

/// A tensor map in the simulator's encoding.
fn encode(map: &cuda::TensorMap) -> Result<[u8; MAP_BYTES], TensorMapError> {
    let dtype = if map.dtype == DType::F16 { Dtype::F16 } else { Dtype::Bf16 };
    let dense = TensorMap::dense(dtype, map.extents.to_vec(), map.box_extents().to_vec());
    let strides = map.strides.to_vec();
    TensorMap { strides, swizzle: Swizzle::B128, address: map.data, ..dense }.encode()
}

impl Launcher for Simulator {
    fn launch(&mut self, launch: &cuda::Launch<'_>) -> infini_attn::Result<()> {
        self.run(launch).map(drop)
    }

    fn fill(&mut self, to: u64, bytes: u64, value: u8) -> infini_attn::Result<()> {
        self.device.fill(to, bytes, value).map_err(|e| refused("fill", &e))
    }

    fn copy(&mut self, to: u64, from: &[u8]) -> infini_attn::Result<()> {
        self.device.write(to, from).map_err(|e| refused("copy", &e))
    }
}

fn refused(what: &str, error: &AddressError) -> Error {
    Error::Driver { what: what.into(), reason: error.to_string() }
}

/// The file of a kernel, as `sm80/sum`.
fn file_of(symbol: &str) -> Result<&'static str, String> {
    let kernel = cuda::KERNELS.iter().find(|k| k.symbol == symbol);
    kernel.map(|k| k.file).ok_or_else(|| format!("{symbol} is not in the table of kernels"))
}

/// The module of a kernel file, parsed once for all tests of the process.
fn module(file: &'static str) -> Result<Arc<Module>, String> {
    type Cell = Arc<OnceLock<Result<Arc<Module>, String>>>;
    static MODULES: Mutex<BTreeMap<&str, Cell>> = Mutex::new(BTreeMap::new());
    let cell = {
        let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
        modules.entry(file).or_default().clone()
    };
    cell.get_or_init(|| {
        let text = cuda::ptx(file).ok_or_else(|| format!("{file} was not compiled"))?;
        Module::parse(text).map(Arc::new).map_err(|error| format!("{file}: {error}"))
    })
    .clone()
}
