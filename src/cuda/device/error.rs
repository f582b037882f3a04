//! What the driver says, as errors of this crate.

use cudarc::driver::DriverError;

use crate::error::Error;

/// The driver's own words.
pub(super) fn reason(error: DriverError) -> String {
    let text = |s: std::result::Result<&std::ffi::CStr, DriverError>| {
        s.map_or_else(|_| format!("{:?}", error.0), |s| s.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}

pub(super) fn driver(what: impl Into<String>, error: DriverError) -> Error {
    Error::Driver { what: what.into(), reason: reason(error) }
}

pub(super) fn no_device(ordinal: usize, error: DriverError) -> Error {
    Error::NoDevice { reason: format!("device {ordinal}: {}", reason(error)) }
}
