//! The operator in the precision of the tensor-core kernels, written plainly: float64 arithmetic,
//! in which the operands of matrix products are rounded to the 16-bit type, and scores to f32. Its
//! error against the float64 reference is what the kernels' error is measured by.

use std::f64::consts::{LN_2, LOG2_E};

use infini_attn::{DType, Denominator, Element, EmptyMemory, Problem, Update};

use super::call::TABLE_ROWS;
use super::cases::Rotation;
use super::model::Output;
use super::stream::Stream;
use super::{WithType, narrow, with_type};

/// Columns of M that share one scale of its operand form.
const SCALE_COLUMNS: usize = 32;

/// One sequence.
#[derive(Clone, Debug)]
pub struct Plain {
    problem: Problem,
    /// [Hkv, Dk, Dv]
    pub m: Vec<f64>,
    /// [Hkv, Dk], sums of rounded σ(k)
    pub z: Vec<f64>,
    /// Tokens seen.
    pub tokens: u64,
    /// Tokens in (M, z).
    pub committed: u64,
    /// Tokens of the open segment.
    open: Vec<Token>,
}

/// A token's keys, as given and rotated, [Hkv, Dk], and values, [Hkv, Dv].
#[derive(Clone, Debug)]
struct Token {
    k: Vec<f64>,
    k_local: Vec<f64>,
    v: Vec<f64>,
}

/// Rotation tables, and the row of every token.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub rotation: Rotation,
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub positions: &'a [i64],
}

impl Plain {
    pub fn new(problem: &Problem) -> Self {
        let heads = problem.kv_heads();
        Self {
            problem: *problem,
            m: vec![0.0; heads * problem.key_dim() * problem.value_dim()],
            z: vec![0.0; heads * problem.key_dim()],
            tokens: 0,
            committed: 0,
            open: vec![],
        }
    }

    /// All tokens of a stream. Outputs are rounded to the element type; log-sum-exp [T, Hq].
    pub fn run<T: Element>(
        &mut self,
        stream: &Stream<T>,
        rows: Option<Rows<'_>>,
        gate: &[f32],
    ) -> Output {
        let p = self.problem;
        let mut out = Output { o: vec![], a_dot: vec![], a_mem: vec![], lse: vec![] };
        let mut t = 0;
        while t < stream.tokens {
            let taken = (p.segment_len() - self.open.len()).min(stream.tokens - t);
            let operands = self.operands();
            for t in t..t + taken {
                let local = |x: &[f64]| local(&p, x, rows, t);
                self.open.push(token(&p, stream, t, &local));
                for (h, &beta) in gate.iter().enumerate() {
                    let dk = p.key_dim();
                    let q = wide(&stream.q[(t * p.heads() + h) * dk..][..dk]);
                    let kv = h / p.group();
                    let (a_dot, lse) = attend(&p, &local(&q), &self.open, kv);
                    let a_mem = self.read(kv, &q, &operands[kv]);
                    out.o.extend(self.gated(beta, &a_dot, &a_mem));
                    out.a_dot.extend(round(p.dtype(), &a_dot));
                    out.a_mem.extend(round(p.dtype(), &a_mem));
                    out.lse.push(lse);
                }
            }
            t += taken;
            self.tokens += taken as u64;
            if self.open.len() == p.segment_len() {
                self.commit();
            }
        }
        out
    }

    /// Commits the open segment.
    pub fn flush(&mut self) {
        self.commit();
    }

    /// M of every head as it enters products: rounded at a power of two per 32 columns.
    fn operands(&self) -> Vec<Vec<f64>> {
        let p = &self.problem;
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let operand = |m: &[f64]| {
            let mut out = vec![0.0; m.len()];
            for c0 in (0..dv).step_by(SCALE_COLUMNS) {
                let columns = c0..dv.min(c0 + SCALE_COLUMNS);
                let block = || (0..dk).flat_map(|d| columns.clone().map(move |c| d * dv + c));
                let max = block().map(|i| m[i].abs()).fold(0.0, f64::max);
                let scale =
                    if max > 0.0 && max.is_finite() { (-max.log2().floor()).exp2() } else { 1.0 };
                for i in block() {
                    out[i] = round(p.dtype(), &[m[i] * scale])[0] / scale;
                }
            }
            out
        };
        self.m.chunks_exact(dk * dv).map(operand).collect()
    }

    /// Eq. (7) for one row, from the rounded σ of the row and the operand form of M.
    fn read(&self, head: usize, x: &[f64], operand: &[f64]) -> Vec<f64> {
        let p = &self.problem;
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let mut r = vec![0.0; dv];
        if self.committed == 0 {
            return r;
        }
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shift = if p.denominator() == Denominator::Exact && max <= 0.0 { max } else { 0.0 };
        let shifted: Vec<f64> = x.iter().map(|x| x - shift).collect();
        let s = sigma(p.dtype(), &shifted);
        let dot: f64 = s.iter().zip(&self.z[head * dk..]).map(|(s, z)| s * z).sum();
        let den = match p.denominator() {
            Denominator::Exact => dot,
            Denominator::Clamp(eps) => dot.max(eps.into()),
            Denominator::Add(eps) => dot + f64::from(eps),
            other => panic!("no rule is known for {other}"),
        };
        if den.abs() >= f64::from(f32::MIN_POSITIVE) {
            for (s, row) in s.iter().zip(operand.chunks_exact(dv)) {
                r.iter_mut().zip(row).for_each(|(r, m)| *r += s * m / den);
            }
        }
        r
    }

    fn gated(&self, beta: f32, a_dot: &[f64], a_mem: &[f64]) -> Vec<f64> {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let empty = self.committed == 0;
        let bypass = empty && self.problem.empty_memory() == EmptyMemory::Bypass;
        let (g, rest) = match bypass {
            true => (0.0, 1.0),
            false => (sigmoid(beta.into()), sigmoid(-f64::from(beta))),
        };
        let weigh = |w: f64, x: f64| if w == 0.0 { 0.0 } else { w * x };
        let o = a_dot.iter().zip(a_mem).map(|(d, m)| weigh(g, *m) + weigh(rest, *d));
        round(self.problem.dtype(), &o.collect::<Vec<_>>())
    }

    fn commit(&mut self) {
        let (p, segment) = (self.problem, std::mem::take(&mut self.open));
        let (dk, dv) = (p.key_dim(), p.value_dim());
        for (h, operand) in self.operands().iter().enumerate() {
            let (mut m, mut z) = (vec![0.0; dk * dv], vec![0.0; dk]);
            for token in &segment {
                let k = &token.k[h * dk..][..dk];
                let mut u = token.v[h * dv..][..dv].to_vec();
                if p.update() == Update::Delta {
                    let r = round(p.dtype(), &self.read(h, k, operand));
                    u.iter_mut().zip(r).for_each(|(u, r)| *u -= r);
                }
                for (d, s) in sigma(p.dtype(), k).into_iter().enumerate() {
                    z[d] += s;
                    m[d * dv..][..dv].iter_mut().zip(&u).for_each(|(m, u)| *m += s * u);
                }
            }
            self.m[h * dk * dv..].iter_mut().zip(m).for_each(|(m, d)| *m += d);
            self.z[h * dk..].iter_mut().zip(z).for_each(|(z, d)| *z += d);
        }
        self.committed += segment.len() as u64;
    }
}

/// Eq. (6) for one row: rounded weights over the last row's maximum, their sum before rounding.
fn attend(p: &Problem, q: &[f64], segment: &[Token], h: usize) -> (Vec<f64>, f64) {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    let dot = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
    // The products in f32, and the shift rounded before one fused multiply-add: where scores are
    // large, this is the error of any f32 softmax.
    let dots: Vec<f32> = segment.iter().map(|t| dot(&t.k_local[h * dk..][..dk]) as f32).collect();
    let scale = (p.scale() * LOG2_E) as f32;
    let max = dots.iter().map(|s| s * scale).fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = dots.iter().map(|s| f64::from(s.mul_add(scale, -max)).exp2()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; dv];
    for (w, t) in round(p.dtype(), &weights).iter().zip(segment) {
        out.iter_mut().zip(&t.v[h * dv..][..dv]).for_each(|(o, v)| *o += w * v / sum);
    }
    (out, f64::from(max) * LN_2 + sum.ln())
}

fn token<T: Element>(
    p: &Problem,
    stream: &Stream<T>,
    t: usize,
    local: &impl Fn(&[f64]) -> Vec<f64>,
) -> Token {
    let [_, wk, wv] = stream.widths();
    let (k, v) = (wide(&stream.k[t * wk..][..wk]), wide(&stream.v[t * wv..][..wv]));
    let k_local = k.chunks_exact(p.key_dim()).flat_map(local).collect();
    Token { k, k_local, v }
}

/// A row of q or k as the local branch sees it: rotated and rounded.
fn local(p: &Problem, row: &[f64], rows: Option<Rows<'_>>, t: usize) -> Vec<f64> {
    let mut row = row.to_vec();
    let Some(r) = rows else { return row };
    let half = r.rotation.channels / 2;
    let at = r.positions[t] as usize;
    assert!(at < TABLE_ROWS);
    for i in 0..half {
        let (a, b) = if r.rotation.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let (c, s) = (f64::from(r.cos[at * half + i]), f64::from(r.sin[at * half + i]));
        (row[a], row[b]) = (row[a] * c - row[b] * s, row[b] * c + row[a] * s);
    }
    round(p.dtype(), &row)
}

/// σ(x) = ELU(x) + 1, below f32's smallest normal number 0, rounded to the element type.
fn sigma(dtype: DType, x: &[f64]) -> Vec<f64> {
    let of = |&x: &f64| if x > 0.0 { x + 1.0 } else { x.exp() };
    let flush = |s: f64| if s < f64::from(f32::MIN_POSITIVE) { 0.0 } else { s };
    round(dtype, &x.iter().map(of).map(flush).collect::<Vec<_>>())
}

/// Rounds to the element type.
fn round(dtype: DType, values: &[f64]) -> Vec<f64> {
    struct Round<'a>(&'a [f64]);
    impl WithType for Round<'_> {
        type Output = Vec<f64>;
        fn run<T: Element>(self) -> Vec<f64> {
            wide(&narrow::<T>(&self.0.iter().map(|&x| x as f32).collect::<Vec<_>>()))
        }
    }
    with_type(dtype, Round(values))
}

fn wide<T: Element>(row: &[T]) -> Vec<f64> {
    super::widen(row)
}
