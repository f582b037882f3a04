//! Inputs of every element type, and comparison with float64.

use half::{bf16, f16};
use rand::distr::StandardUniform;
use rand::prelude::*;
use rand_chacha::ChaCha8Rng;

/// Element types of buffers.
pub trait Element: bytemuck::Pod {
    /// Rounds to nearest.
    fn round(x: f64) -> Self;
    /// The exact value.
    fn value(self) -> f64;
}

macro_rules! element {
    ($type:ty, $round:expr) => {
        impl Element for $type {
            fn round(x: f64) -> Self {
                $round(x)
            }
            fn value(self) -> f64 {
                self.into()
            }
        }
    };
}
element!(f32, |x| x as f32);
element!(f16, |x| f16::from_f32(to_odd(x)));
element!(bf16, |x| bf16::from_f32(to_odd(x)));

/// The f32 next to `x` that is exact or has an odd last bit, so that a second rounding to 16 bits
/// gives what one would have.
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || !nearest.is_finite() {
        return nearest;
    }
    let away = f64::from(nearest).abs() > x.abs();
    f32::from_bits((nearest.to_bits() - u32::from(away)) | 1)
}

/// A generator that depends on the name of the case only.
pub fn generator(name: &str) -> ChaCha8Rng {
    let seed = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    ChaCha8Rng::seed_from_u64(seed)
}

/// `n` values, uniform in (-scale, scale).
pub fn random<T: Element>(rng: &mut impl Rng, n: usize, scale: f64) -> Vec<T> {
    let unit = rng.sample_iter(StandardUniform).take(n);
    unit.map(|u: f64| T::round((2.0 * u - 1.0) * scale)).collect()
}

/// `n` multiples of 1/1024 in (-1, 1): f32 sums of some thousand are exact in any order.
pub fn steps<T: Element>(rng: &mut impl Rng, n: usize) -> Vec<T> {
    (0..n).map(|_| T::round(f64::from(rng.random_range(-1023..1024)) / 1024.0)).collect()
}

/// The values in float64.
pub fn values<T: Element>(data: &[T]) -> Vec<f64> {
    data.iter().map(|x| x.value()).collect()
}

/// Fails unless √(Σ (got − want)² / Σ want²) ≤ `bound`; a NaN or infinity that is not wanted fails.
#[track_caller]
pub fn assert_close(case: &str, got: &[f64], want: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len(), "{case}: number of elements");
    let mut worst = (0.0, 0);
    let (mut error, mut norm) = (0.0, 0.0);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        if !w.is_finite() {
            assert!(g == w || g.is_nan() && w.is_nan(), "{case}: element {i} is {g}, not {w}");
            continue;
        }
        assert!(g.is_finite(), "{case}: element {i} is {g}, not {w}");
        error += (g - w).powi(2);
        norm += w.powi(2);
        if (g - w).abs() > worst.0 {
            worst = ((g - w).abs(), i);
        }
    }
    let relative = (error / norm.max(f64::MIN_POSITIVE)).sqrt();
    let (size, at) = worst;
    assert!(
        relative <= bound,
        "{case}: relative RMS error {relative:.3e} > {bound:.1e}; worst off by {size:.3e} at {at}: \
         {} instead of {}",
        got[at],
        want[at],
    );
}
