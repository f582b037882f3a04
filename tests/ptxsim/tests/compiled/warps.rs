//! Exchanges inside a warp, and 8 x 8 matrices.

use bytemuck::Pod;
use half::bf16;
use ptxsim::Launch;
use rand::prelude::*;

use crate::support::compare::{assert_close, generator, random, steps, values};
use crate::support::reference;
use crate::support::run::{clean, compiled, read};

const LANES: usize = 32;

/// What one warp makes of `input`: `n` elements.
fn of_warp<T: Pod, U: Pod>([file, arch]: [&str; 2], kernel: &str, input: &[T], n: usize) -> Vec<U> {
    let (module, mut device) = compiled(file, arch);
    let (input, out) = (device.buffer("in", input), device.uninitialised::<U>("out", n));
    clean(&mut device, &module, kernel, Launch::linear(1, 32), &[input.into(), out.into()]);
    read(&device, out)
}

/// `shfl.sync` as the instruction set defines it: value and predicate of every lane.
fn shuffle(mode: &str, width: usize, operand: impl Fn(usize) -> usize, value: &[i32]) -> Vec<i32> {
    let source = |lane: usize| {
        let first = lane / width * width;
        let b = operand(lane) % LANES;
        let source = match mode {
            "up" => lane.checked_sub(b).filter(|source| *source >= first),
            "down" => Some(lane + b).filter(|source| *source < first + width),
            "bfly" => Some(lane ^ b).filter(|source| *source < first + width),
            _ => Some(first + b % width),
        };
        (source.unwrap_or(lane), source.is_some())
    };
    let (values, found): (Vec<_>, Vec<_>) =
        (0..LANES).map(source).map(|(from, found)| (value[from], i32::from(found))).unzip();
    [values, found].concat()
}

#[test]
fn shuffles() {
    for arch in ["sm_80", "sm_90a"] {
        let mut rng = generator("shuffles");
        let data: Vec<i32> = (0..LANES).map(|_| rng.random()).collect();
        let out: Vec<i32> = of_warp(["warp", arch], "warp_shuffles", &data, 9 * 64);
        let want = [
            shuffle("up", 32, |_| 1, &data),
            shuffle("up", 16, |_| 3, &data),
            shuffle("down", 8, |_| 2, &data),
            shuffle("down", 32, |_| 17, &data),
            shuffle("bfly", 32, |_| 5, &data),
            shuffle("bfly", 4, |_| 3, &data),
            shuffle("idx", 8, |_| 5, &data),
            shuffle("idx", 32, |lane| (data[lane] & 31) as usize, &data),
            shuffle("idx", 16, |lane| lane * 7, &data),
        ];
        assert_eq!(out, want.concat(), "{arch}");
    }
}

/// Bits of the lanes that fulfil a condition.
fn lanes(condition: impl Fn(usize) -> bool) -> i32 {
    (0..LANES).filter(|lane| condition(*lane)).fold(0u32, |mask, lane| mask | 1 << lane) as i32
}

#[test]
fn votes() {
    for arch in ["sm_80", "sm_90a"] {
        let mut rng = generator("votes");
        let data: Vec<i32> = (0..LANES).map(|_| rng.random()).collect();
        let out: Vec<i32> = of_warp(["warp", arch], "warp_votes", &data, 16 * LANES);

        let odd = |lane: usize| data[lane] & 1 != 0;
        let all = |f: fn(i32, i32) -> i32| data.iter().copied().reduce(f).unwrap_or_default();
        let unsigned = data.iter().map(|x| *x as u32);
        let uniform = |value: i32| vec![value; LANES];
        let half = |lane: usize| if lane < 16 { 0..16 } else { 16..32 };
        let mut want = vec![
            uniform(lanes(odd)),
            uniform(i32::from((0..LANES).any(odd))),
            uniform(i32::from((0..LANES).all(odd))),
            uniform(i32::from((0..LANES).all(|l| odd(l) == odd(0)))),
            (0..LANES).map(|l| lanes(|other| data[other] & 3 == data[l] & 3)).collect(),
            uniform(if data.iter().all(|x| *x == data[0]) { -1 } else { 0 }),
            uniform(all(i32::wrapping_add)),
            uniform(all(i32::min)),
            uniform(all(i32::max)),
            uniform(unsigned.clone().min().unwrap_or_default() as i32),
            uniform(unsigned.max().unwrap_or_default() as i32),
            uniform(all(|x, y| x & y)),
            uniform(all(|x, y| x | y)),
            uniform(all(|x, y| x ^ y)),
        ];
        let positive = |l: usize| lanes(|other| half(l).contains(&other) && data[other] > 0);
        want.push((0..LANES).map(positive).collect());
        assert_eq!(out[..15 * LANES], want.concat(), "{arch}");
        // Which lanes run together is open; each is among them, and only odd lanes ask.
        for (lane, active) in out[15 * LANES..].iter().enumerate() {
            let own = if lane % 2 == 1 { 1u32 << lane } else { 0 };
            let active = *active as u32;
            assert!(active & own == own && active & 0x5555_5555 == 0, "{arch}: lane {lane}");
        }
    }
}

#[test]
fn sums() {
    let data: Vec<f32> = steps(&mut generator("warp sums"), LANES);
    let total: f32 = data.iter().sum();
    let sums: Vec<f32> = of_warp(["warp", "sm_80"], "warp_sums", &data, 2);
    assert_eq!(sums, [total; 2]);
}

#[test]
fn elect() {
    let (module, mut device) = compiled("warp", "sm_90a");
    let out = device.uninitialised::<i32>("out", LANES);
    clean(&mut device, &module, "warp_elect", Launch::linear(1, 32), &[out.into()]);
    let chosen: Vec<i32> = read(&device, out);
    assert_eq!(chosen.iter().sum::<i32>(), 1, "one lane is chosen: {chosen:?}");
}

/// Register `matrix` of ldmatrix: the two elements of a lane, the lower one in the low half.
fn fragment(tile: &[u16], matrix: usize, lane: usize, transposed: bool) -> u32 {
    let element = |i: usize| {
        let (row, column) = (lane / 4, lane % 4 * 2 + i);
        let at = if transposed { column * 8 + row } else { row * 8 + column };
        u32::from(tile[matrix * 64 + at])
    };
    element(0) | element(1) << 16
}

#[test]
fn matrix_loads() {
    let mut rng = generator("matrix loads");
    let tile: Vec<u16> = (0..256).map(|_| rng.random()).collect();
    let loaded = |kernel, n| -> Vec<u32> { of_warp(["matrices", "sm_80"], kernel, &tile, n) };
    let registers = |count: usize, trans: bool| {
        let one = |i: usize| {
            let (lane, matrix) = (i / 4, i % 4);
            if matrix < count { fragment(&tile, matrix, lane, trans) } else { 0 }
        };
        (0..128).map(one).collect::<Vec<u32>>()
    };
    let want = [1, 2, 4].map(|count| registers(count, false)).concat();
    assert_eq!(loaded("matrices_load", 3 * 128), want);
    assert_eq!(loaded("matrices_load_trans", 128), registers(4, true));
    let want = [false, true].map(|trans| registers(4, trans)).concat();
    assert_eq!(loaded("matrices_load_at", 2 * 128), want);
}

#[test]
fn matrix_stores() {
    let mut rng = generator("matrix stores");
    let registers: Vec<u32> = (0..128).map(|_| rng.random()).collect();
    let out: Vec<u16> = of_warp(["matrices", "sm_90a"], "matrices_store", &registers, 512);
    for (i, want) in registers.iter().enumerate() {
        for (tile, transposed) in [(&out[..256], false), (&out[256..], true)] {
            let got = fragment(tile, i % 4, i / 4, transposed);
            assert_eq!(got, *want, "lane {} register {}, transposed {transposed}", i / 4, i % 4);
        }
    }
}

#[test]
fn matrix_transpose() {
    let mut rng = generator("transpose");
    let matrix: Vec<u16> = (0..64).map(|_| rng.random()).collect();
    let out: Vec<u16> = of_warp(["matrices", "sm_80"], "matrices_transpose", &matrix, 64);
    let want: Vec<u16> = (0..64).map(|i| matrix[i % 8 * 8 + i / 8]).collect();
    assert_eq!(out, want);
}

#[test]
fn tf32_product() {
    let (module, mut device) = compiled("matrices", "sm_80");
    let mut rng = generator("tf32");
    // bf16 values are tf32 values: the product is exact up to its f32 sum.
    let exact = |n: usize, rng: &mut _| -> Vec<f32> {
        random::<bf16>(rng, n, 1.0).into_iter().map(f32::from).collect()
    };
    let (a, b) = (exact(128, &mut rng), exact(64, &mut rng));
    let want = reference::matmul(&values(&a), &values(&b), [16, 8, 8], false);
    let (a, b) = (device.buffer("a", &a), device.buffer("b", &b));
    let d = device.uninitialised::<f32>("d", 128);
    let args = [a.into(), b.into(), d.into()];
    clean(&mut device, &module, "mma_tf32", Launch::linear(1, 32), &args);
    assert_close("tf32", &values(&read::<f32>(&device, d)), &want, 1e-6);
}
