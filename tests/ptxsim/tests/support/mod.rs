//! What the targets with compiled kernels share: the compilers, inputs, references, comparison.
#![allow(dead_code)] // each target uses its part

pub mod compare;
pub mod reference;
pub mod run;
pub mod tools;
