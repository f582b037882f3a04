//! Strided views: what is accepted lies inside its buffer, reads what index arithmetic says, and can be
//! written only where no two indices meet.

use arbitrary::{Arbitrary, Result, Unstructured};
use infini_attn::{TensorView, TensorViewMut};

use super::Outcome;

pub fn run(data: &[u8]) -> Outcome {
    view(&mut Unstructured::new(data)).unwrap_or(Outcome::Skipped)
}

fn view(u: &mut Unstructured<'_>) -> Result<Outcome> {
    let rank = u.int_in_range(0..=5)?;
    let shape = (0..rank).map(|_| extent(u)).collect::<Result<Vec<usize>>>()?;
    let rank = if u.ratio(1, 16)? { u.int_in_range(0..=5)? } else { rank };
    let strides = (0..rank).map(|_| stride(u)).collect::<Result<Vec<i64>>>()?;
    let len = u.int_in_range(0..=64)?;
    let offset = if u.ratio(1, 16)? { usize::arbitrary(u)? } else { u.int_in_range(0..=len)? };
    let mut buffer: Box<[f32]> = (0..len).map(|i| i as f32).collect();
    let count = shape.iter().try_fold(1usize, |n, &e| n.checked_mul(e));
    let accepted = match TensorView::strided(&buffer, offset, &shape, &strides) {
        Ok(view) => {
            let whole = view.as_slice().map(<[f32]>::to_vec);
            let mut got = Vec::new();
            let few = count.filter(|&count| count <= 4096);
            every(few.map_or(&[0], |_| &shape), |index| {
                let at = offset as i64 + dot(index, &strides);
                assert_eq!(view.at(index), at as f32, "{index:?} of {shape:?} by {strides:?}");
                got.push(at as f32);
            });
            assert!(
                whole.is_none_or(|whole| few.is_none() || whole == got),
                "{shape:?} {strides:?}"
            );
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    };
    let writable = TensorViewMut::strided(&mut buffer, offset, &shape, &strides).is_ok();
    assert!(accepted || !writable, "{shape:?} by {strides:?}: only to be written");
    if writable && count.is_some_and(|count| count <= 4096) {
        let mut reached = Vec::new();
        every(&shape, |index| reached.push(dot(index, &strides)));
        let elements = reached.len();
        reached.sort_unstable();
        reached.dedup();
        assert_eq!(reached.len(), elements, "{shape:?} by {strides:?}: indices meet");
    }
    Ok(if accepted { Outcome::Accepted } else { Outcome::Refused })
}

fn extent(u: &mut Unstructured<'_>) -> Result<usize> {
    Ok(match u.int_in_range(0..=15)? {
        0 => usize::arbitrary(u)?,
        1 => 0,
        2..=5 => 1,
        _ => u.int_in_range(0..=5)?,
    })
}

fn stride(u: &mut Unstructured<'_>) -> Result<i64> {
    if u.ratio(1, 12)? { i64::arbitrary(u) } else { u.int_in_range(-12..=30) }
}

fn dot(index: &[usize], strides: &[i64]) -> i64 {
    // What is never stepped along may have any stride.
    let steps = index.iter().zip(strides).filter(|(i, _)| **i > 0);
    steps.map(|(&i, &stride)| i as i64 * stride).sum()
}

/// Every index of a shape, in order.
fn every(shape: &[usize], mut visit: impl FnMut(&[usize])) {
    if shape.contains(&0) {
        return;
    }
    let mut index = vec![0; shape.len()];
    loop {
        visit(&index);
        let Some(d) = (0..shape.len()).rev().find(|&d| index[d] + 1 < shape[d]) else { return };
        index[d] += 1;
        index[d + 1..].fill(0);
    }
}
