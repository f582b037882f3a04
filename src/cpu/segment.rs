//! One segment and the memory: what its keys and values add to (M, z).
//!
//! Keys are σ-mapped in chunks of [`CHUNK`] tokens, so that scratch does not grow with N.

use super::matmul::{FEW_ROWS, Into, Mat, add_by_rows, matmul, matmul_strided};
use super::simd;
use super::weights;
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
        add_sums(p, &x.k[..n * dk], &x.v[..n * dv], b, dz);
    });
}

/// b ← b + σ(K)ᵀ V and dz ← dz + Σ σ(K) of a chunk of mapped keys.
fn add_sums(p: &Problem, k: &[f32], v: &[f32], b: &mut [f32], dz: &mut [f32]) {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    let n = k.len() / dk;
    simd::add_rows(k, dz);
    matmul(b, Into::Add, Mat::rows(k, n, dk, dk).t(), Mat::rows(v, n, dv, dv));
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
        let (k, w) = (&mut x.k[..n * dk], &mut x.w[..n * dk]);
        let unit = weights::map_and_weigh(k, z, p.denominator(), w);
        add_transition(p, k, w, unit, g);
    });
    mirror(p, g);
}

/// Rows of G that are computed together, from the diagonal on. Up to 48 `gemm` reads W as it lies.
const G_ROWS: usize = 32;

/// g ← g + unit·σ(K)ᵀ W of a chunk of mapped keys and their weights, but for what [`mirror`] fills in:
/// G is symmetric.
fn add_transition(p: &Problem, k: &[f32], w: &[f32], unit: f32, g: &mut [f32]) {
    let dk = p.key_dim();
    let n = k.len() / dk;
    for first in (0..dk).step_by(G_ROWS) {
        let rows = G_ROWS.min(dk - first);
        let k = Mat::rows(&k[first..], n, rows, dk).t();
        let w = Mat::rows(&w[first..], n, dk - first, dk);
        matmul_strided(&mut g[first * dk + first..], dk, Into::Add, unit, k, w);
    }
}

/// Rows of g before the diagonal from the columns.
fn mirror(p: &Problem, g: &mut [f32]) {
    let dk = p.key_dim();
    for i in 0..dk {
        for j in 0..i / G_ROWS * G_ROWS {
            g[i * dk + j] = g[j * dk + i];
        }
    }
}

/// What keys [tokens, Dk] and values of a segment add to the memory: [`sums`] and, given the z the segment
/// finds if it has a G, [`transition`], to the bit. The keys are mapped where they lie; `w` has room for the
/// weights of a chunk.
pub(crate) fn additions(
    p: &Problem,
    (keys, values): (&mut [f32], &[f32]),
    found: Option<&[f32]>,
    (b, dz, g): (&mut [f32], &mut [f32], &mut [f32]),
    w: &mut Vec<f32>,
) {
    b.fill(0.0);
    dz.fill(0.0);
    g.fill(0.0);
    let (dk, dv) = (p.key_dim(), p.value_dim());
    for (k, v) in keys.chunks_mut(CHUNK * dk).zip(values.chunks(CHUNK * dv)) {
        if let Some(z) = found {
            w.resize(k.len(), 0.0);
            let unit = weights::map_and_weigh(k, z, p.denominator(), w);
            add_transition(p, k, w, unit, g);
        } else {
            simd::feature_map(k);
        }
        add_sums(p, k, v, b, dz);
    }
    if found.is_some() {
        mirror(p, g);
    }
}

/// w ← the retrieval weights of the first `n` keys in k, in the unit returned.
fn weigh(p: &Problem, n: usize, z: &[f32], k: &[f32], w: &mut [f32]) -> f32 {
    let w = &mut w[..n * p.key_dim()];
    w.copy_from_slice(&k[..n * p.key_dim()]);
    weights::retrieval_weights(w, z, p.denominator())
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

/// Whether a piece completes a segment that has a G.
pub(super) fn transits(p: &Problem, piece: &Piece) -> bool {
    p.update() == Update::Delta && piece.full && !piece.empty
}

/// m ← m − G m + B; `b` is left holding the M the segment found. (As G is symmetric, gradients go the other
/// way by the same step.)
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

#[cfg(test)]
mod tests {
    use super::*;

    struct Rows<'a>(&'a [f32], &'a [f32], usize, usize);

    impl Tokens for Rows<'_> {
        fn len(&self) -> usize {
            self.0.len() / self.2
        }

        fn key(&self, j: usize, k: &mut [f32]) {
            k.copy_from_slice(&self.0[j * self.2..][..self.2]);
        }

        fn value(&self, j: usize, v: &mut [f32]) {
            v.copy_from_slice(&self.1[j * self.3..][..self.3]);
        }
    }

    /// σ(K)ᵀ D⁻¹ σ(K) in float64.
    fn exact(keys: &[f32], z: &[f32]) -> Vec<f64> {
        let sigma = |x: &f32| if *x > 0.0 { f64::from(*x) + 1.0 } else { f64::from(*x).exp() };
        let mut g = vec![0.0; z.len() * z.len()];
        for key in keys.chunks_exact(z.len()) {
            let k: Vec<f64> = key.iter().map(sigma).collect();
            let den: f64 = k.iter().zip(z).map(|(k, z)| k * f64::from(*z)).sum();
            for (row, a) in g.chunks_exact_mut(z.len()).zip(&k) {
                row.iter_mut().zip(&k).for_each(|(g, b)| *g += a * b / den);
            }
        }
        g
    }

    #[test]
    fn what_a_packed_segment_adds_is_the_same_and_g_is_right() {
        // Two chunks; channels that are no multiple of the blocks of G, and fewer than one.
        for (dk, dv, n) in [(72, 24, CHUNK + 37), (16, 16, 40)] {
            let built = Problem::builder().key_dim(dk).value_dim(dv).segment_len(n).build();
            let p = built.expect("valid");
            let number = |i: usize| ((i * 7919) % 1013) as f32 / 250.0 - 2.0;
            let keys: Vec<f32> = (0..n * dk).map(number).collect();
            let values: Vec<f32> = (0..n * dv).map(|i| number(i + 5)).collect();
            let z: Vec<f32> = (0..dk).map(|i| 1.0 + (i % 5) as f32).collect();
            let buffers = || (vec![1.0; dk * dv], vec![1.0; dk], vec![1.0; dk * dk]);
            let (mut b, mut dz, mut g) = buffers();
            let mut scratch = Scratch::new(&p).expect("room");
            let tokens = Rows(&keys, &values, dk, dv);
            sums(&p, &tokens, &mut b, &mut dz, &mut scratch);
            transition(&p, &tokens, &z, &mut g, &mut scratch);
            let (mut packed_b, mut packed_dz, mut packed_g) = buffers();
            let packed = (&mut packed_b[..], &mut packed_dz[..], &mut packed_g[..]);
            let mut mapped = keys.clone();
            additions(&p, (&mut mapped, &values), Some(&z), packed, &mut Vec::new());
            assert_eq!((&b, &dz, &g), (&packed_b, &packed_dz, &packed_g));
            let largest = exact(&keys, &z).into_iter().fold(0.0, f64::max);
            for (got, want) in g.iter().zip(exact(&keys, &z)) {
                assert!((f64::from(*got) - want).abs() <= 1e-6 * largest, "{got} for {want}");
            }
        }
    }
}
