//! candle's errors with our text.

use candle_core::{Error, Result};

/// The error of a call of `infini_attn`, with its text.
pub fn wrapped(error: infini_attn::Error) -> Error {
    Error::wrap(error)
}

/// An argument that was refused: what was given, what is expected.
pub fn refused(
    argument: impl Into<String>,
    got: impl ToString,
    expected: impl Into<String>,
) -> Error {
    let (got, expected) = (got.to_string(), expected.into());
    wrapped(infini_attn::Error::Value { argument: argument.into(), got, expected })
}

/// Zeros of a shape.
pub fn zeros<T: bytemuck::Zeroable>(shape: &[usize], what: &str) -> Result<Vec<T>> {
    let count = elements::<T>(shape, what)?;
    bytemuck::allocation::try_zeroed_vec(count).map_err(|()| no_memory::<T>(shape, what))
}

/// How many elements a shape has, if memory can have so many.
pub fn elements<T>(shape: &[usize], what: &str) -> Result<usize> {
    let count = shape.iter().try_fold(1usize, |count, &extent| count.checked_mul(extent));
    let most = isize::MAX as usize / size_of::<T>();
    count.filter(|&count| count <= most).ok_or_else(|| no_memory::<T>(shape, what))
}

fn no_memory<T>(shape: &[usize], what: &str) -> Error {
    let count = shape.iter().fold(1u128, |count, &extent| count.saturating_mul(extent as u128));
    let bytes = count.saturating_mul(size_of::<T>() as u128);
    wrapped(infini_attn::Error::OutOfMemory { what: what.into(), bytes })
}
