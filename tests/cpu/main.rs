//! The operator on the CPU and its reference, and what the tests of all backends rest on.

#[path = "../common/mod.rs"]
mod common;

mod api;
mod architecture;
mod cancel;
mod copies;
mod errors;
mod extremes;
mod fuzz;
mod gradients;
mod gradients_harness;
mod harness;
mod lent;
mod limits;
mod magnitudes;
mod maps;
mod merge;
mod mistakes;
mod oracles;
mod package;
mod pool;
mod pool_model;
#[cfg(feature = "serde")]
mod problem_data;
mod reference;
mod reference_gradients;
mod reference_rows;
mod simd;
mod slots;
mod snapshots;
mod soak;
mod state_files;
mod state_io;
mod state_refusals;
mod strides;
mod table;
mod threads;
#[cfg(feature = "tracing")]
mod tracing;
mod views;
