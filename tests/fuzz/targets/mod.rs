//! What is fuzzed: each target makes calls from bytes and panics where the library breaks a promise.
//! Run by cargo-fuzz, guided by coverage, and by `cargo test --test cpu fuzz` with seeds.
#![allow(dead_code, reason = "a program runs one")]

pub mod call;
pub mod state_file;
pub mod view;

/// What became of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Too few or too large to do anything with.
    Skipped,
    Refused,
    Accepted,
}
