//! One segment and the memory: what its keys and values add to (M, z).
//!
//! Keys are σ-mapped in chunks of [`CHUNK`] tokens, so that scratch does not grow with N.

use super::matmul::{FEW_ROWS, Into, Mat, add_by_rows, matmul, matmul_scaled};
use super::simd;
use crate::alloc;
use crate::call::form::Piece;
use crate::error::Result;
use crate::problem::{Problem, Update};

/// Tokens per chunk: σ(K), its weights and V of 256 tokens at d = 128 are 384 KiB, inside L2.
pub(crate) const CHUNK: usize = 256;

/// What scratch of this module and its callers is called in errors.
pub(super) const SCRATCH: &str = "scratch of a task";

/// Buffers of one running task.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Keys as given, then σ(K), [CHUNK, Dk].
    k: Vec<f32>,
    /// Retrieval weights of the keys, [CHUNK, Dk].
    w: Vec<f32>,
    /// Values, [CHUNK, Dv].
    v: Vec<f32>,
    /// M and z as [`commit`] finds them, under the delta rule.
    m: Vec<f32>,
    z: Vec<f32>,
    /// Σ σ(k) of a chunk that is committed, `[Dk]`.
    dz: Vec<f32>,
    /// A few rows of a product, [FEW_ROWS, Dv].
    rows: Vec<f32>,
}

impl Scratch {
    /// Room for everything but [`commit`].
    pub fn new(p: &Problem) -> Result<Self> {
        let mut scratch = Self::default();
        scratch.fit(p)?;
        Ok(scratch)
    }

    /// Room for [`commit`] too.
    pub fn for_commits(p: &Problem) -> Result<Self> {
        let mut scratch = Self::default();
        scratch.fit_commits(p)?;
        Ok(scratch)
    }

    fn fit(&mut self, p: &Problem) -> Result<()> {
        let rows = |x, width| alloc::room(x, &[CHUNK.min(p.segment_len()), width], SCRATCH);
        if p.update() == Update::Delta {
            rows(&mut self.w, p.key_dim())?;
        }
        rows(&mut self.k, p.key_dim())?;
        rows(&mut self.v, p.value_dim())
    }

    /// Makes what [`Self::for_commits`] makes from buffers that may be smaller.
    pub fn fit_commits(&mut self, p: &Problem) -> Result<()> {
        let (dk, dv) = (p.key_dim(), p.value_dim());
        self.fit(p)?;
        alloc::room(&mut self.dz, &[dk], SCRATCH)?;
        alloc::room(&mut self.rows, &[FEW_ROWS, dv], SCRATCH)?;
        if p.update() == Update::Delta {
            alloc::room(&mut self.m, &[dk, dv], SCRATCH)?;
            alloc::room(&mut self.z, &[dk], SCRATCH)?;
        }
        Ok(())
    }

    pub fn bytes(&self) -> usize {
        alloc::bytes(&[&self.k, &self.w, &self.v, &self.m, &self.z, &self.dz, &self.rows])
    }

    /// Lengthens the chunks into their room; the task does that, not who made them.
    fn chunks(&mut self, p: &Problem) {
        let rows = CHUNK.min(p.segment_len());
        self.k.resize(rows * p.key_dim(), 0.0);
        self.v.resize(rows * p.value_dim(), 0.0);
        if p.update() == Update::Delta {
            self.w.resize(rows * p.key_dim(), 0.0);
        }
    }
}

/// The tokens of one segment and KV head, row by row as f32; keys unrotated.
pub(crate) trait Tokens {
    fn len(&self) -> usize;
    fn key(&self, j: usize, k: &mut [f32]);
    fn value(&self, j: usize, v: &mut [f32]);

    /// Whether the rest need not be looked at.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Loads `x.k` chunk by chunk; calls `each` with a chunk's first token and length.
fn chunks(
    p: &Problem,
    tokens: &impl Tokens,
    x: &mut Scratch,
    mut each: impl FnMut(usize, usize, &mut Scratch),
) {
    x.chunks(p);
    for first in (0..tokens.len()).step_by(CHUNK).take_while(|_| !tokens.cancelled()) {
        let n = CHUNK.min(tokens.len() - first);
        for (j, k) in (first..first + n).zip(x.k.chunks_exact_mut(p.key_dim())) {
            tokens.key(j, k);
        }
        each(first, n, x);
    }
}

fn load_values(p: &Problem, tokens: &impl Tokens, first: usize, n: usize, v: &mut [f32]) {
    for (j, v) in (first..first + n).zip(v.chunks_exact_mut(p.value_dim())) {
        tokens.value(j, v);
    }
}

/// b ← σ(K)ᵀ V and dz ← Σ σ(K) of a segment.
pub(crate) fn sums(
    p: &Problem,
    tokens: &impl Tokens,
    b: &mut [f32],
    dz: &mut [f32],
    x: &mut Scratch,
) {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    b.fill(0.0);
    dz.fill(0.0);
    chunks(p, tokens, x, |first, n, x| {
        load_values(p, tokens, first, n, &mut x.v);
        simd::feature_map(&mut x.k[..n * dk]);
        simd::add_rows(&x.k[..n * dk], dz);
        matmul(b, Into::Add, Mat::rows(&x.k, n, dk, dk).t(), Mat::rows(&x.v, n, dv, dv));
    });
}

/// g ← G = σ(K)ᵀ D⁻¹ σ(K), D = diag(σ(K) z), of a segment that finds the normaliser `z`.
pub(crate) fn transition(
    p: &Problem,
    tokens: &impl Tokens,
    z: &[f32],
    g: &mut [f32],
    x: &mut Scratch,
) {
    let dk = p.key_dim();
    g.fill(0.0);
    chunks(p, tokens, x, |_, n, x| {
        let unit = weigh(p, n, z, &x.k, &mut x.w);
        simd::feature_map(&mut x.k[..n * dk]);
        let (k, w) = (Mat::rows(&x.k, n, dk, dk).t(), Mat::rows(&x.w, n, dk, dk));
        matmul_scaled(g, Into::Add, unit, k, w);
    });
}

/// w ← the retrieval weights of the first `n` keys in k, in the unit returned.
fn weigh(p: &Problem, n: usize, z: &[f32], k: &[f32], w: &mut [f32]) -> f32 {
    let w = &mut w[..n * p.key_dim()];
    w.copy_from_slice(&k[..n * p.key_dim()]);
    simd::retrieval_weights(w, z, p.denominator())
}

/// A buffer with the room of `new` comes to hold it.
fn replace(buffer: &mut Vec<f32>, new: &[f32]) {
    buffer.clear();
    buffer.extend_from_slice(new);
}

/// Writes a segment into (m, z): eq. (8) or (9) as they stand, with f32 residuals.
pub(crate) fn commit(
    p: &Problem,
    tokens: &impl Tokens,
    empty: bool,
    m: &mut [f32],
    z: &mut [f32],
    x: &mut Scratch,
) {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    let delta = p.update() == Update::Delta && !empty;
    if delta {
        replace(&mut x.m, m);
        replace(&mut x.z, z);
    }
    chunks(p, tokens, x, |first, n, x| {
        load_values(p, tokens, first, n, &mut x.v);
        if delta {
            let unit = weigh(p, n, &x.z, &x.k, &mut x.w);
            let (w, m) = (Mat::rows(&x.w, n, dk, dk), Mat::rows(&x.m, dk, dv, dv));
            add_by_rows(&mut x.v[..n * dv], -unit, w, m, &mut x.rows);
        }
        simd::feature_map(&mut x.k[..n * dk]);
        // Sums of many keys: beside a large z single ones would be lost to rounding.
        x.dz.clear();
        x.dz.resize(dk, 0.0);
        simd::add_rows(&x.k[..n * dk], &mut x.dz);
        simd::add_rows(&x.dz, z);
        let (k, v) = (Mat::rows(&x.k, n, dk, dk).t(), Mat::rows(&x.v, n, dv, dv));
        add_by_rows(m, 1.0, k, v, &mut x.rows);
    });
}

/// Whether a completed segment has a G.
pub(super) fn transits(p: &Problem, piece: &Piece) -> bool {
    p.update() == Update::Delta && !piece.empty
}

/// m ← m − G m + B; `b` is left holding the M the segment found.
pub(super) fn advance_memory(p: &Problem, piece: &Piece, b: &mut [f32], g: &[f32], m: &mut [f32]) {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    // B − G M, then M + that: the small correction is rounded, never I − G.
    if transits(p, piece) {
        matmul(b, Into::Subtract, Mat::rows(g, dk, dk, dk), Mat::rows(m, dk, dv, dv));
    }
    for (b, m) in b.iter_mut().zip(m) {
        let found = *m;
        *m += *b;
        *b = found;
    }
}
