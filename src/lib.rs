//! Infini-attention ([arXiv 2404.07143](https://arxiv.org/abs/2404.07143)): attention over an unbounded
//! stream in constant memory. Inside a segment of N tokens it is ordinary causal softmax attention;
//! everything older lives in one matrix per head, read by a linear retrieval, written by the linear or
//! the delta rule, and mixed in by a learned gate.
//!
//! A [`Problem`] says what is computed, a [`State`] holds streams, [`TensorView`]s lend your memory, and a
//! call advances the state in place:
//!
//! ```
//! use infini_attn::{Inputs, Outputs, Problem, State, TensorView, TensorViewMut, decode, prefill};
//!
//! let problem = Problem::builder().heads(8).kv_heads(2).head_dim(64).segment_len(256).build()?;
//! let mut state = State::new(&problem, 1)?;
//! let mut run = |tokens: usize, decoding: bool| {
//!     // Yours come from a model: q [B, T, Hq, D], k and v [B, T, Hkv, D].
//!     let (q, kv) = (vec![0.1f32; tokens * 8 * 64], vec![0.2f32; tokens * 2 * 64]);
//!     let mut o = vec![0.0f32; tokens * 8 * 64];
//!     let inputs = Inputs::new(
//!         TensorView::new(&q, &[1, tokens, 8, 64])?,
//!         TensorView::new(&kv, &[1, tokens, 2, 64])?,
//!         TensorView::new(&kv, &[1, tokens, 2, 64])?,
//!     );
//!     let outputs = Outputs::new(TensorViewMut::new(&mut o, &[1, tokens, 8, 64])?);
//!     let call = if decoding { decode } else { prefill };
//!     call(&problem, &inputs, &[0.0; 8], &mut state, outputs)
//! };
//! run(1000, false)?; // the prompt
//! for _ in 0..30 {
//!     run(1, true)?; // a token at a time
//! }
//! assert_eq!((state.tokens(0), state.committed(0), state.open_len(0)), (1030, 1024, 6));
//! # Ok::<(), infini_attn::Error>(())
//! ```
//!
//! | | |
//! |---|---|
//! | [`prefill()`], [`decode()`], [`flush`] | tokens into streams; an open segment into the memory early |
//! | [`forward`] | prompts and single tokens in one call |
//! | [`prefill_backward`] | gradients of a `prefill`, with a [`Tape`] of it and a [`StateGradient`] |
//! | [`State`] | streams by slot: new, reset, fork, copy, truncate, save, load |
//! | [`HostLayout`], [`StateViewMut`] | a state in memory of yours |
//! | [`Pool`] | slots of all layers of a model, allocated and freed, with steps that are whole or undone |
//! | [`PrefixCache`] | states of prompts that come again |
//! | [`merge_partials`], [`merge_memories`] | what was computed in parts |
//! | [`key_sums`], [`segment_map`], [`compose`], [`apply`] | the delta rule as affine maps of token runs |
//! | [`mod@reference`] | the equations in float64, and every convention |
#![cfg_attr(feature = "cuda", doc = "| [`cuda`] | the same on NVIDIA GPUs (feature `cuda`) |")]
#![cfg_attr(not(feature = "cuda"), doc = "| `cuda` | the same on NVIDIA GPUs (feature `cuda`) |")]
//!
//! Features, none of them on by default: `cuda`, whose build needs nvcc and g++ (docs/building.md);
//! `serde`, for a [`Problem`] as data; `tracing`, for a span of that crate around every call (level DEBUG,
//! target `infini_attn`, fields `shapes`, `sequences`, `tokens`, `slots`, `plan`, `error`; the table of a
//! plan is an event of level TRACE); `nvtx`, for a range around every call on a device and every launch, for
//! profilers.
//!
//! Without optimisation the CPU backend is a hundred times slower. In debug builds, Cargo.toml of the
//! program can optimise what it depends on: `[profile.dev.package."*"]` with `opt-level = 3`.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod alloc;
mod call;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dtype;
mod error;
mod memory;
mod pool;
mod problem;
pub mod reference;
mod tensor;
mod trace;

pub use call::gradients::{InputGradients, OutputGradients};
pub use call::tape::Tape;
pub use call::{Inputs, MAX_DECODE_TOKENS, Outputs, Rope};
pub use cpu::backward::prefill_backward;
pub use cpu::maps::{
    KeySums, SegmentMap, apply, compose, key_sums, key_sums_until, segment_map, segment_map_until,
};
pub use cpu::merge::{merge_memories, merge_partials};
pub use cpu::simd::simd_level;
pub use cpu::view::StateViewMut;
pub use cpu::{decode, flush, forward, prefill};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use memory::State;
pub use memory::gradient::{OpenGradient, StateGradient};
pub use memory::layout::{HostLayout, HostPart};
pub use pool::Pool;
pub use pool::handles::Slot;
pub use pool::prefix::{PrefixCache, PrefixCounters};
pub use pool::slots::Slots;
pub use pool::snapshot::Snapshot;
pub use problem::{Denominator, EmptyMemory, Problem, ProblemBuilder, Update};
pub use tensor::{MAX_RANK, TensorView, TensorViewMut};

// The example in it compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
