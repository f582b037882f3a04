//! Where a wait of the kernels gave up, in builds with `INFINI_ATTN_WAIT_POLLS`
//! (kernels/sm90/bounded_wait.cuh): a record per module, in memory of the host that kernels reach as
//! well. It can be read when the trap has taken everything else of the context away.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use cudarc::driver::sys::{self, CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CUresult};
use cudarc::driver::{CudaContext, CudaModule, CudaStream, DriverError, result};

use crate::cuda::plan::params::InfiniWaitReport;

/// The variable of a module that holds the address of its record.
const POINTER: &str = "infini_wait_report";

/// A module's record.
#[derive(Debug)]
pub(super) struct WaitReport {
    /// The module's file.
    file: &'static str,
    record: NonNull<InfiniWaitReport>,
    context: Arc<CudaContext>,
}

// SAFETY: the record is the object's own, and the host only reads it.
unsafe impl Send for WaitReport {}

impl WaitReport {
    /// Gives a module its record; none for a module whose waits do not give up.
    pub fn attach(
        file: &'static str,
        module: &Arc<CudaModule>,
        stream: &Arc<CudaStream>,
    ) -> Result<Option<Self>, DriverError> {
        stream.context().bind_to_thread()?;
        let mut pointer = match module.get_global(POINTER, stream) {
            Err(DriverError(CUresult::CUDA_ERROR_NOT_FOUND)) => return Ok(None),
            pointer => pointer?,
        };
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: written before anything reads it.
        let record = unsafe { result::malloc_host(size_of::<InfiniWaitReport>(), flags) }?;
        let record = NonNull::new(record.cast::<InfiniWaitReport>())
            .ok_or(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))?;
        let report = Self { file, record, context: stream.context().clone() };
        // SAFETY: the memory has the record's size and a page's alignment; no kernel knows it yet.
        unsafe { record.write(InfiniWaitReport::default()) };
        let mut address = 0;
        // SAFETY: the memory was allocated to be mapped.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut address, record.as_ptr().cast(), 0) }
            .result()?;
        stream.memcpy_htod(&address.to_ne_bytes(), &mut pointer)?;
        // Kernels on other streams find it as well.
        stream.synchronize()?;
        Ok(Some(report))
    }

    /// What a thread of the module has written down.
    pub fn text(&self) -> Option<String> {
        // SAFETY: the record lives as long as this object, and is plain data. A kernel may be writing
        // it, `complete` last: hence twice, and volatile.
        let read = || unsafe { self.record.read_volatile() };
        let complete = read().complete != 0;
        fence(Ordering::Acquire);
        complete.then(|| format!("a wait in {} {}", self.file, Place(read())))
    }
}

impl Drop for WaitReport {
    fn drop(&mut self) {
        // A context that is lost does neither, and runs nothing.
        _ = self.context.synchronize();
        // SAFETY: allocated by `attach`; no kernel runs.
        _ = unsafe { result::free_host(self.record.as_ptr().cast()) };
    }
}

/// A record in words.
struct Place(InfiniWaitReport);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let InfiniWaitReport { block: [x, y, z], thread, barrier, parity, polls, .. } = self.0;
        let warp = thread / 32;
        write!(f, "gave up after {polls} polls: block ({x}, {y}, {z}), warp {warp}, ")?;
        write!(f, "barrier at shared {barrier:#x}, parity {parity}")
    }
}

#[cfg(test)]
mod tests {
    use cudarc::driver::{LaunchConfig, PushKernelArg};
    use cudarc::nvrtc::Ptx;

    use super::*;
    use crate::cuda::device::Device;

    #[test]
    fn a_record_names_block_warp_barrier_and_parity() {
        let (block, thread, barrier) = ([3, 0, 1], 159, 0x1c408);
        let polls = 1 << 26;
        let record = InfiniWaitReport { complete: 1, block, thread, barrier, parity: 1, polls };
        assert_eq!(
            Place(record).to_string(),
            "gave up after 67108864 polls: block (3, 0, 1), warp 4, barrier at shared 0x1c408, \
             parity 1"
        );
    }

    /// A kernel that gives up if `ends` is 0; the first word of the record is `complete`.
    const GIVES_UP: &str = "
        .version 8.0 .target sm_80 .address_size 64
        .global .align 8 .u64 infini_wait_report;
        .visible .entry wait(.param .u32 ends) {
            .reg .pred %p; .reg .b32 %r; .reg .b64 %rd;
            ld.param.u32 %r, [ends];
            setp.ne.u32 %p, %r, 0; @%p bra END;
            ld.global.u64 %rd, [infini_wait_report];
            st.global.u32 [%rd+4], 7;
            st.global.u32 [%rd+16], 159;
            st.global.u32 [%rd+20], 1032;
            st.global.u32 [%rd], 1;
            trap;
        END:
            ret;
        }";

    /// On the simulator: a trap takes a device away from the whole process.
    #[test]
    fn the_error_after_a_trap_says_where_a_wait_gave_up() {
        let Ok(device) = Device::new(0) else { return println!("skipped: no device") };
        if device.name().expect("a name") != "PTX simulator" {
            return println!("skipped: not on the simulator");
        }
        let (context, stream) = (device.stream().context(), device.stream());
        let load = |ptx: &str| context.load_module(Ptx::from_src(ptx)).expect("loaded");
        let without = load(".version 8.0 .target sm_80 .address_size 64 .entry nothing() { ret; }");
        assert!(WaitReport::attach("none", &without, stream).expect("looked for").is_none());

        let module = load(GIVES_UP);
        device.watch("sm80/test", &module).expect("attached");
        let wait = module.load_function("wait").expect("found");
        let launch = |ends: u32| {
            let one = (1, 1, 1);
            let config = LaunchConfig { grid_dim: one, block_dim: one, shared_mem_bytes: 0 };
            // SAFETY: it takes one number.
            unsafe { stream.launch_builder(&wait).arg(&ends).launch(config) }.map(drop)
        };
        launch(1).and_then(|()| stream.synchronize()).expect("the wait ends");
        assert_eq!(device.wait_report(), None);

        launch(0).and_then(|()| stream.synchronize()).expect_err("a trap");
        let expected = "a wait in sm80/test gave up after 0 polls: block (7, 0, 0), warp 4, barrier \
                        at shared 0x408, parity 0";
        assert_eq!(device.wait_report().as_deref(), Some(expected));
        let error = device.synchronize().expect_err("it stays").to_string();
        assert!(error.ends_with(&format!("; {expected}")), "{error}");
    }
}
