//! Device code of CUB, libcu++, cooperative groups and the mathematical library.

use ptxsim::{Arg, Launch};

use crate::support::run::{clean, compiled, read};

const ARCHS: [&str; 2] = ["sm_80", "sm_90a"];
const BLOCK: usize = 128;
const N: usize = 3 * BLOCK;

/// Runs a kernel of `x` on both architectures and hands its output to `check`.
fn run<T: bytemuck::Pod, U: bytemuck::Pod>(
    kernel: &str,
    x: &[T],
    rows: usize,
    takes_n: bool,
    check: impl Fn(&[U]),
) {
    for arch in ARCHS {
        let (module, mut device) = compiled("libraries", arch);
        let input = device.buffer("x", x);
        // What a kernel leaves out keeps its zeros.
        let zeros = vec![U::zeroed(); rows * N];
        let out = device.buffer("out", &zeros);
        let mut args: Vec<Arg> = vec![input.into(), out.into()];
        if takes_n {
            args.push(Arg::I32(N as i32));
        }
        let launch = Launch::linear((N / BLOCK) as u32, BLOCK as u32);
        clean(&mut device, &module, kernel, launch, &args);
        check(&read(&device, out));
    }
}

fn integers() -> Vec<i32> {
    (0..N as i64).map(|i| ((i * 2_654_435_761) % 2001 - 1000) as i32).collect()
}

fn floats() -> Vec<f32> {
    (0..N).map(|i| (i as f32 - 150.3) / 37.0).collect()
}

#[test]
fn sums_scans_and_sorts_of_blocks() {
    let x = integers();
    run("cub_block", &x, 3, true, |out: &[i32]| {
        for (b, block) in x.chunks(BLOCK).enumerate() {
            assert_eq!(out[b], block.iter().sum::<i32>());
            let scan = block.iter().scan(0, |sum, v| {
                *sum += v;
                Some(*sum)
            });
            let at = b * BLOCK..(b + 1) * BLOCK;
            assert!(scan.eq(out[N..2 * N][at.clone()].iter().copied()));
            let mut sorted = block.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, out[2 * N..][at]);
        }
    });
}

/// Results against `f64` functions, by the largest error relative to the larger of value and 1.
fn functions(out: &[f64], x: &[f32], wanted: &[fn(f64) -> f64], bound: f64) {
    for (row, f) in wanted.iter().enumerate() {
        for (i, x) in x.iter().enumerate() {
            let (got, want) = (out[row * N + i], f((*x).into()));
            let error = (got - want).abs() / want.abs().max(1.0);
            assert!(error <= bound, "function {row} of {x}: {got}, not {want}");
        }
    }
}

#[test]
fn functions_of_f32() {
    let x = floats();
    let wanted: [fn(f64) -> f64; 13] = [
        |x| f64::from(x as f32 * 1e5).sin(),
        f64::cos,
        f64::tan,
        |x| x.abs().powf(f64::from(1.3f32)),
        |x| f64::from((x as f32).abs() + 1e-3).ln(),
        erf,
        f64::cbrt,
        |x| x.atan2(1.5),
        |x| x % f64::from(0.7f32),
        f64::tanh,
        |x| x.abs().ln_1p(),
        |x| x.hypot(2.0),
        f64::sinh,
    ];
    run("math_library", &x, wanted.len(), true, |out: &[f32]| {
        let out: Vec<f64> = out.iter().map(|v| f64::from(*v)).collect();
        functions(&out, &x, &wanted, 1e-6);
    });
}

/// The error function, by its series.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let terms = (0..120).scan(x, |term, n| {
        let now = *term / f64::from(2 * n + 1);
        *term *= -x * x / f64::from(n + 1);
        Some(now)
    });
    terms.sum::<f64>() * std::f64::consts::FRAC_2_SQRT_PI
}

#[test]
fn functions_of_f64() {
    let x = floats();
    let wanted: [fn(f64) -> f64; 8] = [
        f64::exp,
        f64::sin,
        |x| x.abs().sqrt(),
        |x| x / 3.1,
        |x| x.abs().powf(0.3),
        |x| (x.abs() + 1.0).ln(),
        |x| x % 0.3,
        |x| x.floor().copysign(-x),
    ];
    run("math_double", &x, wanted.len(), true, |out: &[f64]| functions(out, &x, &wanted, 1e-14));
}

/// Lanes of one instruction that form several groups, each with a mask of its own.
#[test]
fn groups_of_lanes() {
    let x = integers();
    run("groups", &x, 2, true, |out: &[i32]| {
        for i in 0..N {
            let tile = &x[i / 8 * 8..i / 8 * 8 + 8];
            let warp = &x[i / 32 * 32..i / 32 * 32 + 32];
            let odd = warp.iter().filter(|v| **v & 1 != 0).count() as i32;
            assert_eq!((out[i], out[N + i]), (tile.iter().sum(), odd));
        }
    });
}

#[test]
fn pipelines_of_copies() {
    let x: Vec<f32> = (0..4 * N).map(|i| i as f32).collect();
    run("pipelines", &x, 1, true, |out: &[f32]| {
        for (i, got) in out.iter().enumerate() {
            assert_eq!(*got, (0..4).map(|k| x[k * N + i]).sum::<f32>());
        }
    });
}

#[test]
fn barriers_of_a_block() {
    let x = integers();
    run("barriers", &x, 1, false, |out: &[i32]| {
        for (got, block) in out.chunks(BLOCK).zip(x.chunks(BLOCK)) {
            assert!(got.iter().eq(block.iter().rev()));
        }
    });
}
