//! Modules, functions, launches and what fits on the device.

use std::collections::HashMap;

use ptxsim::occupancy::Block;
use ptxsim::{Arg, Buffer, Launch, LaunchError, Module, Residency};

use crate::error::{
    COOPERATIVE_TOO_LARGE, Code, INVALID_CLUSTER, INVALID_HANDLE, INVALID_IMAGE, INVALID_PTX,
    INVALID_VALUE, LAUNCH_FAILED, NO_BINARY, NOT_FOUND, NOT_SUPPORTED, OUT_OF_RESOURCES, Result,
};
use crate::machine::{Machine, Owned};

/// Dynamic shared memory that a kernel gets without asking.
const DEFAULT_SHARED: u32 = 48 << 10;

pub struct Loaded {
    pub module: Module,
    /// Variables that the host has asked for, as buffers of the same content: the device keeps none
    /// between launches.
    pub variables: HashMap<String, Buffer>,
}

pub struct Function {
    module: usize,
    name: String,
    most_shared: u32,
    /// Clusters of more than the portable size are allowed.
    non_portable: bool,
}

/// A launch that is asked for.
#[derive(Clone, Debug)]
pub struct Call {
    pub function: usize,
    pub launch: Launch,
    /// All blocks must be resident together.
    pub cooperative: bool,
    /// It may begin before the launch before it has ended, and waits for it itself.
    pub early: bool,
    pub args: Vec<Vec<u8>>,
}

impl Machine {
    pub fn load(&mut self, ptx: &str) -> Result<usize> {
        let context = self.current()?;
        let module = match self.parsed.get(ptx) {
            Some(module) => module.clone(),
            None => {
                let module = Module::parse(ptx).map_err(|e| {
                    eprintln!("{e}");
                    INVALID_PTX
                })?;
                self.parsed.entry(ptx.into()).or_insert(module).clone()
            }
        };
        let handle = self.handle();
        let value = Loaded { module, variables: HashMap::new() };
        self.modules.insert(handle, Owned { context, value });
        Ok(handle)
    }

    pub fn unload(&mut self, module: usize) -> Result {
        let unloaded = self.modules.remove(&module).ok_or(INVALID_HANDLE)?;
        unloaded.value.variables.into_values().for_each(|buffer| self.device.free(buffer));
        Ok(())
    }

    /// A module of the current context.
    fn module(&mut self, module: usize) -> Result<&mut Loaded> {
        let context = self.contexts.current()?;
        let loaded = self.modules.get_mut(&module).filter(|loaded| loaded.context == context);
        Ok(&mut loaded.ok_or(INVALID_HANDLE)?.value)
    }

    /// Address and bytes of a variable. What kernels write to it ends with their launch.
    pub fn variable(&mut self, module: usize, name: &str) -> Result<(u64, usize)> {
        let value = self.module(module)?.module.variable(name).ok_or(NOT_FOUND)?;
        let known = self.module(module)?.variables.get(name).copied();
        let buffer = known.unwrap_or_else(|| self.device.upload(name, &value));
        self.module(module)?.variables.insert(name.into(), buffer);
        Ok((self.device.address(buffer), value.len()))
    }

    pub fn new_function(&mut self, module: usize, name: &str) -> Result<usize> {
        let context = self.contexts.current()?;
        if !self.module(module)?.module.kernels().any(|kernel| kernel == name) {
            return Err(NOT_FOUND);
        }
        let handle = self.handle();
        let (name, most_shared) = (name.into(), DEFAULT_SHARED);
        let value = Function { module, name, most_shared, non_portable: false };
        self.functions.insert(handle, Owned { context, value });
        Ok(handle)
    }

    fn function(&self, function: usize) -> Result<(&Function, &Module)> {
        let function = &self.functions.get(&function).ok_or(INVALID_HANDLE)?.value;
        let loaded = self.modules.get(&function.module).ok_or(INVALID_HANDLE)?;
        Ok((function, &loaded.value.module))
    }

    /// Sets an attribute by its number.
    pub fn set_function_attribute(
        &mut self,
        function: usize,
        attribute: u32,
        value: i32,
    ) -> Result {
        let own = self.block(function, 0, 0)?.shared;
        let most = self.settings.arch.shared_per_block().saturating_sub(own);
        let function = &mut self.functions.get_mut(&function).ok_or(INVALID_HANDLE)?.value;
        match attribute {
            // Dynamic shared memory.
            8 => match u32::try_from(value) {
                Ok(bytes) if bytes <= most => function.most_shared = bytes,
                _ => return Err(INVALID_VALUE),
            },
            14 => function.non_portable = value != 0,
            // How shared memory and L1 are cut, how clusters are scheduled.
            9 | 15 => {}
            // A cluster's dimensions.
            11..=13 => return Err(NOT_SUPPORTED),
            _ => return Err(INVALID_VALUE),
        }
        Ok(())
    }

    /// Bytes of every parameter.
    pub fn parameters(&self, function: usize) -> Result<Vec<u32>> {
        let (function, module) = self.function(function)?;
        module.parameters(&function.name).map_err(|error| {
            eprintln!("{error}");
            INVALID_IMAGE
        })
    }

    /// An attribute by its number.
    pub fn function_attribute(&self, function: usize, attribute: u32) -> Result<i32> {
        let (function, module) = self.function(function)?;
        let kernel = module.kernel(&function.name).map_err(|error| refusal(&error))?;
        let required = kernel.directives.cluster.unwrap_or_default();
        let arch = self.settings.arch;
        let capability = arch.capability();
        let version = 10 * capability.0 + capability.1;
        let value = match attribute {
            0 => kernel.directives.threads().unwrap_or(1024),
            1 => kernel.static_shared,
            3 => kernel.frame,
            // Registers: those of kernels that change them are known, of others the most.
            4 => kernel.registers_at_entry(arch).unwrap_or_else(|| kernel.most_registers(arch)),
            // PTX and the binary made of it.
            5 | 6 => version,
            8 => function.most_shared,
            10 => u32::from(kernel.directives.explicit_cluster),
            11..=13 => required[attribute as usize - 11],
            14 => u32::from(function.non_portable),
            _ => return Err(INVALID_VALUE),
        };
        Ok(value as i32)
    }

    /// The cluster that a kernel asks for in its text.
    pub fn own_cluster(&self, function: usize) -> Result<[u32; 3]> {
        let (function, module) = self.function(function)?;
        let kernel = module.kernel(&function.name).map_err(|error| refusal(&error))?;
        Ok(kernel.directives.cluster.filter(|c| !c.contains(&0)).unwrap_or([1; 3]))
    }

    // ---- occupancy

    /// What a block takes of its multiprocessor.
    fn block(&self, function: usize, threads: u32, shared_bytes: u32) -> Result<Block> {
        let (function, module) = self.function(function)?;
        let kernel = module.kernel(&function.name).map_err(|error| refusal(&error))?;
        let shared = kernel.static_shared.saturating_add(shared_bytes);
        Ok(Block { threads, registers: kernel.registers_at_entry(self.settings.arch), shared })
    }

    /// Blocks that a multiprocessor holds.
    pub fn resident_blocks(&self, function: usize, threads: i32, shared: usize) -> Result<u32> {
        let threads = u32::try_from(threads).ok().filter(|n| *n > 0).ok_or(INVALID_VALUE)?;
        let shared = u32::try_from(shared).map_err(|_| INVALID_VALUE)?;
        Ok(self.block(function, threads, shared)?.per_multiprocessor(self.settings.arch))
    }

    /// Clusters that the device holds.
    pub fn resident_clusters(&self, function: usize, launch: &Launch) -> Result<u32> {
        let (blocks, threads) = (product(launch.cluster), product(launch.block));
        self.check_cluster(function, blocks)?;
        let block = self.block(function, threads, launch.shared_bytes)?;
        Ok(block.clusters(self.settings.arch, blocks))
    }

    /// Blocks of the largest cluster that can be launched.
    pub fn largest_cluster(&self, function: usize, launch: &Launch) -> Result<u32> {
        let sizes = (0..5).rev().map(|n| 1 << n);
        let fits = |blocks: &u32| {
            let launch = Launch { cluster: [*blocks, 1, 1], ..*launch };
            self.resident_clusters(function, &launch).is_ok_and(|n| n > 0)
        };
        Ok(sizes.into_iter().find(fits).unwrap_or(0))
    }

    /// Whether a cluster may have so many blocks.
    fn check_cluster(&self, function: usize, blocks: u32) -> Result {
        let (function, _) = self.function(function)?;
        let arch = self.settings.arch;
        let most = if function.non_portable { arch.max_cluster() } else { arch.portable_cluster() };
        if (1..=most).contains(&blocks) { Ok(()) } else { Err(INVALID_CLUSTER) }
    }

    // ---- launches

    /// Whether a launch can be enqueued in a stream of this context.
    pub fn check_call(&self, call: &Call, context: usize) -> Result {
        let Call { function, launch, cooperative, .. } = call;
        let owner = self.functions.get(function).ok_or(INVALID_HANDLE)?.context;
        if owner != context || self.contexts.current()? != context {
            return Err(INVALID_HANDLE);
        }
        if launch.shared_bytes > self.function(*function)?.0.most_shared {
            return Err(INVALID_VALUE);
        }
        let blocks = product(launch.cluster);
        self.check_cluster(*function, blocks)?;
        let threads = product(launch.block);
        let registers = Block { shared: 0, ..self.block(*function, threads, 0)? };
        if threads <= 1024 && registers.per_multiprocessor(self.settings.arch) == 0 {
            return Err(OUT_OF_RESOURCES);
        }
        let clusters = self.resident_clusters(*function, launch)?;
        let cut = (0..3).any(|d| !launch.grid[d].is_multiple_of(launch.cluster[d]));
        if cut || blocks > 1 && clusters == 0 {
            return Err(INVALID_CLUSTER);
        }
        if *cooperative && product(launch.grid) > clusters.saturating_mul(blocks) {
            return Err(COOPERATIVE_TOO_LARGE);
        }
        Ok(())
    }

    /// Runs a kernel.
    pub fn launch(&mut self, call: &Call, context: usize) -> Result {
        let function = &self.functions.get(&call.function).ok_or(INVALID_HANDLE)?.value;
        let loaded = self.modules.get_mut(&function.module).ok_or(INVALID_HANDLE)?;
        let Loaded { module, variables } = &mut loaded.value;
        for (name, buffer) in variables {
            module.set_variable(name, &self.device.contents(*buffer));
        }
        let args: Vec<_> = call.args.iter().cloned().map(Arg::Bytes).collect();
        self.pinned.values_mut().for_each(|pinned| pinned.value.upload(&mut self.device));
        let residency = self.device.options.residency;
        if call.cooperative {
            self.device.options.residency = Residency::CoResident;
        }
        self.device.options.early = call.early;
        let report = self.device.launch(module, &function.name, &call.launch, &args);
        self.device.options.residency = residency;
        self.device.options.early = false;
        self.pinned.values().for_each(|pinned| pinned.value.download(&self.device));
        self.settings.summary.tell(&function.name, &call.launch, &report);
        match report {
            Ok(report) if self.settings.goes_on(&report) => Ok(()),
            Ok(_) => {
                self.contexts.fail(context, LAUNCH_FAILED);
                Err(LAUNCH_FAILED)
            }
            Err(error) => Err(refusal(&error)),
        }
    }
}

fn product(dims: [u32; 3]) -> u32 {
    dims.iter().fold(1, |n, d| n.saturating_mul(*d))
}

/// What the driver says to a launch that cannot run.
fn refusal(error: &LaunchError) -> Code {
    match error {
        LaunchError::Target { .. } => NO_BINARY,
        LaunchError::Decode { .. } => INVALID_PTX,
        _ => INVALID_VALUE,
    }
}
