//! The `.approx` instructions: correctly rounded, or perturbed inside their documented bounds.
use super::half::Half;
use super::{NAN_F32, Rounding};

/// How far a result may be from the exact value.
#[derive(Copy, Clone, Debug)]
enum Bound {
    Ulp(f64),
    Relative(f64),
    Absolute(f64),
}

/// Evaluates approximations. Without a seed every result is computed in `f64` and rounded to
/// nearest; with one it is moved inside the bound, by an amount that depends only on the seed,
/// the operation and the operands.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Approx {
    /// Source of the perturbation.
    pub seed: Option<u64>,
}

impl Approx {
    /// `ex2.approx.f32`.
    pub fn ex2(self, x: f32) -> f32 {
        self.single(1, f64::from(x).exp2(), [x, 0.0], Bound::Ulp(2.0))
    }

    /// `lg2.approx.f32`.
    pub fn lg2(self, x: f32) -> f32 {
        let error = 2f64.powi(-22);
        let near_one = x > 0.5 && x < 2.0;
        let bound = if near_one { Bound::Absolute(error) } else { Bound::Relative(error) };
        self.single(2, f64::from(x).log2(), [x, 0.0], bound)
    }

    /// `rcp.approx.f32`.
    pub fn rcp(self, x: f32) -> f32 {
        self.single(3, 1.0 / f64::from(x), [x, 0.0], Bound::Ulp(1.0))
    }

    /// `sqrt.approx.f32`.
    pub fn sqrt(self, x: f32) -> f32 {
        self.single(4, f64::from(x).sqrt(), [x, 0.0], Bound::Relative(2f64.powi(-23)))
    }

    /// `rsqrt.approx.f32`.
    pub fn rsqrt(self, x: f32) -> f32 {
        let exact = 1.0 / f64::from(x).sqrt();
        self.single(5, exact, [x, 0.0], Bound::Relative(2f64.powf(-22.9)))
    }

    /// `tanh.approx.f32`.
    pub fn tanh(self, x: f32) -> f32 {
        let bound = Bound::Relative(2f64.powi(-11));
        self.single(6, f64::from(x).tanh(), [x, 0.0], bound).clamp(-1.0, 1.0)
    }

    /// `sin.approx.f32`.
    pub fn sin(self, x: f32) -> f32 {
        self.single(7, f64::from(x).sin(), [x, 0.0], Bound::Absolute(2f64.powf(-20.5)))
    }

    /// `cos.approx.f32`.
    pub fn cos(self, x: f32) -> f32 {
        self.single(8, f64::from(x).cos(), [x, 0.0], Bound::Absolute(2f64.powf(-20.5)))
    }

    /// `div.approx.f32`: a divisor above 2^126 gives 0, or NaN below an infinity.
    pub fn div(self, a: f32, b: f32) -> f32 {
        if b.is_finite() && b.abs() > 2f32.powi(126) && !a.is_nan() {
            let zero = 0f32.copysign(f32::from_bits(a.to_bits() ^ b.to_bits()));
            return if a.is_infinite() { NAN_F32 } else { zero };
        }
        self.single(9, f64::from(a) / f64::from(b), [a, b], Bound::Ulp(2.0))
    }

    /// `div.full.f32`.
    pub fn div_full(self, a: f32, b: f32) -> f32 {
        self.single(10, f64::from(a) / f64::from(b), [a, b], Bound::Ulp(2.0))
    }

    /// `ex2.approx` of a 16-bit float.
    pub fn ex2_half(self, kind: Half, x: u16) -> u16 {
        let bound = match kind {
            Half::F16 => Bound::Relative(2f64.powf(-9.9)),
            Half::Bf16 => Bound::Relative(2f64.powi(-7)),
        };
        self.half(11, kind, f64::from(kind.to_f32(x)).exp2(), x, bound)
    }

    /// `tanh.approx` of a 16-bit float.
    pub fn tanh_half(self, kind: Half, x: u16) -> u16 {
        let bound = match kind {
            Half::F16 => Bound::Absolute(2f64.powf(-10.987)),
            Half::Bf16 => Bound::Absolute(2f64.powi(-8)),
        };
        self.half(12, kind, f64::from(kind.to_f32(x)).tanh(), x, bound)
    }

    fn single(self, op: u64, exact: f64, operands: [f32; 2], bound: Bound) -> f32 {
        let rounded = super::f64_to_f32(exact, Rounding::Nearest);
        let limit = match bound {
            Bound::Ulp(n) => n * unit(rounded),
            Bound::Relative(r) => r * exact.abs(),
            Bound::Absolute(a) => a,
        };
        let key = u64::from(operands[0].to_bits()) << 32 | u64::from(operands[1].to_bits());
        let Some(moved) = self.moved(op, key, exact, rounded.into(), limit) else {
            return rounded;
        };
        let moved = moved as f32;
        if allowed(exact, moved.into(), limit) { moved } else { rounded }
    }

    fn half(self, op: u64, kind: Half, exact: f64, operand: u16, bound: Bound) -> u16 {
        let rounded = kind.round(exact, Rounding::Nearest);
        let limit = match bound {
            Bound::Ulp(n) => n * unit(kind.to_f32(rounded)),
            Bound::Relative(r) => r * exact.abs(),
            Bound::Absolute(a) => a,
        };
        let op = op << 1 | u64::from(kind == Half::Bf16);
        let value = kind.to_f32(rounded).into();
        let Some(moved) = self.moved(op, operand.into(), exact, value, limit) else {
            return rounded;
        };
        let moved = kind.round(moved, Rounding::Nearest);
        if allowed(exact, kind.to_f32(moved).into(), limit) { moved } else { rounded }
    }

    /// The exact value moved by a pseudo-random part of `limit`, unless the result is a corner
    /// case (NaN, infinite, zero) or nothing is to be perturbed.
    fn moved(self, op: u64, key: u64, exact: f64, rounded: f64, limit: f64) -> Option<f64> {
        let seed = self.seed?;
        if !rounded.is_finite() || rounded == 0.0 {
            return None;
        }
        let hash = mix(mix(seed ^ op.rotate_left(56)) ^ key);
        let part = (hash >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
        Some(exact + part * limit)
    }
}

/// A perturbed result stays finite, keeps its sign and lies inside the bound.
fn allowed(exact: f64, moved: f64, limit: f64) -> bool {
    moved.is_finite() && moved * exact.signum() > 0.0 && (moved - exact).abs() <= limit
}

/// Distance from |x| to the next `f32` towards zero, the smaller of its two neighbours'.
fn unit(x: f32) -> f64 {
    let x = x.abs();
    if x == 0.0 || !x.is_finite() { 0.0 } else { f64::from(x) - f64::from(x.next_down()) }
}

/// SplitMix64's finaliser.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners_survive_perturbation() {
        for seed in [None, Some(1), Some(2)] {
            let a = Approx { seed };
            assert_eq!(a.ex2(f32::NEG_INFINITY).to_bits(), 0);
            assert_eq!(a.ex2(f32::INFINITY), f32::INFINITY);
            assert_eq!(a.lg2(0.0), f32::NEG_INFINITY);
            assert!(a.lg2(-1.0).is_nan());
            assert_eq!(a.rcp(-0.0), f32::NEG_INFINITY);
            assert_eq!(a.rcp(f32::NEG_INFINITY).to_bits(), 0x8000_0000);
            assert_eq!(a.sqrt(-0.0).to_bits(), 0x8000_0000);
            assert_eq!(a.sqrt(-1.0).to_bits(), 0x7FFF_FFFF);
            assert_eq!(a.rsqrt(0.0), f32::INFINITY);
            assert_eq!(a.div(1.0, 2f32.powi(127)), 0.0);
            assert!(a.div(f32::INFINITY, 2f32.powi(127)).is_nan());
            assert!(a.tanh(f32::INFINITY) <= 1.0);
        }
    }

    #[test]
    fn perturbation_moves_results_but_not_out_of_bounds() {
        let a = Approx { seed: Some(7) };
        let mut moved = 0;
        for i in 1..2000 {
            let x = i as f32 * 0.013 - 11.0;
            let exact = f64::from(x).exp2();
            let y = a.ex2(x);
            moved += usize::from(y != Approx::default().ex2(x));
            assert!((f64::from(y) - exact).abs() <= 2.0 * unit(exact as f32));
            assert_eq!(y, a.ex2(x));
            for kind in [Half::F16, Half::Bf16] {
                let h = kind.from_f32(x, Rounding::Nearest);
                let exact = f64::from(kind.to_f32(h)).exp2();
                let y = f64::from(kind.to_f32(a.ex2_half(kind, h)));
                assert!((y - exact).abs() <= exact * 2f64.powi(-7), "{x} {y} {exact}");
            }
        }
        assert!(moved > 500);
    }
}
