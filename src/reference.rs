//! Float64 reference: the paper's equations read line by line, one token after another. Slow, and
//! the oracle of every other implementation.

use crate::alloc;
use crate::call::form::Sequence;
use crate::call::{self, Batch, Inputs};
use crate::error::{Error, Result};
use crate::memory::{Counters, check_slots};
use crate::problem::{Denominator, EmptyMemory, Problem, Update};

/// State of the reference: float64 throughout, one entry per slot.
#[derive(Clone, Debug)]
pub struct State {
    /// Memory M, [slots, Hkv, Dk, Dv].
    pub m: Vec<f64>,
    /// Normaliser z, [slots, Hkv, Dk].
    pub z: Vec<f64>,
    problem: Problem,
    counters: Vec<Counters>,
    /// Open segment of each slot: one entry per token.
    open: Vec<Vec<Token>>,
}

/// A token of the open segment, all KV heads.
#[derive(Clone, Debug)]
struct Token {
    /// Keys as given, [Hkv, Dk].
    k: Vec<f64>,
    /// Keys as the local branch sees them, [Hkv, Dk].
    k_local: Vec<f64>,
    /// Values, [Hkv, Dv].
    v: Vec<f64>,
}

/// Everything the operator can return, row-major in the inputs' order of dimensions. Padded rows
/// are 0 (log-sum-exp −∞).
#[derive(Clone, Debug)]
pub struct Output {
    /// Gated output, [B, T, Hq, Dv] or packed [total, Hq, Dv].
    pub o: Vec<f64>,
    /// Local branch, shaped like `o`.
    pub a_dot: Vec<f64>,
    /// Memory branch, shaped like `o`.
    pub a_mem: Vec<f64>,
    /// Log-sum-exp of the local branch, [B, Hq, T] or packed [Hq, total].
    pub lse: Vec<f64>,
}

impl State {
    /// Empty streams in slots 0 to `sequences` − 1.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(problem: &Problem, sequences: usize) -> Result<Self> {
        let (h, dk, dv) = (problem.kv_heads(), problem.key_dim(), problem.value_dim());
        let what = format_args!("a reference state of {sequences} slots");
        Ok(Self {
            problem: *problem,
            m: alloc::zeroed(&[sequences, h, dk, dv], what)?,
            z: alloc::zeroed(&[sequences, h, dk], what)?,
            counters: alloc::zeroed(&[sequences], what)?,
            open: alloc::collected((0..sequences).map(|_| Vec::new()), what)?,
        })
    }

    /// Tokens the slot has seen.
    pub fn tokens(&self, slot: usize) -> u64 {
        self.counters[slot].tokens
    }

    /// Tokens the slot has written into (M, z).
    pub fn committed(&self, slot: usize) -> u64 {
        self.counters[slot].committed
    }

    /// Tokens in the slot's open segment.
    pub fn open_len(&self, slot: usize) -> usize {
        self.counters[slot].open_len
    }

    /// Writes the open segment of every named slot into its memory.
    ///
    /// # Errors
    /// [`Error::Problem`] when the state belongs to another problem, [`Error::Value`] for a slot out of
    /// range or named twice.
    pub fn flush(&mut self, problem: &Problem, slots: &[usize]) -> Result<()> {
        self.check(problem)?;
        check_slots(slots, self.counters.len())?;
        slots.iter().for_each(|&slot| self.commit(problem, slot));
        Ok(())
    }

    /// The state must be one of `problem`, its M and z (which anyone may replace) of that size.
    fn check(&self, problem: &Problem) -> Result<()> {
        problem.check_same(&self.problem)?;
        let z = self.counters.len() * problem.kv_heads() * problem.key_dim();
        for (argument, got, len) in
            [("state.m", self.m.len(), z * problem.value_dim()), ("state.z", self.z.len(), z)]
        {
            if got != len {
                let expected = format!("{len} (as State::new made)");
                return Err(Error::Length { argument, got, expected });
            }
        }
        Ok(())
    }

    /// Retrieval with one query row, and whether the memory was empty (then 0).
    fn read(&self, p: &Problem, slot: usize, kv_head: usize, q: &[f64]) -> (Vec<f64>, bool) {
        if self.counters[slot].committed == 0 {
            return (vec![0.0; p.value_dim()], true);
        }
        let chunk = slot * p.kv_heads() + kv_head;
        let (m, z) = (p.key_dim() * p.value_dim(), p.key_dim());
        (retrieve(p, q, &self.m[chunk * m..][..m], &self.z[chunk * z..][..z]), false)
    }

    fn commit(&mut self, p: &Problem, slot: usize) {
        let segment = std::mem::take(&mut self.open[slot]);
        let (dk, dv) = (p.key_dim(), p.value_dim());
        for h in 0..p.kv_heads() {
            let chunk = slot * p.kv_heads() + h;
            let m = &mut self.m[chunk * dk * dv..][..dk * dv];
            let z = &mut self.z[chunk * dk..][..dk];
            let empty = self.counters[slot].committed == 0;
            let (m_before, z_before) = (m.to_vec(), z.to_vec());
            for token in &segment {
                let k = &token.k[h * dk..][..dk];
                let mut u = token.v[h * dv..][..dv].to_vec();
                if p.update() == Update::Delta && !empty {
                    let r = retrieve(p, k, &m_before, &z_before);
                    u.iter_mut().zip(r).for_each(|(u, r)| *u -= r);
                }
                for (d, s) in k.iter().map(|&x| sigma(x)).enumerate() {
                    z[d] += s;
                    m[d * dv..][..dv].iter_mut().zip(&u).for_each(|(m, u)| *m += s * u);
                }
            }
        }
        let c = &mut self.counters[slot];
        c.committed += segment.len() as u64;
        c.open_len = 0;
    }
}

/// σ(x) = ELU(x) + 1. Below f32's smallest normal number it counts as 0, as on every backend.
pub(crate) fn sigma(x: f64) -> f64 {
    let s = if x > 0.0 { x + 1.0 } else { x.exp() };
    if s < f64::from(f32::MIN_POSITIVE) { 0.0 } else { s }
}

/// Eq. (7) for one row: σ(x) M / σ(x) z.
fn retrieve(p: &Problem, x: &[f64], m: &[f64], z: &[f64]) -> Vec<f64> {
    // Exact is invariant to the row's scale: σ(x) = exp(x − max) when no channel is positive.
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let shift = if p.denominator() == Denominator::Exact && max <= 0.0 { max } else { 0.0 };
    let s: Vec<f64> = x.iter().map(|&x| sigma(x - shift)).collect();
    let dot: f64 = s.iter().zip(z).map(|(s, z)| s * z).sum();
    let den = match p.denominator() {
        Denominator::Exact => dot,
        Denominator::Clamp(eps) => dot.max(eps.into()),
        Denominator::Add(eps) => dot + f64::from(eps),
    };
    let mut r = vec![0.0; p.value_dim()];
    // Like σ, a denominator below f32's smallest normal number counts as 0.
    let absent = den.abs() < f64::from(f32::MIN_POSITIVE);
    if !absent {
        for (s, m) in s.iter().zip(m.chunks_exact(p.value_dim())) {
            r.iter_mut().zip(m).for_each(|(r, m)| *r += s * m / den);
        }
    }
    r
}

/// Eq. (6) for one row: softmax over the open segment, and its log-sum-exp.
fn attend(p: &Problem, q: &[f64], segment: &[Token], h: usize) -> (Vec<f64>, f64) {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    let logits: Vec<f64> = (segment.iter())
        .map(|t| {
            p.scale() * q.iter().zip(&t.k_local[h * dk..][..dk]).map(|(q, k)| q * k).sum::<f64>()
        })
        .collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|s| (s - max).exp()).sum();
    let mut out = vec![0.0; dv];
    for (s, t) in logits.iter().zip(segment) {
        let w = (s - max).exp() / sum;
        out.iter_mut().zip(&t.v[h * dv..][..dv]).for_each(|(o, v)| *o += w * v);
    }
    (out, max + sum.ln())
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The operator on any number of tokens; the same meaning as [`crate::prefill`], for inputs of any
/// type that converts to f64.
///
/// # Errors
/// Those of [`crate::prefill`] that concern inputs, gate and slots.
pub fn prefill<T: Copy + Into<f64>>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
) -> Result<Output> {
    state.check(problem)?;
    let (batch, sequences) = call::resolve(problem, inputs, gate, &state.counters)?;
    let shape = inputs.q.shape();
    let rows: usize = shape[..shape.len() - 1].iter().product();
    let mut out = Output {
        o: vec![0.0; rows * problem.value_dim()],
        a_dot: vec![0.0; rows * problem.value_dim()],
        a_mem: vec![0.0; rows * problem.value_dim()],
        lse: vec![f64::NEG_INFINITY; rows],
    };
    for seq in &sequences {
        for t in 0..seq.len {
            step(problem, inputs, &batch, gate, seq, t, state, &mut out);
        }
    }
    Ok(out)
}

/// Token `t` of a sequence: append it, attend and retrieve with every query head, and commit the
/// segment if the token was its last.
#[allow(clippy::too_many_arguments)]
fn step<T: Copy + Into<f64>>(
    p: &Problem,
    inputs: &Inputs<'_, T>,
    batch: &Batch<'_>,
    gate: &[f32],
    seq: &Sequence,
    t: usize,
    state: &mut State,
    out: &mut Output,
) {
    let (b, token, rows) = (seq.batch, seq.first + t, inputs.rows());
    let widen = |row: &[T]| -> Vec<f64> { row.iter().map(|&x| x.into()).collect() };
    let local = |row: &[f64]| {
        let mut row = row.to_vec();
        if let Some(rope) = &batch.rope {
            rope.rotate(&mut row, batch.position(seq, t));
        }
        row
    };
    let mut new = Token { k: vec![], k_local: vec![], v: vec![] };
    for h in 0..p.kv_heads() {
        // SAFETY: `resolve` checked every index.
        let (k, v) = unsafe { (widen(rows.k.row(b, token, h)), widen(rows.v.row(b, token, h))) };
        new.k_local.extend(local(&k));
        new.k.extend(k);
        new.v.extend(v);
    }
    state.open[seq.slot].push(new);
    for (h, &beta) in gate.iter().enumerate() {
        // SAFETY: as above.
        let q = widen(unsafe { rows.q.row(b, token, h) });
        let (a_dot, lse) = attend(p, &local(&q), &state.open[seq.slot], h / p.group());
        let (a_mem, empty) = state.read(p, seq.slot, h / p.group(), &q);
        let bypass = empty && p.empty_memory() == EmptyMemory::Bypass;
        let (g, complement) =
            if bypass { (0.0, 1.0) } else { (sigmoid(beta.into()), sigmoid(-f64::from(beta))) };
        // A branch of weight 0 is absent, whatever it holds.
        let weigh = |w: f64, x: f64| if w == 0.0 { 0.0 } else { w * x };
        let o = a_mem.iter().zip(&a_dot).map(|(&m, &d)| weigh(g, m) + weigh(complement, d));
        let at = ((b * batch.tokens() + token) * p.heads() + h) * p.value_dim();
        out.o.splice(at..at + p.value_dim(), o);
        out.a_dot[at..][..p.value_dim()].copy_from_slice(&a_dot);
        out.a_mem[at..][..p.value_dim()].copy_from_slice(&a_mem);
        out.lse[(b * p.heads() + h) * batch.tokens() + token] = lse;
    }
    let c = &mut state.counters[seq.slot];
    c.tokens += 1;
    c.open_len += 1;
    c.rotated = batch.rope.is_some();
    if c.open_len == p.segment_len() {
        state.commit(p, seq.slot);
    }
}
