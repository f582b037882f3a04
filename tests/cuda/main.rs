//! The CUDA backend without a device: what is compiled, what is planned, and what the kernels compute
//! in the simulator.

#[path = "../common/mod.rs"]
mod common;

mod build;
mod kernels;
mod operations;
mod plan;
