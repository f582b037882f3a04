//! Elementwise arithmetic: exact where the instruction set is, otherwise within its bounds.

use bytemuck::Pod;
use half::{bf16, f16};
use ptxsim::{Arg, Launch};
use rand::prelude::*;

use crate::support::compare::{Element, generator};
use crate::support::run::{clean, compiled, read};

const ARCHS: [&str; 2] = ["sm_80", "sm_90a"];

/// Runs an elementwise kernel of `count` output rows of `n` elements over its inputs.
fn rows<X: Pod, T: Pod>(
    arch: &str,
    kernel: &str,
    inputs: &[&[X]],
    [count, n]: [usize; 2],
) -> Vec<Vec<T>> {
    let (module, mut device) = compiled("math", arch);
    let inputs = ["x", "y"].into_iter().zip(inputs);
    let mut args: Vec<Arg> = inputs.map(|(name, x)| device.buffer(name, x).into()).collect();
    let out = device.uninitialised::<T>("out", count * n);
    args.extend([out.into(), Arg::I32(n as i32)]);
    clean(&mut device, &module, kernel, Launch::linear(n.div_ceil(128) as u32, 128), &args);
    read(&device, out).chunks(n).map(<[T]>::to_vec).collect()
}

/// Finite f32 of every size, both signs, and the special values.
fn floats(rng: &mut impl Rng, n: usize) -> Vec<f32> {
    let mut draw = || {
        let exponent = rng.random_range(-30.0f32..30.0);
        let sign = if rng.random() { 1.0 } else { -1.0 };
        sign * exponent.exp2()
    };
    let mut values: Vec<f32> = (0..n).map(|_| draw()).collect();
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, -1e-40, 65504.0];
    values[..special.len()].copy_from_slice(&special);
    values
}

/// `got` against `want` computed in float64: equal NaNs, infinities and zeros; otherwise within
/// `ulps` units of the last place of f32, or `absolute`.
#[track_caller]
fn assert_within(case: &str, got: f32, want: f64, ulps: f64, absolute: f64) {
    let rounded = want as f32;
    if rounded.is_nan() || rounded.is_infinite() {
        assert!(got == rounded || got.is_nan() && rounded.is_nan(), "{case}: {got}, not {want}");
        return;
    }
    let unit = 2f64.powi(want.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor() as i32 - 23);
    let bound = (ulps * unit).max(absolute);
    let error = (f64::from(got) - want).abs();
    assert!(error <= bound, "{case}: {got:e}, not {want:e}: off by {error:e} > {bound:e}");
}

/// Minimum or maximum: a number wins over a NaN.
fn extreme(x: f64, y: f64, pick: fn(f64, f64) -> f64) -> f64 {
    if x.is_nan() {
        y
    } else if y.is_nan() {
        x
    } else {
        pick(x, y)
    }
}

#[test]
fn f32_operations() {
    let n = 1000;
    for arch in ARCHS {
        let mut rng = generator("f32 operations");
        let (xs, mut ys) = (floats(&mut rng, n), floats(&mut rng, n));
        ys.reverse();
        let out: Vec<Vec<f32>> = rows(arch, "math_f32", &[&xs, &ys], [18, n]);
        for i in 0..n {
            let (x, y) = (f64::from(xs[i]), f64::from(ys[i]));
            let check = |row: usize, what: &str, want: f64, ulps: f64, absolute: f64| {
                let case = format!("{arch}: {what} of {x:e}, {y:e}");
                assert_within(&case, out[row][i], want, ulps, absolute);
            };
            // Half a unit, and a little for the rounding of the reference itself.
            check(0, "x + y", x + y, 0.501, 0.0);
            check(1, "x * y", x * y, 0.5, 0.0);
            check(2, "x / y", x / y, 0.501, 0.0);
            if !ys[i].is_subnormal() {
                check(3, "fdividef", x / y, 2.0, 0.0); // no bound for subnormal divisors
            }
            check(4, "sqrt", x.abs().sqrt(), 0.501, 0.0);
            check(5, "rsqrt", y.abs().sqrt().recip(), 2.2, 0.0);
            check(6, "exp", x.exp(), 2.0, 0.0);
            check(7, "log", y.abs().ln(), 2.0, 0.0);
            check(8, "tanh.approx", x.tanh(), 0.0, x.tanh().abs() * 2f64.powi(-11) + 1e-44);
            check(9, "fma", x.mul_add(y, x), 0.501, 0.0);
            check(10, "min", extreme(x, y, f64::min), 0.0, 0.0);
            check(11, "max", extreme(x, y, f64::max), 0.0, 0.0);
            check(12, "1 / y", y.recip(), 0.501, 0.0);
            check(13, "floor", x.floor(), 0.0, 0.0);
            if !x.is_nan() {
                check(14, "copysign", x.copysign(y), 0.0, 0.0);
            }
            check(15, "ex2", x.exp2(), 2.0, f64::from(f32::MIN_POSITIVE));
            check(16, "lg2", y.abs().log2(), 0.0, y.abs().log2().abs().max(1.0) * 2f64.powi(-22));
            check(17, "rcp", y.recip(), 1.0, 0.0);
        }
    }
}

#[test]
fn conversions() {
    let n = 1000;
    for arch in ARCHS {
        let xs = floats(&mut generator("conversions"), n);
        let out: Vec<Vec<i32>> = rows(arch, "math_round", &[&xs], [8, n]);
        for (i, x) in xs.iter().enumerate() {
            let nan = |bits: u16| if x.is_nan() { 0x7fff } else { i32::from(bits) };
            let want = [
                nan(f16::from_f32(*x).to_bits()),
                nan(bf16::from_f32(*x).to_bits()),
                *x as i32, // saturating, NaN is 0: as the instruction
                x.round_ties_even() as i32,
                *x as u32 as i32,
                x.floor() as i32,
                x.ceil() as i32,
                (if *x > 0.0 { x.min(1.0) } else { 0.0 }).to_bits() as i32,
            ];
            let got: Vec<i32> = out.iter().map(|row| row[i]).collect();
            assert_eq!(got, want, "{arch}: {x:e}");
        }
    }
}

#[test]
fn i32_operations() {
    let n = 500;
    for arch in ARCHS {
        let mut rng = generator("i32 operations");
        let mut draw = || rng.random::<i32>() >> rng.random_range(0..31);
        let xs: Vec<i32> = (0..n).map(|_| draw()).collect();
        let ys: Vec<i32> = (0..n).map(|_| Some(draw()).filter(|y| *y != 0).unwrap_or(7)).collect();
        let out: Vec<Vec<i32>> = rows(arch, "math_i32", &[&xs, &ys], [20, n]);
        for (i, (x, y)) in xs.iter().copied().zip(ys.iter().copied()).enumerate() {
            let (ux, uy) = (x as u32, y as u32);
            let bytes = [ux.to_le_bytes(), uy.to_le_bytes()].concat();
            // Selector 0x3175, lowest nibble first.
            let permuted = u32::from_le_bytes([bytes[5], bytes[7], bytes[1], bytes[3]]);
            let field = 0x1ff << 5;
            let want = [
                x.wrapping_add(y),
                x.wrapping_mul(y),
                ((i64::from(x) * i64::from(y)) >> 32) as i32,
                x.wrapping_div(y),
                x.wrapping_rem(y),
                (ux / uy) as i32,
                x >> (y & 31),
                (ux >> (uy & 31)) as i32,
                (ux << (uy & 31)) as i32,
                x.min(y),
                x.max(y),
                x.wrapping_abs(),
                x.count_ones() as i32,
                x.leading_zeros() as i32,
                x.reverse_bits(),
                permuted as i32,
                (uy << 7 | ux >> 25) as i32,
                x.wrapping_mul(y).wrapping_add(y),
                x & !field | y << 5 & field,
                (x & y) ^ !x,
            ];
            let got: Vec<i32> = out.iter().map(|row| row[i]).collect();
            assert_eq!(got, want, "{arch}: {x:#x}, {y:#x}");
        }
    }
}

#[test]
fn i64_operations() {
    let n = 500;
    for arch in ARCHS {
        let mut rng = generator("i64 operations");
        let mut draw = || rng.random::<i64>() >> rng.random_range(0..63);
        let xs: Vec<i64> = (0..n).map(|_| draw()).collect();
        let ys: Vec<i64> = (0..n).map(|_| Some(draw()).filter(|y| *y != 0).unwrap_or(7)).collect();
        let out: Vec<Vec<i64>> = rows(arch, "math_i64", &[&xs, &ys], [10, n]);
        for (i, (x, y)) in xs.iter().copied().zip(ys.iter().copied()).enumerate() {
            let want = [
                x.wrapping_add(y),
                x.wrapping_mul(y),
                ((i128::from(x) * i128::from(y)) >> 64) as i64,
                x.wrapping_div(y),
                x.wrapping_rem(y),
                x >> (y & 63),
                ((x as u64) >> (y & 63)) as i64,
                x.min(y),
                i64::from(x.count_ones()),
                i64::from(x.leading_zeros()),
            ];
            let got: Vec<i64> = out.iter().map(|row| row[i]).collect();
            assert_eq!(got, want, "{arch}: {x:#x}, {y:#x}");
        }
    }
}

/// A result of a 16-bit operation: one rounding of the exact value, NaN for NaN, the sign of zero
/// left open.
fn assert_half<T: Element>(case: &str, got: T, want: f64) {
    let (got, want) = (got.value(), T::round(want).value());
    assert!(got == want || got.is_nan() && want.is_nan(), "{case}: {got:e}, not {want:e}");
}

fn half_operations<T: Element>(kernel: &str) {
    let n = 600; // pairs
    for arch in ARCHS {
        let mut rng = generator(kernel);
        // Exponents this close keep every sum and product exact in float64.
        let mut draw = || {
            let size = rng.random_range(-8.0f64..8.0).exp2();
            T::round(if rng.random() { size } else { -size })
        };
        let (mut xs, mut ys): (Vec<T>, Vec<T>) = (0..2 * n).map(|_| (draw(), draw())).unzip();
        let special = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0];
        for (i, x) in special.iter().enumerate() {
            xs[i] = T::round(*x);
            ys[2 * i] = T::round(*x);
        }
        let out: Vec<Vec<[T; 2]>> = rows(arch, kernel, &[&xs, &ys], [10, n]);
        for i in 0..2 * n {
            let (x, y) = (xs[i].value(), ys[i].value());
            let want = [
                x + y,
                x - y,
                x * y,
                x.mul_add(y, x),
                extreme(x, y, f64::min),
                extreme(x, y, f64::max),
                -x,
                x.abs(),
                f64::from(u8::from(x < y)),
                f64::from((x + 1.0) as f32),
            ];
            for (row, want) in want.into_iter().enumerate() {
                let case = format!("{arch}: {kernel}, row {row} of {x:e}, {y:e}");
                assert_half(&case, out[row][i / 2][i % 2], want);
            }
        }
    }
}

#[test]
fn f16_operations() {
    half_operations::<f16>("math_half2_f16");
}

#[test]
fn bf16_operations() {
    half_operations::<bf16>("math_half2_bf16");
}
