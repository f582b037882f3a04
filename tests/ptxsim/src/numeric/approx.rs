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

/// What is approximated.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Function {
    /// `ex2.approx`.
    Ex2 = 1,
    /// `lg2.approx`.
    Lg2,
    /// `rcp.approx`.
    Rcp,
    /// `sqrt.approx`.
    Sqrt,
    /// `rsqrt.approx`.
    Rsqrt,
    /// `tanh.approx`.
    Tanh,
    /// `sin.approx`.
    Sin,
    /// `cos.approx`.
    Cos,
    /// `div.approx`, of divisors up to 2^126.
    Div,
    /// `div.full`.
    DivFull,
}

impl Function {
    fn exact(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Ex2 => a.exp2(),
            Self::Lg2 => a.log2(),
            Self::Rcp => 1.0 / a,
            Self::Sqrt => a.sqrt(),
            Self::Rsqrt => 1.0 / a.sqrt(),
            Self::Tanh => a.tanh(),
            Self::Sin => a.sin(),
            Self::Cos => a.cos(),
            Self::Div | Self::DivFull => a / b,
        }
    }

    /// The documented bound of the instruction of f32 at `a`.
    fn bound(self, a: f32) -> Bound {
        match self {
            Self::Ex2 | Self::Div | Self::DivFull => Bound::Ulp(2.0),
            Self::Lg2 if a > 0.5 && a < 2.0 => Bound::Absolute(2f64.powi(-22)),
            Self::Lg2 => Bound::Relative(2f64.powi(-22)),
            Self::Rcp => Bound::Ulp(1.0),
            Self::Sqrt => Bound::Relative(2f64.powi(-23)),
            Self::Rsqrt => Bound::Relative(2f64.powf(-22.9)),
            Self::Tanh => Bound::Relative(2f64.powi(-11)),
            Self::Sin | Self::Cos => Bound::Absolute(2f64.powf(-20.5)),
        }
    }

    /// The same of a 16-bit float.
    fn bound_half(self, kind: Half) -> Bound {
        match (self, kind) {
            (Self::Tanh, Half::F16) => Bound::Absolute(2f64.powf(-10.987)),
            (Self::Tanh, Half::Bf16) => Bound::Absolute(2f64.powi(-8)),
            (_, Half::F16) => Bound::Relative(2f64.powf(-9.9)),
            (_, Half::Bf16) => Bound::Relative(2f64.powi(-7)),
        }
    }

    /// Whether a bound is documented at these operands.
    fn bounded(self, a: f32, b: f32) -> bool {
        let normal = 2f32.powi(-126)..=2f32.powi(126);
        match self {
            Self::Sin | Self::Cos => !a.is_finite() || a.abs() <= std::f32::consts::PI,
            Self::Div => normal.contains(&b.abs()) || b == 0.0 || !b.is_finite(),
            _ => true,
        }
    }

    /// Whether the rules allow a result of f32, with `.ftz` where `flush`.
    pub fn allows(self, operands: [f32; 2], flush: bool, result: f32) -> bool {
        let [a, b] = operands.map(|x| if flush { super::ftz(x) } else { x });
        let exact = self.exact(a.into(), b.into());
        let power = f32::from_bits((exact as f32).min(f32::MAX).to_bits() & 0x7F80_0000);
        let least = f64::from(f32::from_bits(1));
        let ulp = (f64::from(power) * 2f64.powi(-23)).max(least);
        let limit = self.bound(a).limit(exact, ulp).max(least);
        if flush && (result == 0.0 || result.is_subnormal()) && exact != 0.0 {
            return result == 0.0 && exact.abs() - limit < f64::from(f32::MIN_POSITIVE);
        }
        !self.bounded(a, b) || within(exact, result.into(), limit, 2f64.powi(128))
    }

    /// Whether the rules allow a result of a 16-bit float.
    pub fn allows_half(self, kind: Half, a: u16, flush: bool, result: u16) -> bool {
        let exact = self.exact(kind.to_f32(a).into(), 0.0);
        let limit = self.bound_half(kind).limit(exact, 0.0).max(kind.to_f32(1).into());
        let overflow = match kind {
            Half::F16 => 2f64.powi(16),
            Half::Bf16 => 2f64.powi(128),
        };
        let flushed =
            flush && result << 1 == 0 && kind.ftz(kind.round(exact.abs(), Rounding::Zero)) == 0;
        flushed || within(exact, kind.to_f32(result).into(), limit, overflow)
    }
}

/// Whether a result is the NaN, infinity or zero that it must be, or close enough; an infinity
/// stands for the number beyond the largest.
fn within(exact: f64, result: f64, limit: f64, overflow: f64) -> bool {
    if exact.is_nan() || result.is_nan() {
        return exact.is_nan() && result.is_nan();
    }
    if exact.is_infinite() || exact == 0.0 {
        return result.to_bits() == exact.to_bits();
    }
    let clamped = |x: f64| x.clamp(-overflow, overflow);
    (clamped(result) - clamped(exact)).abs() <= limit
}

impl Bound {
    fn limit(self, exact: f64, ulp: f64) -> f64 {
        match self {
            Self::Ulp(n) => n * ulp,
            Self::Relative(r) => r * exact.abs(),
            Self::Absolute(a) => a,
        }
    }
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
        self.single(Function::Ex2, [x, 0.0])
    }

    /// `lg2.approx.f32`.
    pub fn lg2(self, x: f32) -> f32 {
        self.single(Function::Lg2, [x, 0.0])
    }

    /// `rcp.approx.f32`.
    pub fn rcp(self, x: f32) -> f32 {
        self.single(Function::Rcp, [x, 0.0])
    }

    /// `sqrt.approx.f32`.
    pub fn sqrt(self, x: f32) -> f32 {
        self.single(Function::Sqrt, [x, 0.0])
    }

    /// `rsqrt.approx.f32`.
    pub fn rsqrt(self, x: f32) -> f32 {
        self.single(Function::Rsqrt, [x, 0.0])
    }

    /// `tanh.approx.f32`.
    pub fn tanh(self, x: f32) -> f32 {
        self.single(Function::Tanh, [x, 0.0]).clamp(-1.0, 1.0)
    }

    /// `sin.approx.f32`.
    pub fn sin(self, x: f32) -> f32 {
        self.single(Function::Sin, [x, 0.0])
    }

    /// `cos.approx.f32`.
    pub fn cos(self, x: f32) -> f32 {
        self.single(Function::Cos, [x, 0.0])
    }

    /// `div.approx.f32`: a divisor above 2^126 gives 0, or NaN below an infinity.
    pub fn div(self, a: f32, b: f32) -> f32 {
        if b.is_finite() && b.abs() > 2f32.powi(126) && !a.is_nan() {
            let zero = 0f32.copysign(f32::from_bits(a.to_bits() ^ b.to_bits()));
            return if a.is_infinite() { NAN_F32 } else { zero };
        }
        self.single(Function::Div, [a, b])
    }

    /// `div.full.f32`.
    pub fn div_full(self, a: f32, b: f32) -> f32 {
        self.single(Function::DivFull, [a, b])
    }

    /// `ex2.approx` of a 16-bit float.
    pub fn ex2_half(self, kind: Half, x: u16) -> u16 {
        self.half(11, kind, Function::Ex2, x)
    }

    /// `tanh.approx` of a 16-bit float.
    pub fn tanh_half(self, kind: Half, x: u16) -> u16 {
        self.half(12, kind, Function::Tanh, x)
    }

    fn single(self, function: Function, [a, b]: [f32; 2]) -> f32 {
        let exact = function.exact(a.into(), b.into());
        let rounded = super::f64_to_f32(exact, Rounding::Nearest);
        let limit = function.bound(a).limit(exact, unit(rounded));
        let key = u64::from(a.to_bits()) << 32 | u64::from(b.to_bits());
        let Some(moved) = self.moved(function as u64, key, exact, rounded.into(), limit) else {
            return rounded;
        };
        let moved = moved as f32;
        if allowed(exact, moved.into(), limit) { moved } else { rounded }
    }

    fn half(self, op: u64, kind: Half, function: Function, operand: u16) -> u16 {
        let exact = function.exact(kind.to_f32(operand).into(), 0.0);
        let rounded = kind.round(exact, Rounding::Nearest);
        let limit = function.bound_half(kind).limit(exact, unit(kind.to_f32(rounded)));
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

    #[test]
    fn bounds_allow_what_is_close_enough_and_no_more() {
        let next = |x: f32, n: i32| f32::from_bits((x.to_bits() as i32 + n) as u32);
        let allows = |f: Function, x: f32, y: f32| f.allows([x, 0.0], false, y);
        assert!(allows(Function::Rcp, 3.0, next(1.0 / 3.0, -1)));
        assert!(!allows(Function::Rcp, 3.0, next(1.0 / 3.0, 1)));
        assert!(allows(Function::Ex2, 0.5, next(2f32.sqrt(), 2)));
        assert!(!allows(Function::Ex2, 0.5, next(2f32.sqrt(), 3)));
        assert!(Function::DivFull.allows([f32::MAX, 1.0], false, f32::INFINITY));
        assert!(!allows(Function::Ex2, 127.0, f32::INFINITY));
        assert!(!allows(Function::Sqrt, -1.0, 0.0) && allows(Function::Sqrt, -1.0, f32::NAN));
        assert!(!allows(Function::Sqrt, -0.0, 0.0) && allows(Function::Sqrt, -0.0, -0.0));
        assert!(!allows(Function::Sin, 3.0, 0.2) && allows(Function::Sin, 1e9, 0.2));
        let (few, more) = (f32::from_bits(7), f32::from_bits(8));
        assert!(allows(Function::Ex2, -146.5, few) && !allows(Function::Ex2, -146.5, more));
        let tiny = f32::from_bits(0x40_0000);
        assert!(Function::Ex2.allows([-127.0, 0.0], false, tiny));
        assert!(!Function::Ex2.allows([-127.0, 0.0], true, tiny));
        assert!(Function::Ex2.allows([-127.0, 0.0], true, 0.0));
        assert!(!Function::Ex2.allows([-120.0, 0.0], true, 0.0));
        let one = |y: u16| Function::Ex2.allows_half(Half::F16, 0, false, y);
        assert!(one(0x3C00) && one(0x3C01) && !one(0x3C02) && !one(0x7C00));
    }
}
