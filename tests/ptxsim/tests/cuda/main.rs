//! CUDA C++ kernels, compiled by nvcc, against float64 or integer references.

#[path = "../support/mod.rs"]
mod support;

mod arithmetic;
mod blocks;
mod bounded_waits;
mod clusters;
mod copies;
mod libraries;
mod modes;
mod products;
mod warps;
