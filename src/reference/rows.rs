//! The equations of one row of one head.

use crate::alloc;
use crate::error::Result;
use crate::problem::{Denominator, EmptyMemory, Problem};

/// What memory is for, in errors.
pub(super) const ROW: &str = "a row of the reference";

/// A token of the open segment, all KV heads.
#[derive(Clone, Debug)]
pub(super) struct Token {
    /// Keys as given, [Hkv, Dk].
    pub k: Vec<f64>,
    /// Keys as the local branch sees them, [Hkv, Dk].
    pub k_local: Vec<f64>,
    /// Values, [Hkv, Dv].
    pub v: Vec<f64>,
}

/// σ(x) = ELU(x) + 1. Below f32's smallest normal number it counts as 0, as on every backend.
pub(crate) fn sigma(x: f64) -> f64 {
    let s = if x > 0.0 { x + 1.0 } else { x.exp() };
    if s < f64::from(f32::MIN_POSITIVE) { 0.0 } else { s }
}

/// Its derivative, 0 where it counts as 0.
pub(super) fn sigma_slope(x: f64) -> f64 {
    if x > 0.0 { 1.0 } else { sigma(x) }
}

/// What a retrieval makes of its row x before it reads M.
pub(super) struct Probe {
    /// σ(x), of x less its maximum where that changes nothing.
    pub s: Vec<f64>,
    /// Its derivative.
    pub slope: Vec<f64>,
    /// The denominator; none where it counts as 0.
    pub den: Option<f64>,
    /// Whether the denominator follows σ(x) and z.
    pub follows: bool,
}

impl Probe {
    pub fn new(p: &Problem, x: &[f64], z: &[f64]) -> Result<Self> {
        // Exact is invariant to the row's scale: σ(x) = exp(x − max) when no channel is positive.
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shift = if p.denominator() == Denominator::Exact && max <= 0.0 { max } else { 0.0 };
        let s = alloc::collected(x.iter().map(|&x| sigma(x - shift)), ROW)?;
        let slope = alloc::collected(x.iter().map(|&x| sigma_slope(x - shift)), ROW)?;
        let dot = dot(&s, z);
        let (den, follows) = match p.denominator() {
            Denominator::Exact => (dot, true),
            Denominator::Clamp(eps) => (dot.max(eps.into()), dot >= f64::from(eps)),
            Denominator::Add(eps) => (dot + f64::from(eps), true),
        };
        // Like σ, a denominator below f32's smallest normal number counts as 0.
        let absent = den.abs() < f64::from(f32::MIN_POSITIVE);
        Ok(Self { s, slope, den: (!absent).then_some(den), follows })
    }
}

/// Eq. (7) for one row: σ(x) M / σ(x) z.
pub(super) fn retrieve(p: &Problem, x: &[f64], m: &[f64], z: &[f64]) -> Result<Vec<f64>> {
    let probe = Probe::new(p, x, z)?;
    let mut r = alloc::zeroed(&[p.value_dim()], ROW)?;
    if let Some(den) = probe.den {
        for (s, m) in probe.s.iter().zip(m.chunks_exact(p.value_dim())) {
            r.iter_mut().zip(m).for_each(|(r, m)| *r += s * m / den);
        }
    }
    Ok(r)
}

/// The softmax of one row over the open segment, and its log-sum-exp.
pub(super) fn softmax(
    p: &Problem,
    q: &[f64],
    segment: &[Token],
    h: usize,
) -> Result<(Vec<f64>, f64)> {
    let dk = p.key_dim();
    let logits = segment.iter().map(|t| p.scale() * dot(q, &t.k_local[h * dk..][..dk]));
    let mut weights = alloc::collected(logits, ROW)?;
    let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = weights.iter().map(|s| (s - max).exp()).sum();
    weights.iter_mut().for_each(|s| *s = (*s - max).exp() / sum);
    Ok((weights, max + sum.ln()))
}

/// Eq. (6) for one row: the values of the open segment by the weights of its softmax.
pub(super) fn attend(
    p: &Problem,
    weights: &[f64],
    segment: &[Token],
    h: usize,
) -> Result<Vec<f64>> {
    let dv = p.value_dim();
    let mut out = alloc::zeroed(&[dv], ROW)?;
    for (w, t) in weights.iter().zip(segment) {
        out.iter_mut().zip(&t.v[h * dv..][..dv]).for_each(|(o, v)| *o += w * v);
    }
    Ok(out)
}

pub(super) fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// Weights of A_mem and A_dot in the gated output.
pub(super) fn gate_weights(p: &Problem, beta: f32, empty: bool) -> (f64, f64) {
    if empty && p.empty_memory() == EmptyMemory::Bypass {
        return (0.0, 1.0);
    }
    (sigmoid(beta.into()), sigmoid(-f64::from(beta)))
}

/// A branch of weight 0 is absent, whatever it holds.
pub(super) fn weigh(w: f64, x: f64) -> f64 {
    if w == 0.0 { 0.0 } else { w * x }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
