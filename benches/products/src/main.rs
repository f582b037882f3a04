//! Which matrix-product crate for attention-sized f32 tiles? Best of 40 rounds, one thread, the
//! crates in turns. Run with `cargo run --release --manifest-path benches/products/Cargo.toml`.

use std::time::Instant;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// dst [m, n] += a [m, k] · b [k, n], all row-major.
type Product = fn(usize, usize, usize, &[f32], &[f32], &mut [f32]);

fn gemm_crate(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], dst: &mut [f32]) {
    assert!(a.len() >= m * k && b.len() >= k * n && dst.len() >= m * n);
    let (dst, a, b) = (dst.as_mut_ptr(), a.as_ptr(), b.as_ptr());
    let (n_, k_) = (n as isize, k as isize);
    let none = gemm::Parallelism::None;
    // SAFETY: the extents were checked above.
    unsafe {
        gemm::gemm(m, n, k, dst, 1, n_, true, a, 1, k_, b, 1, n_, 1.0, 1.0, false, false, false, none);
    }
}

fn matrixmultiply_crate(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], dst: &mut [f32]) {
    assert!(a.len() >= m * k && b.len() >= k * n && dst.len() >= m * n);
    let (dst, a, b) = (dst.as_mut_ptr(), a.as_ptr(), b.as_ptr());
    let (n_, k_) = (n as isize, k as isize);
    // SAFETY: the extents were checked above.
    unsafe { matrixmultiply::sgemm(m, k, n, 1.0, a, k_, 1, b, n_, 1, 1.0, dst, n_, 1) }
}

fn faer_crate(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], dst: &mut [f32]) {
    let dst = MatMut::from_row_major_slice_mut(&mut dst[..m * n], m, n);
    let a = MatRef::from_row_major_slice(&a[..m * k], m, k);
    let b = MatRef::from_row_major_slice(&b[..k * n], k, n);
    matmul(dst, Accum::Add, a, b, 1.0f32, Par::Seq);
}

fn main() {
    let crates: [(&str, Product); 3] =
        [("gemm", gemm_crate), ("matrixmultiply", matrixmultiply_crate), ("faer", faer_crate)];
    println!("| m × n × k | {} |", crates.map(|(name, _)| format!("{name} GF/s")).join(" | "));
    println!("|---|---|---|---|");
    for (m, n, k) in [(48, 128, 64), (48, 64, 128), (48, 128, 128), (128, 128, 256), (64, 64, 256)] {
        let (a, b, mut dst) = (vec![0.5; m * k], vec![0.25; k * n], vec![0.0; m * n]);
        let flops = 2.0 * (m * n * k) as f64;
        let calls = (2e8 / flops) as usize + 1;
        let mut best = [f64::INFINITY; 3];
        for _ in 0..40 {
            for ((_, product), best) in crates.iter().zip(&mut best) {
                let start = Instant::now();
                (0..calls).for_each(|_| product(m, n, k, &a, &b, std::hint::black_box(&mut dst)));
                *best = best.min(start.elapsed().as_secs_f64() / calls as f64);
            }
        }
        let rates = best.map(|seconds| format!("{:.0}", flops / seconds / 1e9)).join(" | ");
        println!("| {m} × {n} × {k} | {rates} |");
    }
}
