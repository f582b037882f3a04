#![doc = include_str!("../README.md")]
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod alloc;
mod call;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dtype;
mod error;
mod memory;
mod problem;
pub mod reference;
mod tensor;

pub use call::{Inputs, MAX_DECODE_TOKENS, Outputs, Rope};
pub use cpu::maps::{
    KeySums, SegmentMap, apply, compose, key_sums, key_sums_until, segment_map, segment_map_until,
};
pub use cpu::merge::{merge_memories, merge_partials};
pub use cpu::simd::simd_level;
pub use cpu::{decode, flush, prefill};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use memory::State;
pub use problem::{Denominator, EmptyMemory, Problem, ProblemBuilder, Update};
pub use tensor::{MAX_RANK, TensorView, TensorViewMut};
