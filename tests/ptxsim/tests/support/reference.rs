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

impl Attention {
    fn row<'a>(&self, x: &'a [f64], head: usize, token: usize) -> &'a [f64] {
        &x[(head * self.tokens + token) * self.d..][..self.d]
    }

    /// The weights of the keys that a query sees, and ln Σ exp of its scores.
    fn weights(&self, q: &[f64], k: &[f64], head: usize, token: usize) -> (Vec<f64>, f64) {
        let visible = if self.causal { token + 1 } else { self.tokens };
        let query = self.row(q, head, token);
        let score = |key| dot(query, self.row(k, head, key)) * self.scale;
        let scores: Vec<f64> = (0..visible).map(score).collect();
        let weights = softmax(&scores, visible);
        let log_sum = scores[0] - weights[0].ln();
        (weights, log_sum)
    }

    /// Every query.
    fn queries(&self) -> impl Iterator<Item = (usize, usize)> {
        let tokens = self.tokens;
        (0..self.heads).flat_map(move |head| (0..tokens).map(move |token| (head, token)))
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// to += factor x.
fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}

/// softmax(scale q kᵀ) v; everything [heads][tokens][d].
pub fn attention(q: &[f64], k: &[f64], v: &[f64], shape: Attention) -> Vec<f64> {
    let mut out = vec![0.0; q.len()];
    for ((head, token), to) in shape.queries().zip(out.chunks_mut(shape.d)) {
        for (key, weight) in shape.weights(q, k, head, token).0.into_iter().enumerate() {
            add(to, weight, shape.row(v, head, key));
        }
    }
    out
}

/// ln Σ exp of the scores of every query, [heads][tokens].
pub fn log_sums(q: &[f64], k: &[f64], shape: Attention) -> Vec<f64> {
    shape.queries().map(|(head, token)| shape.weights(q, k, head, token).1).collect()
}

/// The derivatives with respect to q, k and v of the sum of `d_o` times the attention.
pub fn attention_backward([q, k, v, d_o]: [&[f64]; 4], shape: Attention) -> [Vec<f64>; 3] {
    let [mut d_q, mut d_k, mut d_v] = [q, k, v].map(|x| vec![0.0; x.len()]);
    for (head, token) in shape.queries() {
        let at = |token: usize| (head * shape.tokens + token) * shape.d;
        let row = |token: usize| at(token)..at(token) + shape.d;
        let (weights, _) = shape.weights(q, k, head, token);
        let d_out = &d_o[row(token)];
        let d_weights: Vec<f64> = (0..weights.len()).map(|key| dot(d_out, &v[row(key)])).collect();
        let mean = dot(&weights, &d_weights);
        for (key, (weight, d_weight)) in weights.iter().zip(d_weights).enumerate() {
            let d_score = weight * (d_weight - mean) * shape.scale;
            add(&mut d_q[row(token)], d_score, &k[row(key)]);
            add(&mut d_k[row(key)], d_score, &q[row(token)]);
            add(&mut d_v[row(key)], *weight, d_out);
        }
    }
    [d_q, d_k, d_v]
}
