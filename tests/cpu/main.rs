//! The operator on the CPU and its reference, and what the tests of all backends rest on.

#[path = "../common/mod.rs"]
mod common;

mod api;
mod architecture;
mod errors;
mod extremes;
mod harness;
mod limits;
mod magnitudes;
mod maps;
mod merge;
mod mistakes;
mod oracles;
mod reference;
mod state_io;
mod table;
mod threads;
