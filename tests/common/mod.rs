//! What the tests of every backend share: one table of cases, the driver that runs a case through
//! a backend and through the float64 reference, and small helpers around single streams.
// Each test binary uses its own part of this module.
#![allow(dead_code)]

pub mod backend;
pub mod buffers;
pub mod call;
pub mod cases;
pub mod driver;
pub mod extremes;
pub mod metric;
pub mod model;
#[cfg(feature = "cuda")]
pub mod noise;
pub mod plain;
#[cfg(feature = "cuda")]
pub mod plans;
pub mod say;
#[cfg(feature = "cuda")]
pub mod simulator;
#[cfg(feature = "tracing")]
pub mod spans;
pub mod stream;
#[cfg(feature = "cuda")]
pub mod switches;
pub mod tensor_cases;
pub mod tolerance;

use half::{bf16, f16};
use infini_attn::{DType, Element};

/// Calls a generic function with the element type of a [`DType`].
pub trait WithType {
    type Output;
    fn run<T: Element>(self) -> Self::Output;
}

/// Dispatches on a problem's element type.
pub fn with_type<W: WithType>(dtype: DType, work: W) -> W::Output {
    match dtype {
        DType::F32 => work.run::<f32>(),
        DType::F16 => work.run::<f16>(),
        DType::BF16 => work.run::<bf16>(),
        other => panic!("no Rust type is known for {other}"),
    }
}

/// Rounds a list of f32 to the element type.
pub fn narrow<T: Element>(values: &[f32]) -> Vec<T> {
    let mut out = vec![T::zeroed(); values.len()];
    T::narrow(values, &mut out);
    out
}

/// One value in the element type.
pub fn scalar<T: Element>(value: f32) -> T {
    narrow(&[value])[0]
}

/// Every element as f64, exactly.
pub fn widen<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&x| x.into()).collect()
}

/// The bits, for comparisons in which NaN equals itself and 0 differs from −0.
pub fn bits<T: Element>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}
