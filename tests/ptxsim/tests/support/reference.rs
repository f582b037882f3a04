//! The results in float64.

/// c = a b; a [m][k], b [k][n] or, `transposed`, [n][k].
pub fn matmul(a: &[f64], b: &[f64], [m, n, k]: [usize; 3], transposed: bool) -> Vec<f64> {
    assert_eq!((a.len(), b.len()), (m * k, k * n), "operands of a {m} x {n} x {k} product");
    let at = |i: usize, j: usize| if transposed { b[j * k + i] } else { b[i * n + j] };
    let element = |e: usize| (0..k).map(|i| a[e / n * k + i] * at(i, e % n)).sum();
    (0..m * n).map(element).collect()
}

/// Softmax of every row.
pub fn softmax(x: &[f64], columns: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<_> = row.iter().map(|v| (v - top).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(move |w| w / total)
    };
    x.chunks(columns).flat_map(row).collect()
}

/// Shape and kind of an attention.
#[derive(Clone, Copy)]
pub struct Attention {
    pub heads: usize,
    pub tokens: usize,
    pub d: usize,
    pub scale: f64,
    pub causal: bool,
}

/// softmax(scale q kᵀ) v; everything [heads][tokens][d].
pub fn attention(q: &[f64], k: &[f64], v: &[f64], shape: Attention) -> Vec<f64> {
    let Attention { heads, tokens, d, scale, causal } = shape;
    let mut out = vec![0.0; heads * tokens * d];
    let row = |x: &[f64], head: usize, token: usize| {
        let first = (head * tokens + token) * d;
        x[first..first + d].to_vec()
    };
    for head in 0..heads {
        for token in 0..tokens {
            let query = row(q, head, token);
            let visible = if causal { token + 1 } else { tokens };
            let score = |key: usize| {
                let product: f64 = query.iter().zip(row(k, head, key)).map(|(x, y)| x * y).sum();
                product * scale
            };
            let scores: Vec<f64> = (0..visible).map(score).collect();
            let to = &mut out[(head * tokens + token) * d..][..d];
            for (key, weight) in softmax(&scores, visible).into_iter().enumerate() {
                to.iter_mut().zip(row(v, head, key)).for_each(|(o, x)| *o += weight * x);
            }
        }
    }
    out
}
