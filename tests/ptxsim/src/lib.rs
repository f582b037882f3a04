//! A functional simulator of PTX, the virtual instruction set of NVIDIA GPUs.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod access;
pub mod arch;
pub mod ast;
pub mod async_queue;
pub mod bank;
pub mod bound;
pub mod cli;
pub mod clock;
mod context;
pub mod count;
mod decode;
mod device;
pub mod diagnostic;
mod gang;
pub mod launch;
pub mod layout;
mod lexer;
pub mod mbarrier;
mod memory;
pub mod named_barrier;
pub mod numeric;
mod ops;
pub mod parser;
mod program;
pub mod report;
mod scope;
pub mod shadow;
pub mod tensor_map;
mod warp;

pub use arch::Arch;
pub use device::{Arg, Buffer, Device, Module, Uninitialised};
pub use launch::{Launch, LaunchError, Options, Residency, Timing};
pub use report::Report;
