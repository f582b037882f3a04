//! One segment and the memory: what its keys and values add to (M, z).
//!
//! Keys are σ-mapped in chunks of [`CHUNK`] tokens, so that scratch does not grow with N.

use super::matmul::{Into, Mat, matmul};
use super::simd;
use crate::{Problem, Update};

/// Tokens per chunk: σ(K), its weights and V of 256 tokens at d = 128 are 384 KiB, inside L2.
pub(crate) const CHUNK: usize = 256;

/// Buffers of one running task.
pub(crate) struct Scratch {
    /// Keys as given, then σ(K), [CHUNK, Dk].
    pub k: Vec<f32>,
    /// Retrieval weights of the keys, [CHUNK, Dk].
    w: Vec<f32>,
    /// Values, [CHUNK, Dv].
    pub v: Vec<f32>,
    m_before: Vec<f32>,
    z_before: Vec<f32>,
}

impl Scratch {
    pub fn new(p: &Problem) -> Self {
        let rows = |width| vec![0.0; CHUNK.min(p.segment_len()) * width];
        Self {
            k: rows(p.key_dim()),
            w: rows(p.key_dim()),
            v: rows(p.value_dim()),
            m_before: Vec::new(),
            z_before: Vec::new(),
        }
    }
}

/// Fills `k` and `v` of the scratch with the `len` tokens of a segment that start at `first`.
pub(crate) trait Load: Fn(usize, usize, &mut [f32], &mut [f32]) {}
impl<F: Fn(usize, usize, &mut [f32], &mut [f32])> Load for F {}

/// Calls `each` with every chunk of a segment of `tokens` tokens: (k, v, scratch w).
fn chunks(
    p: &Problem,
    tokens: usize,
    load: impl Load,
    x: &mut Scratch,
    mut each: impl FnMut(&mut [f32], &mut [f32], &mut [f32]),
) {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    for first in (0..tokens).step_by(CHUNK) {
        let n = CHUNK.min(tokens - first);
        let (k, v, w) = (&mut x.k[..n * dk], &mut x.v[..n * dv], &mut x.w[..n * dk]);
        load(first, n, k, v);
        each(k, v, w);
    }
}

/// b ← σ(K)ᵀ V and dz ← Σ σ(K) of a segment.
pub(crate) fn sums(
    p: &Problem,
    tokens: usize,
    load: impl Load,
    b: &mut [f32],
    dz: &mut [f32],
    x: &mut Scratch,
) {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    b.fill(0.0);
    dz.fill(0.0);
    chunks(p, tokens, load, x, |k, v, _| {
        let n = k.len() / dk;
        simd::feature_map(k);
        simd::add_rows(k, dz);
        matmul(b, Into::Add, Mat::rows(k, n, dk, dk).t(), Mat::rows(v, n, dv, dv));
    });
}

/// g ← G = σ(K)ᵀ D⁻¹ σ(K), D = diag(σ(K) z), of a segment that finds the normaliser `z`.
pub(crate) fn transition(
    p: &Problem,
    tokens: usize,
    load: impl Load,
    z: &[f32],
    g: &mut [f32],
    x: &mut Scratch,
) {
    let dk = p.key_dim();
    g.fill(0.0);
    chunks(p, tokens, load, x, |k, _, w| {
        let n = k.len() / dk;
        w.copy_from_slice(k);
        simd::retrieval_weights(w, z, p.denominator());
        simd::feature_map(k);
        matmul(g, Into::Add, Mat::rows(k, n, dk, dk).t(), Mat::rows(w, n, dk, dk));
    });
}

/// Writes a segment into (m, z): eq. (8) or (9) as they stand, with f32 residuals.
pub(crate) fn commit(
    p: &Problem,
    tokens: usize,
    load: impl Load,
    empty: bool,
    m: &mut [f32],
    z: &mut [f32],
    x: &mut Scratch,
) {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    let delta = p.update() == Update::Delta && !empty;
    let (mut m_before, mut z_before) =
        (std::mem::take(&mut x.m_before), std::mem::take(&mut x.z_before));
    if delta {
        m_before.clear();
        m_before.extend_from_slice(m);
        z_before.clear();
        z_before.extend_from_slice(z);
    }
    chunks(p, tokens, load, x, |k, v, w| {
        let n = k.len() / dk;
        if delta {
            w.copy_from_slice(k);
            simd::retrieval_weights(w, &z_before, p.denominator());
            matmul(v, Into::Subtract, Mat::rows(w, n, dk, dk), Mat::rows(&m_before, dk, dv, dv));
        }
        simd::feature_map(k);
        simd::add_rows(k, z);
        matmul(m, Into::Add, Mat::rows(k, n, dk, dk).t(), Mat::rows(v, n, dv, dv));
    });
    (x.m_before, x.z_before) = (m_before, z_before);
}
