//! A functional simulator of PTX, the virtual instruction set of NVIDIA GPUs.
//!
//! It executes what the compiler emits on the CPU and reports what a GPU would let pass: accesses
//! out of bounds, races, values nobody has written, and more ([`diagnostic::Kind`]). It counts what
//! the kernel does ([`Report`]). [`cli`] does the same from the command line.
//!
//! ```
//! use ptxsim::{Arch, Arg, Device, Launch, Module};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let module = Module::parse(
//!     ".version 8.0
//!     .target sm_80
//!     .address_size 64
//!     .visible .entry scale(.param .u64 data, .param .f32 factor) {
//!         .reg .b32 %r;
//!         .reg .f32 %f<3>;
//!         .reg .b64 %rd<3>;
//!         ld.param.u64 %rd0, [data];
//!         cvta.to.global.u64 %rd1, %rd0;
//!         mov.u32 %r, %tid.x;
//!         mad.wide.u32 %rd2, %r, 4, %rd1;
//!         ld.param.f32 %f0, [factor];
//!         ld.global.f32 %f1, [%rd2];
//!         mul.f32 %f2, %f1, %f0;
//!         st.global.f32 [%rd2], %f2;
//!         ret;
//!     }",
//! )?;
//! let mut device = Device::new(Arch::Sm80);
//! let data = device.buffer("data", &[1.0f32, 2.0, 3.0]);
//!
//! let args = [Arg::Buffer(data), Arg::F32(0.5)];
//! let report = device.launch(&module, "scale", &Launch::linear(1, 3), &args)?;
//! assert!(report.is_clean(), "{report}");
//! assert_eq!(device.read::<f32>(data)?, [0.5, 1.0, 1.5]);
//!
//! // A fourth thread has no element.
//! let report = device.launch(&module, "scale", &Launch::linear(1, 4), &args)?;
//! assert!(report.has(ptxsim::diagnostic::Kind::OutOfBounds));
//! # Ok(())
//! # }
//! ```
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
mod limits;
pub mod mbarrier;
mod memory;
mod module;
pub mod named_barrier;
pub mod numeric;
pub mod occupancy;
mod ops;
pub mod order;
pub mod parser;
mod program;
pub mod registers;
pub mod report;
mod scope;
pub mod shadow;
pub mod tensor_map;
mod warp;

pub use arch::Arch;
pub use device::{AddressError, Arg, Buffer, Device, Uninitialised};
pub use launch::{Launch, LaunchError, Options, Residency, Timing};
pub use module::Module;
pub use report::Report;
