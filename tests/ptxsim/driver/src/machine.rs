//! The one device, its streams, events and graphs. Work is done when it is enqueued, in the order of
//! the host; a stream that captures only keeps it.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ptxsim::{Arch, Arg, Buffer, Device, Launch, Module};

use crate::pinned::Pinned;

/// A result of the driver, by its number.
pub type Code = u32;
pub const INVALID_VALUE: Code = 1;
pub const INVALID_IMAGE: Code = 200;
pub const INVALID_CONTEXT: Code = 201;
pub const INVALID_PTX: Code = 218;
pub const INVALID_HANDLE: Code = 400;
pub const NOT_FOUND: Code = 500;
pub const LAUNCH_FAILED: Code = 719;
pub const CAPTURE_UNSUPPORTED: Code = 900;
pub const CAPTURE_INVALIDATED: Code = 901;
pub const ILLEGAL_STATE: Code = 401;
pub const CAPTURE_ISOLATION: Code = 905;
pub const CAPTURED_EVENT: Code = 907;

pub type Result<T = ()> = std::result::Result<T, Code>;

/// Dynamic shared memory that a kernel gets without asking.
const DEFAULT_SHARED: u32 = 48 << 10;

/// What a stream does, or a graph holds.
#[derive(Clone, Debug)]
pub enum Op {
    Launch { function: usize, launch: Launch, args: Vec<Vec<u8>> },
    Fill { to: u64, bytes: u64, value: u8 },
    Copy { to: u64, from: u64, bytes: u64 },
}

struct Loaded {
    module: Module,
    /// Variables that the host has asked for, as buffers of the same content: the device keeps none
    /// between launches.
    variables: HashMap<String, Buffer>,
}

struct Function {
    module: usize,
    name: String,
    most_shared: u32,
}

#[derive(Default)]
struct Event {
    recorded: Option<Instant>,
    /// The capture it was recorded in.
    capture: Option<usize>,
}

struct Capture {
    id: usize,
    ops: Vec<Op>,
    valid: bool,
}

pub struct Machine {
    device: Device,
    buffers: HashMap<u64, Buffer>,
    pinned: HashMap<usize, Pinned>,
    modules: HashMap<usize, Loaded>,
    functions: HashMap<usize, Function>,
    /// Streams, each with what it captures.
    streams: HashMap<usize, Option<Capture>>,
    events: HashMap<usize, Event>,
    graphs: HashMap<usize, Vec<Op>>,
    next: usize,
    /// A kernel has failed: so does everything from then on.
    failed: Option<Code>,
}

/// What the device is: `PTXSIM_ARCH`, sm_80 without.
static ARCH: LazyLock<Arch> = LazyLock::new(|| {
    let name = std::env::var("PTXSIM_ARCH").unwrap_or_else(|_| "sm_80".into());
    name.parse().unwrap_or_else(|error| panic!("PTXSIM_ARCH: {error}"))
});

pub fn arch() -> Arch {
    *ARCH
}

static MACHINE: LazyLock<Mutex<Machine>> = LazyLock::new(|| Mutex::new(Machine::new()));

pub fn machine() -> MutexGuard<'static, Machine> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    fn new() -> Self {
        Self {
            device: Device::new(arch()),
            buffers: HashMap::new(),
            pinned: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            // The legacy default stream.
            streams: HashMap::from([(0, None)]),
            events: HashMap::new(),
            graphs: HashMap::new(),
            next: 0x1000,
            failed: None,
        }
    }

    fn handle(&mut self) -> usize {
        self.next += 16;
        self.next
    }

    pub fn status(&self) -> Result {
        self.failed.map_or(Ok(()), Err)
    }

    // ---- memory

    pub fn allocate(&mut self, bytes: u64) -> Result<u64> {
        self.status()?;
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        let buffer = self.device.uninitialised_bytes("allocation", bytes);
        let address = self.device.address(buffer);
        self.buffers.insert(address, buffer);
        Ok(address)
    }

    pub fn free(&mut self, address: u64) -> Result {
        let buffer = self.buffers.remove(&address).ok_or(INVALID_VALUE)?;
        self.device.free(buffer);
        Ok(())
    }

    pub fn write(&mut self, to: u64, from: &[u8]) -> Result {
        self.status()?;
        self.device.write(to, from).map_err(refused)
    }

    pub fn read(&self, from: u64, to: &mut [u8]) -> Result {
        self.status()?;
        to.copy_from_slice(&self.device.peek(from, to.len() as u64).map_err(refused)?);
        Ok(())
    }

    /// Memory of the host that kernels reach as well; where it begins.
    pub fn allocate_pinned(&mut self, bytes: usize) -> Result<usize> {
        self.status()?;
        let pinned = Pinned::new(&mut self.device, bytes).ok_or(INVALID_VALUE)?;
        let start = pinned.start();
        self.pinned.insert(start, pinned);
        Ok(start)
    }

    /// Where kernels find it.
    pub fn pinned_address(&self, start: usize) -> Result<u64> {
        let pinned = self.pinned.get(&start).ok_or(INVALID_VALUE)?;
        Ok(self.device.address(pinned.buffer))
    }

    pub fn free_pinned(&mut self, start: usize) -> Result {
        let pinned = self.pinned.remove(&start).ok_or(INVALID_VALUE)?;
        self.device.free(pinned.buffer);
        Ok(())
    }

    // ---- modules

    pub fn load(&mut self, ptx: &str) -> Result<usize> {
        let module = Module::parse(ptx).map_err(|e| {
            eprintln!("{e}");
            INVALID_PTX
        })?;
        let handle = self.handle();
        self.modules.insert(handle, Loaded { module, variables: HashMap::new() });
        Ok(handle)
    }

    pub fn unload(&mut self, module: usize) -> Result {
        let unloaded = self.modules.remove(&module).ok_or(INVALID_HANDLE)?;
        unloaded.variables.into_values().for_each(|buffer| self.device.free(buffer));
        Ok(())
    }

    /// Address and bytes of a variable. What kernels write to it ends with their launch.
    pub fn variable(&mut self, module: usize, name: &str) -> Result<(u64, usize)> {
        let Loaded { module, variables } = self.modules.get_mut(&module).ok_or(INVALID_HANDLE)?;
        let value = module.variable(name).ok_or(NOT_FOUND)?;
        let new = || self.device.upload(name, &value);
        let buffer = *variables.entry(name.into()).or_insert_with(new);
        Ok((self.device.address(buffer), value.len()))
    }

    pub fn function(&mut self, module: usize, name: &str) -> Result<usize> {
        let loaded = self.modules.get(&module).ok_or(INVALID_HANDLE)?;
        if !loaded.module.kernels().any(|kernel| kernel == name) {
            return Err(NOT_FOUND);
        }
        let handle = self.handle();
        let function = Function { module, name: name.into(), most_shared: DEFAULT_SHARED };
        self.functions.insert(handle, function);
        Ok(handle)
    }

    pub fn allow_shared(&mut self, function: usize, bytes: u32) -> Result {
        self.functions.get_mut(&function).ok_or(INVALID_HANDLE)?.most_shared = bytes;
        Ok(())
    }

    /// Bytes of every parameter.
    pub fn parameters(&self, function: usize) -> Result<Vec<u32>> {
        let function = self.functions.get(&function).ok_or(INVALID_HANDLE)?;
        let loaded = self.modules.get(&function.module).ok_or(INVALID_HANDLE)?;
        loaded.module.parameters(&function.name).map_err(|e| {
            eprintln!("{e}");
            INVALID_IMAGE
        })
    }

    // ---- streams

    pub fn new_stream(&mut self) -> usize {
        let handle = self.handle();
        self.streams.insert(handle, None);
        handle
    }

    pub fn end_stream(&mut self, stream: usize) -> Result {
        self.streams.remove(&stream).map(drop).ok_or(INVALID_HANDLE)
    }

    fn stream(&mut self, stream: usize) -> Result<&mut Option<Capture>> {
        self.streams.get_mut(&stream).ok_or(INVALID_HANDLE)
    }

    /// Work that a capture keeps.
    pub fn submit(&mut self, stream: usize, op: Op) -> Result {
        self.status()?;
        match self.stream(stream)? {
            Some(capture) if !capture.valid => Err(CAPTURE_INVALIDATED),
            Some(capture) => {
                capture.ops.push(op);
                Ok(())
            }
            None => self.perform(&op),
        }
    }

    /// Before what no capture can hold, which ends it.
    pub fn outside_capture(&mut self, stream: usize) -> Result {
        self.status()?;
        match self.stream(stream)? {
            Some(capture) => {
                capture.valid = false;
                Err(CAPTURE_UNSUPPORTED)
            }
            None => Ok(()),
        }
    }

    /// 0: none; 1: active; 2: invalidated.
    pub fn capture_status(&mut self, stream: usize) -> Result<u32> {
        Ok(match self.stream(stream)? {
            None => 0,
            Some(capture) if capture.valid => 1,
            Some(_) => 2,
        })
    }

    pub fn begin_capture(&mut self, stream: usize) -> Result {
        let id = self.handle();
        match self.stream(stream)? {
            Some(_) => Err(ILLEGAL_STATE),
            none => {
                *none = Some(Capture { id, ops: vec![], valid: true });
                Ok(())
            }
        }
    }

    pub fn end_capture(&mut self, stream: usize) -> Result<usize> {
        let capture = self.stream(stream)?.take().ok_or(ILLEGAL_STATE)?;
        if !capture.valid {
            return Err(CAPTURE_INVALIDATED);
        }
        Ok(self.new_graph(capture.ops))
    }

    // ---- events

    pub fn new_event(&mut self) -> usize {
        let handle = self.handle();
        self.events.insert(handle, Event::default());
        handle
    }

    pub fn end_event(&mut self, event: usize) -> Result {
        self.events.remove(&event).map(drop).ok_or(INVALID_HANDLE)
    }

    pub fn record(&mut self, event: usize, stream: usize) -> Result {
        self.status()?;
        let capture = self.stream(stream)?.as_ref().map(|capture| capture.id);
        let event = self.events.get_mut(&event).ok_or(INVALID_HANDLE)?;
        *event = Event { recorded: Some(Instant::now()), capture };
        Ok(())
    }

    /// A capture can wait for its own events only, and nothing else for those.
    pub fn wait(&mut self, stream: usize, event: usize) -> Result {
        let event = self.events.get(&event).ok_or(INVALID_HANDLE)?;
        let (recorded, source) = (event.recorded.is_some(), event.capture);
        match self.stream(stream)? {
            Some(capture) if recorded && source != Some(capture.id) => {
                capture.valid = false;
                Err(CAPTURE_ISOLATION)
            }
            None if source.is_some() => Err(CAPTURE_UNSUPPORTED),
            _ => Ok(()),
        }
    }

    /// When the event was reached; none for one that was not recorded.
    pub fn reached(&self, event: usize) -> Result<Option<Instant>> {
        self.status()?;
        let event = self.events.get(&event).ok_or(INVALID_HANDLE)?;
        if event.capture.is_some() { Err(CAPTURED_EVENT) } else { Ok(event.recorded) }
    }

    // ---- graphs

    fn new_graph(&mut self, ops: Vec<Op>) -> usize {
        let handle = self.handle();
        self.graphs.insert(handle, ops);
        handle
    }

    pub fn instantiate(&mut self, graph: usize) -> Result<usize> {
        let ops = self.graphs.get(&graph).ok_or(INVALID_HANDLE)?.clone();
        Ok(self.new_graph(ops))
    }

    pub fn end_graph(&mut self, graph: usize) -> Result {
        self.graphs.remove(&graph).map(drop).ok_or(INVALID_HANDLE)
    }

    pub fn replay(&mut self, graph: usize, stream: usize) -> Result {
        let ops = self.graphs.get(&graph).ok_or(INVALID_HANDLE)?.clone();
        ops.into_iter().try_for_each(|op| self.submit(stream, op))
    }

    fn perform(&mut self, op: &Op) -> Result {
        match op {
            Op::Fill { to, bytes, value } => self.device.fill(*to, *bytes, *value).map_err(refused),
            Op::Copy { to, from, bytes } => self.device.copy(*to, *from, *bytes).map_err(refused),
            Op::Launch { function, launch, args } => {
                let function = self.functions.get(function).ok_or(INVALID_HANDLE)?;
                if launch.shared_bytes > function.most_shared {
                    return Err(INVALID_VALUE);
                }
                let args: Vec<_> = args.iter().cloned().map(Arg::Bytes).collect();
                let Loaded { module, variables } =
                    self.modules.get_mut(&function.module).ok_or(INVALID_HANDLE)?;
                for (name, buffer) in variables {
                    module.set_variable(name, &self.device.contents(*buffer));
                }
                self.pinned.values().for_each(|pinned| pinned.upload(&mut self.device));
                let report = self.device.launch(module, &function.name, launch, &args);
                self.pinned.values().for_each(|pinned| pinned.download(&self.device));
                let found = match report {
                    Ok(report) if report.is_clean() => return Ok(()),
                    Ok(report) => report.to_string(),
                    Err(error) => error.to_string(),
                };
                eprintln!("{}, grid {:?}:\n{found}", function.name, launch.grid);
                self.failed = Some(LAUNCH_FAILED);
                Err(LAUNCH_FAILED)
            }
        }
    }
}

fn refused(error: ptxsim::AddressError) -> Code {
    eprintln!("{error}");
    INVALID_VALUE
}
