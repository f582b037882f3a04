//! The element-wise parts of the gradients.

use crate::cpu::simd::{dot, exp, max, vectorised};

vectorised! {

/// A block of scores of the local branch, keys by rows: key j, the tile's row i at `j · rows + i`. Rows
/// see it from row j + `offset` on. `s` holds q·k, then the weights P; `ds` holds G·v, then
/// dL/ds = P ∘ (G·v − δ); `sums` gain Σ P ∘ (G·v) by row.
pub(super) fn scores(
    s: &mut [f32],
    ds: &mut [f32],
    offset: isize,
    lse: &[f32],
    delta: &[f32],
    sums: &mut [f32],
) {
    let rows = lse.len();
    let keys = s.chunks_exact_mut(rows).zip(ds.chunks_exact_mut(rows));
    for (j, (s, ds)) in keys.enumerate() {
        let first = (j as isize + offset).clamp(0, rows as isize) as usize;
        s[..first].fill(0.0);
        ds[..first].fill(0.0);
        let seen = first..rows;
        let by_row = lse[seen.clone()].iter().zip(&delta[seen.clone()]).zip(&mut sums[seen.clone()]);
        let keys = s[seen.clone()].iter_mut().zip(&mut ds[seen]);
        for ((s, ds), ((lse, delta), sum)) in keys.zip(by_row) {
            // Rounding may put a score above the log of the sum that it is part of.
            let below = *s - lse;
            let p = exp(if below > 0.0 { 0.0 } else { below });
            *sum = p.mul_add(*ds, *sum);
            *s = p;
            *ds = p * (*ds - delta);
        }
    }
}

/// out ← a·b of every row of `width`, times `factor`.
pub(super) fn row_dots(a: &[f32], b: &[f32], width: usize, factor: f32, out: &mut [f32]) {
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    rows.zip(out).for_each(|((a, b), out)| *out = factor * dot(a, b));
}

/// The memory branch of query rows, from p = H Mᵀ by rows and c = H·m: p becomes dL/dq = σ'(q) ∘
/// (p − c z) / n, and `dz` loses Σ w c, what the rows' denominators owe z. `q` as given, `w` its retrieval
/// weights in `unit`, `denominators` as `retrieval_rows` leaves them.
pub(super) fn query_rows(
    p: &mut [f32],
    (q, w): (&[f32], &[f32]),
    (c, denominators): (&[f32], &[[f32; 2]]),
    (z, unit): (&[f32], f32),
    dz: &mut [f32],
) {
    let width = z.len();
    let rows = p.chunks_exact_mut(width).zip(q.chunks_exact(width).zip(w.chunks_exact(width)));
    for ((p, (q, w)), (c, [inverse, moves])) in rows.zip(c.iter().zip(denominators)) {
        let c = c * moves;
        let (inverse, owed) = (inverse * unit, c * unit);
        let columns = q.iter().zip(w).zip(z.iter().zip(&mut *dz));
        for (p, ((q, w), (z, dz))) in p.iter_mut().zip(columns) {
            // σ'(q) / n: 1 / n above 0, and σ(q) / n, the weight, below.
            let slope = if *q > 0.0 { inverse } else { *w * unit };
            *p = slope * (*p - c * z);
            *dz -= w * owed;
        }
    }
}

/// The delta rule's part of key rows, from y = w (X + Xᵀ), X = Λ Mᵀ: with κ = ½ w·y y becomes κ z − y, and
/// `dz` gains Σ κ σ(k). `w` is left without meaning.
pub(super) fn residual_rows(
    y: &mut [f32],
    (s, w): (&[f32], &mut [f32]),
    denominators: &[[f32; 2]],
    (z, unit): (&[f32], f32),
    dz: &mut [f32],
) {
    let width = z.len();
    // κ is of the order of 1 / z², which f32 may not hold; κ times a power of two of about z is.
    let scale = f32::from_bits(max(z).to_bits() & 0x7f80_0000);
    let scale = if scale > 0.0 { scale } else { 1.0 };
    let (factor, inverse) = (0.5 * unit * scale, 1.0 / scale);
    let rows = s.chunks_exact(width).zip(w.chunks_exact_mut(width));
    for ((y, (s, w)), [_, moves]) in y.chunks_exact_mut(width).zip(rows).zip(denominators) {
        w.iter_mut().for_each(|w| *w *= factor);
        let kappa = moves * dot(w, y);
        let columns = s.iter().zip(z.iter().zip(&mut *dz));
        for (y, (s, (z, dz))) in y.iter_mut().zip(columns) {
            *y = kappa.mul_add(z * inverse, -*y);
            *dz = kappa.mul_add(s * inverse, *dz);
        }
    }
}

/// y ← σ'(k) ∘ (y + λ) by rows; `k` as given, `s` its σ.
pub(super) fn key_rows(y: &mut [f32], k: &[f32], s: &[f32], lambda: &[f32]) {
    let width = lambda.len();
    let rows = k.chunks_exact(width).zip(s.chunks_exact(width));
    for (y, (k, s)) in y.chunks_exact_mut(width).zip(rows) {
        let columns = k.iter().zip(s).zip(lambda);
        for (y, ((k, s), lambda)) in y.iter_mut().zip(columns) {
            *y = (*y + lambda) * if *k > 0.0 { 1.0 } else { *s };
        }
    }
}

/// x ← x + y.
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// x ← x + xᵀ of a square matrix.
pub(super) fn symmetrise(x: &mut [f32], n: usize) {
    for i in 0..n {
        for j in 0..=i {
            let sum = x[i * n + j] + x[j * n + i];
            x[i * n + j] = sum;
            x[j * n + i] = sum;
        }
    }
}

/// out [width, rows] ← xᵀ of x [rows, width].
pub(super) fn transpose(x: &[f32], rows: usize, out: &mut [f32]) {
    let width = x.len() / rows.max(1);
    for (r, row) in x.chunks_exact(width.max(1)).enumerate() {
        row.iter().enumerate().for_each(|(c, x)| out[c * rows + r] = *x);
    }
}

}
