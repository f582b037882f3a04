//! What was loaded into a context: once for all devices in it, whichever context object of cudarc they
//! were made from.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use cudarc::nvrtc::Ptx;

use super::Device;
use super::encoded_maps::EncodedMaps;
use super::host_tables::HostTables;
use super::wait_report::WaitReport;
use crate::cuda::plan::kernel::Kernel;
use crate::cuda::plan::kernels;
use crate::cuda::plan::target::Target;
use crate::error::{Error, Result};

/// Of the contexts that have devices.
static CONTEXTS: Mutex<Vec<Weak<Loaded>>> = Mutex::new(Vec::new());

/// What was loaded into a context so far.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Keeps the context, and so its handle.
    pub context: Arc<CudaContext>,
    pub capability: (i32, i32),
    tables: Mutex<Tables>,
    /// Of the modules whose waits give up.
    waits: Mutex<Vec<WaitReport>>,
    pub maps: EncodedMaps,
    pub host_tables: HostTables,
    /// Asked once.
    pub target: OnceLock<Target>,
}

#[derive(Debug, Default)]
struct Tables {
    /// By file.
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// By symbol.
    functions: HashMap<&'static str, CudaFunction>,
}

impl Loaded {
    /// That of the context.
    pub fn of(context: &Arc<CudaContext>, capability: (i32, i32)) -> Arc<Self> {
        let mut all = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|loaded| loaded.strong_count() > 0);
        let mut alive = all.iter().filter_map(Weak::upgrade);
        if let Some(loaded) = alive.find(|loaded| *loaded.context == **context) {
            return loaded;
        }
        let loaded = Arc::new(Self {
            context: context.clone(),
            capability,
            tables: Mutex::default(),
            waits: Mutex::default(),
            maps: EncodedMaps::default(),
            host_tables: HostTables::default(),
            target: OnceLock::new(),
        });
        all.push(Arc::downgrade(&loaded));
        loaded
    }

    /// Where a wait gave up.
    pub fn wait_report(&self) -> Option<String> {
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.iter().find_map(WaitReport::text)
    }
}

impl Device {
    /// A kernel, loaded now if it was not yet.
    pub(super) fn function(&self, kernel: &'static Kernel) -> Result<CudaFunction> {
        let mut tables = self.loaded.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = tables.functions.get(kernel.symbol) {
            return Ok(function.clone());
        }
        let what = || format!("loading the kernel {}", kernel.symbol);
        self.refuse_capture(&what(), "call Device::prepare before the capture")?;
        self.bind()?;
        let module = match tables.modules.get(kernel.file) {
            Some(module) => module.clone(),
            None => {
                let module = self.load_module(kernel.file)?;
                tables.modules.insert(kernel.file, module.clone());
                module
            }
        };
        let function = module.load_function(kernel.symbol).map_err(|e| self.failed(what(), e))?;
        // For all of them: static shared memory counts towards what needs no asking for, and a driver
        // that loads lazily loads the function now, not at a launch that may be captured.
        let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(most, kernel.shared_bytes as i32).map_err(|e| {
            self.failed(format!("{} with {} B of shared memory", what(), kernel.shared_bytes), e)
        })?;
        let registers = CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
        let registers = function.get_attribute(registers).map_err(|e| self.failed(what(), e))?;
        kernel.check_registers(registers)?;
        tables.functions.insert(kernel.symbol, function.clone());
        Ok(function)
    }

    /// The code of a file. Every fatbin holds PTX beside its cubins, so the driver finds or compiles
    /// something for each device; the PTX text itself stays out of the program.
    fn load_module(&self, file: &'static str) -> Result<Arc<CudaModule>> {
        let what = || format!("loading the kernels of {file}");
        let fatbin = kernels::fatbin(file).ok_or_else(|| Error::Driver {
            what: what(),
            reason: "not compiled into this build".into(),
        })?;
        let module = self.loaded.context.load_module(Ptx::from_binary(fatbin.to_vec()));
        let module = module.map_err(|e| self.failed(what(), e))?;
        self.watch(file, &module).map_err(|e| self.failed(what(), e))?;
        Ok(module)
    }

    /// Gives a module a record of its waits, if they give up.
    pub(super) fn watch(
        &self,
        file: &'static str,
        module: &Arc<CudaModule>,
    ) -> std::result::Result<(), DriverError> {
        let report = WaitReport::attach(file, module, &self.stream)?;
        self.loaded.waits.lock().unwrap_or_else(PoisonError::into_inner).extend(report);
        Ok(())
    }
}
