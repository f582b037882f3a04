//! Ranges of NVTX, by which profilers such as Nsight Systems tell what belongs to which call, with the
//! feature `nvtx`; without it nothing.

#[cfg(feature = "nvtx")]
use std::sync::OnceLock;

#[cfg(feature = "nvtx")]
use cudarc::nvtx;
#[cfg(feature = "nvtx")]
use libloading::Library;

/// Names of the library, of those that cudarc tries, in its order.
#[cfg(feature = "nvtx")]
const NAMES: &[&str] = if cfg!(windows) {
    &["nvToolsExt.dll", "nvToolsExt64.dll", "nvToolsExt64_1.dll"]
} else {
    &["libnvToolsExt.so", "libnvToolsExt.so.1"]
};

/// What cudarc calls for a range.
#[cfg(feature = "nvtx")]
const FUNCTIONS: [&str; 2] = ["nvtxRangeStartEx", "nvtxRangeEnd"];

/// A range that ends when it is dropped.
#[cfg_attr(feature = "nvtx", expect(dead_code, reason = "held for what dropping it does"))]
pub(super) struct Range(#[cfg(feature = "nvtx")] Option<nvtx::Range>);

/// A range of that name; none where the library is not installed, for cudarc panics there.
#[cfg(feature = "nvtx")]
pub(super) fn range(name: &str) -> Range {
    Range((present() && !name.contains('\0')).then(|| nvtx::scoped_range(name)))
}

#[cfg(not(feature = "nvtx"))]
pub(super) fn range(_: &str) -> Range {
    Range()
}

/// Whether the library is there, looked for once.
#[cfg(feature = "nvtx")]
fn present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    *PRESENT.get_or_init(|| {
        // SAFETY: opening the library is what cudarc's first call in it does; nothing is called here.
        let opened = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let has = |library: &Library| {
            // SAFETY: only whether there is one.
            let found = |name: &&str| {
                unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_ok()
            };
            FUNCTIONS.iter().all(found)
        };
        opened.as_ref().is_some_and(has)
    })
}
