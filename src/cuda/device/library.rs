//! The driver's library, looked at before anything is called in it: where it or one of its functions
//! is missing, the first call would panic.

use std::sync::OnceLock;

use libloading::Library;

use crate::error::{Error, Result};

/// Names it goes by, in the order in which cudarc tries them.
const NAMES: &[&str] =
    if cfg!(windows) { &["cuda.dll", "nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };

/// What the crate calls, itself or through cudarc (tests/cuda/device/refusals.rs compares).
pub(super) const FUNCTIONS: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuMemAllocAsync",
    "cuMemAlloc_v2",
    "cuMemFreeAsync",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleGetGlobal_v2",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveClusters",
    "cuOccupancyMaxPotentialClusterSize",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuTensorMapEncodeTiled",
];

/// That the driver is installed, and new enough to have every function.
///
/// # Errors
/// [`Error::NoDevice`].
pub(super) fn check() -> Result<()> {
    /// Found once, it stays.
    static INSTALLED: OnceLock<()> = OnceLock::new();
    if INSTALLED.get().is_some() {
        return Ok(());
    }
    let missing = |reason: String| Err(Error::NoDevice { reason });
    // SAFETY: the driver's library has no other use; opening it is what its first call does.
    let opened = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
    let Some(library) = opened else {
        let names = NAMES.join(" or ");
        return missing(format!("the CUDA driver is not installed ({names} not found)"));
    };
    let has = |name: &&str| {
        // SAFETY: only whether there is one; it is not called.
        unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_ok()
    };
    match FUNCTIONS.iter().copied().find(|name| !has(name)) {
        None => {
            INSTALLED.get_or_init(|| ());
            Ok(())
        }
        Some(name) => missing(format!(
            "the CUDA driver's library has no {name}: the driver is older than 525 (CUDA 12.0), or that is \
             not the driver"
        )),
    }
}
