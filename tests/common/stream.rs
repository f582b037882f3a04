//! Streams of tokens: seeded data, rotation tables, and a stream seen as a batch of one.

use infini_attn::{Element, Inputs, Problem, TensorView};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

use super::narrow;

/// Unrotated queries, keys and values of one sequence: [tokens, Hq, Dk], [tokens, Hkv, Dk] and
/// [tokens, Hkv, Dv].
#[derive(Clone, Debug, PartialEq)]
pub struct Stream<T> {
    pub problem: Problem,
    pub tokens: usize,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
}

/// Standard normal numbers, the same for the same seed.
pub fn normals(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| StandardNormal.sample(&mut rng)).collect()
}

/// Deterministic values in (−1, 1).
pub fn uniforms(seed: u64, len: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

impl<T: Element> Stream<T> {
    /// N(0, 1), rounded to the element type.
    pub fn normal(problem: &Problem, tokens: usize, seed: u64) -> Self {
        Self::from_fn(problem, tokens, seed, |_, x| x)
    }

    /// N(0, 1) mapped by `value('q' | 'k' | 'v', x)`, rounded to the element type.
    pub fn from_fn(
        problem: &Problem,
        tokens: usize,
        seed: u64,
        value: impl Fn(char, f32) -> f32,
    ) -> Self {
        let p = problem;
        let fill = |which: char, width: usize| {
            let values = normals(seed * 1000 + which as u64, tokens * width);
            narrow(&values.into_iter().map(|x| value(which, x)).collect::<Vec<_>>())
        };
        Self {
            problem: *p,
            tokens,
            q: fill('q', p.heads() * p.key_dim()),
            k: fill('k', p.kv_heads() * p.key_dim()),
            v: fill('v', p.kv_heads() * p.value_dim()),
        }
    }

    /// Elements of q, k and v per token.
    pub fn widths(&self) -> [usize; 3] {
        let p = &self.problem;
        [p.heads() * p.key_dim(), p.kv_heads() * p.key_dim(), p.kv_heads() * p.value_dim()]
    }

    /// Tokens `range`.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        let [q, k, v] = self.widths();
        Self {
            problem: self.problem,
            tokens: range.len(),
            q: self.q[range.start * q..range.end * q].to_vec(),
            k: self.k[range.start * k..range.end * k].to_vec(),
            v: self.v[range.start * v..range.end * v].to_vec(),
        }
    }

    /// The tokens in the given order (repetitions allowed).
    pub fn gather(&self, order: &[usize]) -> Self {
        let mut out = self.slice(0..0);
        order.iter().for_each(|&t| out.append(&self.slice(t..t + 1)));
        out
    }

    /// Adds the tokens of another stream.
    pub fn append(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.q.extend(&other.q);
        self.k.extend(&other.k);
        self.v.extend(&other.v);
    }

    /// Row of a token and head: the slice of `which` ('q', 'k' or 'v').
    pub fn row_mut(&mut self, which: char, token: usize, head: usize) -> &mut [T] {
        let p = self.problem;
        let (data, heads, dim) = match which {
            'q' => (&mut self.q, p.heads(), p.key_dim()),
            'k' => (&mut self.k, p.kv_heads(), p.key_dim()),
            _ => (&mut self.v, p.kv_heads(), p.value_dim()),
        };
        &mut data[(token * heads + head) * dim..][..dim]
    }

    /// As a batch of one.
    pub fn inputs(&self) -> Inputs<'_, T> {
        let p = &self.problem;
        let view = |data, heads, dim| {
            TensorView::new(data, &[1, self.tokens, heads, dim]).expect("a stream's own shape")
        };
        Inputs::new(
            view(&self.q, p.heads(), p.key_dim()),
            view(&self.k, p.kv_heads(), p.key_dim()),
            view(&self.v, p.kv_heads(), p.value_dim()),
        )
    }
}

/// Rotation tables [positions, R/2] of the usual frequencies, times a magnitude factor.
pub fn rope_tables(positions: usize, channels: usize, magnitude: f64) -> (Vec<f32>, Vec<f32>) {
    let half = channels / 2;
    let angle = |i: usize| {
        let (position, channel) = ((i / half) as f64, (i % half) as f64);
        position * 10000f64.powf(-2.0 * channel / channels as f64)
    };
    let table = |f: fn(f64) -> f64| -> Vec<f32> {
        (0..positions * half).map(|i| (magnitude * f(angle(i))) as f32).collect()
    };
    (table(f64::cos), table(f64::sin))
}
