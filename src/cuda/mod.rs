//! The operator on CUDA devices of compute capability 8.0 and later (feature `cuda`).
//!
//! The kernels are compiled when the crate is built and lie in it as fatbins; [`KERNELS`] is the
//! table they are looked up in. libcuda is never linked: it is opened when a device is.

mod kernels;
#[cfg_attr(not(test), allow(dead_code))]
mod transfer;
pub mod params;

pub use kernels::{KERNELS, Kernel, fatbin, find, ptx};
