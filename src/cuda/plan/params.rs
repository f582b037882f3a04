//! Launch parameters of the kernels, one structure per kernel.
//!
//! Names, shapes, units and absent values are those of `kernels/params.h`, of which the structures are
//! made. The structures are plain data without padding: [`bytemuck::bytes_of`] gives what a
//! launch passes.

#![allow(missing_docs, non_camel_case_types)] // every field is documented in the header

include!("../../../kernels/params.rs");
