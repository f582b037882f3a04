//! The gradients of one sequence's call in phases that are parallel over its segments, in float64; and
//! mistakes that an implementation in such phases can make.

use infini_attn::reference::{OpenGradient, Output};
use infini_attn::{Denominator, EmptyMemory, Problem, Update};

/// Something done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// Keys have no part in what later segments divide by.
    DenominatorForgotten,
    /// dβ as if β weighed the other branch.
    BranchesSwapped,
    KeysNotRotatedBack,
    /// Weights of a segment that finds a memory, for one that finds none.
    FirstNotEmpty,
    /// Tokens of the segment that stays open take part in the memory after the call.
    OpenCommitted,
    /// Only one query head of a group reaches keys, values and memory.
    GroupNotSummed,
    /// Blocks of truncated propagation are one.
    TruncationLeaks,
    PaddingNotZero,
    NotANumber,
}

/// A token's key, as the memory and as the local branch see it, and value: [Hkv, D].
#[derive(Clone, Debug)]
pub struct Token {
    pub k: Vec<f64>,
    pub rotated: Vec<f64>,
    pub v: Vec<f64>,
}

/// What a sequence's call found and was given.
pub struct Call<'a> {
    pub p: &'a Problem,
    /// Unrotated and rotated queries of the new tokens, [Hq, Dk].
    pub q: Vec<[Vec<f64>; 2]>,
    /// Those found, then the new ones.
    pub tokens: Vec<Token>,
    pub gate: &'a [f32],
    /// M and z before the call, and whether nothing was in them.
    pub memory: [Vec<f64>; 2],
    pub empty: bool,
    /// Gradients to the outputs, [tokens, Hq, Dv] and [tokens, Hq].
    pub upstream: Output,
    pub bptt_segments: Option<usize>,
    pub mistake: Option<Mistake>,
}

/// Gradients: to the new tokens' queries, rotated and not, to all tokens, and to the gate.
pub struct Gradients {
    pub q: Vec<[Vec<f64>; 2]>,
    pub tokens: Vec<OpenGradient>,
    pub gate: Vec<f64>,
}

/// σ of a row as a retrieval takes it, its derivative, the denominator, and 1 if that follows the row.
struct Probe {
    s: Vec<f64>,
    slope: Vec<f64>,
    den: f64,
    follows: f64,
}

const LEAST: f64 = f32::MIN_POSITIVE as f64;

fn sigma(x: f64) -> f64 {
    let s = if x > 0.0 { x + 1.0 } else { x.exp() };
    if s < LEAST { 0.0 } else { s }
}

fn slope(x: f64) -> f64 {
    if x > 0.0 { 1.0 } else { sigma(x) }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(y: &mut [f64], a: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// m += a x yᵀ
fn outer(m: &mut [f64], a: f64, x: &[f64], y: &[f64]) {
    m.chunks_exact_mut(y.len()).zip(x).for_each(|(row, x)| add(row, a * x, y));
}

/// xᵀ m
fn left(x: &[f64], m: &[f64]) -> Vec<f64> {
    let mut y = vec![0.0; m.len() / x.len()];
    m.chunks_exact(y.len()).zip(x).for_each(|(row, x)| add(&mut y, *x, row));
    y
}

/// m y
fn right(m: &[f64], y: &[f64]) -> Vec<f64> {
    m.chunks_exact(y.len()).map(|row| dot(row, y)).collect()
}

impl Probe {
    fn new(p: &Problem, x: &[f64], z: &[f64]) -> Self {
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shift = if p.denominator() == Denominator::Exact { max.min(0.0) } else { 0.0 };
        let s: Vec<f64> = x.iter().map(|x| sigma(x - shift)).collect();
        let n = dot(&s, z);
        let (den, follows) = match p.denominator() {
            Denominator::Clamp(eps) if n < f64::from(eps) => (eps.into(), 0.0),
            Denominator::Add(eps) => (n + f64::from(eps), 1.0),
            _ => (n, 1.0),
        };
        // One that counts as 0: nothing is found.
        let den = if den.abs() < LEAST { f64::INFINITY } else { den };
        Self { s, slope: x.iter().map(|x| slope(x - shift)).collect(), den, follows }
    }

    fn read(&self, m: &[f64]) -> Vec<f64> {
        left(&self.s, m).into_iter().map(|x| x / self.den).collect()
    }
}

/// A segment of one KV head.
struct Segment {
    /// Its tokens.
    from: usize,
    to: usize,
    full: bool,
    empty: bool,
    /// M and z that it finds.
    m: Vec<f64>,
    z: Vec<f64>,
}

impl Call<'_> {
    /// The gradients; those to M and z after the call become those before it, and the tokens' begin with
    /// `open`, those to the segment that stays open.
    pub fn backward(&self, memory: &mut [Vec<f64>; 2], open: &[OpenGradient]) -> Gradients {
        let p = self.p;
        let (k, v) = (p.kv_heads() * p.key_dim(), p.kv_heads() * p.value_dim());
        let zeros = || OpenGradient { k: vec![0.0; k], k_rotated: vec![0.0; k], v: vec![0.0; v] };
        let mut tokens: Vec<_> = (0..self.tokens.len() - open.len()).map(|_| zeros()).collect();
        tokens.extend_from_slice(open);
        let q = vec![[(); 2].map(|()| vec![0.0; p.heads() * p.key_dim()]); self.q.len()];
        let mut out = Gradients { q, tokens, gate: vec![0.0; p.heads()] };
        (0..p.kv_heads()).for_each(|h| self.head(h, memory, &mut out));
        out
    }

    /// The segments, each with what it finds.
    fn segments(&self, h: usize) -> Vec<Segment> {
        let p = self.p;
        let (n, dk, dv) = (p.segment_len(), p.key_dim(), p.value_dim());
        let [mut m, mut z] =
            [&self.memory[0][h * dk * dv..][..dk * dv], &self.memory[1][h * dk..][..dk]]
                .map(<[f64]>::to_vec);
        let (mut empty, mut out) = (self.empty, vec![]);
        for from in (0..self.tokens.len()).step_by(n) {
            let to = (from + n).min(self.tokens.len());
            let full = to == from + n || self.mistake == Some(Mistake::OpenCommitted);
            let found = Segment { from, to, full, empty, m: m.clone(), z: z.clone() };
            for token in self.tokens[from..to].iter().filter(|_| to == from + n) {
                let (k, mut u) = (&token.k[h * dk..][..dk], token.v[h * dv..][..dv].to_vec());
                if p.update() == Update::Delta && !empty {
                    add(&mut u, -1.0, &Probe::new(p, k, &found.z).read(&found.m));
                }
                let s: Vec<f64> = k.iter().map(|&x| sigma(x)).collect();
                outer(&mut m, 1.0, &s, &u);
                add(&mut z, 1.0, &s);
            }
            empty &= to < from + n;
            out.push(found);
        }
        out
    }

    fn head(&self, h: usize, memory: &mut [Vec<f64>; 2], out: &mut Gradients) {
        let (dk, dv) = (self.p.key_dim(), self.p.value_dim());
        let segments = self.segments(h);
        let reads: Vec<_> = segments.iter().map(|s| self.read(h, s, out)).collect();
        let [d_m, d_z] = memory;
        let (d_m, d_z) = (&mut d_m[h * dk * dv..][..dk * dv], &mut d_z[h * dk..][..dk]);
        for (i, (segment, [e_m, e_z])) in segments.iter().zip(reads).enumerate().rev() {
            if segment.full {
                self.write(h, segment, d_m, d_z, out);
            }
            add(d_m, 1.0, &e_m);
            add(d_z, -1.0, &e_z);
            let leaks = self.mistake == Some(Mistake::TruncationLeaks);
            if self.bptt_segments.is_some_and(|block| i % block == 0) && !leaks {
                d_m.fill(0.0);
                d_z.fill(0.0);
            }
        }
    }

    /// The outputs of a segment's new rows: E and e, and what does not go through the memory.
    fn read(&self, kv: usize, segment: &Segment, out: &mut Gradients) -> [Vec<f64>; 2] {
        let p = self.p;
        let (dk, dv, group) = (p.key_dim(), p.value_dim(), p.group());
        let found = self.tokens.len() - self.q.len();
        let (mut e_m, mut e_z) = (vec![0.0; dk * dv], vec![0.0; dk]);
        let rows = segment.from.max(found)..segment.to.max(found);
        for (t, h) in rows.flat_map(|t| (0..group).map(move |g| (t, kv * group + g))) {
            let lost = self.mistake == Some(Mistake::GroupNotSummed) && h % group != 0;
            let i = t - found;
            let [q, q_rotated] = self.q[i].each_ref().map(|q| &q[h * dk..][..dk]);
            let up = |all: &[f64]| all[(i * p.heads() + h) * dv..][..dv].to_vec();
            let (g_a, g_dot) = (up(&self.upstream.o), up(&self.upstream.a_dot));
            let d_lse = self.upstream.lse[i * p.heads() + h];

            let logit = |token: &Token| p.scale() * dot(q_rotated, &token.rotated[kv * dk..][..dk]);
            let logits: Vec<f64> = self.tokens[segment.from..=t].iter().map(logit).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|s| (s - max).exp()).sum();
            let weights: Vec<f64> = logits.iter().map(|s| (s - max).exp() / sum).collect();
            let mut a_dot = vec![0.0; dv];
            for (w, token) in weights.iter().zip(&self.tokens[segment.from..]) {
                add(&mut a_dot, *w, &token.v[kv * dv..][..dv]);
            }

            let bypass = segment.empty && p.empty_memory() == EmptyMemory::Bypass;
            let bypass = bypass && self.mistake != Some(Mistake::FirstNotEmpty);
            let beta = f64::from(self.gate[h]);
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            let (g, rest) = if bypass { (0.0, 1.0) } else { (sigmoid(beta), sigmoid(-beta)) };
            let mut m = vec![0.0; dv];
            if !segment.empty {
                let probe = Probe::new(p, q, &segment.z);
                m = probe.read(&segment.m);
                let mut given = up(&self.upstream.a_mem);
                add(&mut given, g, &g_a);
                let c = dot(&given, &m) * probe.follows;
                let d_s = right(&segment.m, &given);
                for (d, d_s) in d_s.into_iter().enumerate() {
                    out.q[i][0][h * dk + d] +=
                        probe.slope[d] * (d_s - c * segment.z[d]) / probe.den;
                }
                if !lost {
                    outer(&mut e_m, 1.0 / probe.den, &probe.s, &given);
                    add(&mut e_z, c / probe.den, &probe.s);
                }
            }
            let a: Vec<f64> = m.iter().zip(&a_dot).map(|(m, d)| g * m + rest * d).collect();
            if !bypass {
                let swapped = self.mistake == Some(Mistake::BranchesSwapped);
                let sign = if swapped { -g } else { g };
                out.gate[h] += sign * (dot(&g_a, &m) - dot(&g_a, &a));
            }

            let delta = dot(&g_a, &a) - g * dot(&g_a, &m) + dot(&g_dot, &a_dot) - d_lse;
            for (j, w) in weights.iter().enumerate() {
                let token = &self.tokens[segment.from + j];
                let (k, v) = (&token.rotated[kv * dk..][..dk], &token.v[kv * dv..][..dv]);
                let d_s = p.scale() * w * (rest * dot(&g_a, v) + dot(&g_dot, v) - delta);
                add(&mut out.q[i][1][h * dk..][..dk], d_s, k);
                if !lost {
                    let to = &mut out.tokens[segment.from + j];
                    add(&mut to.k_rotated[kv * dk..][..dk], d_s, q_rotated);
                    add(&mut to.v[kv * dv..][..dv], w * rest, &g_a);
                    add(&mut to.v[kv * dv..][..dv], *w, &g_dot);
                }
            }
        }
        [e_m, e_z]
    }

    /// The keys and values that a segment writes by: from Λ_s and λ_s to Λ − G Λ and λ − h.
    fn write(&self, h: usize, s: &Segment, d_m: &mut [f64], d_z: &mut [f64], out: &mut Gradients) {
        let p = self.p;
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let (lambda_m, lambda_z) = (d_m.to_vec(), d_z.to_vec());
        for t in s.from..s.to {
            let (k, v) = (&self.tokens[t].k[h * dk..][..dk], &self.tokens[t].v[h * dv..][..dv]);
            let to = &mut out.tokens[t];
            let sigma: Vec<f64> = k.iter().map(|&x| sigma(x)).collect();
            let d_u = left(&sigma, &lambda_m);
            add(&mut to.v[h * dv..][..dv], 1.0, &d_u);
            let mut u = v.to_vec();
            if p.update() == Update::Delta && !s.empty {
                let probe = Probe::new(p, k, &s.z);
                let r = probe.read(&s.m);
                add(&mut u, -1.0, &r);
                let c = -dot(&d_u, &r) * probe.follows;
                for (d, m_du) in right(&s.m, &d_u).into_iter().enumerate() {
                    to.k[h * dk + d] += probe.slope[d] * (-m_du - c * s.z[d]) / probe.den;
                }
                outer(d_m, -1.0 / probe.den, &probe.s, &d_u);
                add(d_z, -c / probe.den, &probe.s);
            }
            let forgotten = self.mistake == Some(Mistake::DenominatorForgotten);
            for (d, d_sigma) in right(&lambda_m, &u).into_iter().enumerate() {
                let through_z = if forgotten { 0.0 } else { lambda_z[d] };
                to.k[h * dk + d] += slope(k[d]) * (d_sigma + through_z);
            }
        }
    }
}
