//! `cvt` between integers and floating point, and to integral values.
use super::int::Int;
use super::{Format, Rounding, f64_to_f32};

/// `cvt.{rn,rna,rz}.tf32.f32`: bits with the low 13 zero. NaN becomes 0x7FFFFFFF, but by `.rna`,
/// which cuts it as an H100 does (an infinity where the payload lay below).
pub fn f32_to_tf32(x: f32, rounding: Rounding) -> u32 {
    match rounding {
        Rounding::NearestAway if x.is_nan() => x.to_bits() & TF32_BITS,
        _ if x.is_nan() => 0x7FFF_FFFF,
        _ => Format::TF32.round(x.into(), rounding) << 13,
    }
}

/// Of the bits of an f32 those that a tf32 has.
const TF32_BITS: u32 = 0xFFFF_E000;

/// What the tensor cores read of a register given as `tf32`.
pub fn tf32_operand(bits: u32) -> f32 {
    f32::from_bits(bits & TF32_BITS)
}

/// Value rounded to an integral one: `.rni`, `.rzi`, `.rmi`, `.rpi`.
pub fn to_integral(x: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest => x.round_ties_even(),
        Rounding::NearestAway => x.round(),
        Rounding::Zero => x.trunc(),
        Rounding::Down => x.floor(),
        Rounding::Up => x.ceil(),
    }
}

/// `cvt` to an integer: saturating. NaN gives 0, or the top bit alone when the source is `f64`
/// (`double`) or the destination has 64 bits.
pub fn float_to_int(x: f64, to: Int, rounding: Rounding, double: bool) -> u64 {
    if x.is_nan() {
        return if double || to.bits == 64 { 1 << (to.bits - 1) } else { 0 };
    }
    to.saturate(to_integral(x, rounding) as i128)
}

/// `cvt` of an integer value to `f32`; the other narrow formats round [`int_to_odd`] themselves.
pub fn int_to_f32(value: i128, rounding: Rounding) -> f32 {
    f64_to_f32(int_to_odd(value), rounding)
}

/// An integer of at most 65 bits as an `f64` rounded to odd.
pub fn int_to_odd(value: i128) -> f64 {
    let magnitude = value.unsigned_abs();
    if magnitude < 1 << 53 {
        return value as f64;
    }
    let sticky = u128::from(magnitude & 0xFFF != 0);
    let magnitude = (magnitude >> 12 | sticky) as f64 * 4096.0;
    if value < 0 { -magnitude } else { magnitude }
}

/// `cvt` of an integer value to `f64`.
pub fn int_to_f64(value: i128, rounding: Rounding) -> f64 {
    let nearest = value as f64;
    let back = nearest as i128;
    match rounding {
        Rounding::Down if back > value => nearest.next_down(),
        Rounding::Up if back < value => nearest.next_up(),
        Rounding::Zero if value > 0 && back > value => nearest.next_down(),
        Rounding::Zero if value < 0 && back < value => nearest.next_up(),
        _ => nearest,
    }
}

/// `cvt` between integers: truncated or extended, clamped to the destination with `sat`.
pub fn int_to_int(bits: u64, from: Int, to: Int, sat: bool) -> u64 {
    let value = from.value(bits);
    if sat { to.saturate(value) } else { to.mask(value as u64) }
}
