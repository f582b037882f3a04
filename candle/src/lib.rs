//! Infini-attention ([arXiv 2404.07143](https://arxiv.org/abs/2404.07143)) on candle's tensors, on the CPU
//! and, with the feature `cuda`, by the kernels of `infini-attn` on candle's CUDA devices.
//!
//! | | |
//! |---|---|
//! | [`infini_attention`], [`infini_attention_parts`] | the operator: q, k, v and a gate, a [`State`] that advances, a [`Batch`] |
//! | [`State`], [`Pool`] | streams by slot, of one layer or of all of a model |
//! | [`Rope`] | rotation, tables of one segment for streams of any length |
//! | [`InfiniAttention`] | a module with its projections |
//! | [`Model`], [`Config`], [`Cache`] | a Llama, Mistral, Qwen2 or Qwen3 that generates, of Hugging Face's checkpoints |
//!
//! What is computed, and every convention: the crate `infini-attn`. Errors are candle's, with the text of
//! that crate: the argument, what was given, what is expected.
//!
//! On CUDA, candle's device must be one of `Device::new_cuda_with_stream`.

#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod attention;
mod batch;
mod cache;
mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod gradient;
mod model;
mod operator;
mod state;

pub use attention::InfiniAttention;
pub use batch::{Batch, Rope};
pub use cache::Cache;
pub use config::{Config, EndTokens, RopeParameters, Settings};
pub use infini_attn::{EmptyMemory, Pool, Problem, Slot, Slots, Snapshot, Update};
pub use model::Model;
pub use operator::{Parts, infini_attention, infini_attention_parts};
pub use state::{State, element_type};

// The examples in it compile and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
