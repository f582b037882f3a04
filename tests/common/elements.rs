//! Element types by name, and conversions.

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
