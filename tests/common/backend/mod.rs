//! Implementations that the driver runs cases through.

#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda")]
pub mod entry;
mod host;
#[cfg(feature = "cuda")]
pub mod simulated;

pub use host::*;
