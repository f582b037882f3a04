//! Matrix products of the tensor cores, with the accumulation order as a choice.
use super::half::Half;
use super::{NAN_F32, Rounding};
use multiversion::multiversion;

/// How a dot product is summed; the hardware's own order is not specified.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accumulation {
    /// Products and C summed in `f64`, rounded once.
    #[default]
    Exact,
    /// A chain of `f32` FMAs in the order of increasing k, starting with C.
    Chain,
}

/// Depth worked on together, and columns: few enough that their sums stay in registers.
const DEPTH: usize = 16;
const WIDTH: usize = 32;
/// Columns of `mma.sync`.
const NARROW: usize = 8;
/// Sums that need no allocation.
const FEW: usize = 256;

/// `c += a · bᵀ` with `a` of m × k, `b` of n × k and `c` of m × n, all row-major.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn mma_tile(
    (m, n, k): (usize, usize, usize),
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
    accumulation: Accumulation,
) {
    let (a, b, c) = (&a[..m * k], &b[..n * k], &mut c[..m * n]);
    match accumulation {
        Accumulation::Exact => {
            let (mut few, mut many) = ([0.0; FEW], Vec::new());
            let sums = take(&mut few, &mut many, c.len());
            c.iter().zip(sums.iter_mut()).for_each(|(&c, s)| *s = c.into());
            sum_exact((n, k), a, b, sums);
            c.iter_mut().zip(sums).for_each(|(c, s)| *c = clean(*s as f32));
        }
        Accumulation::Chain => {
            sum_chain((n, k), a, b, c);
            c.iter_mut().for_each(|c| *c = clean(*c));
        }
    }
}

/// As [`mma_tile`] with `f16` accumulators: the sum is formed as there and rounded once more.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn mma_tile_f16(
    (m, n, k): (usize, usize, usize),
    a: &[f32],
    b: &[f32],
    c: &mut [u16],
    accumulation: Accumulation,
) {
    let (a, b, c) = (&a[..m * k], &b[..n * k], &mut c[..m * n]);
    let round = |c: &mut u16, s: f64| *c = Half::F16.round(s, Rounding::Nearest);
    match accumulation {
        Accumulation::Exact => {
            let (mut few, mut many) = ([0.0; FEW], Vec::new());
            let sums = take(&mut few, &mut many, c.len());
            c.iter().zip(sums.iter_mut()).for_each(|(&c, s)| *s = Half::F16.to_f32(c).into());
            sum_exact((n, k), a, b, sums);
            c.iter_mut().zip(sums).for_each(|(c, s)| round(c, *s));
        }
        Accumulation::Chain => {
            let (mut few, mut many) = ([0.0; FEW], Vec::new());
            let sums = take(&mut few, &mut many, c.len());
            c.iter().zip(sums.iter_mut()).for_each(|(&c, s)| *s = Half::F16.to_f32(c));
            sum_chain((n, k), a, b, sums);
            c.iter_mut().zip(sums).for_each(|(c, s)| round(c, (*s).into()));
        }
    }
}

/// Room for `n` sums.
fn take<'s, T: Copy + Default>(
    few: &'s mut [T; FEW],
    many: &'s mut Vec<T>,
    n: usize,
) -> &'s mut [T] {
    if n > FEW {
        many.resize(n, T::default());
        return many;
    }
    &mut few[..n]
}

fn clean(x: f32) -> f32 {
    if x.is_nan() { NAN_F32 } else { x }
}

/// Adds the products to the sums in the order of increasing k, `WIDTH` columns at a time.
#[inline(always)]
fn accumulate<T: Copy + From<f32>, const WIDTH: usize>(
    (n, k): (usize, usize),
    a: &[f32],
    b: &[f32],
    sums: &mut [T],
    step: impl Fn(T, T, T) -> T,
) {
    let zero = [T::from(0.0); WIDTH];
    let mut panel = [zero; DEPTH];
    for (first, from) in
        (0..n).step_by(WIDTH).flat_map(|n| (0..k).step_by(DEPTH).map(move |k| (n, k)))
    {
        let (width, depth) = (WIDTH.min(n - first), DEPTH.min(k - from));
        // Rows of the panel hold one k of all columns, zero beyond the last.
        for (column, row) in b[first * k..].chunks_exact(k).take(width).enumerate() {
            let row = row[from..from + depth].iter();
            row.zip(&mut panel).for_each(|(&x, panel)| panel[column] = x.into());
        }
        for (a, sums) in a.chunks_exact(k).zip(sums.chunks_exact_mut(n)) {
            let sums = &mut sums[first..first + width];
            let mut row = zero;
            row[..width].copy_from_slice(sums);
            for (&x, y) in a[from..from + depth].iter().zip(&panel) {
                for (s, &y) in row.iter_mut().zip(y) {
                    *s = step(*s, x.into(), y);
                }
            }
            sums.copy_from_slice(&row[..width]);
        }
    }
}

/// Products of `f32` are exact in `f64`, so no FMA is needed.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn sum_exact((n, k): (usize, usize), a: &[f32], b: &[f32], sums: &mut [f64]) {
    let step = |s, x, y| s + x * y;
    match n {
        ..=NARROW => accumulate::<_, NARROW>((n, k), a, b, sums, step),
        _ => accumulate::<_, WIDTH>((n, k), a, b, sums, step),
    }
}

/// One rounding a step.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn sum_chain((n, k): (usize, usize), a: &[f32], b: &[f32], sums: &mut [f32]) {
    let step = |s, x: f32, y| x.mul_add(y, s);
    match n {
        ..=NARROW => accumulate::<_, NARROW>((n, k), a, b, sums, step),
        _ => accumulate::<_, WIDTH>((n, k), a, b, sums, step),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_equal_plain_sums_at_every_width() {
        for (m, n, k) in [(16, 8, 16), (16, 8, 8), (64, 256, 16), (16, 40, 37), (3, 5, 7)] {
            let value = |i: usize| ((i * 37 + 11) % 61) as f32 / 16.0 - 1.8;
            let a: Vec<f32> = (0..m * k).map(value).collect();
            let b: Vec<f32> = (0..n * k).map(|i| value(i * 5 + 3)).collect();
            let c: Vec<f32> = (0..m * n).map(|i| value(i * 7 + 1)).collect();
            let (mut exact, mut chain) = (c.clone(), c.clone());
            mma_tile((m, n, k), &a, &b, &mut exact, Accumulation::Exact);
            mma_tile((m, n, k), &a, &b, &mut chain, Accumulation::Chain);
            for (i, &seed) in c.iter().enumerate() {
                let (row, col) = (i / n, i % n);
                let pairs = || (0..k).map(|p| (a[row * k + p], b[col * k + p]));
                let sum =
                    pairs().fold(f64::from(seed), |s, (x, y)| s + f64::from(x) * f64::from(y));
                assert_eq!(exact[i], sum as f32);
                assert_eq!(chain[i], pairs().fold(seed, |s, (x, y)| x.mul_add(y, s)));
            }
        }
    }

    #[test]
    fn special_values() {
        for accumulation in [Accumulation::Exact, Accumulation::Chain] {
            let mut c = [0.0, 0.0, f32::NAN, 1.0];
            let (a, b) = ([f32::INFINITY, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, f32::MAX]);
            mma_tile((2, 2, 2), &a, &b, &mut c, accumulation);
            assert_eq!(c[0], f32::INFINITY);
            assert_eq!([c[1].to_bits(), c[2].to_bits()], [0x7FFF_FFFF; 2]);
            assert_eq!(c[3], f32::MAX);
            let mut h = [0x7BFF];
            mma_tile_f16((1, 1, 1), &[16.0], &[1.0], &mut h, accumulation);
            assert_eq!(h, [0x7C00]);
        }
    }
}
