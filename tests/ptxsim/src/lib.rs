//! A functional simulator of PTX, the virtual instruction set of NVIDIA GPUs.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod async_queue;
pub mod mbarrier;
pub mod named_barrier;
pub mod tensor_map;
