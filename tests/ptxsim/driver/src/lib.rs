//! A `libcuda.so` whose one device is the simulator: programs that open the driver at run time run
//! on it unchanged, with `LD_LIBRARY_PATH` naming its folder. `PTXSIM_ARCH=sm_90a` makes it one of
//! compute capability 9.0; docs/ptxsim.md names the other variables it reads.
//!
//! The part of the driver's interface that cudarc's safe layer uses: contexts, memory, modules (PTX,
//! or fatbins that hold PTX) and their variables, launches, occupancy, streams, events, capture and
//! graphs; and tensor maps. Whatever the simulator finds in a launch goes to stderr and, unless the
//! environment says otherwise, fails the launch and every call after it in its context. Streams do
//! their work at once, so that a missing wait between streams goes unnoticed; a capture across streams
//! is refused. Contexts share their memory.
#![allow(non_snake_case)] // the names are the driver's
#![allow(clippy::missing_safety_doc)] // the contracts are the driver's as well

mod attributes;
mod context;
mod error;
mod fatbin;
mod kernels;
mod launches;
mod machine;
mod pinned;
mod refusals;
mod settings;
mod streams;
mod summary;
#[cfg(test)]
mod tests;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::slice;

use error::{INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, Result, driver, give};
use machine::{initialise, machine};
use streams::Op;

const NAME: &[u8] = b"PTX simulator\0";
/// The version of the interface.
const VERSION: c_int = 13000;

driver! {
    cuInit(_flags: c_uint) = initialise();
    cuDriverGetVersion(version: *mut c_int) = give(version, VERSION);
    cuGetErrorName(error: error::Code, text: *mut *const c_char) =
        give(text, error::name(error)?.as_ptr());
    cuGetErrorString(error: error::Code, text: *mut *const c_char) =
        give(text, error::text(error)?.as_ptr());

    cuDeviceGetCount(count: *mut c_int) = give(count, 1);
    cuDeviceGet(device: *mut c_int, ordinal: c_int) = {
        the_device(ordinal)?;
        give(device, ordinal)
    };
    cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) = {
        the_device(device)?;
        let count = NAME.len().min(usize::try_from(len).unwrap_or(0));
        let (text, end) = (bytes_mut(name.cast(), count)?, count.checked_sub(1));
        text.copy_from_slice(&NAME[..count]);
        text[end.ok_or(INVALID_VALUE)?] = 0;
        Ok(())
    };
    cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int) = {
        the_device(device)?;
        let arch = machine()?.settings.arch;
        give(value, attributes::attribute(arch, attribute).ok_or(INVALID_VALUE)?)
    };

    cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) = {
        the_device(device)?;
        give(context, machine()?.retain_primary())
    };
    cuDevicePrimaryCtxRelease_v2(device: c_int) = {
        the_device(device)?;
        machine()?.release_primary()
    };
    cuDevicePrimaryCtxReset_v2(device: c_int) = {
        the_device(device)?;
        machine()?.reset_primary();
        Ok(())
    };
    cuCtxCreate_v2(context: *mut usize, _flags: c_uint, device: c_int) =
        create_context(context, device);
    cuCtxCreate_v3(
        context: *mut usize, _affinity: *const c_void, _count: c_int, _flags: c_uint, device: c_int
    ) = create_context(context, device);
    cuCtxCreate_v4(context: *mut usize, _params: *const c_void, _flags: c_uint, device: c_int) =
        create_context(context, device);
    cuCtxDestroy_v2(context: usize) = machine()?.destroy_context(context);
    cuCtxSetCurrent(context: usize) = machine()?.contexts.set_current(context);
    cuCtxGetCurrent(context: *mut usize) = give(context, context::current());
    cuCtxPushCurrent_v2(context: usize) = machine()?.contexts.push_current(context);
    cuCtxPopCurrent_v2(context: *mut usize) = {
        let popped = context::pop()?;
        if context.is_null() { Ok(()) } else { give(context, popped) }
    };
    cuCtxGetDevice(device: *mut c_int) = {
        machine()?.contexts.current()?;
        give(device, 0)
    };
    cuCtxSynchronize() = machine()?.current().map(drop);

    cuMemAlloc_v2(address: *mut u64, bytes: usize) =
        give(address, machine()?.allocate(bytes as u64)?);
    cuMemFree_v2(address: u64) = machine()?.free(address);
    cuMemAllocAsync(address: *mut u64, bytes: usize, stream: usize) = {
        let mut machine = machine()?;
        machine.outside_capture(stream)?;
        give(address, machine.allocate(bytes as u64)?)
    };
    cuMemFreeAsync(address: u64, stream: usize) = {
        let mut machine = machine()?;
        machine.outside_capture(stream)?;
        machine.free(address)
    };
    cuMemHostAlloc(start: *mut usize, bytes: usize, _flags: c_uint) =
        give(start, machine()?.allocate_pinned(bytes)?);
    cuMemHostGetDevicePointer_v2(address: *mut u64, start: usize, _flags: c_uint) =
        give(address, machine()?.pinned_address(start)?);
    cuMemFreeHost(start: usize) = machine()?.free_pinned(start);
    cuMemcpyHtoD_v2(to: u64, from: *const u8, count: usize) =
        machine()?.write(to, bytes(from, count)?);
    cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, count: usize, stream: usize) = {
        let mut machine = machine()?;
        machine.outside_capture(stream)?;
        machine.write(to, bytes(from, count)?)
    };
    cuMemcpyDtoH_v2(to: *mut u8, from: u64, count: usize) =
        machine()?.read(from, bytes_mut(to, count)?);
    cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, count: usize, stream: usize) = {
        let mut machine = machine()?;
        machine.outside_capture(stream)?;
        machine.read(from, bytes_mut(to, count)?)
    };
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, count: usize, stream: usize) =
        machine()?.submit(stream, Op::Copy { to, from, bytes: count as u64 });
    // Contexts share their memory.
    cuMemcpyPeerAsync(
        to: u64, _to_context: usize, from: u64, _from_context: usize, count: usize, stream: usize
    ) = machine()?.submit(stream, Op::Copy { to, from, bytes: count as u64 });
    cuMemsetD8Async(to: u64, value: u8, count: usize, stream: usize) =
        machine()?.submit(stream, Op::Fill { to, bytes: count as u64, value });

    cuStreamCreate(stream: *mut usize, _flags: c_uint) = give(stream, machine()?.new_stream()?);
    cuStreamDestroy_v2(stream: usize) = machine()?.end_stream(stream);
    cuStreamSynchronize(stream: usize) = machine()?.outside_capture(stream);
    cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) =
        machine()?.wait(stream, event);
    cuStreamIsCapturing(stream: usize, status: *mut c_uint) =
        give(status, machine()?.capture_status(stream)?);
    cuStreamBeginCapture_v2(stream: usize, _mode: c_uint) = machine()?.begin_capture(stream);
    cuStreamEndCapture(stream: usize, graph: *mut usize) =
        give(graph, machine()?.end_capture(stream)?);

    cuEventCreate(event: *mut usize, _flags: c_uint) = give(event, machine()?.new_event()?);
    cuEventDestroy_v2(event: usize) = machine()?.end_event(event);
    cuEventRecord(event: usize, stream: usize) = machine()?.record(event, stream);
    cuEventQuery(event: usize) = machine()?.reached(event).map(drop);
    cuEventSynchronize(event: usize) = machine()?.reached(event).map(drop);
    cuEventElapsedTime(ms: *mut f32, start: usize, end: usize) = give(ms, elapsed(start, end)?);
    cuEventElapsedTime_v2(ms: *mut f32, start: usize, end: usize) = give(ms, elapsed(start, end)?);

    cuGraphInstantiateWithFlags(exec: *mut usize, graph: usize, _flags: u64) =
        give(exec, machine()?.instantiate(graph)?);
    cuGraphUpload(_exec: usize, _stream: usize) = Ok(());
    cuGraphLaunch(exec: usize, stream: usize) = machine()?.replay(exec, stream);
    cuGraphDestroy(graph: usize) = machine()?.end_graph(graph);
    cuGraphExecDestroy(exec: usize) = machine()?.end_graph(exec);
}

/// There is one device.
fn the_device(ordinal: c_int) -> Result {
    if ordinal == 0 { Ok(()) } else { Err(INVALID_DEVICE) }
}

unsafe fn create_context(context: *mut usize, device: c_int) -> Result {
    the_device(device)?;
    let created = machine()?.create_context();
    // SAFETY: the caller's pointer.
    unsafe { give(context, created) }
}

/// Values of the caller's; a null pointer is one to nothing.
unsafe fn values<'a, T>(start: *const T, count: usize) -> Result<&'a [T]> {
    match (start.is_null(), count) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(INVALID_VALUE),
        // SAFETY: as many as the caller says, as in the driver.
        (false, _) => Ok(unsafe { slice::from_raw_parts(start, count) }),
    }
}

unsafe fn bytes<'a>(start: *const u8, count: usize) -> Result<&'a [u8]> {
    // SAFETY: as above.
    unsafe { values(start, count) }
}

unsafe fn bytes_mut<'a>(start: *mut u8, count: usize) -> Result<&'a mut [u8]> {
    match (start.is_null(), count) {
        (_, 0) => Ok(&mut []),
        (true, _) => Err(INVALID_VALUE),
        // SAFETY: as above.
        (false, _) => Ok(unsafe { slice::from_raw_parts_mut(start, count) }),
    }
}

/// Milliseconds between two events.
fn elapsed(start: usize, end: usize) -> Result<f32> {
    let machine = machine()?;
    let reached = |event| machine.reached(event)?.ok_or(INVALID_HANDLE);
    let (start, end) = (reached(start)?, reached(end)?);
    Ok(end.saturating_duration_since(start).as_secs_f32() * 1e3)
}
