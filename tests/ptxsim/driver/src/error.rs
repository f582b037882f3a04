//! Results of the driver, and how exported functions give them.

use std::ffi::CStr;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A result of the driver, by its number.
pub type Code = u32;
pub type Result<T = ()> = std::result::Result<T, Code>;

/// The results there are, each with its name in the driver and what it says.
macro_rules! codes {
    ($($code:ident = $number:literal, $name:literal: $text:literal;)*) => {
        $(pub const $code: Code = $number;)*
        const TEXTS: &[(Code, &CStr, &CStr)] = &[$(($number, $name, $text)),*];
    };
}

codes! {
    SUCCESS = 0, c"CUDA_SUCCESS": c"no error";
    INVALID_VALUE = 1, c"CUDA_ERROR_INVALID_VALUE": c"invalid argument";
    OUT_OF_MEMORY = 2, c"CUDA_ERROR_OUT_OF_MEMORY": c"out of memory";
    NOT_INITIALIZED = 3, c"CUDA_ERROR_NOT_INITIALIZED": c"the environment of the simulator is wrong";
    LOST = 46, c"CUDA_ERROR_DEVICE_UNAVAILABLE": c"the device is busy or unavailable";
    INVALID_DEVICE = 101, c"CUDA_ERROR_INVALID_DEVICE": c"invalid device ordinal";
    INVALID_IMAGE = 200, c"CUDA_ERROR_INVALID_IMAGE": c"device kernel image is invalid";
    INVALID_CONTEXT = 201, c"CUDA_ERROR_INVALID_CONTEXT": c"invalid device context";
    NO_BINARY = 209, c"CUDA_ERROR_NO_BINARY_FOR_GPU": c"no kernel image is available for the device";
    INVALID_PTX = 218, c"CUDA_ERROR_INVALID_PTX": c"PTX that the simulator does not understand";
    FILE_NOT_FOUND = 301, c"CUDA_ERROR_FILE_NOT_FOUND": c"file not found";
    INVALID_HANDLE = 400, c"CUDA_ERROR_INVALID_HANDLE": c"invalid resource handle";
    ILLEGAL_STATE = 401, c"CUDA_ERROR_ILLEGAL_STATE": c"the operation cannot be performed in this state";
    NOT_FOUND = 500, c"CUDA_ERROR_NOT_FOUND": c"named symbol not found";
    OUT_OF_RESOURCES = 701, c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": c"too many resources requested for launch";
    LAUNCH_FAILED = 719, c"CUDA_ERROR_LAUNCH_FAILED": c"the simulator has found a mistake";
    COOPERATIVE_TOO_LARGE = 720, c"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": c"too many blocks in cooperative launch";
    NOT_SUPPORTED = 801, c"CUDA_ERROR_NOT_SUPPORTED": c"operation not supported";
    CAPTURE_UNSUPPORTED = 900, c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": c"operation not permitted when stream is capturing";
    CAPTURE_INVALIDATED = 901, c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": c"capture was invalidated by an earlier error";
    CAPTURE_ISOLATION = 905, c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION": c"dependency on work outside of the capture";
    CAPTURED_EVENT = 907, c"CUDA_ERROR_CAPTURED_EVENT": c"the event was recorded in a capture";
    INVALID_CLUSTER = 912, c"CUDA_ERROR_INVALID_CLUSTER_SIZE": c"invalid cluster size";
    UNKNOWN = 999, c"CUDA_ERROR_UNKNOWN": c"the simulator has failed";
}

/// What a result says.
pub fn text(code: Code) -> Result<&'static CStr> {
    TEXTS.iter().find(|t| t.0 == code).map(|t| t.2).ok_or(INVALID_VALUE)
}

/// Its name in the driver.
pub fn name(code: Code) -> Result<&'static CStr> {
    TEXTS.iter().find(|t| t.0 == code).map(|t| t.1).ok_or(INVALID_VALUE)
}

/// The result of an exported function; a panic is one, for nothing may unwind into the caller.
pub fn outcome(body: impl FnOnce() -> Result) -> Code {
    let done = catch_unwind(AssertUnwindSafe(body));
    done.unwrap_or(Err(UNKNOWN)).err().unwrap_or(SUCCESS)
}

/// Writes a value where the caller wants it.
///
/// # Safety
/// `to` is null or points to a place for a value.
pub unsafe fn give<T>(to: *mut T, value: T) -> Result {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

/// Exports functions of the driver: `name(arguments) = an expression of type Result`.
macro_rules! driver {
    ($($name:ident($($arg:ident: $type:ty),* $(,)?) = $body:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> $crate::error::Code {
            // SAFETY: pointers are the caller's, as in the driver.
            #[allow(unused_unsafe)]
            $crate::error::outcome(|| {
                $crate::refusals::admit(stringify!($name))?;
                unsafe { $body }
            })
        }
    )*};
}
pub(crate) use driver;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_result() {
        assert_eq!(outcome(|| panic!("expected in this test")), UNKNOWN);
        assert_eq!((outcome(|| Ok(())), outcome(|| Err(7))), (0, 7));
    }

    #[test]
    fn results_have_a_name_and_a_text() {
        assert_eq!(name(INVALID_CLUSTER), Ok(c"CUDA_ERROR_INVALID_CLUSTER_SIZE"));
        assert_eq!((text(SUCCESS), text(4711)), (Ok(c"no error"), Err(INVALID_VALUE)));
    }
}
