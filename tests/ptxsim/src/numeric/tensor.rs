//! Matrix products of the tensor cores, with the accumulation order as a choice.
use super::half::Half;
use super::{NAN_F32, Rounding};
use multiversion::multiversion;

/// How a dot product is summed; the hardware's own order is not specified.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accumulation {
    /// Products and C summed in `f64`, rounded once.
    #[default]
    Exact,
    /// A chain of `f32` FMAs in the order of increasing k, starting with C.
    Chain,
}

/// Columns worked on together: few enough that their sums stay in registers.
const WIDTH: usize = 32;

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
            let mut sums: Vec<f64> = c.iter().map(|&x| x.into()).collect();
            sum_exact((n, k), a, b, &mut sums);
            c.iter_mut().zip(&sums).for_each(|(c, &s)| *c = clean(s as f32));
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
    let seed = c.iter().map(|&x| Half::F16.to_f32(x));
    let sums: Vec<f64> = match accumulation {
        Accumulation::Exact => {
            let mut sums: Vec<f64> = seed.map(f64::from).collect();
            sum_exact((n, k), a, b, &mut sums);
            sums
        }
        Accumulation::Chain => {
            let mut sums: Vec<f32> = seed.collect();
            sum_chain((n, k), a, b, &mut sums);
            sums.into_iter().map(f64::from).collect()
        }
    };
    c.iter_mut().zip(sums).for_each(|(c, s)| *c = Half::F16.round(s, Rounding::Nearest));
}

fn clean(x: f32) -> f32 {
    if x.is_nan() { NAN_F32 } else { x }
}

/// Panel of `b` from column `first`: k rows of [`WIDTH`] columns, zero beyond the last.
fn panel<T: Copy + From<f32>>(b: &[f32], k: usize, first: usize, out: &mut [[T; WIDTH]]) {
    out.fill([T::from(0.0); WIDTH]);
    for (column, row) in b[first * k..].chunks_exact(k).take(WIDTH).enumerate() {
        row.iter().zip(out.iter_mut()).for_each(|(&x, out)| out[column] = x.into());
    }
}

macro_rules! sum {
    ($(#[$doc:meta])* $name:ident, $real:ty, |$s:ident, $x:ident, $y:ident| $step:expr) => {
        $(#[$doc])*
        #[multiversion(targets(
            "x86_64+avx512f+avx512vl+avx2+fma",
            "x86_64+avx2+fma",
        ))]
        fn $name((n, k): (usize, usize), a: &[f32], b: &[f32], sums: &mut [$real]) {
            if n == 0 || k == 0 {
                return;
            }
            let mut columns = vec![[0.0; WIDTH]; k];
            for first in (0..n).step_by(WIDTH) {
                let width = WIDTH.min(n - first);
                panel::<$real>(b, k, first, &mut columns);
                for (a, sums) in a.chunks_exact(k).zip(sums.chunks_exact_mut(n)) {
                    let mut row = [0.0; WIDTH];
                    row[..width].copy_from_slice(&sums[first..first + width]);
                    for (&x, y) in a.iter().zip(&columns) {
                        let $x = <$real>::from(x);
                        for ($s, &$y) in row.iter_mut().zip(y) {
                            *$s = $step;
                        }
                    }
                    sums[first..first + width].copy_from_slice(&row[..width]);
                }
            }
        }
    };
}

sum! {
    /// Products of `f32` are exact in `f64`, so no FMA is needed.
    sum_exact, f64, |s, x, y| *s + x * y
}
sum! {
    /// One rounding a step.
    sum_chain, f32, |s, x, y| x.mul_add(y, *s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_equal_plain_sums_at_every_width() {
        for (m, n, k) in [(16, 8, 16), (16, 8, 8), (64, 256, 16), (16, 40, 16), (3, 5, 7)] {
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
