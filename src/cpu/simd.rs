//! The element-wise parts: exponential, feature map, softmax. Plain loops over fixed-width chunks,
//! compiled for every SIMD level and chosen at run time.

use multiversion::target::target_cfg_f;

/// Lanes per chunk: one AVX-512 register, two of AVX2, four of NEON.
pub(crate) const LANES: usize = 16;

/// Compiles functions for AVX-512, for AVX2 and for the target's baseline (NEON on aarch64), and
/// picks at run time.
macro_rules! vectorised {
    ($($function:item)*) => {
        $(#[multiversion::multiversion(targets(
            "x86_64+avx512f+avx512bw+avx512cd+avx512dq+avx512vl+avx2+fma",
            "x86_64+avx2+fma",
        ))]
        $function)*
    };
}

pub(crate) use vectorised;

/// exp(x) for x ≤ 0 within 2 ulp; 0 where it would be below f32's smallest normal number. NaN
/// stays NaN. Cody-Waite reduction, then a polynomial of degree 6 on [−ln2/2, ln2/2] (Cephes).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.336_54;
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer
    let clamped = if x < LOWEST { LOWEST } else { x };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = r.mul_add(1.987_569_1e-4, 1.398_199_9e-3);
    let p = r.mul_add(p, 8.333_452e-3);
    let p = r.mul_add(p, 4.166_579_6e-2);
    let p = r.mul_add(p, 1.666_666_5e-1);
    let p = r.mul_add(p, 5e-1);
    let p = (r * r).mul_add(p, r) + 1.0;
    // The low bits of `shifted` hold n: shift them into the exponent.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < LOWEST { 0.0 } else { p * power }
}

/// 2ˣ for x ≤ 0, as [`exp`]; cheaper, as x needs no reduction but its fraction.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    const LOWEST: f32 = -126.0;
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < LOWEST { LOWEST } else { x };
    let shifted = clamped + ROUND;
    let r = clamped - (shifted - ROUND);
    let p = r.mul_add(1.535_336_2e-4, 1.339_887_4e-3);
    let p = r.mul_add(p, 9.618_437e-3);
    let p = r.mul_add(p, 5.550_332_5e-2);
    let p = r.mul_add(p, 2.402_264_8e-1);
    let p = r.mul_add(p, std::f32::consts::LN_2);
    let p = r.mul_add(p, 1.0);
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < LOWEST { 0.0 } else { p * power }
}

/// σ(x) = ELU(x) + 1.
#[inline(always)]
pub(crate) fn sigma(x: f32) -> f32 {
    let e = exp(if x > 0.0 { 0.0 } else { x });
    if x > 0.0 { x + 1.0 } else { e }
}

#[inline(always)]
pub(crate) fn chunked(x: &[f32]) -> (&[[f32; LANES]], &[f32]) {
    x.as_chunks::<LANES>()
}

/// Folds the lanes in a tree: log2(16) steps instead of 16.
#[inline(always)]
pub(crate) fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// Largest element, NaN ignored; −∞ for an empty row.
#[inline(always)]
pub(crate) fn max(row: &[f32]) -> f32 {
    let pick = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = chunked(row);
    // Two at once: one would wait for its own last result.
    let (pairs, odd) = chunks.as_chunks::<2>();
    let mut acc = [[f32::NEG_INFINITY; LANES]; 2];
    for pair in pairs {
        for (acc, chunk) in acc.iter_mut().zip(pair) {
            for i in 0..LANES {
                acc[i] = pick(acc[i], chunk[i]);
            }
        }
    }
    let [mut acc, second] = acc;
    for chunk in odd.iter().chain([&second]) {
        for i in 0..LANES {
            acc[i] = pick(acc[i], chunk[i]);
        }
    }
    rest.iter().copied().fold(fold(acc, pick), pick)
}

#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((ac, ar), (bc, br)) = (chunked(a), chunked(b));
    let mut acc = [0.0f32; LANES];
    for (a, b) in ac.iter().zip(bc) {
        for i in 0..LANES {
            acc[i] = a[i].mul_add(b[i], acc[i]);
        }
    }
    let tail: f32 = ar.iter().zip(br).map(|(a, b)| a * b).sum();
    fold(acc, |a, b| a + b) + tail
}

/// x ← 2^(x − shift), and the sum of the results.
#[inline(always)]
fn exp_sum(row: &mut [f32], shift: f32) -> f32 {
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    let mut acc = [0.0f32; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp2(chunk[i] - shift);
            acc[i] += chunk[i];
        }
    }
    let mut sum = fold(acc, |a, b| a + b);
    for x in rest {
        *x = exp2(*x - shift);
        sum += *x;
    }
    sum
}

/// Brings rows into the cache one after another: processors foresee that. Out of memory, rows that are
/// read side by side come at half the rate (docs/cpu.md).
#[inline(always)]
fn fetch<const D: usize>(rows: [&[f32]; D]) {
    let lines = rows.iter().flat_map(|row| row.iter().step_by(LANES));
    std::hint::black_box(lines.fold(0, |bits, x| bits | x.to_bits()));
}

/// The first `D` elements of row `r`.
#[inline(always)]
fn row_of<const D: usize>((a, [row, col]): (&[f32], [usize; 2]), r: usize) -> [f32; D] {
    std::array::from_fn(|k| a[r * row + k * col])
}

/// `D` steps of the sum for a single row of [`add_product`].
#[inline(always)]
fn add_row<const D: usize>(dst: &mut [f32], a: [f32; D], b: [&[f32]; D]) {
    let b = b.map(|row| &row[..dst.len()]);
    for j in 0..dst.len() {
        let mut sum = dst[j];
        for k in 0..D {
            sum = a[k].mul_add(b[k][j], sum);
        }
        dst[j] = sum;
    }
}

/// The same for `R` rows: a vector of `b` is loaded once for all of them. (The compiler makes a mess of
/// this loop for one row.)
#[inline(always)]
fn add_rows_of<const R: usize, const D: usize>(
    dst: &mut [f32],
    a: (&[f32], [usize; 2]),
    b: [&[f32]; D],
) {
    let width = b[0].len();
    let a: [[f32; D]; R] = std::array::from_fn(|r| row_of(a, r));
    let mut rows = dst.chunks_exact_mut(width);
    let dst: [_; R] = std::array::from_fn(|_| match rows.next() {
        Some(row) => row.as_chunks_mut::<LANES>(),
        None => unreachable!("`dst` has so many rows"),
    });
    let b = b.map(|row| chunked(&row[..width]));
    for j in 0..width / LANES {
        let b: [[f32; LANES]; D] = std::array::from_fn(|k| b[k].0[j]);
        for r in 0..R {
            let mut sums = dst[r].0[j];
            for k in 0..D {
                for i in 0..LANES {
                    sums[i] = a[r][k].mul_add(b[k][i], sums[i]);
                }
            }
            dst[r].0[j] = sums;
        }
    }
    for r in 0..R {
        add_row(dst[r].1, a[r], b.map(|row| row.1));
    }
}

/// `D` steps of [`add_product`] for all rows.
#[inline(always)]
fn add_steps<const D: usize>(dst: &mut [f32], a: (&[f32], [usize; 2]), b: [&[f32]; D]) {
    const ROWS: usize = 4;
    let width = b[0].len();
    for (i, rows) in dst.chunks_mut(ROWS * width).enumerate() {
        let a = (&a.0[i * ROWS * a.1[0]..], a.1);
        match rows.len() / width {
            1 => add_row(rows, row_of(a, 0), b),
            2 => add_rows_of::<2, D>(rows, a, b),
            3 => add_rows_of::<3, D>(rows, a, b),
            _ => add_rows_of::<ROWS, D>(rows, a, b),
        }
    }
}

/// Running softmax statistics of one row: maximum score and sum of weights so far.
#[derive(Clone, Copy)]
pub(crate) struct Running {
    pub max: f32,
    pub sum: f32,
}

impl Running {
    /// Nothing seen yet.
    pub const START: Running = Running { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// Makes the scores that a row does not see −∞, and its maximum that of the others.
#[inline(always)]
fn raise(s: &mut [f32], visible: usize, run: &mut Running, o: &mut [f32]) {
    if visible < s.len() {
        hide(&mut s[visible - visible % LANES..], visible % LANES);
    }
    let grown = max(s);
    if grown > run.max {
        // Before the first block `o` holds nothing.
        if run.max != f32::NEG_INFINITY {
            let factor = exp2(run.max - grown);
            o.iter_mut().for_each(|o| *o *= factor);
            run.sum *= factor;
        }
        run.max = grown;
    }
}

/// s ← −∞ but for the first few elements, less than [`LANES`].
#[inline(always)]
fn hide(s: &mut [f32], seen: usize) {
    let (chunks, rest) = s.as_chunks_mut::<LANES>();
    let mut seen = seen;
    for chunk in chunks {
        for (i, x) in chunk.iter_mut().enumerate() {
            *x = if i < seen { *x } else { f32::NEG_INFINITY };
        }
        seen = 0;
    }
    rest.iter_mut().skip(seen).for_each(|x| *x = f32::NEG_INFINITY);
}

/// `multiversion` renames lifetimes, `'static` as well.
type Name = &'static str;

vectorised! {

/// The vector instructions of this machine that the element-wise parts use: `AVX-512`, `AVX2`, `NEON` or
/// `baseline SIMD`. (The `gemm` crate, whose the matrix products are, asks the processor itself.)
pub fn simd_level() -> Name {
    let wide = target_cfg_f!(target_feature = "avx512f");
    match (wide, target_cfg_f!(target_feature = "avx2"), cfg!(target_arch = "aarch64")) {
        (true, ..) => "AVX-512",
        (_, true, _) => "AVX2",
        (.., true) => "NEON",
        _ => "baseline SIMD",
    }
}

/// One block of a blockwise softmax. Row i of `s` (`width` scores) sees its first `visible[i]`
/// keys; scores become weights relative to the new maximum, unseen ones 0, and row i of `o`
/// (`dv` wide) is rescaled where the maximum grew.
pub(crate) fn softmax_block(
    s: &mut [f32],
    width: usize,
    visible: &[usize],
    running: &mut [Running],
    o: &mut [f32],
    dv: usize,
) {
    // Pass by pass, because rows wait for their maxima, and not for those of others.
    let rows = s.chunks_exact_mut(width).zip(o.chunks_exact_mut(dv)).zip(&mut *running);
    for (((s, o), run), visible) in rows.zip(visible) {
        raise(s, *visible, run, o);
    }
    for (s, run) in s.chunks_exact_mut(width).zip(running) {
        // All scores −∞: any finite shift gives weights 0 instead of NaN.
        let shift = if run.max == f32::NEG_INFINITY { 0.0 } else { run.max };
        run.sum += exp_sum(s, shift);
    }
}

/// dst ← dst + a·b for few rows, `dst` and `b` rows of `width`, `a` of `depth`. `b` is read once, in the
/// order in which it lies: its memory sets the pace. `b` comes with the elements between rows, `a` with
/// those between rows and between columns.
pub(crate) fn add_product(
    dst: &mut [f32],
    a: (&[f32], [usize; 2]),
    b: (&[f32], usize),
    width: usize,
    depth: usize,
) {
    const STEPS: usize = 8;
    let row = |k: usize| &b.0[k * b.1..][..width];
    let whole = depth - depth % STEPS;
    for k in (0..whole).step_by(STEPS) {
        let rows = std::array::from_fn(|i| row(k + i));
        fetch(rows);
        add_steps::<STEPS>(dst, (&a.0[k * a.1[1]..], a.1), rows);
    }
    for k in whole..depth {
        add_steps::<1>(dst, (&a.0[k * a.1[1]..], a.1), [row(k)]);
    }
}

/// x ← σ(x), element by element.
pub(crate) fn feature_map(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = sigma(*x));
}

/// Adds the rows of `x` (each as long as `sums`) to `sums`.
pub(crate) fn add_rows(x: &[f32], sums: &mut [f32]) {
    for row in x.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(s, x)| *s += x);
    }
}

/// y ← x · factor.
pub(crate) fn scaled(x: &[f32], factor: f32, y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = x * factor);
}

/// x ← x · factor.
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|x| *x *= factor);
}

/// x ← wx·x + wy·y, a branch of weight 0 being absent whatever it holds.
pub(crate) fn blend(x: &mut [f32], wx: f32, y: &[f32], wy: f32) {
    if wx == 0.0 {
        x.iter_mut().zip(y).for_each(|(x, y)| *x = wy * y);
    } else if wy == 0.0 {
        x.iter_mut().for_each(|x| *x *= wx);
    } else {
        x.iter_mut().zip(y).for_each(|(x, y)| *x = wx.mul_add(*x, wy * y));
    }
}

}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulps_and_flushes() {
        let mut worst = 0.0f64;
        for i in 0..873_000 {
            let x = -(i as f32) * 1e-4;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            worst = worst.max((got / want - 1.0).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst:e}");
        assert_eq!([exp(0.0), exp(-87.4), exp(f32::NEG_INFINITY)], [1.0, 0.0, 0.0]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp2_is_within_two_ulps_and_flushes() {
        let mut worst = 0.0f64;
        for i in 0..1_260_000 {
            let x = -(i as f32) * 1e-4;
            let (got, want) = (f64::from(exp2(x)), f64::from(x).exp2());
            worst = worst.max((got / want - 1.0).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst:e}");
        assert_eq!([exp2(0.0), exp2(-126.1), exp2(f32::NEG_INFINITY)], [1.0, 0.0, 0.0]);
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn sigma_is_elu_plus_one() {
        assert_eq!(
            [sigma(2.0), sigma(0.0), sigma(-200.0), sigma(f32::INFINITY)],
            [3.0, 1.0, 0.0, f32::INFINITY]
        );
        assert!(sigma(f32::NAN).is_nan());
    }

    #[test]
    fn all_scores_minus_infinity_weigh_nothing() {
        let (mut s, mut o) = ([f32::NEG_INFINITY; 20], [0.0; 2]);
        let mut running = [Running::START];
        softmax_block(&mut s, 20, &[20], &mut running, &mut o, 2);
        assert_eq!((s, running[0].sum), ([0.0; 20], 0.0));
    }
}
