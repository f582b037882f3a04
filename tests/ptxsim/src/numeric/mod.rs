//! Arithmetic of PTX on exact bits: pure functions without state.
//!
//! Operations on `f32` and on 16-bit floats run in `f64` rounded to odd: 53 bits with a sticky
//! last bit are enough to round once more, to any narrower format and in any direction, as if
//! the exact result had been rounded.
pub mod approx;
pub mod convert;
pub mod half;
pub mod int;
pub mod tensor;

use std::cmp::Ordering;

/// NaN that `f32` operations produce.
pub const NAN_F32: f32 = f32::from_bits(0x7FFF_FFFF);

/// Direction in which an inexact result is rounded.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// `.rn`: to nearest, ties to even.
    Nearest,
    /// `.rz`: towards zero.
    Zero,
    /// `.rm`: towards negative infinity.
    Down,
    /// `.rp`: towards positive infinity.
    Up,
    /// `.rna`: to nearest, ties away from zero.
    NearestAway,
}

impl Rounding {
    /// Rounding of a modifier (`rn`, `rz`, `rm`, `rp`, `rna`).
    pub fn parse(modifier: &str) -> Option<Self> {
        Some(match modifier {
            "rn" => Self::Nearest,
            "rz" => Self::Zero,
            "rm" => Self::Down,
            "rp" => Self::Up,
            "rna" => Self::NearestAway,
            _ => return None,
        })
    }
}

/// A binary interchange format of at most 32 bits.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Format {
    exponent: u32,
    mantissa: u32,
}

impl Format {
    /// IEEE single precision.
    pub const F32: Self = Self { exponent: 8, mantissa: 23 };
    /// IEEE half precision.
    pub const F16: Self = Self { exponent: 5, mantissa: 10 };
    /// The upper half of `f32`.
    pub const BF16: Self = Self { exponent: 8, mantissa: 7 };
    /// `f32` with ten bits of mantissa.
    pub const TF32: Self = Self { exponent: 8, mantissa: 10 };

    /// Bits of `x` rounded once to this format; NaN has every bit but the sign set.
    pub fn round(self, x: f64, rounding: Rounding) -> u32 {
        let (mantissa, bits) = (self.mantissa as i64, self.exponent + self.mantissa);
        let infinity = ((1u64 << self.exponent) - 1) << self.mantissa;
        let sign = (x.is_sign_negative() as u32) << bits;
        if x.is_nan() {
            return (1 << bits) - 1;
        }
        if x.is_infinite() || x == 0.0 {
            return sign | if x == 0.0 { 0 } else { infinity as u32 };
        }
        let raw = x.abs().to_bits();
        let field = (raw >> 52) as i64;
        let fraction = raw & ((1 << 52) - 1);
        let significand = if field == 0 { fraction } else { fraction | 1 << 52 };
        let lowest = field.max(1) - 1075; // x = significand · 2^lowest
        let smallest = 2 - (1i64 << (self.exponent - 1)) - mantissa; // exponent of a subnormal unit
        let unit = (lowest + 52 - mantissa).max(smallest);
        // At least 29 bits are dropped: every format here is narrower than f64.
        let dropped = (unit - lowest).min(63) as u32;
        let (kept, rest) = (significand >> dropped, significand & ((1 << dropped) - 1));
        let half = 1u64 << (dropped - 1);
        let up = match rounding {
            Rounding::Nearest => rest > half || (rest == half && kept & 1 == 1),
            Rounding::NearestAway => rest >= half,
            Rounding::Zero => false,
            Rounding::Down => rest != 0 && x < 0.0,
            Rounding::Up => rest != 0 && x > 0.0,
        };
        // A carry out of the mantissa moves on to the exponent.
        let rounded = (((unit - smallest) as u64) << self.mantissa) + kept + up as u64;
        let saturates = match rounding {
            Rounding::Nearest | Rounding::NearestAway => false,
            Rounding::Zero => true,
            Rounding::Down => x > 0.0,
            Rounding::Up => x < 0.0,
        };
        sign | rounded.min(infinity - saturates as u64) as u32
    }
}

/// `x` rounded once to `f32`.
pub fn f64_to_f32(x: f64, rounding: Rounding) -> f32 {
    match rounding {
        _ if x.is_nan() => NAN_F32,
        Rounding::Nearest => x as f32,
        _ => f32::from_bits(Format::F32.round(x, rounding)),
    }
}

/// `s`, the result rounded to nearest, made odd if it differs from the exact result, which lies
/// on the side of `error`'s sign.
fn odd(s: f64, error: f64) -> f64 {
    if error == 0.0 || !s.is_finite() || s == 0.0 || s.to_bits() & 1 == 1 {
        return s;
    }
    let away = (error > 0.0) == (s > 0.0);
    f64::from_bits(if away { s.to_bits() + 1 } else { s.to_bits() - 1 })
}

/// `a + b` rounded to odd; an exact zero has the sign that `rounding` gives it.
pub(crate) fn add_odd(a: f64, b: f64, rounding: Rounding) -> f64 {
    let s = a + b;
    if s == 0.0 && rounding == Rounding::Down && (a.is_sign_negative() || b.is_sign_negative()) {
        return -0.0;
    }
    let t = s - a;
    odd(s, (a - (s - t)) + (b - t))
}

/// `a / b` rounded to odd, for operands that fit `f32`.
pub(crate) fn div_odd(a: f64, b: f64) -> f64 {
    let q = a / b;
    if !q.is_finite() || !b.is_finite() {
        return q;
    }
    odd(q, (-q).mul_add(b, a) * b.signum())
}

/// Square root rounded to odd, for operands that fit `f32`.
pub(crate) fn sqrt_odd(a: f64) -> f64 {
    let s = a.sqrt();
    odd(s, (-s).mul_add(s, a))
}

/// `x`, or the NaN of `f32` operations.
pub(crate) fn canonical(x: f32) -> f32 {
    if x.is_nan() { NAN_F32 } else { x }
}

/// `add.f32`.
pub fn add_f32(a: f32, b: f32, rounding: Rounding) -> f32 {
    match rounding {
        Rounding::Nearest => canonical(a + b),
        _ => f64_to_f32(add_odd(a.into(), b.into(), rounding), rounding),
    }
}

/// `sub.f32`.
pub fn sub_f32(a: f32, b: f32, rounding: Rounding) -> f32 {
    add_f32(a, -b, rounding)
}

/// `mul.f32`.
pub fn mul_f32(a: f32, b: f32, rounding: Rounding) -> f32 {
    match rounding {
        Rounding::Nearest => canonical(a * b),
        _ => f64_to_f32(f64::from(a) * f64::from(b), rounding),
    }
}

/// `fma.f32`: one rounding.
pub fn fma_f32(a: f32, b: f32, c: f32, rounding: Rounding) -> f32 {
    f64_to_f32(add_odd(f64::from(a) * f64::from(b), c.into(), rounding), rounding)
}

/// `div.f32` with a rounding modifier.
pub fn div_f32(a: f32, b: f32, rounding: Rounding) -> f32 {
    match rounding {
        Rounding::Nearest => canonical(a / b),
        _ => f64_to_f32(div_odd(a.into(), b.into()), rounding),
    }
}

/// `rcp.f32` with a rounding modifier.
pub fn rcp_f32(a: f32, rounding: Rounding) -> f32 {
    div_f32(1.0, a, rounding)
}

/// `sqrt.f32` with a rounding modifier.
pub fn sqrt_f32(a: f32, rounding: Rounding) -> f32 {
    match rounding {
        Rounding::Nearest => canonical(a.sqrt()),
        _ => f64_to_f32(sqrt_odd(a.into()), rounding),
    }
}

/// `fma.rn.f64`; addition and multiplication of `f64` to nearest are Rust's own.
pub fn fma_f64(a: f64, b: f64, c: f64) -> f64 {
    a.mul_add(b, c)
}

/// `.ftz`: a subnormal becomes the zero of its sign.
pub fn ftz(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// `.sat`: clamped to [0, 1]; NaN and −0 become +0.
pub fn saturate(x: f32) -> f32 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

/// `min.f32`: −0 is below +0; of one NaN the other operand, or NaN where `propagate` (`.NaN`).
pub fn min_f32(a: f32, b: f32, propagate: bool) -> f32 {
    select(a, b, propagate, a.total_cmp(&b) == Ordering::Less)
}

/// `max.f32`, the mirror image of [`min_f32`].
pub fn max_f32(a: f32, b: f32, propagate: bool) -> f32 {
    select(a, b, propagate, a.total_cmp(&b) == Ordering::Greater)
}

fn select(a: f32, b: f32, propagate: bool, first: bool) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (false, false) => {
            if first {
                a
            } else {
                b
            }
        }
        (false, true) if !propagate => a,
        (true, false) if !propagate => b,
        _ => NAN_F32,
    }
}

/// `min.f64`: as [`min_f32`] without `.NaN`.
pub fn min_f64(a: f64, b: f64) -> f64 {
    if b.is_nan() || (!a.is_nan() && a.total_cmp(&b).is_lt()) { a } else { b }
}

/// `max.f64`: as [`max_f32`] without `.NaN`.
pub fn max_f64(a: f64, b: f64) -> f64 {
    if b.is_nan() || (!a.is_nan() && a.total_cmp(&b).is_gt()) { a } else { b }
}

/// `copysign.f32 d, a, b`: the magnitude of `b` with the sign of `a`, as PTX orders them.
pub fn copysign_f32(a: f32, b: f32) -> f32 {
    b.copysign(a)
}

/// `copysign.f64 d, a, b`.
pub fn copysign_f64(a: f64, b: f64) -> f64 {
    b.copysign(a)
}

/// Comparison of `setp` and `set`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are the instruction's
pub enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

impl Compare {
    /// Comparison of a modifier; `lo ls hi hs` are the unsigned names of `lt le gt ge`.
    pub fn parse(modifier: &str) -> Option<Self> {
        Some(match modifier {
            "eq" => Self::Eq,
            "ne" => Self::Ne,
            "lt" | "lo" => Self::Lt,
            "le" | "ls" => Self::Le,
            "gt" | "hi" => Self::Gt,
            "ge" | "hs" => Self::Ge,
            "equ" => Self::Equ,
            "neu" => Self::Neu,
            "ltu" => Self::Ltu,
            "leu" => Self::Leu,
            "gtu" => Self::Gtu,
            "geu" => Self::Geu,
            "num" => Self::Num,
            "nan" => Self::Nan,
            _ => return None,
        })
    }

    /// Whether the relation holds for operands in `order`; `None` when one is NaN.
    pub fn holds(self, order: Option<Ordering>) -> bool {
        let Some(order) = order else {
            use Compare::*;
            return matches!(self, Equ | Neu | Ltu | Leu | Gtu | Geu | Nan);
        };
        match self {
            Self::Eq | Self::Equ => order.is_eq(),
            Self::Ne | Self::Neu => order.is_ne(),
            Self::Lt | Self::Ltu => order.is_lt(),
            Self::Le | Self::Leu => order.is_le(),
            Self::Gt | Self::Gtu => order.is_gt(),
            Self::Ge | Self::Geu => order.is_ge(),
            Self::Num => true,
            Self::Nan => false,
        }
    }

    /// Comparison of `f32`.
    pub fn f32(self, a: f32, b: f32) -> bool {
        self.holds(a.partial_cmp(&b))
    }

    /// Comparison of `f64`.
    pub fn f64(self, a: f64, b: f64) -> bool {
        self.holds(a.partial_cmp(&b))
    }

    /// Comparison of `f16` or `bf16` bits.
    pub fn half(self, kind: half::Half, a: u16, b: u16) -> bool {
        self.f32(kind.to_f32(a), kind.to_f32(b))
    }

    /// Comparison of integers of one type, in the low bits.
    pub fn int(self, ty: int::Int, a: u64, b: u64) -> bool {
        self.holds(Some(ty.value(a).cmp(&ty.value(b))))
    }
}

#[cfg(test)]
mod tests;
