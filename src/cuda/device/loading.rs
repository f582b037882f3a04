//! Kernels, loaded when they are first needed.

use std::sync::{Arc, PoisonError};

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaFunction, CudaModule, DriverError};
use cudarc::nvrtc::Ptx;

use super::Device;
use super::wait_report::WaitReport;
use crate::cuda::plan::kernel::Kernel;
use crate::cuda::plan::kernels;
use crate::error::{Error, Result};

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
