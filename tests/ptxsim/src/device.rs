//! The device: buffers, launches, several schedules of one launch.

use std::collections::VecDeque;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::arch::Arch;
use crate::gang::Gang;
use crate::launch::{FIRST_MODULE_VARIABLE, Grid, Launch, LaunchError, Options, Residency, Timing};
use crate::memory::{GlobalBuffer, Target, global_address, target};
use crate::module::Module;
use crate::program::Kernel;
use crate::report::Report;
use crate::tensor_map::TensorMap;

/// A buffer of a [`Device`].
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Buffer(usize);

/// A kernel argument.
#[derive(Clone, Debug)]
pub enum Arg {
    /// Address of a buffer.
    Buffer(Buffer),
    /// 32-bit integer.
    I32(i32),
    /// 32-bit integer.
    U32(u32),
    /// 64-bit integer, or an address.
    I64(i64),
    /// 64-bit integer, or an address.
    U64(u64),
    /// 32-bit float.
    F32(f32),
    /// A structure by value.
    Bytes(Vec<u8>),
    /// A tensor map by value.
    TensorMap(TensorMap),
}

impl From<Buffer> for Arg {
    fn from(b: Buffer) -> Self {
        Self::Buffer(b)
    }
}

/// Bytes that no kernel and no upload has written.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("byte {offset} of buffer {buffer} was never written")]
pub struct Uninitialised {
    /// Name of the buffer.
    pub buffer: String,
    /// First such byte.
    pub offset: u64,
}

/// Why bytes cannot be accessed by their address.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AddressError {
    /// The address belongs to no buffer.
    #[error("address {address:#x} lies in no buffer of the device")]
    NoBuffer {
        /// The address.
        address: u64,
    },
    /// The range begins before its buffer or ends behind it.
    #[error("{bytes} bytes at offset {offset} of buffer {buffer} leave its {size} bytes")]
    Outside {
        /// Name of the buffer.
        buffer: String,
        /// Where the range begins in the buffer.
        offset: i64,
        /// Length of the range.
        bytes: u64,
        /// Length of the buffer.
        size: u64,
    },
    /// Part of the range was never written.
    #[error(transparent)]
    Uninitialised(#[from] Uninitialised),
}

/// A simulated device.
///
/// Buffers know which of their bytes have been written:
///
/// ```
/// use ptxsim::{Arch, Arg, Device, Launch, Module};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let module = Module::parse(
///     ".version 8.0 .target sm_80 .address_size 64
///     .visible .entry one(.param .u64 to) {
///         .reg .b64 %rd;
///         ld.param.u64 %rd, [to];
///         st.global.u32 [%rd], 1;
///         ret;
///     }",
/// )?;
/// let mut device = Device::new(Arch::Sm80);
/// let to = device.uninitialised::<u32>("to", 2);
/// let report = device.explore(&module, "one", &Launch::linear(1, 1), &[Arg::Buffer(to)], 3)?;
/// assert!(report.is_clean(), "{report}");
///
/// assert_eq!(device.contents(to), [1, 0, 0, 0, 0, 0, 0, 0]);
/// assert_eq!(device.unwritten(to), 4);
/// let error = device.read::<u32>(to).unwrap_err();
/// assert_eq!(error.to_string(), "byte 4 of buffer to was never written");
/// # Ok(())
/// # }
/// ```
pub struct Device {
    arch: Arch,
    /// How launches are simulated.
    pub options: Options,
    buffers: Vec<GlobalBuffer>,
    /// Numbers of freed buffers, the earliest first.
    freed: VecDeque<usize>,
}

/// Numbers of buffers are not used again before so many are taken, so that an access through an old
/// address is found.
const FRESH_NUMBERS: usize = FIRST_MODULE_VARIABLE / 2;

impl Device {
    /// A device without buffers.
    pub fn new(arch: Arch) -> Self {
        Self { arch, options: Options::default(), buffers: Vec::new(), freed: VecDeque::new() }
    }

    /// A buffer that holds `data`.
    pub fn buffer<T: bytemuck::Pod>(&mut self, name: &str, data: &[T]) -> Buffer {
        self.upload(name, bytemuck::cast_slice(data))
    }

    /// A buffer that holds `bytes`.
    pub fn upload(&mut self, name: &str, bytes: &[u8]) -> Buffer {
        let buffer = self.uninitialised_bytes(name, bytes.len() as u64);
        self.buffers[buffer.0].copy_in(0, bytes);
        buffer
    }

    /// A buffer of `n` elements that nobody has written.
    pub fn uninitialised<T: bytemuck::Pod>(&mut self, name: &str, n: usize) -> Buffer {
        self.uninitialised_bytes(name, (n * size_of::<T>()) as u64)
    }

    /// A buffer of `bytes` bytes that nobody has written.
    pub fn uninitialised_bytes(&mut self, name: &str, bytes: u64) -> Buffer {
        let buffer = GlobalBuffer::new(name, bytes);
        if self.buffers.len() >= FRESH_NUMBERS
            && let Some(number) = self.freed.pop_front()
        {
            self.buffers[number] = buffer;
            return Buffer(number);
        }
        self.buffers.push(buffer);
        Buffer(self.buffers.len() - 1)
    }

    /// Ends the life of a buffer: from now on it has no bytes, and an access is out of bounds.
    pub fn free(&mut self, buffer: Buffer) {
        let freed = &mut self.buffers[buffer.0];
        *freed = GlobalBuffer::new(&format!("{} (freed)", freed.name), 0);
        self.freed.push_back(buffer.0);
    }

    /// Address of a buffer's first byte in the simulated machine.
    pub fn address(&self, buffer: Buffer) -> u64 {
        global_address(buffer.0)
    }

    /// Copies bytes to an address, as from the host; they count as written.
    ///
    /// # Errors
    /// [`AddressError`] when the range does not lie in one buffer; then nothing is written.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), AddressError> {
        let (buffer, offset) = self.locate(address, bytes.len() as u64)?;
        buffer.copy_in(offset, bytes);
        Ok(())
    }

    /// Sets every byte of a range; they count as written.
    ///
    /// # Errors
    /// As [`Device::write`].
    pub fn fill(&mut self, address: u64, bytes: u64, value: u8) -> Result<(), AddressError> {
        let (buffer, offset) = self.locate(address, bytes)?;
        buffer.update(offset, bytes as usize, |_, part| part.fill(value));
        Ok(())
    }

    /// The bytes at an address.
    ///
    /// # Errors
    /// [`AddressError`] when the range does not lie in one buffer or was not written throughout.
    pub fn read_bytes(&self, address: u64, bytes: u64) -> Result<Vec<u8>, AddressError> {
        let (buffer, offset) = self.locate(address, bytes)?;
        if let Some(offset) = buffer.uninitialised(offset, bytes) {
            return Err(Uninitialised { buffer: buffer.name.clone(), offset }.into());
        }
        let mut out = vec![0; bytes as usize];
        buffer.copy_out(offset, &mut out);
        Ok(out)
    }

    /// The bytes at an address; those that were never written are 0.
    ///
    /// # Errors
    /// [`AddressError`] when the range does not lie in one buffer.
    pub fn peek(&self, address: u64, bytes: u64) -> Result<Vec<u8>, AddressError> {
        let (buffer, offset) = self.locate(address, bytes)?;
        let mut out = vec![0; bytes as usize];
        buffer.copy_out(offset, &mut out);
        Ok(out)
    }

    /// Copies bytes from one address to another, as the device does outside of kernels; what was
    /// never written is left out.
    ///
    /// # Errors
    /// As [`Device::write`].
    pub fn copy(&mut self, to: u64, from: u64, bytes: u64) -> Result<(), AddressError> {
        let data = self.peek(from, bytes)?;
        let (source, start) = self.locate(from, bytes)?;
        let written = source.initialised(start..start + bytes);
        let (target, first) = self.locate(to, bytes)?;
        let mut done = 0;
        for run in written.chunk_by(|a, b| a == b) {
            if run[0] {
                target.copy_in(first + done as u64, &data[done..][..run.len()]);
            }
            done += run.len();
        }
        Ok(())
    }

    /// The buffer that holds a range, and where the range begins in it.
    fn locate(&self, address: u64, bytes: u64) -> Result<(&GlobalBuffer, u64), AddressError> {
        let outside = AddressError::NoBuffer { address };
        let Target::Global { buffer, offset } = target(address) else { return Err(outside) };
        let buffer = self.buffers.get(buffer).ok_or(outside)?;
        match u64::try_from(offset) {
            Ok(at) if at.checked_add(bytes).is_some_and(|end| end <= buffer.bytes) => {
                Ok((buffer, at))
            }
            _ => {
                let (name, size) = (buffer.name.clone(), buffer.bytes);
                Err(AddressError::Outside { buffer: name, offset, bytes, size })
            }
        }
    }

    /// Contents of a buffer.
    ///
    /// # Errors
    /// [`Uninitialised`] when part of it was never written.
    pub fn read<T: bytemuck::Pod>(&self, buffer: Buffer) -> Result<Vec<T>, Uninitialised> {
        Ok(bytemuck::allocation::pod_collect_to_vec(&self.download(buffer)?))
    }

    /// Contents of a buffer as bytes.
    ///
    /// # Errors
    /// [`Uninitialised`] when part of it was never written.
    pub fn download(&self, buffer: Buffer) -> Result<Vec<u8>, Uninitialised> {
        let b = &self.buffers[buffer.0];
        match b.uninitialised(0, b.bytes) {
            Some(offset) => Err(Uninitialised { buffer: b.name.clone(), offset }),
            None => Ok(self.contents(buffer)),
        }
    }

    /// Contents of a buffer; bytes that were never written are 0.
    pub fn contents(&self, buffer: Buffer) -> Vec<u8> {
        let b = &self.buffers[buffer.0];
        let mut bytes = vec![0; b.bytes as usize];
        b.copy_out(0, &mut bytes);
        bytes
    }

    /// How many bytes of a buffer were never written.
    pub fn unwritten(&self, buffer: Buffer) -> u64 {
        let b = &self.buffers[buffer.0];
        let written = b.initialised(0..b.bytes);
        written.iter().filter(|w| !**w).count() as u64
    }

    /// Runs a kernel once, by [`Device::options`].
    ///
    /// # Errors
    /// [`LaunchError`]: nothing has run. What the kernel does wrong is in the report.
    pub fn launch(
        &mut self,
        module: &Module,
        kernel: &str,
        launch: &Launch,
        args: &[Arg],
    ) -> Result<Report, LaunchError> {
        if !self.arch.runs(&module.ast.target) {
            let target = module.ast.target.clone();
            return Err(LaunchError::Target { target, arch: self.arch });
        }
        let kernel = module.kernel(kernel)?;
        let params = self.params(&kernel, args)?;
        let variables = module.variables();
        self.buffers.iter_mut().for_each(GlobalBuffer::reset_accesses);
        let options = self.options.clone();
        let grid =
            Grid::new(&kernel, self.arch, *launch, params, &self.buffers, &variables, &options)?;
        Ok(run(&grid))
    }

    fn params(&self, kernel: &Kernel, args: &[Arg]) -> Result<Vec<u8>, LaunchError> {
        let name = || kernel.name.clone();
        if args.len() != kernel.params.len() {
            let (expected, given) = (kernel.params.len(), args.len());
            return Err(LaunchError::ArgumentCount { kernel: name(), expected, given });
        }
        let end = kernel.params.last().map_or(0, |p| p.offset + p.bytes);
        if end > self.arch.max_params() {
            return Err(LaunchError::Limit {
                what: "the size of the parameters".into(),
                given: end.to_string(),
                limit: self.arch.max_params().to_string(),
            });
        }
        let mut block = vec![0; end as usize];
        for (index, (param, arg)) in kernel.params.iter().zip(args).enumerate() {
            let bytes = match arg {
                Arg::Buffer(b) => self.address(*b).to_le_bytes().to_vec(),
                Arg::I32(v) => v.to_le_bytes().to_vec(),
                Arg::U32(v) => v.to_le_bytes().to_vec(),
                Arg::I64(v) => v.to_le_bytes().to_vec(),
                Arg::U64(v) => v.to_le_bytes().to_vec(),
                Arg::F32(v) => v.to_le_bytes().to_vec(),
                Arg::Bytes(v) => v.clone(),
                Arg::TensorMap(map) => {
                    let refused = |error| LaunchError::TensorMap { kernel: name(), index, error };
                    map.encode().map_err(refused)?.to_vec()
                }
            };
            if bytes.len() != param.bytes as usize {
                return Err(LaunchError::ArgumentSize {
                    kernel: name(),
                    index,
                    name: param.name.clone(),
                    expected: param.bytes,
                    given: bytes.len(),
                });
            }
            block[param.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        Ok(block)
    }

    /// Runs a kernel under several schedules, from the same contents of all buffers, with
    /// asynchronous operations eager and lazy in turn; the buffers then hold what the first left.
    /// Outputs that differ in a bit are reported as schedule-dependent.
    ///
    /// # Errors
    /// As [`Device::launch`].
    pub fn explore(
        &mut self,
        module: &Module,
        kernel: &str,
        launch: &Launch,
        args: &[Arg],
        schedules: u32,
    ) -> Result<Report, LaunchError> {
        if schedules <= 1 {
            return self.launch(module, kernel, launch, args);
        }
        let before = self.save();
        let (seed, timing) = (self.options.seed, self.options.timing);
        let mut report = self.launch(module, kernel, launch, args)?;
        let first = self.save();
        for i in 1..schedules {
            self.restore(&before);
            self.options.seed = seed.wrapping_add(i.into());
            self.options.timing = match (timing, i % 2) {
                (Timing::Eager, 1) | (Timing::Lazy, 0) => Timing::Lazy,
                _ => Timing::Eager,
            };
            let next = self.launch(module, kernel, launch, args);
            (self.options.seed, self.options.timing) = (seed, timing);
            let next = next?;
            let schedule = next.schedules[0];
            report.merge(next);
            let second = self.save();
            let buffers = self.buffers.iter().zip(first.iter().zip(&second)).enumerate();
            for (number, (b, (x, y))) in buffers {
                if let Some(at) = (0..x.0.len()).find(|i| x.0[*i] != y.0[*i] || x.1[*i] != y.1[*i])
                {
                    let buffer = (number as u32, b.name.as_str());
                    report.schedule_dependent(buffer, at as u64, &schedule);
                }
            }
        }
        self.restore(&first);
        Ok(report)
    }

    /// Contents and initialised bytes of all buffers.
    fn save(&self) -> Vec<(Vec<u8>, Vec<bool>)> {
        let save = |i: usize| {
            let written = self.buffers[i].initialised(0..self.buffers[i].bytes);
            (self.contents(Buffer(i)), written)
        };
        (0..self.buffers.len()).map(save).collect()
    }

    fn restore(&mut self, saved: &[(Vec<u8>, Vec<bool>)]) {
        for (buffer, (bytes, written)) in self.buffers.iter_mut().zip(saved) {
            buffer.restore(bytes, written);
        }
    }
}

/// Runs every gang of a grid.
fn run(grid: &Grid<'_>) -> Report {
    let per_gang = match grid.options.residency {
        Residency::Sequential => grid.cluster_size(),
        Residency::CoResident => grid.blocks(),
    };
    let mut gangs: Vec<u32> = (0..grid.blocks() / per_gang).collect();
    gangs.shuffle(&mut ChaCha8Rng::seed_from_u64(grid.options.seed));
    let mut outcomes: Vec<_> = gangs
        .into_par_iter()
        .with_max_len(1)
        .map(|g| (g, Gang::new(grid, g * per_gang..(g + 1) * per_gang).run()))
        .collect();
    // Findings are merged in the order of the blocks, whatever the order they ran in.
    outcomes.sort_by_key(|(g, _)| *g);
    Report::new(grid, outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}
