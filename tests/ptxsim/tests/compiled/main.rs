//! Kernels that compilers have written, CUDA C++ by nvcc and Triton's, against float64 or integer
//! references; and what mutations make of them.

#[path = "../support/mod.rs"]
mod support;

mod arithmetic;
mod blocks;
mod bounded_waits;
mod clusters;
mod copies;
mod libraries;
mod modes;
mod mutations;
mod products;
mod triton;
mod warps;
