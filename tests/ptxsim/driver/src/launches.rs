//! Exported functions for modules, functions, launches, occupancy and tensor maps.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs;

use ptxsim::Launch;
use ptxsim::layout::Swizzle;
use ptxsim::tensor_map::{DTYPES as ALL_DTYPES, Dtype, ENCODED_BYTES, OobFill, TensorMap};

use crate::error::{
    FILE_NOT_FOUND, INVALID_IMAGE, INVALID_VALUE, NOT_SUPPORTED, Result, driver, give,
};
use crate::kernels::Call;
use crate::machine::machine;
use crate::streams::Op;
use crate::{fatbin, values};

/// Element types of tensor maps that have a number here, and swizzles by number.
const DTYPES: &[Dtype] = ALL_DTYPES.split_at(10).0;
const SWIZZLES: [Swizzle; 4] = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];

/// How a kernel is launched (CUlaunchConfig).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub stream: usize,
    pub attributes: *const Attribute,
    pub count: c_uint,
}

/// An attribute of a launch (CUlaunchAttribute): 64 bytes by number.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Attribute {
    pub id: c_uint,
    pub padding: c_uint,
    pub value: [c_uint; 16],
}

/// Numbers of launch attributes.
pub const COOPERATIVE: c_uint = 2;
pub const CLUSTER: c_uint = 4;
/// The launch may begin before the one before it has ended.
pub const EARLY: c_uint = 6;
/// Those that ask for events, or for a node that changes itself.
const UNSUPPORTED: [c_uint; 3] = [7, 12, 13];

driver! {
    cuModuleLoadData(module: *mut usize, image: *const c_void) = {
        if image.is_null() {
            return Err(INVALID_VALUE);
        }
        let ptx = fatbin::ptx(image).ok_or(INVALID_IMAGE)?;
        give(module, machine()?.load(&ptx)?)
    };
    cuModuleLoad(module: *mut usize, file: *const c_char) = {
        let content = fs::read(text(file)?).map_err(|_| FILE_NOT_FOUND)?;
        let ptx = fatbin::ptx_of_file(&content).ok_or(INVALID_IMAGE)?;
        give(module, machine()?.load(&ptx)?)
    };
    cuModuleUnload(module: usize) = machine()?.unload(module);
    cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) =
        give(function, machine()?.new_function(module, &text(name)?)?);
    cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: usize, name: *const c_char) = {
        let (at, len) = machine()?.variable(module, &text(name)?)?;
        // Either result may be unwanted.
        if !address.is_null() {
            address.write(at);
        }
        if !bytes.is_null() {
            bytes.write(len);
        }
        Ok(())
    };
    cuFuncSetAttribute(function: usize, attribute: c_uint, value: c_int) =
        machine()?.set_function_attribute(function, attribute, value);
    cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, function: usize) =
        give(value, machine()?.function_attribute(function, attribute)?);

    cuLaunchKernel(
        function: usize, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint,
        shared_bytes: c_uint, stream: usize, params: *const *const u8, _extra: *mut *mut c_void,
    ) = {
        let (grid, block) = ([gx, gy, gz], [bx, by, bz]);
        let config = Config { grid, block, shared_bytes, stream, attributes: NONE, count: 0 };
        submit(function, &config, false, params)
    };
    cuLaunchCooperativeKernel(
        function: usize, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint,
        shared_bytes: c_uint, stream: usize, params: *const *const u8,
    ) = {
        let (grid, block) = ([gx, gy, gz], [bx, by, bz]);
        let config = Config { grid, block, shared_bytes, stream, attributes: NONE, count: 0 };
        submit(function, &config, true, params)
    };
    cuLaunchKernelEx(
        config: *const Config, function: usize, params: *const *const u8, _extra: *mut *mut c_void,
    ) = submit(function, config.as_ref().ok_or(INVALID_VALUE)?, false, params);

    cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int, function: usize, threads: c_int, shared_bytes: usize,
    ) = give(blocks, machine()?.resident_blocks(function, threads, shared_bytes)? as c_int);
    cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int, function: usize, threads: c_int, shared_bytes: usize, _flags: c_uint,
    ) = give(blocks, machine()?.resident_blocks(function, threads, shared_bytes)? as c_int);
    cuOccupancyMaxActiveClusters(count: *mut c_int, function: usize, config: *const Config) = {
        let config = config.as_ref().ok_or(INVALID_VALUE)?;
        let machine = machine()?;
        let launch = machine.described(function, config)?.launch;
        give(count, machine.resident_clusters(function, &launch)? as c_int)
    };
    cuOccupancyMaxPotentialClusterSize(size: *mut c_int, function: usize, config: *const Config) = {
        let config = config.as_ref().ok_or(INVALID_VALUE)?;
        let machine = machine()?;
        let launch = machine.described(function, config)?.launch;
        give(size, machine.largest_cluster(function, &launch)? as c_int)
    };

    cuTensorMapEncodeTiled(
        map: *mut [u8; ENCODED_BYTES], dtype: c_uint, rank: c_uint, address: u64,
        dims: *const u64, strides: *const u64, extents: *const u32, steps: *const u32,
        interleave: c_uint, swizzle: c_uint, _promotion: c_uint, nan: c_uint,
    ) = {
        let (rank, valid) = (rank as usize, interleave == 0 && (1..=5).contains(&rank));
        let known = DTYPES.get(dtype as usize).zip(SWIZZLES.get(swizzle as usize));
        let (dtype, swizzle) = known.filter(|_| valid).ok_or(INVALID_VALUE)?;
        let dims = values(dims, rank)?.to_vec();
        let dense = TensorMap::dense(*dtype, dims, values(extents, rank)?.to_vec());
        let described = TensorMap {
            address,
            strides: values(strides, rank - 1)?.to_vec(),
            element_strides: values(steps, rank)?.to_vec(),
            swizzle: *swizzle,
            oob: if nan == 1 { OobFill::Nan } else { OobFill::Zero },
            ..dense
        };
        give(map, described.encode().map_err(|error| {
            eprintln!("{error}");
            INVALID_VALUE
        })?)
    };
}

/// No attributes.
const NONE: *const Attribute = std::ptr::null();

/// A name.
unsafe fn text(name: *const c_char) -> Result<String> {
    if name.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: it ends with NUL, as in the driver.
    Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into())
}

impl crate::machine::Machine {
    /// The call that a configuration describes, without arguments.
    ///
    /// # Safety
    /// The configuration points to as many attributes as it says.
    unsafe fn described(&self, function: usize, config: &Config) -> Result<Call> {
        let Config { grid, block, shared_bytes, attributes, count, .. } = *config;
        // SAFETY: the caller's promise.
        let attributes = unsafe { values(attributes, count as usize)? };
        if attributes.iter().any(|a| UNSUPPORTED.contains(&a.id)) {
            return Err(NOT_SUPPORTED);
        }
        let given = |id| attributes.iter().find(|a| a.id == id).map(|a| a.value);
        let cluster = match given(CLUSTER) {
            Some([x, y, z, ..]) => [x, y, z],
            None => self.own_cluster(function)?,
        };
        let launch = Launch { grid, block, cluster, shared_bytes, registers: None };
        let set = |id| given(id).is_some_and(|value| value[0] != 0);
        let (cooperative, early) = (set(COOPERATIVE), set(EARLY));
        Ok(Call { function, launch, cooperative, early, args: Vec::new() })
    }
}

/// Enqueues a launch.
unsafe fn submit(
    function: usize,
    config: &Config,
    cooperative: bool,
    params: *const *const u8,
) -> Result {
    let mut machine = machine()?;
    // SAFETY: the configuration is the caller's, as in the driver.
    let call = unsafe { machine.described(function, config)? };
    let sizes = machine.parameters(function)?;
    // SAFETY: one pointer per parameter, to as many bytes as it has, as in the driver.
    let args = unsafe {
        let pointers = values(params, sizes.len())?;
        let all = pointers.iter().zip(sizes);
        all.map(|(p, n)| Ok(values(*p, n as usize)?.to_vec())).collect::<Result<_>>()?
    };
    let call = Call { cooperative: cooperative || call.cooperative, args, ..call };
    machine.submit(config.stream, Op::Launch(call))
}
