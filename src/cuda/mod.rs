//! The operator on CUDA devices of compute capability 8.0 and later (feature `cuda`).
//!
//! The kernels are compiled when the crate is built and lie in it as fatbins; [`KERNELS`] is the
//! table they are looked up in. libcuda is never linked: it is opened when a device is.

//!
//! Calls come in two layers. The raw one takes addresses: a *plan* is made on the host from shapes
//! alone ([`plan_prefill`]), printed or tested without a device, and run by a
//! [`Launcher`]. The typed one owns states and borrows tensors in cudarc's buffers.

mod address;
mod buffers;
mod call;
mod device;
mod kernels;
mod launcher;
pub mod params;
mod plan;
mod prefill;
mod sequences;
mod state;
mod tensor;
mod transfer;
mod typed;

pub use address::{Addresses, Operand, Requirement};
pub use buffers::{TensorView, TensorViewMut};
pub use call::{Call, DeviceRope};
pub use device::{CudaLauncher, Device};
pub use kernels::{KERNELS, Kernel, fatbin, find, ptx};
pub use launcher::{Launch, Launcher};
pub use plan::{Plan, PlannedLaunch};
pub use prefill::{PrefillOptions, plan_prefill};
pub use state::{Mirror, StateLayout};
pub use tensor::DeviceTensor;
pub use typed::{Gate, State};
