//! The one device and what programs have made on it. Work is done when it is enqueued, in the order of
//! the host; a stream that captures only keeps it.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use ptxsim::{Buffer, Device, Module};

use crate::context::Contexts;
use crate::error::{INVALID_VALUE, NOT_INITIALIZED, Result};
use crate::kernels::{Function, Loaded};
use crate::pinned::Pinned;
use crate::settings::Settings;
use crate::streams::{Capture, Event, Op, StreamId};

/// Something that belongs to a context.
pub struct Owned<T> {
    pub context: usize,
    pub value: T,
}

pub struct Machine {
    pub settings: Settings,
    pub device: Device,
    pub contexts: Contexts,
    buffers: HashMap<u64, Owned<Buffer>>,
    pub pinned: HashMap<usize, Owned<Pinned>>,
    /// By their PTX: what was loaded once may be loaded into other contexts.
    pub parsed: HashMap<String, Module>,
    pub modules: HashMap<usize, Owned<Loaded>>,
    pub functions: HashMap<usize, Owned<Function>>,
    pub streams: HashMap<StreamId, Owned<Option<Capture>>>,
    pub events: HashMap<usize, Owned<Event>>,
    pub graphs: HashMap<usize, Vec<Op>>,
    next: usize,
}

static MACHINE: LazyLock<std::result::Result<Mutex<Machine>, String>> = LazyLock::new(|| {
    let variable = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
    let settings = Settings::read(variable);
    settings.map(|settings| Mutex::new(Machine::new(settings)))
});

/// The machine.
pub fn machine() -> Result<MutexGuard<'static, Machine>> {
    let machine = MACHINE.as_ref().map_err(|_| NOT_INITIALIZED)?;
    Ok(machine.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Says what is wrong with the environment.
pub fn initialise() -> Result {
    match MACHINE.as_ref() {
        Ok(_) => Ok(()),
        Err(error) => {
            eprintln!("the simulator cannot start: {error}");
            Err(INVALID_VALUE)
        }
    }
}

impl Machine {
    fn new(settings: Settings) -> Self {
        let mut device = Device::new(settings.arch);
        device.options = settings.options.clone();
        Self {
            settings,
            device,
            contexts: Contexts::default(),
            buffers: HashMap::new(),
            pinned: HashMap::new(),
            parsed: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            graphs: HashMap::new(),
            next: 0x1000,
        }
    }

    pub fn handle(&mut self) -> usize {
        self.next += 16;
        self.next
    }

    /// The current context, in which everything goes on.
    pub fn current(&self) -> Result<usize> {
        let context = self.contexts.current()?;
        self.contexts.status(context)?;
        Ok(context)
    }

    // ---- contexts

    pub fn create_context(&mut self) -> usize {
        let handle = self.handle();
        self.contexts.create(handle);
        handle
    }

    pub fn retain_primary(&mut self) -> usize {
        let new = self.handle();
        self.contexts.retain(new)
    }

    pub fn release_primary(&mut self) -> Result {
        if let Some(last) = self.contexts.release()? {
            self.clear(last);
            self.contexts.end(last);
        }
        Ok(())
    }

    /// Ends what belongs to the primary context, which stays retained.
    pub fn reset_primary(&mut self) {
        if let Some(primary) = self.contexts.reset_primary() {
            self.clear(primary);
        }
    }

    pub fn destroy_context(&mut self, handle: usize) -> Result {
        self.contexts.destroy(handle)?;
        self.clear(handle);
        Ok(())
    }

    /// Ends everything that belongs to a context.
    fn clear(&mut self, context: usize) {
        self.streams.retain(|_, stream| stream.context != context);
        self.events.retain(|_, event| event.context != context);
        self.functions.retain(|_, function| function.context != context);
        let device = &mut self.device;
        for (_, module) in self.modules.extract_if(|_, module| module.context == context) {
            module.value.variables.into_values().for_each(|buffer| device.free(buffer));
        }
        for (_, buffer) in self.buffers.extract_if(|_, buffer| buffer.context == context) {
            device.free(buffer.value);
        }
        for (_, pinned) in self.pinned.extract_if(|_, pinned| pinned.context == context) {
            device.free(pinned.value.buffer);
        }
    }

    // ---- memory

    pub fn allocate(&mut self, bytes: u64) -> Result<u64> {
        let context = self.current()?;
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        let value = self.device.uninitialised_bytes("allocation", bytes);
        let address = self.device.address(value);
        self.buffers.insert(address, Owned { context, value });
        Ok(address)
    }

    pub fn free(&mut self, address: u64) -> Result {
        let buffer = self.buffers.remove(&address).ok_or(INVALID_VALUE)?;
        self.device.free(buffer.value);
        Ok(())
    }

    pub fn write(&mut self, to: u64, from: &[u8]) -> Result {
        self.current()?;
        self.device.write(to, from).map_err(refused)
    }

    pub fn read(&self, from: u64, to: &mut [u8]) -> Result {
        self.current()?;
        to.copy_from_slice(&self.device.peek(from, to.len() as u64).map_err(refused)?);
        Ok(())
    }

    /// Memory of the host that kernels reach as well; where it begins.
    pub fn allocate_pinned(&mut self, bytes: usize) -> Result<usize> {
        let context = self.current()?;
        let value = Pinned::new(&mut self.device, bytes).ok_or(INVALID_VALUE)?;
        let start = value.start();
        self.pinned.insert(start, Owned { context, value });
        Ok(start)
    }

    /// Where kernels find it.
    pub fn pinned_address(&mut self, start: usize) -> Result<u64> {
        let pinned = self.pinned.get_mut(&start).ok_or(INVALID_VALUE)?;
        Ok(pinned.value.map(&self.device))
    }

    pub fn free_pinned(&mut self, start: usize) -> Result {
        let pinned = self.pinned.remove(&start).ok_or(INVALID_VALUE)?;
        self.device.free(pinned.value.buffer);
        Ok(())
    }
}

/// An access by the host that lies in no buffer.
pub fn refused(error: ptxsim::AddressError) -> crate::error::Code {
    eprintln!("{error}");
    INVALID_VALUE
}
