//! Element types of queries, keys, values and outputs.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use strum::{Display, EnumString, VariantNames};

/// Element type of q, k, v and the outputs. The state is always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Display, EnumString, VariantNames)]
#[strum(serialize_all = "lowercase", parse_err_ty = crate::error::Error, parse_err_fn = unknown_dtype)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl DType {
    /// Size of one element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

fn unknown_dtype(name: &str) -> crate::error::Error {
    crate::error::Error::name::<DType>("dtype", name)
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A type that q, k, v and the outputs may have: `f32`, [`half::f16`] or [`half::bf16`].
pub trait Element: sealed::Sealed + bytemuck::Pod + Into<f64> + Send + Sync + 'static {
    /// The matching [`DType`].
    const DTYPE: DType;
    /// Converts a row to f32, exactly. Both slices have the same length.
    fn widen(src: &[Self], dst: &mut [f32]);
    /// Rounds a row of f32 to nearest even. Both slices have the same length.
    fn narrow(src: &[f32], dst: &mut [Self]);
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    fn widen(src: &[Self], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }

    fn narrow(src: &[f32], dst: &mut [Self]) {
        dst.copy_from_slice(src);
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;

    fn widen(src: &[Self], dst: &mut [f32]) {
        src.convert_to_f32_slice(dst);
    }

    fn narrow(src: &[f32], dst: &mut [Self]) {
        dst.convert_from_f32_slice(src);
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;

    fn widen(src: &[Self], dst: &mut [f32]) {
        // Spelled out because the shift vectorises; half's own conversion goes element by element.
        for (d, s) in dst.iter_mut().zip(src) {
            *d = f32::from_bits(u32::from(s.to_bits()) << 16);
        }
    }

    fn narrow(src: &[f32], dst: &mut [Self]) {
        dst.convert_from_f32_slice(src);
    }
}
