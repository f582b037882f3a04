//! A `libcuda.so` whose one device is the simulator: programs that open the driver at run time run
//! on it unchanged, with `LD_LIBRARY_PATH` naming its folder. `PTXSIM_ARCH=sm_90a` makes it one of
//! compute capability 9.0.
//!
//! The part of the driver's interface that cudarc's safe layer uses: contexts, memory, modules (PTX,
//! or fatbins that hold PTX) and their variables, launches, streams, events, capture and graphs; and
//! tensor maps. Whatever the simulator finds in a launch goes to stderr and fails the launch and
//! every call after it. Streams do their work at once, so that a missing wait between streams goes
//! unnoticed; a capture across streams is refused.
#![allow(non_snake_case)] // the names are the driver's
#![allow(clippy::missing_safety_doc)] // the contracts are the driver's as well

mod fatbin;
mod machine;
mod pinned;

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::slice::{from_raw_parts, from_raw_parts_mut};

use machine::{
    CAPTURE_INVALIDATED, CAPTURE_ISOLATION, CAPTURE_UNSUPPORTED, CAPTURED_EVENT, Code,
    INVALID_CONTEXT, INVALID_HANDLE, INVALID_IMAGE, INVALID_VALUE, LAUNCH_FAILED, NOT_FOUND, Op,
    Result, arch, machine,
};
use ptxsim::Launch;
use ptxsim::layout::Swizzle;
use ptxsim::tensor_map::{DTYPES as ALL_DTYPES, Dtype, ENCODED_BYTES, OobFill, TensorMap};

/// The one context.
const CONTEXT: usize = 0xc0;
const NAME: &[u8] = b"PTX simulator\0";

/// An attribute of the device, by number: those of an A100 or an H200.
fn attribute(number: c_uint) -> c_int {
    let name = arch().to_string();
    let capability: c_int = name.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
    match number {
        13 => (arch().rates().clock / 1e3) as c_int, // kHz
        16 => arch().multiprocessors() as c_int,
        // L2, bytes
        38 if arch().is_hopper() => 50 << 20,
        38 => 40 << 20,
        75 => capability / 10,
        76 => capability % 10,
        115 => 1, // memory pools
        _ => 0,
    }
}

const ERRORS: [(Code, &CStr); 11] = [
    (0, c"no error"),
    (INVALID_VALUE, c"invalid argument"),
    (INVALID_IMAGE, c"device kernel image is invalid"),
    (INVALID_CONTEXT, c"invalid device context"),
    (INVALID_HANDLE, c"invalid resource handle"),
    (NOT_FOUND, c"named symbol not found"),
    (LAUNCH_FAILED, c"the simulator has found a mistake"),
    (CAPTURE_UNSUPPORTED, c"operation not permitted when stream is capturing"),
    (CAPTURE_INVALIDATED, c"capture was invalidated by an earlier error"),
    (CAPTURE_ISOLATION, c"dependency on work outside of the capture"),
    (CAPTURED_EVENT, c"the event was recorded in a capture"),
];

/// Element types of tensor maps that have a number here, and swizzles by number.
const DTYPES: &[Dtype] = ALL_DTYPES.split_at(10).0;
const SWIZZLES: [Swizzle; 4] = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];

/// How a kernel is launched (CUlaunchConfig).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: usize,
    attributes: *const Attribute,
    count: c_uint,
}

/// An attribute of a launch (CUlaunchAttribute): 64 bytes by number.
#[repr(C)]
pub struct Attribute {
    id: c_uint,
    padding: c_uint,
    cluster: [c_uint; 3],
    rest: [c_uint; 13],
}

/// The number of the cluster's dimensions.
const CLUSTER: c_uint = 4;

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

fn code(result: Result) -> Code {
    result.err().unwrap_or(0)
}

/// Writes a value where the caller wants it.
unsafe fn give<T>(to: *mut T, value: Result<T>) -> Code {
    match value {
        // SAFETY: the caller's pointer, as in the driver.
        Ok(value) => unsafe { to.write(value) },
        Err(error) => return error,
    }
    0
}

/// Exports functions of the driver: `name(arguments) = an expression of type Code`.
macro_rules! driver {
    ($($name:ident($($arg:ident: $type:ty),*) = $body:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> Code {
            // SAFETY: pointers are the caller's, as in the driver.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    )*};
}

driver! {
    cuInit(_flags: c_uint) = 0;
    cuDriverGetVersion(version: *mut c_int) = give(version, Ok(13000));
    cuDeviceGetCount(count: *mut c_int) = give(count, Ok(1));
    cuDeviceGet(device: *mut c_int, ordinal: c_int) =
        if ordinal == 0 { give(device, Ok(0)) } else { INVALID_VALUE };
    cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) = {
        let count = NAME.len().min(len as usize);
        from_raw_parts_mut(name as *mut u8, count).copy_from_slice(&NAME[..count]);
        0
    };
    cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, _device: c_int) =
        give(value, Ok(crate::attribute(attribute)));
    cuDevicePrimaryCtxRetain(context: *mut usize, _device: c_int) = give(context, Ok(CONTEXT));
    cuDevicePrimaryCtxRelease_v2(_device: c_int) = 0;
    cuCtxSetCurrent(context: usize) = {
        CURRENT.set(context);
        if [0, CONTEXT].contains(&context) { 0 } else { INVALID_CONTEXT }
    };
    cuCtxGetCurrent(context: *mut usize) = give(context, Ok(CURRENT.get()));
    cuCtxSynchronize() = code(machine().status());
    cuGetErrorName(error: Code, text: *mut *const c_char) = cuGetErrorString(error, text);
    cuGetErrorString(error: Code, text: *mut *const c_char) = {
        let known = ERRORS.iter().find(|e| e.0 == error).ok_or(INVALID_VALUE);
        give(text, known.map(|e| e.1.as_ptr()))
    };

    cuMemAlloc_v2(address: *mut u64, bytes: usize) =
        give(address, machine().allocate(bytes as u64));
    cuMemFree_v2(address: u64) = code(machine().free(address));
    cuMemAllocAsync(address: *mut u64, bytes: usize, stream: usize) = {
        let mut machine = machine();
        let allowed = machine.outside_capture(stream);
        give(address, allowed.and_then(|()| machine.allocate(bytes as u64)))
    };
    cuMemFreeAsync(address: u64, stream: usize) = {
        let mut machine = machine();
        code(machine.outside_capture(stream).and_then(|()| machine.free(address)))
    };
    cuMemHostAlloc(start: *mut usize, bytes: usize, _flags: c_uint) =
        give(start, machine().allocate_pinned(bytes));
    cuMemHostGetDevicePointer_v2(address: *mut u64, start: usize, _flags: c_uint) =
        give(address, machine().pinned_address(start));
    cuMemFreeHost(start: usize) = code(machine().free_pinned(start));
    cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) =
        code(machine().write(to, from_raw_parts(from, bytes)));
    cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: usize) = {
        let mut machine = machine();
        let allowed = machine.outside_capture(stream);
        code(allowed.and_then(|()| machine.write(to, from_raw_parts(from, bytes))))
    };
    cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) =
        code(machine().read(from, from_raw_parts_mut(to, bytes)));
    cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: usize) = {
        let mut machine = machine();
        let allowed = machine.outside_capture(stream);
        code(allowed.and_then(|()| machine.read(from, from_raw_parts_mut(to, bytes))))
    };
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) =
        code(machine().submit(stream, Op::Copy { to, from, bytes: bytes as u64 }));
    cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: usize) =
        code(machine().submit(stream, Op::Fill { to, bytes: bytes as u64, value }));

    cuModuleLoadData(module: *mut usize, image: *const c_void) = {
        let ptx = fatbin::ptx(image).ok_or(INVALID_IMAGE);
        give(module, ptx.and_then(|ptx| machine().load(&ptx)))
    };
    cuModuleUnload(module: usize) = code(machine().unload(module));
    cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) =
        give(function, machine().function(module, &CStr::from_ptr(name).to_string_lossy()));
    cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: usize, name: *const c_char) =
        variable(address, bytes, module, &CStr::from_ptr(name).to_string_lossy());
    // 8: dynamic shared memory.
    cuFuncSetAttribute(function: usize, attribute: c_uint, value: c_int) =
        match attribute {
            8 if value as u64 > u64::from(arch().shared_per_block()) => INVALID_VALUE,
            8 => code(machine().allow_shared(function, value as u32)),
            _ => 0,
        };
    cuLaunchKernel(
        function: usize, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint,
        shared_bytes: c_uint, stream: usize, params: *const *const u8, _extra: *mut *mut c_void
    ) = {
        let launch = Launch {
            grid: [gx, gy, gz], block: [bx, by, bz], ..Launch::linear(1, 1).shared(shared_bytes)
        };
        code(submit(function, launch, stream, params))
    };
    cuLaunchKernelEx(
        config: *const Config, function: usize, params: *const *const u8, _extra: *mut *mut c_void
    ) = {
        let Config { grid, block, shared_bytes, stream, attributes, count } = *config;
        let attributes = if count == 0 { &[] } else { from_raw_parts(attributes, count as usize) };
        let cluster = attributes.iter().find(|a| a.id == CLUSTER).map_or([1; 3], |a| a.cluster);
        let launch = Launch { grid, block, cluster, shared_bytes, registers: None };
        code(submit(function, launch, stream, params))
    };
    cuTensorMapEncodeTiled(
        map: *mut [u8; ENCODED_BYTES], dtype: c_uint, rank: c_uint, address: u64,
        dims: *const u64, strides: *const u64, extents: *const u32, steps: *const u32,
        interleave: c_uint, swizzle: c_uint, _promotion: c_uint, nan: c_uint
    ) = {
        let (rank, valid) = (rank as usize, interleave == 0 && (1..=5).contains(&rank));
        let known = DTYPES.get(dtype as usize).zip(SWIZZLES.get(swizzle as usize));
        let encoded = known.filter(|_| valid).ok_or(INVALID_VALUE);
        give(map, encoded.and_then(|(dtype, swizzle)| {
            let dims = from_raw_parts(dims, rank).to_vec();
            let dense = TensorMap::dense(*dtype, dims, from_raw_parts(extents, rank).to_vec());
            let described = TensorMap {
                address,
                strides: from_raw_parts(strides, rank - 1).to_vec(),
                element_strides: from_raw_parts(steps, rank).to_vec(),
                swizzle: *swizzle,
                oob: if nan == 1 { OobFill::Nan } else { OobFill::Zero },
                ..dense
            };
            described.encode().map_err(|error| {
                eprintln!("{error}");
                INVALID_VALUE
            })
        }))
    };

    cuStreamCreate(stream: *mut usize, _flags: c_uint) = give(stream, Ok(machine().new_stream()));
    cuStreamDestroy_v2(stream: usize) = code(machine().end_stream(stream));
    cuStreamSynchronize(stream: usize) = code(machine().outside_capture(stream));
    cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) =
        code(machine().wait(stream, event));
    cuStreamIsCapturing(stream: usize, status: *mut c_uint) =
        give(status, machine().capture_status(stream));
    cuStreamBeginCapture_v2(stream: usize, _mode: c_uint) = code(machine().begin_capture(stream));
    cuStreamEndCapture(stream: usize, graph: *mut usize) =
        give(graph, machine().end_capture(stream));

    cuEventCreate(event: *mut usize, _flags: c_uint) = give(event, Ok(machine().new_event()));
    cuEventDestroy_v2(event: usize) = code(machine().end_event(event));
    cuEventRecord(event: usize, stream: usize) = code(machine().record(event, stream));
    cuEventQuery(event: usize) = code(machine().reached(event).map(drop));
    cuEventSynchronize(event: usize) = code(machine().reached(event).map(drop));
    cuEventElapsedTime(ms: *mut f32, start: usize, end: usize) = elapsed(ms, start, end);
    cuEventElapsedTime_v2(ms: *mut f32, start: usize, end: usize) = elapsed(ms, start, end);

    cuGraphInstantiateWithFlags(exec: *mut usize, graph: usize, _flags: u64) =
        give(exec, machine().instantiate(graph));
    cuGraphUpload(_exec: usize, _stream: usize) = 0;
    cuGraphLaunch(exec: usize, stream: usize) = code(machine().replay(exec, stream));
    cuGraphDestroy(graph: usize) = code(machine().end_graph(graph));
    cuGraphExecDestroy(exec: usize) = code(machine().end_graph(exec));
}

/// Enqueues a launch.
unsafe fn submit(
    function: usize,
    launch: Launch,
    stream: usize,
    params: *const *const u8,
) -> Result {
    let mut machine = machine();
    let sizes = machine.parameters(function)?;
    let values = sizes.iter().enumerate();
    // SAFETY: one pointer per parameter, to as many bytes as it has, as in the driver.
    let read =
        |(i, n): (usize, &u32)| unsafe { from_raw_parts(*params.add(i), *n as usize).to_vec() };
    let args = values.map(read).collect();
    machine.submit(stream, Op::Launch { function, launch, args })
}

/// Either result may be unwanted.
unsafe fn variable(address: *mut u64, bytes: *mut usize, module: usize, name: &str) -> Code {
    let (at, len) = match machine().variable(module, name) {
        Ok(found) => found,
        Err(error) => return error,
    };
    // SAFETY: the caller's pointers.
    unsafe {
        if !address.is_null() {
            address.write(at);
        }
        if !bytes.is_null() {
            bytes.write(len);
        }
    }
    0
}

unsafe fn elapsed(ms: *mut f32, start: usize, end: usize) -> Code {
    let machine = machine();
    let both = machine.reached(start).and_then(|a| Ok((a, machine.reached(end)?)));
    let time = both.and_then(|(start, end)| {
        let (start, end) = (start.ok_or(INVALID_HANDLE)?, end.ok_or(INVALID_HANDLE)?);
        Ok(end.saturating_duration_since(start).as_secs_f32() * 1e3)
    });
    // SAFETY: the caller's pointer.
    unsafe { give(ms, time) }
}
