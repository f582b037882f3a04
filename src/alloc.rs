//! Memory that may not be there. Whatever grows with a caller's extents is asked for here, where a
//! refusal becomes an error; `vec!`, `collect` and `clone` would end the process.

use std::fmt::Display;

use bytemuck::Zeroable;

use crate::error::{Error, Result};

/// As many zeros as the product of `extents`. The system gives large buffers page by page, when they
/// are first touched.
pub(crate) fn zeroed<T: Zeroable>(extents: &[usize], what: impl Display) -> Result<Vec<T>> {
    (product(extents).and_then(|len| bytemuck::allocation::try_zeroed_vec(len).ok()))
        .ok_or_else(|| refused::<T>(extents, what))
}

/// An empty vector with room for the product of `extents`, none of it touched.
pub(crate) fn reserved<T>(extents: &[usize], what: impl Display) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    room(&mut vec, extents, what)?;
    Ok(vec)
}

/// A copy of `items`.
pub(crate) fn copied<T: Copy>(items: &[T], what: impl Display) -> Result<Vec<T>> {
    let mut copy = reserved(&[items.len()], what)?;
    copy.extend_from_slice(items);
    Ok(copy)
}

/// The items of an iterator that knows how many they are.
pub(crate) fn collected<T>(
    items: impl ExactSizeIterator<Item = T>,
    what: impl Display,
) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    refill(&mut vec, items, what)?;
    Ok(vec)
}

/// The same in the place of what `vec` holds, in its room if that suffices.
pub(crate) fn refill<T>(
    vec: &mut Vec<T>,
    items: impl ExactSizeIterator<Item = T>,
    what: impl Display,
) -> Result<()> {
    vec.clear();
    room(vec, &[items.len()], what)?;
    vec.extend(items);
    Ok(())
}

/// Makes room for the product of `extents` in all, none of it touched.
pub(crate) fn room<T>(vec: &mut Vec<T>, extents: &[usize], what: impl Display) -> Result<()> {
    let held = vec.len();
    (product(extents).and_then(|len| vec.try_reserve_exact(len.saturating_sub(held)).ok()))
        .ok_or_else(|| refused::<T>(extents, what))
}

/// Bytes of the room of some vectors.
pub(crate) fn bytes(vecs: &[&Vec<f32>]) -> usize {
    vecs.iter().map(|vec| size_of::<f32>() * vec.capacity()).sum()
}

/// Makes room for one more item.
pub(crate) fn grow<T>(items: &mut Vec<T>, what: impl Display) -> Result<()> {
    items.try_reserve(1).map_err(|_| refused::<T>(&[items.len() + 1], what))
}

fn product(extents: &[usize]) -> Option<usize> {
    extents.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent))
}

fn refused<T>(extents: &[usize], what: impl Display) -> Error {
    let elements = extents.iter().fold(1u128, |n, &extent| n.saturating_mul(extent as u128));
    Error::out_of_memory(what, elements.saturating_mul(size_of::<T>() as u128))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_that_no_integer_holds_is_refused_like_one_that_no_memory_holds() {
        for extents in [&[usize::MAX][..], &[1 << 40, 1 << 40], &[1 << 62, 3, 1 << 50]] {
            for got in [zeroed::<f32>(extents, "x"), reserved::<f32>(extents, "x")] {
                let text = got.expect_err("no machine has so much").to_string();
                assert!(text.starts_with("x: ") && text.contains(" B asked for"), "{text}");
            }
        }
        assert!(zeroed::<f32>(&[1 << 40, 0, 1 << 40], "x").expect("nothing").is_empty());
    }
}
