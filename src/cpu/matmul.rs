//! Safe access to the `gemm` crate's single-threaded product; tasks, not products, are parallel. A product
//! of few rows does so little with each element of its right factor that packing it, as `gemm` does, costs
//! more than the product: those have a loop of our own. (It packs nothing for a single row.)

use std::ops::Range;

use gemm::Parallelism;

use super::simd;

/// Up to so many rows are few (docs/cpu.md).
pub(crate) const FEW_ROWS: usize = 8;

/// A strided f32 matrix: element (i, j) is `data[i * row + j * col]`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row: usize,
    col: usize,
}

impl<'a> Mat<'a> {
    /// Rows of `stride` elements, the first `cols` of which count.
    pub fn rows(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(),
            "matrix bounds"
        );
        Self { data, rows, cols, row: stride, col: 1 }
    }

    /// Some of the rows.
    fn part(self, rows: Range<usize>) -> Self {
        Self { data: &self.data[rows.start * self.row..], rows: rows.len(), ..self }
    }

    /// The transpose; nothing moves.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row: self.col, col: self.row, ..self }
    }
}

/// Whether a product replaces its destination or is added to it.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Into {
    Store,
    Add,
    Subtract,
}

/// dst ← dst + `factor`·a·b, a few rows at a time by way of `rows`, which has room for [`FEW_ROWS`] of them:
/// `gemm` would allocate in every call.
pub(crate) fn add_by_rows(
    dst: &mut [f32],
    factor: f32,
    a: Mat<'_>,
    b: Mat<'_>,
    rows: &mut Vec<f32>,
) {
    let n = b.cols;
    rows.resize(FEW_ROWS * n, 0.0);
    for (i, dst) in dst[..a.rows * n].chunks_mut(FEW_ROWS * n).enumerate() {
        let first = i * FEW_ROWS;
        let part = a.part(first..first + dst.len() / n);
        matmul_scaled(rows, Into::Store, factor, part, b);
        simd::add_rows(&rows[..dst.len()], dst);
    }
}

/// dst ← a·b, dst + a·b or dst − a·b; dst is row-major without gaps.
pub(crate) fn matmul(dst: &mut [f32], mode: Into, a: Mat<'_>, b: Mat<'_>) {
    matmul_scaled(dst, mode, 1.0, a, b);
}

/// [`matmul`] of `factor`·a·b.
pub(crate) fn matmul_scaled(dst: &mut [f32], mode: Into, factor: f32, a: Mat<'_>, b: Mat<'_>) {
    matmul_strided(dst, b.cols, mode, factor, a, b);
}

/// The same where rows of dst lie `stride` apart.
pub(crate) fn matmul_strided(
    dst: &mut [f32],
    stride: usize,
    mode: Into,
    factor: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner extents");
    assert!(n <= stride && (m == 0 || (m - 1) * stride + n <= dst.len()), "destination bounds");
    if m * n == 0 {
        return;
    }
    if k == 0 {
        if mode == Into::Store {
            dst.chunks_mut(stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    let stores = mode == Into::Store;
    let adds = mode == Into::Add && factor == 1.0;
    if (2..=FEW_ROWS).contains(&m) && b.col == 1 && stride == n && (stores || adds) {
        let dst = &mut dst[..m * n];
        if stores {
            dst.fill(0.0);
        }
        simd::add_product(dst, (a.data, [a.row, a.col]), (b.data, b.row), n, k);
        if factor != 1.0 {
            simd::scale(dst, factor);
        }
        return;
    }
    let beta = if mode == Into::Subtract { -factor } else { factor };
    let [ar, ac, br, bc] = [a.row, a.col, b.row, b.col].map(|s| s as isize);
    // SAFETY: all three matrices lie inside their slices (`Mat::rows`, the assertion above), and
    // `dst` is a unique borrow.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            stride as isize,
            mode != Into::Store,
            a.data.as_ptr(),
            ac,
            ar,
            b.data.as_ptr(),
            bc,
            br,
            1.0,
            beta,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
