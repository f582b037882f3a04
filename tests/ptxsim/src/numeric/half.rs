//! `f16` and `bf16` arithmetic on bits, each operation rounded once.
use super::{Format, Rounding, add_odd, max_f32, min_f32};

/// NaN that operations of either 16-bit format produce.
pub const NAN: u16 = 0x7FFF;

/// One of the two 16-bit formats.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Half {
    /// IEEE half precision.
    F16,
    /// The upper half of `f32`.
    Bf16,
}

impl Half {
    /// Exact value.
    #[inline]
    pub fn to_f32(self, bits: u16) -> f32 {
        match self {
            Self::F16 => ::half::f16::from_bits(bits).to_f32(),
            Self::Bf16 => f32::from_bits(u32::from(bits) << 16),
        }
    }

    /// `x` rounded once; NaN becomes [`NAN`].
    pub fn round(self, x: f64, rounding: Rounding) -> u16 {
        let format = match self {
            Self::F16 => Format::F16,
            Self::Bf16 => Format::BF16,
        };
        format.round(x, rounding) as u16
    }

    /// `cvt` from `f32`.
    pub fn from_f32(self, x: f32, rounding: Rounding) -> u16 {
        self.round(x.into(), rounding)
    }

    fn wide(self, bits: u16) -> f64 {
        self.to_f32(bits).into()
    }

    /// `add.rn`.
    pub fn add(self, a: u16, b: u16) -> u16 {
        let sum = add_odd(self.wide(a), self.wide(b), Rounding::Nearest);
        self.round(sum, Rounding::Nearest)
    }

    /// `sub.rn`.
    pub fn sub(self, a: u16, b: u16) -> u16 {
        self.add(a, b ^ 0x8000)
    }

    /// `mul.rn`.
    pub fn mul(self, a: u16, b: u16) -> u16 {
        self.round(self.wide(a) * self.wide(b), Rounding::Nearest)
    }

    /// `fma.rn`.
    pub fn fma(self, a: u16, b: u16, c: u16) -> u16 {
        let sum = add_odd(self.wide(a) * self.wide(b), self.wide(c), Rounding::Nearest);
        self.round(sum, Rounding::Nearest)
    }

    /// `.relu` of a result: negative becomes +0, NaN [`NAN`].
    pub fn relu(self, x: u16) -> u16 {
        match self.to_f32(x) {
            v if v.is_nan() => NAN,
            v if v.is_sign_negative() => 0,
            _ => x,
        }
    }

    /// `.sat` of a result: clamped to [0, 1], NaN becomes +0.
    pub fn saturate(self, x: u16) -> u16 {
        self.from_f32(super::saturate(self.to_f32(x)), Rounding::Nearest)
    }

    /// `.ftz`: a subnormal becomes the zero of its sign.
    pub fn ftz(self, x: u16) -> u16 {
        let exponent = match self {
            Self::F16 => 0x7C00,
            Self::Bf16 => 0x7F80,
        };
        if x & exponent == 0 { x & 0x8000 } else { x }
    }

    /// `min`, with `.NaN` where `propagate`.
    pub fn min(self, a: u16, b: u16, propagate: bool) -> u16 {
        self.from_f32(min_f32(self.to_f32(a), self.to_f32(b), propagate), Rounding::Nearest)
    }

    /// `max`, with `.NaN` where `propagate`.
    pub fn max(self, a: u16, b: u16, propagate: bool) -> u16 {
        self.from_f32(max_f32(self.to_f32(a), self.to_f32(b), propagate), Rounding::Nearest)
    }

    /// `abs`.
    pub fn abs(self, a: u16) -> u16 {
        self.clean(a, a & 0x7FFF)
    }

    /// `neg`.
    pub fn neg(self, a: u16) -> u16 {
        self.clean(a, a ^ 0x8000)
    }

    fn clean(self, a: u16, result: u16) -> u16 {
        if self.to_f32(a).is_nan() { NAN } else { result }
    }
}

/// An operation on one element applied to both halves of a register.
pub fn pair(a: u32, op: impl Fn(u16) -> u16) -> u32 {
    pack(op(a as u16), op((a >> 16) as u16))
}

/// A binary operation applied to both halves of two registers.
pub fn pair2(a: u32, b: u32, op: impl Fn(u16, u16) -> u16) -> u32 {
    pack(op(a as u16, b as u16), op((a >> 16) as u16, (b >> 16) as u16))
}

/// A ternary operation applied to both halves of three registers.
pub fn pair3(a: u32, b: u32, c: u32, op: impl Fn(u16, u16, u16) -> u16) -> u32 {
    pack(op(a as u16, b as u16, c as u16), op((a >> 16) as u16, (b >> 16) as u16, (c >> 16) as u16))
}

/// Register with `low` and `high` halves.
pub fn pack(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

/// `bf16` bits of `x`.
pub fn f32_to_bf16(x: f32, rounding: Rounding) -> u16 {
    Half::Bf16.from_f32(x, rounding)
}

/// Value of `bf16` bits.
pub fn bf16_to_f32(bits: u16) -> f32 {
    Half::Bf16.to_f32(bits)
}

/// `f16` bits of `x`.
pub fn f32_to_f16(x: f32, rounding: Rounding) -> u16 {
    Half::F16.from_f32(x, rounding)
}

/// Value of `f16` bits.
pub fn f16_to_f32(bits: u16) -> f32 {
    Half::F16.to_f32(bits)
}
