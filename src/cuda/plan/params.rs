//! Launch parameters of the kernels, one structure per kernel.
//!
//! Names, shapes, units and absent values are those of `kernels/params.h`, from which this module is
//! generated. The structures are plain data without padding: [`bytemuck::bytes_of`] gives what a
//! launch passes.

#![allow(missing_docs, non_camel_case_types)] // every field is documented in the header

include!(concat!(env!("OUT_DIR"), "/params.rs"));
