//! From rows of queries or keys to their retrieval weights, σ(x) / σ(x)·z.

use super::simd::{LANES, chunked, fold, max, sigma, vectorised};
use crate::problem::Denominator;

/// Rows that go through the passes of [`retrieval_weights`] together.
const GROUP: usize = 48;

/// From where on z is huge, and the unit that its weights then have.
const HUGE: f32 = 7.9e28; // 2⁹⁶
const HUGE_UNIT: f32 = 2.328_306_4e-10; // 2⁻³²

/// 1 / denominator, or 0 where that is so small that its reciprocal would be no f32. NaN where it is
/// infinite: z left f32, and what was written is lost.
#[inline(always)]
fn reciprocal(den: f64) -> f64 {
    if den.abs() < f64::from(f32::MIN_POSITIVE) {
        0.0
    } else if den.is_infinite() {
        f64::NAN
    } else {
        1.0 / den
    }
}

/// What every channel of a row can be lessened by without a change of its weights, so that nothing
/// underflows: Exact is invariant to the row's scale.
#[inline(always)]
fn shift_of(row: &[f32], policy: Denominator) -> f32 {
    if policy != Denominator::Exact {
        return 0.0;
    }
    let top = max(row);
    // A row of −∞ only: weightless, as in the limit of ever smaller channels.
    if top <= 0.0 && top != f32::NEG_INFINITY { top } else { 0.0 }
}

/// x ← σ(x); returns σ(x)·z.
#[inline(always)]
fn map_row(x: &mut [f32], z: &[f32]) -> f32 {
    let ((xc, xr), (zc, zr)) = (x.as_chunks_mut::<LANES>(), chunked(z));
    let mut acc = [0.0f32; LANES];
    for (x, z) in xc.iter_mut().zip(zc) {
        for i in 0..LANES {
            x[i] = sigma(x[i]);
            acc[i] = x[i].mul_add(z[i], acc[i]);
        }
    }
    let mut sum = fold(acc, |a, b| a + b);
    for (x, z) in xr.iter_mut().zip(zr) {
        *x = sigma(*x);
        sum += *x * z;
    }
    sum
}

/// From a row of σ(x) and its product with z to its weights over `unit`; returns the product and what the row
/// was multiplied by.
#[inline(always)]
fn weigh_row(row: &mut [f32], sum: f32, z: &[f32], policy: Denominator, unit: f32) -> (f64, f64) {
    if unit == 1.0 && sum.is_finite() {
        let wide = reciprocal(policy.of(sum.into()));
        let factor = wide as f32;
        // Where z = 0 the memory holds nothing, but the weight may overflow, and ∞ · 0 is NaN.
        row.iter_mut().zip(z).for_each(|(x, z)| *x = if *z == 0.0 { 0.0 } else { *x * factor });
        (sum.into(), wide)
    } else {
        weigh_wide(row, z, policy, unit)
    }
}

/// Where z is huge the weights, of the order of 1 / z, would leave f32's normal numbers.
#[inline(always)]
fn unit_of(z: &[f32]) -> f32 {
    if max(z) < HUGE { 1.0 } else { HUGE_UNIT }
}

/// [`retrieval_weights`] of one row of σ(x) whose product with z leaves f32, or may.
#[cold]
fn weigh_wide(row: &mut [f32], z: &[f32], policy: Denominator, unit: f32) -> (f64, f64) {
    let wide = || row.iter().zip(z).map(|(&x, &z)| f64::from(x) * f64::from(z));
    let sum = wide().sum();
    let factor = reciprocal(policy.of(sum)) / f64::from(unit);
    let weights = row.iter_mut().zip(z);
    weights.for_each(|(x, z)| {
        *x = if *z == 0.0 { 0.0 } else { (f64::from(*x) * factor) as f32 };
    });
    (sum, factor)
}

vectorised! {

/// Turns every row x (as long as `z`) into its retrieval weights σ(x) / σ(x)·z over the unit of z,
/// so that the retrieval is one product with M, times that unit, which is returned.
pub(crate) fn retrieval_weights(x: &mut [f32], z: &[f32], policy: Denominator) -> f32 {
    let unit = unit_of(z);
    for rows in x.chunks_mut(GROUP * z.len()) {
        let mut sums = [0.0; GROUP];
        for (row, sum) in rows.chunks_exact_mut(z.len()).zip(&mut sums) {
            // Foreseen, unlike a number that is always subtracted: the row does not wait for it.
            let shift = shift_of(row, policy);
            if shift != 0.0 {
                row.iter_mut().for_each(|x| *x -= shift);
            }
            *sum = map_row(row, z);
        }
        for (row, sum) in rows.chunks_exact_mut(z.len()).zip(sums) {
            weigh_row(row, sum, z, policy, unit);
        }
    }
    unit
}

/// [`retrieval_weights`], and for every row the reciprocal of its denominator, over that unit, and whether its
/// denominator moves with σ(x)·z (1) or is clamped (0).
pub(crate) fn retrieval_rows(
    x: &mut [f32],
    z: &[f32],
    policy: Denominator,
    rows: &mut [[f32; 2]],
) -> f32 {
    let unit = unit_of(z);
    for (row, out) in x.chunks_exact_mut(z.len()).zip(rows) {
        let shift = shift_of(row, policy);
        if shift != 0.0 {
            row.iter_mut().for_each(|x| *x -= shift);
        }
        let product = map_row(row, z);
        let (sum, factor) = weigh_row(row, product, z, policy, unit);
        let clamped = matches!(policy, Denominator::Clamp(eps) if sum < f64::from(eps));
        *out = [factor as f32, if clamped { 0.0 } else { 1.0 }];
    }
    unit
}

/// x ← σ(x), and w ← what [`retrieval_weights`] would have made of x.
pub(crate) fn map_and_weigh(x: &mut [f32], z: &[f32], policy: Denominator, w: &mut [f32]) -> f32 {
    let unit = unit_of(z);
    let groups = x.chunks_mut(GROUP * z.len()).zip(w.chunks_mut(GROUP * z.len()));
    for (x, w) in groups {
        let mut sums = [0.0; GROUP];
        let rows = x.chunks_exact_mut(z.len()).zip(w.chunks_exact_mut(z.len()));
        for ((x, w), sum) in rows.zip(&mut sums) {
            let shift = shift_of(x, policy);
            if shift == 0.0 {
                *sum = map_row(x, z);
                w.copy_from_slice(x);
            } else {
                w.iter_mut().zip(&*x).for_each(|(w, x)| *w = x - shift);
                *sum = map_row(w, z);
                x.iter_mut().for_each(|x| *x = sigma(*x));
            }
        }
        for (row, sum) in w.chunks_exact_mut(z.len()).zip(sums) {
            weigh_row(row, sum, z, policy, unit);
        }
    }
    unit
}

}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::feature_map;

    #[test]
    fn keys_mapped_and_weighed_at_once_are_the_same() {
        // Whole groups of rows and a short one; every third row is below zero, where weights are shifted.
        let (rows, width) = (2 * GROUP + 5, 20);
        let z: Vec<f32> = (0..width).map(|i| (i % 7) as f32).collect();
        let row = |i: usize| {
            move |j: usize| {
                ((i * 31 + j * 17) % 23) as f32 / 4.0
                    - [2.0, 60.0][usize::from(i.is_multiple_of(3))]
            }
        };
        let given: Vec<f32> = (0..rows).flat_map(|i| (0..width).map(row(i))).collect();
        for policy in [Denominator::Exact, Denominator::Clamp(0.5), Denominator::Add(0.5)] {
            let (mut weights, mut mapped) = (given.clone(), given.clone());
            let unit = retrieval_weights(&mut weights, &z, policy);
            feature_map(&mut mapped);
            let (mut x, mut w) = (given.clone(), vec![0.0; given.len()]);
            assert_eq!(map_and_weigh(&mut x, &z, policy, &mut w), unit);
            assert_eq!((x, w), (mapped, weights));
        }
    }
}
