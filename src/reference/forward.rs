//! The operator, one token after another.

use std::sync::atomic::Ordering;

use crate::alloc;
use crate::call::check::Tables;
use crate::call::form::Sequence;
use crate::call::{self, Batch, Inputs};
use crate::error::{Error, Result};
use crate::memory::{Counters, check_slots};
use crate::problem::{Problem, Update};
use crate::reference::rows::{ROW, Token, attend, gate_weights, retrieve, sigma, softmax, weigh};

/// What memory is for, in errors.
pub(super) const STATE: &str = "a reference state";
pub(super) const TOKEN: &str = "a token of the reference";
pub(super) const OUTPUTS: &str = "the reference's outputs";

/// State of the reference: float64 throughout, one entry per slot.
#[derive(Clone, Debug)]
pub struct State {
    /// Memory M, [slots, Hkv, Dk, Dv].
    pub m: Vec<f64>,
    /// Normaliser z, [slots, Hkv, Dk].
    pub z: Vec<f64>,
    pub(super) problem: Problem,
    pub(super) counters: Vec<Counters>,
    /// Open segment of each slot: one entry per token.
    pub(super) open: Vec<Vec<Token>>,
}

impl Token {
    pub(super) fn try_clone(&self) -> Result<Token> {
        let copy = |x: &[f64]| alloc::copied(x, TOKEN);
        Ok(Token { k: copy(&self.k)?, k_local: copy(&self.k_local)?, v: copy(&self.v)? })
    }
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
    /// range or named twice, [`Error::OutOfMemory`].
    pub fn flush(&mut self, problem: &Problem, slots: &[usize]) -> Result<()> {
        self.check(problem)?;
        check_slots(slots, self.counters.len())?;
        let mut next = self.try_clone()?;
        slots.iter().try_for_each(|&slot| next.commit(problem, slot))?;
        *self = next;
        Ok(())
    }

    /// A copy, or [`Error::OutOfMemory`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn try_clone(&self) -> Result<State> {
        let mut open = alloc::reserved(&[self.open.len()], STATE)?;
        for segment in &self.open {
            let mut copy = alloc::reserved(&[segment.len()], STATE)?;
            segment.iter().try_for_each(|token| token.try_clone().map(|token| copy.push(token)))?;
            open.push(copy);
        }
        Ok(State {
            problem: self.problem,
            m: alloc::copied(&self.m, STATE)?,
            z: alloc::copied(&self.z, STATE)?,
            counters: alloc::copied(&self.counters, STATE)?,
            open,
        })
    }

    /// The state must be one of `problem`, its M and z (which anyone may replace) of that size.
    pub(super) fn check(&self, problem: &Problem) -> Result<()> {
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
    pub(super) fn read(
        &self,
        p: &Problem,
        slot: usize,
        kv_head: usize,
        q: &[f64],
    ) -> Result<(Vec<f64>, bool)> {
        if self.counters[slot].committed == 0 {
            return Ok((alloc::zeroed(&[p.value_dim()], ROW)?, true));
        }
        let chunk = slot * p.kv_heads() + kv_head;
        let (m, z) = (p.key_dim() * p.value_dim(), p.key_dim());
        Ok((retrieve(p, q, &self.m[chunk * m..][..m], &self.z[chunk * z..][..z])?, false))
    }

    pub(super) fn commit(&mut self, p: &Problem, slot: usize) -> Result<()> {
        let segment = std::mem::take(&mut self.open[slot]);
        let (dk, dv) = (p.key_dim(), p.value_dim());
        for h in 0..p.kv_heads() {
            let chunk = slot * p.kv_heads() + h;
            let m = &mut self.m[chunk * dk * dv..][..dk * dv];
            let z = &mut self.z[chunk * dk..][..dk];
            let empty = self.counters[slot].committed == 0;
            let (m_before, z_before) = (alloc::copied(m, STATE)?, alloc::copied(z, STATE)?);
            for token in &segment {
                let k = &token.k[h * dk..][..dk];
                let mut u = alloc::copied(&token.v[h * dv..][..dv], ROW)?;
                if p.update() == Update::Delta && !empty {
                    let r = retrieve(p, k, &m_before, &z_before)?;
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
        Ok(())
    }
}

/// The operator on any number of tokens; the same meaning as [`crate::prefill`], for inputs of any
/// type that converts to f64.
///
/// # Errors
/// Those of [`crate::prefill`] that concern inputs, gate, slots, the state's problem and memory that
/// does not suffice. [`Error::Cancelled`] with no token taken in.
pub fn prefill<T: Copy + Into<f64>>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
) -> Result<Output> {
    state.check(problem)?;
    let mut tables = Tables::default();
    let batch = call::resolve(problem, inputs, gate, &state.counters, &mut tables)?;
    let sequences = tables.sequences;
    let shape = inputs.q.shape();
    let rows = &shape[..shape.len() - 1];
    let output = || alloc::zeroed(&[rows, &[problem.value_dim()]].concat(), OUTPUTS);
    let (o, a_dot, a_mem) = (output()?, output()?, output()?);
    let mut out = Output { o, a_dot, a_mem, lse: alloc::zeroed(rows, OUTPUTS)? };
    out.lse.fill(f64::NEG_INFINITY);
    // Memory may run out on the way.
    let mut next = state.try_clone()?;
    for seq in &sequences {
        for t in 0..seq.len {
            if inputs.cancel.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(Error::Cancelled { taken: vec![0; sequences.len()] });
            }
            step(problem, inputs, &batch, gate, seq, t, &mut next, &mut out)?;
        }
    }
    *state = next;
    Ok(out)
}

/// Rotates row `t` of a sequence for the local branch.
fn rotate(batch: &Batch<'_>, seq: &Sequence, t: usize, row: &mut [f64]) {
    if let Some(rope) = &batch.rope {
        rope.rotate(row, batch.position(seq, t));
    }
}

/// Key and value of token `t` of a sequence.
pub(super) fn new_token<T: Copy + Into<f64>>(
    p: &Problem,
    inputs: &Inputs<'_, T>,
    batch: &Batch<'_>,
    seq: &Sequence,
    t: usize,
) -> Result<Token> {
    let rows = inputs.rows();
    let buffer = |width| alloc::reserved(&[p.kv_heads(), width], TOKEN);
    let (k, k_local, v) = (buffer(p.key_dim())?, buffer(p.key_dim())?, buffer(p.value_dim())?);
    let mut new = Token { k, k_local, v };
    for h in 0..p.kv_heads() {
        let at = (seq.batch, seq.first + t, h);
        // SAFETY: `resolve` checked every index.
        let (k, v) = unsafe { (rows.k.row(at.0, at.1, at.2), rows.v.row(at.0, at.1, at.2)) };
        new.k.extend(k.iter().map(|&x| x.into()));
        new.v.extend(v.iter().map(|&x| x.into()));
    }
    new.k_local.extend_from_slice(&new.k);
    new.k_local.chunks_exact_mut(p.key_dim()).for_each(|k| rotate(batch, seq, t, k));
    Ok(new)
}

/// A query row, as the memory and as the local branch see it.
pub(super) fn query<T: Copy + Into<f64>>(
    inputs: &Inputs<'_, T>,
    batch: &Batch<'_>,
    seq: &Sequence,
    t: usize,
    h: usize,
) -> Result<[Vec<f64>; 2]> {
    // SAFETY: `resolve` checked every index.
    let q = unsafe { inputs.rows().q.row(seq.batch, seq.first + t, h) };
    let q = alloc::collected(q.iter().map(|&x| x.into()), ROW)?;
    let mut q_local = alloc::copied(&q, ROW)?;
    rotate(batch, seq, t, &mut q_local);
    Ok([q, q_local])
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
) -> Result<()> {
    let (b, token) = (seq.batch, seq.first + t);
    let new = new_token(p, inputs, batch, seq, t)?;
    alloc::grow(&mut state.open[seq.slot], STATE)?;
    state.open[seq.slot].push(new);
    for (h, &beta) in gate.iter().enumerate() {
        let [q, q_local] = query(inputs, batch, seq, t, h)?;
        let segment = &state.open[seq.slot];
        let (weights, lse) = softmax(p, &q_local, segment, h / p.group())?;
        let a_dot = attend(p, &weights, segment, h / p.group())?;
        let (a_mem, empty) = state.read(p, seq.slot, h / p.group(), &q)?;
        let (g, complement) = gate_weights(p, beta, empty);
        let at = ((b * batch.tokens() + token) * p.heads() + h) * p.value_dim();
        for (o, (&m, &d)) in out.o[at..].iter_mut().zip(a_mem.iter().zip(&a_dot)) {
            *o = weigh(g, m) + weigh(complement, d);
        }
        out.a_dot[at..][..p.value_dim()].copy_from_slice(&a_dot);
        out.a_mem[at..][..p.value_dim()].copy_from_slice(&a_mem);
        out.lse[(b * p.heads() + h) * batch.tokens() + token] = lse;
    }
    let c = &mut state.counters[seq.slot];
    c.tokens += 1;
    c.open_len += 1;
    c.rotated = batch.rope.is_some();
    if c.open_len == p.segment_len() {
        state.commit(p, seq.slot)?;
    }
    Ok(())
}
