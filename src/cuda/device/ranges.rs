//! Ranges of NVTX, by which profilers such as Nsight Systems tell what belongs to which call, with the
//! feature `nvtx`; without it nothing.
//!
//! Not by cudarc's `nvtx`: that panics where there is no libnvToolsExt, which NVIDIA ends with CUDA 12.8.

/// A range of that name, which ends when it is dropped; none where no library is installed.
#[cfg(feature = "nvtx")]
pub(super) fn range(name: &str) -> nvtx::Range {
    nvtx::range(name)
}

/// Nothing.
#[cfg(not(feature = "nvtx"))]
pub(super) fn range(_: &str) -> impl Sized + use<> {}

#[cfg(feature = "nvtx")]
mod nvtx {
    use std::ffi::{CString, c_char};
    use std::sync::OnceLock;

    use libloading::Library;

    /// Libraries with the functions of NVTX: up to CUDA 12.8, and from 12.9 on.
    const NAMES: &[&str] = if cfg!(windows) {
        &["nvToolsExt64_1.dll", "nvtx3interop.dll"]
    } else {
        &["libnvToolsExt.so.1", "libnvtx3interop.so.1"]
    };

    type Start = unsafe extern "C" fn(name: *const c_char) -> u64;
    type End = unsafe extern "C" fn(id: u64);

    struct Functions {
        start: Start,
        end: End,
        /// Stays open as long as they may be called.
        _library: Library,
    }

    /// Looked for once.
    fn functions() -> Option<&'static Functions> {
        static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
        // SAFETY: NVIDIA's libraries have no other use, and these are the signatures of nvToolsExt.h.
        let open = |name: &&str| unsafe {
            let library = Library::new(*name).ok()?;
            let start = *library.get::<Start>(b"nvtxRangeStartA").ok()?;
            let end = *library.get::<End>(b"nvtxRangeEnd").ok()?;
            Some(Functions { start, end, _library: library })
        };
        FUNCTIONS.get_or_init(|| NAMES.iter().find_map(open)).as_ref()
    }

    pub struct Range(Option<(End, u64)>);

    pub fn range(name: &str) -> Range {
        let (Some(functions), Ok(name)) = (functions(), CString::new(name)) else {
            return Range(None);
        };
        // SAFETY: the library is open, and copies the name.
        let id = unsafe { (functions.start)(name.as_ptr()) };
        Range(Some((functions.end, id)))
    }

    impl Drop for Range {
        fn drop(&mut self) {
            if let Some((end, id)) = self.0 {
                // SAFETY: the library stays open, and the range was not ended before.
                unsafe { end(id) }
            }
        }
    }
}
