//! Matrix products and attention.

use half::{bf16, f16};
use ptxsim::layout::Swizzle;
use ptxsim::tensor_map::{Dtype, TensorMap};
use ptxsim::{Arg, Buffer, Device, Launch, Options};

use crate::support::compare::{Element, assert_close, generator, random, values};
use crate::support::reference::{self, Attention};
use crate::support::run::{clean, compiled, read};

const BF16: f64 = 1.0 / 256.0;

fn tiles(length: usize, tile: usize) -> u32 {
    length.div_ceil(tile) as u32
}

fn integer(n: usize) -> Arg {
    Arg::I32(n as i32)
}

/// Operands of a product and what it should be.
struct Product {
    a: Buffer,
    b: Buffer,
    want: Vec<f64>,
}

fn product<T: Element>(
    device: &mut Device,
    case: &str,
    [m, n, k]: [usize; 3],
    transposed: bool,
) -> Product {
    let mut rng = generator(case);
    let a: Vec<T> = random(&mut rng, m * k, 1.0);
    let b: Vec<T> = random(&mut rng, k * n, 1.0);
    let want = reference::matmul(&values(&a), &values(&b), [m, n, k], transposed);
    Product { a: device.buffer("a", &a), b: device.buffer("b", &b), want }
}

fn result<T: Element>(device: &Device, buffer: Buffer) -> Vec<f64> {
    values(&read::<T>(device, buffer))
}

#[test]
fn naive_product() {
    for arch in ["sm_80", "sm_90a"] {
        let (module, mut device) = compiled("matmul_naive", arch);
        let [m, n, k] = [37, 45, 29];
        let case = format!("naive product, {arch}");
        let Product { a, b, want } = product::<f32>(&mut device, &case, [m, n, k], false);
        let c = device.uninitialised::<f32>("c", m * n);
        let grid = [tiles(n, 16), tiles(m, 16), 1];
        let launch = Launch { grid, block: [16, 16, 1], ..Launch::linear(1, 1) };
        let args = [a.into(), b.into(), c.into(), integer(m), integer(n), integer(k)];
        clean(&mut device, &module, "matmul_naive", launch, &args);
        assert_close(&case, &result::<f32>(&device, c), &want, 1e-6);
    }
}

fn pipelined<T: Element>(
    options: &Options,
    arch: &str,
    kernel: &str,
    sizes: [usize; 3],
) -> (Vec<f64>, Vec<f64>) {
    let (module, mut device) = compiled("matmul_sm80", arch);
    device.options = options.clone();
    let case = format!("{kernel} {sizes:?} {arch}");
    let Product { a, b, want } = product::<T>(&mut device, &case, sizes, kernel.ends_with("_nt"));
    let [m, n, k] = sizes;
    let c = device.uninitialised::<f32>("c", m * n);
    let launch = Launch {
        grid: [tiles(n, 64), tiles(m, 64), 1],
        ..Launch::linear(1, 128).shared(3 * 16384)
    };
    let args = [a.into(), b.into(), c.into(), integer(m), integer(n), integer(k)];
    clean(&mut device, &module, kernel, launch, &args);
    let got = result::<f32>(&device, c);
    assert_close(&case, &got, &want, 1e-6);
    (got, want)
}

/// A bf16 product on a device with these options, in f32: result and reference.
pub fn product_of(options: &Options) -> (Vec<f64>, Vec<f64>) {
    pipelined::<bf16>(options, "sm_80", "matmul_pipelined_bf16", [64, 64, 128])
}

#[test]
fn pipelined_products() {
    for arch in ["sm_80", "sm_90a"] {
        for sizes in [[128, 64, 256], [70, 104, 72], [5, 8, 8]] {
            pipelined::<bf16>(&Options::default(), arch, "matmul_pipelined_bf16", sizes);
            pipelined::<f16>(&Options::default(), arch, "matmul_pipelined_f16", sizes);
            pipelined::<bf16>(&Options::default(), arch, "matmul_pipelined_bf16_nt", sizes);
            pipelined::<f16>(&Options::default(), arch, "matmul_pipelined_f16_nt", sizes);
        }
    }
}

/// The map of a bf16 matrix with the 128-byte swizzle.
fn map(device: &Device, matrix: Buffer, [rows, columns]: [usize; 2], tile: [u32; 2]) -> Arg {
    let [tile_rows, tile_columns] = tile;
    Arg::TensorMap(TensorMap {
        swizzle: Swizzle::B128,
        address: device.address(matrix),
        ..TensorMap::dense(
            Dtype::Bf16,
            vec![columns as u64, rows as u64],
            vec![tile_columns, tile_rows],
        )
    })
}

#[test]
fn wgmma_products() {
    for (kernel, transposed) in [("matmul_wgmma", false), ("matmul_wgmma_nt", true)] {
        for sizes in [[128, 256, 320], [72, 200, 136], [64, 128, 64]] {
            let (module, mut device) = compiled("matmul_sm90", "sm_90a");
            let case = format!("{kernel} {sizes:?}");
            let Product { a, b, want } = product::<bf16>(&mut device, &case, sizes, transposed);
            let [m, n, k] = sizes;
            let c = device.uninitialised::<bf16>("c", m * n);
            let b_map = if transposed {
                map(&device, b, [n, k], [128, 64])
            } else {
                map(&device, b, [k, n], [64, 64])
            };
            let args = [
                map(&device, a, [m, k], [64, 64]),
                b_map,
                map(&device, c, [m, n], [64, 64]),
                integer(k),
            ];
            let launch = Launch {
                grid: [tiles(n, 128), tiles(m, 64), 1],
                ..Launch::linear(1, 256).shared(90112)
            };
            clean(&mut device, &module, kernel, launch, &args);
            assert_close(&case, &result::<bf16>(&device, c), &want, BF16);
        }
    }
}

/// Causal or full attention of bf16 heads of 128 channels, on a device with these options: result
/// and reference.
pub fn attention(
    options: &Options,
    [heads, tokens]: [usize; 2],
    causal: bool,
) -> (Vec<f64>, Vec<f64>) {
    let shape = Attention { heads, tokens, d: 128, scale: 128f64.sqrt().recip(), causal };
    let (module, mut device) = compiled("attention_sm80", "sm_80");
    device.options = options.clone();
    let mut rng = generator(&format!("attention of {heads} heads, {tokens} tokens"));
    let n = heads * tokens * 128;
    let inputs: Vec<Vec<bf16>> = (0..3).map(|_| random(&mut rng, n, 2.0)).collect();
    let [q, k, v] = [0, 1, 2].map(|i| values(&inputs[i]));
    let want = reference::attention(&q, &k, &v, shape);
    let [q, k, v] = [("q", 0), ("k", 1), ("v", 2)].map(|(x, i)| device.buffer(x, &inputs[i]));
    let o = device.uninitialised::<bf16>("o", n);
    let launch = Launch {
        grid: [tiles(tokens, 64), heads as u32, 1],
        ..Launch::linear(1, 128).shared(49152)
    };
    let mut args: Vec<Arg> = [q, k, v, o].map(Arg::from).to_vec();
    args.extend([integer(tokens), Arg::F32(shape.scale as f32), Arg::I32(causal.into())]);
    clean(&mut device, &module, "attention_d128", launch, &args);
    (result::<bf16>(&device, o), want)
}

#[test]
fn attention_d128() {
    for (tokens, heads, causal) in [(256, 2, true), (100, 1, true), (129, 1, false), (1, 1, true)] {
        let (got, want) = attention(&Options::default(), [heads, tokens], causal);
        let case = format!("attention of {tokens} tokens, causal {causal}");
        assert_close(&case, &got, &want, 2.0 * BF16);
    }
}

/// One product of a warpgroup in each form of operands.
#[test]
fn wgmma_operand_forms() {
    let transpose =
        |x: &[f16]| -> Vec<f16> { (0..4096).map(|i| x[i % 64 * 64 + i / 64]).collect() };
    for (kernel, a_transposed, b_transposed) in [
        ("wgmma_registers", false, true),
        ("wgmma_registers_t", false, false),
        ("wgmma_shared_tt", true, false),
        ("wgmma_add", false, true),
    ] {
        let (module, mut device) = compiled("wgmma", "sm_90a");
        let mut rng = generator(kernel);
        let (a, b): (Vec<f16>, Vec<f16>) =
            (random(&mut rng, 4096, 1.0), random(&mut rng, 4096, 1.0));
        let before: Vec<f32> = random(&mut rng, 4096, 10.0);
        let mut want = reference::matmul(&values(&a), &values(&b), [64; 3], b_transposed);
        let a = device.buffer("a", &if a_transposed { transpose(&a) } else { a });
        let b = device.buffer("b", &b);
        let d = if kernel == "wgmma_add" {
            want.iter_mut().zip(&before).for_each(|(w, b)| *w += f64::from(*b));
            device.buffer("d", &before)
        } else {
            device.uninitialised::<f32>("d", 4096)
        };
        let launch = Launch::linear(1, 128).shared(16384);
        clean(&mut device, &module, kernel, launch, &[a.into(), b.into(), d.into()]);
        assert_close(kernel, &result::<f32>(&device, d), &want, 1e-6);
    }
}
