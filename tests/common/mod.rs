//! What the tests of every backend share: one table of cases, the driver that runs a case through
//! a backend and through the float64 reference, and small helpers around single streams.
// Each test binary uses its own part of this module.
#![allow(dead_code)]

pub mod backend;
pub mod buffers;
pub mod call;
pub mod cases;
pub mod data;
pub mod driver;
pub mod elements;
pub mod extremes;
pub mod gradients;
pub mod metric;
pub mod model;
#[cfg(feature = "cuda")]
pub mod noise;
pub mod phases;
pub mod plain;
#[cfg(feature = "cuda")]
pub mod plans;
pub mod say;
#[cfg(feature = "cuda")]
pub mod simulator;
#[cfg(feature = "tracing")]
pub mod spans;
pub mod stream;
#[cfg(feature = "cuda")]
pub mod switches;
pub mod tensor_cases;
pub mod tolerance;

pub use elements::{WithType, bits, narrow, scalar, widen, with_type};
