//! A functional simulator of PTX, the virtual instruction set of NVIDIA GPUs.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod layout;
pub mod numeric;
