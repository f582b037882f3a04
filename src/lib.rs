#![doc = include_str!("../README.md")]
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod call;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dtype;
mod error;
mod memory;
mod merge;
mod problem;
pub mod reference;
mod runs;
mod tensor;

pub use call::{Inputs, Outputs, Rope};
pub use cpu::{KeySums, MAX_DECODE_TOKENS, SegmentMap, apply, compose, key_sums, segment_map};
pub use cpu::{decode, flush, prefill};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use memory::State;
pub use merge::{merge_memories, merge_partials};
pub use problem::{Denominator, EmptyMemory, Problem, ProblemBuilder, Update};
pub use tensor::{MAX_RANK, TensorView, TensorViewMut};
