//! Gradients in float64, by the chain rule through eq. (6) to (10), one segment after another from the
//! last: the oracle of [`crate::prefill_backward`], whose order of computation it shares nothing with.

use std::sync::atomic::Ordering;

use crate::alloc;
use crate::call::check::Tables;
use crate::call::form::{Piece, Sequence, pieces};
use crate::call::{self, Batch, Inputs};
use crate::error::{Error, Result};
use crate::problem::{Problem, Update};
use crate::reference::forward::{OUTPUTS, Output, STATE, State, TOKEN, new_token, query};
use crate::reference::rows::{
    Probe, ROW, Token, attend, dot, gate_weights, retrieve, sigma, sigma_slope, softmax, weigh,
};

/// Gradient of a loss with respect to a [`State`].
#[derive(Clone, Debug)]
pub struct StateGradient {
    /// dL/dM, [slots, Hkv, Dk, Dv].
    pub m: Vec<f64>,
    /// dL/dz, [slots, Hkv, Dk].
    pub z: Vec<f64>,
    /// To the tokens of each slot's open segment.
    pub open: Vec<Vec<OpenGradient>>,
}

impl StateGradient {
    /// Zeros: a loss that does not depend on `state`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(state: &State) -> Result<Self> {
        let mut open = alloc::reserved(&[state.counters.len()], STATE)?;
        for counters in &state.counters {
            open.push(open_zeros(&state.problem, counters.open_len)?);
        }
        let (m, z) =
            (alloc::zeroed(&[state.m.len()], STATE)?, alloc::zeroed(&[state.z.len()], STATE)?);
        Ok(Self { m, z, open })
    }

    /// A copy, or [`Error::OutOfMemory`].
    fn try_clone(&self) -> Result<Self> {
        let copy = |x: &[f64]| alloc::copied(x, STATE);
        let mut open = alloc::reserved(&[self.open.len()], STATE)?;
        for segment in &self.open {
            let mut rows = alloc::reserved(&[segment.len()], STATE)?;
            for row in segment {
                let (k, k_rotated, v) = (copy(&row.k)?, copy(&row.k_rotated)?, copy(&row.v)?);
                rows.push(OpenGradient { k, k_rotated, v });
            }
            open.push(rows);
        }
        Ok(Self { m: copy(&self.m)?, z: copy(&self.z)?, open })
    }

    /// It must be shaped like `state` after a call on these sequences.
    fn check(&self, p: &Problem, state: &State, sequences: &[Sequence]) -> Result<()> {
        let slots = state.counters.len();
        check_len("gradient.m", self.m.len(), state.m.len())?;
        check_len("gradient.z", self.z.len(), state.z.len())?;
        check_len("gradient.open", self.open.len(), slots)?;
        for seq in sequences {
            let rows = &self.open[seq.slot];
            let after = (state.counters[seq.slot].open_len + seq.len) % p.segment_len();
            check_len("gradient.open", rows.len(), after)?;
            for row in rows {
                check_len("gradient.open.k", row.k.len(), p.kv_heads() * p.key_dim())?;
                check_len("gradient.open.k_rotated", row.k_rotated.len(), row.k.len())?;
                check_len("gradient.open.v", row.v.len(), p.kv_heads() * p.value_dim())?;
            }
        }
        Ok(())
    }
}

fn check_len(argument: &'static str, got: usize, expected: usize) -> Result<()> {
    match got == expected {
        true => Ok(()),
        false => Err(Error::Length { argument, got, expected: expected.to_string() }),
    }
}

fn open_zeros(p: &Problem, tokens: usize) -> Result<Vec<OpenGradient>> {
    let mut rows = alloc::reserved(&[tokens], TOKEN)?;
    for _ in 0..tokens {
        let row = |width| alloc::zeroed(&[p.kv_heads(), width], TOKEN);
        let (k, k_rotated, v) = (row(p.key_dim())?, row(p.key_dim())?, row(p.value_dim())?);
        rows.push(OpenGradient { k, k_rotated, v });
    }
    Ok(rows)
}

/// The gradient with respect to a token of an open segment, all KV heads.
#[derive(Clone, Debug)]
pub struct OpenGradient {
    /// To the keys as the memory will see them (and the local branch, without rotation), [Hkv, Dk].
    pub k: Vec<f64>,
    /// To the rotated keys, [Hkv, Dk]; zeros without rotation.
    pub k_rotated: Vec<f64>,
    /// To the values, [Hkv, Dv].
    pub v: Vec<f64>,
}

/// Gradients with respect to the inputs of a call, shaped like them, row-major; 0 at padding.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// dL/dq.
    pub q: Vec<f64>,
    /// dL/dk.
    pub k: Vec<f64>,
    /// dL/dv.
    pub v: Vec<f64>,
    /// dL/dβ, `[Hq]`.
    pub gate: Vec<f64>,
}

/// The gradients of [`super::prefill`] on `state` (which stands where the call found it) from those with
/// respect to its outputs: `outputs` is shaped like them. `gradient`, dL/d(state after the call),
/// becomes dL/d(state before it); `bptt_segments` as in [`crate::InputGradients::bptt_segments`].
///
/// # Errors
/// Those of [`super::prefill`]; [`Error::Length`] for gradients of another shape than what they
/// belong to, [`Error::Value`] for blocks of 0 segments. Nothing changes then.
pub fn prefill_backward<T: Copy + Into<f64>>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &State,
    outputs: &Output,
    gradient: &mut StateGradient,
    bptt_segments: Option<usize>,
) -> Result<Gradients> {
    state.check(problem)?;
    let mut tables = Tables::default();
    let batch = call::resolve(problem, inputs, gate, &state.counters, &mut tables)?;
    let rows = inputs.q.shape().iter().rev().skip(1).product::<usize>();
    check_len("outputs.o", outputs.o.len(), rows * problem.value_dim())?;
    check_len("outputs.a_dot", outputs.a_dot.len(), rows * problem.value_dim())?;
    check_len("outputs.a_mem", outputs.a_mem.len(), rows * problem.value_dim())?;
    check_len("outputs.lse", outputs.lse.len(), rows)?;
    gradient.check(problem, state, &tables.sequences)?;
    if bptt_segments == Some(0) {
        return Err(Error::value("bptt_segments", 0, "at least 1"));
    }
    let zeros = |shape: &[usize]| alloc::zeroed(shape, OUTPUTS);
    let (q, k) = (zeros(inputs.q.shape())?, zeros(inputs.k.shape())?);
    let (v, beta) = (zeros(inputs.v.shape())?, zeros(&[gate.len()])?);
    let mut pass = Pass {
        p: problem,
        inputs,
        batch,
        gate,
        outputs,
        gradients: Gradients { q, k, v, gate: beta },
        state: gradient.try_clone()?,
    };
    // Forward once more, one sequence at a time: what every segment finds.
    let mut states = state.try_clone()?;
    for seq in &tables.sequences {
        let segments = pass.segments(*seq, &mut states)?;
        for (i, segment) in segments.iter().enumerate().rev() {
            if inputs.cancel.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(Error::Cancelled { taken: vec![0; tables.sequences.len()] });
            }
            pass.segment(segment)?;
            if bptt_segments.is_some_and(|block| i.is_multiple_of(block)) {
                let [m, z] = pass.memory(seq.slot);
                m.fill(0.0);
                z.fill(0.0);
            }
        }
    }
    *gradient = pass.state;
    Ok(pass.gradients)
}

/// The part of a sequence's call that falls into one segment, and what it finds.
struct Segment {
    piece: Piece,
    /// M, [Hkv, Dk, Dv].
    m: Vec<f64>,
    /// z, [Hkv, Dk].
    z: Vec<f64>,
    /// The segment's tokens, first those of earlier calls.
    tokens: Vec<Token>,
}

/// A head's part of M or z of all heads of so many.
fn head(all: &[f64], heads: usize, h: usize) -> &[f64] {
    let len = all.len() / heads;
    &all[h * len..][..len]
}

fn head_mut(all: &mut [f64], heads: usize, h: usize) -> &mut [f64] {
    let len = all.len() / heads;
    &mut all[h * len..][..len]
}

/// What nothing depends on is absent, whatever it holds.
fn matters(gradient: &[f64]) -> bool {
    gradient.iter().any(|x| *x != 0.0)
}

/// y += a x
fn add(y: &mut [f64], a: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// A call on its way back.
struct Pass<'a, T> {
    p: &'a Problem,
    inputs: &'a Inputs<'a, T>,
    batch: Batch<'a>,
    gate: &'a [f32],
    outputs: &'a Output,
    gradients: Gradients,
    state: StateGradient,
}

impl<T: Copy + Into<f64>> Pass<'_, T> {
    /// The gradients to M and z of a slot.
    fn memory(&mut self, slot: usize) -> [&mut [f64]; 2] {
        let slots = self.state.open.len();
        let StateGradient { m, z, .. } = &mut self.state;
        [head_mut(m, slots, slot), head_mut(z, slots, slot)]
    }

    /// The segments of a sequence's call, which `state` goes through.
    fn segments(&self, seq: Sequence, state: &mut State) -> Result<Vec<Segment>> {
        let (p, slot, slots) = (self.p, seq.slot, state.counters.len());
        let mut segments = Vec::new();
        for piece in pieces(p, seq, state.counters[slot]) {
            for t in piece.start..piece.start + piece.len {
                let token = new_token(p, self.inputs, &self.batch, &seq, t)?;
                alloc::grow(&mut state.open[slot], STATE)?;
                state.open[slot].push(token);
            }
            let copy = |all| alloc::copied(head(all, slots, slot), STATE);
            let (m, z) = (copy(&state.m)?, copy(&state.z)?);
            let mut tokens = alloc::reserved(&[state.open[slot].len()], STATE)?;
            for token in &state.open[slot] {
                tokens.push(token.try_clone()?);
            }
            alloc::grow(&mut segments, STATE)?;
            segments.push(Segment { piece, m, z, tokens });
            if piece.full {
                state.commit(p, slot)?;
            }
        }
        Ok(segments)
    }

    /// From the gradient to the state after a segment to that to the state before it.
    fn segment(&mut self, segment: &Segment) -> Result<()> {
        let (p, piece, seq) = (self.p, &segment.piece, &segment.piece.seq);
        let mut tokens = match piece.full {
            true => open_zeros(p, p.segment_len())?,
            false => std::mem::take(&mut self.state.open[seq.slot]),
        };
        if piece.full {
            for h in 0..p.kv_heads() {
                self.commit(segment, h, &mut tokens)?;
            }
        }
        for i in 0..piece.len {
            for h in 0..p.heads() {
                self.row(segment, i, h, &mut tokens)?;
            }
        }
        for (j, token) in tokens.iter_mut().enumerate() {
            if let Some(rope) = &self.batch.rope {
                let Some(t) = j.checked_sub(piece.cached) else { continue };
                let position = self.batch.position(seq, piece.start + t);
                let keys = token.k_rotated.chunks_exact_mut(p.key_dim());
                keys.for_each(|k| rope.rotate_back(k, position));
            }
            add(&mut token.k, 1.0, &token.k_rotated);
            token.k_rotated.fill(0.0);
        }
        let new = tokens.drain(piece.cached..).enumerate();
        for (t, token) in new {
            let at = seq.batch * self.batch.tokens() + seq.first + piece.start + t;
            let (k, v) = (token.k.len(), token.v.len());
            self.gradients.k[at * k..][..k].copy_from_slice(&token.k);
            self.gradients.v[at * v..][..v].copy_from_slice(&token.v);
        }
        // What is left was found.
        self.state.open[seq.slot] = tokens;
        Ok(())
    }

    /// Back through eq. (8) and (9), of one KV head: M_s = M_{s−1} + σ(K)ᵀ U, z_s = z_{s−1} + Σ σ(K).
    fn commit(&mut self, segment: &Segment, h: usize, tokens: &mut [OpenGradient]) -> Result<()> {
        let (p, dk, dv) = (self.p, self.p.key_dim(), self.p.value_dim());
        let before = [&segment.m, &segment.z].map(|all| head(all, p.kv_heads(), h));
        let [d_m, d_z] = self.memory(segment.piece.seq.slot).map(|d| head_mut(d, p.kv_heads(), h));
        if !matters(d_m) && !matters(d_z) {
            return Ok(());
        }
        let (after_m, after_z) = (alloc::copied(d_m, STATE)?, alloc::copied(d_z, STATE)?);
        for (token, to) in segment.tokens.iter().zip(tokens) {
            let (k, v) = (&token.k[h * dk..][..dk], &token.v[h * dv..][..dv]);
            let (d_k, d_v) = (&mut to.k[h * dk..][..dk], &mut to.v[h * dv..][..dv]);
            let corrected = p.update() == Update::Delta && !segment.piece.empty;
            let mut u = alloc::copied(v, ROW)?;
            if corrected {
                add(&mut u, -1.0, &retrieve(p, k, before[0], before[1])?);
            }
            let mut d_u = alloc::zeroed(&[dv], ROW)?;
            for (d, row) in after_m.chunks_exact(dv).enumerate() {
                add(&mut d_u, sigma(k[d]), row);
                d_k[d] += sigma_slope(k[d]) * (dot(row, &u) + after_z[d]);
            }
            add(d_v, 1.0, &d_u);
            if corrected {
                d_u.iter_mut().for_each(|x| *x = -*x);
                retrieve_back(p, k, before, &d_u, d_k, [&mut *d_m, &mut *d_z])?;
            }
        }
        Ok(())
    }

    /// Back from the outputs of one query head for the `i`-th new token of a segment.
    fn row(
        &mut self,
        segment: &Segment,
        i: usize,
        h: usize,
        tokens: &mut [OpenGradient],
    ) -> Result<()> {
        let (p, piece, seq) = (self.p, &segment.piece, &segment.piece.seq);
        let (dk, dv, kv) = (p.key_dim(), p.value_dim(), h / p.group());
        let (token, seen) = (seq.first + piece.start + i, piece.cached + i + 1);
        let at = (seq.batch * self.batch.tokens() + token) * p.heads() + h;
        let lse_at = (seq.batch * p.heads() + h) * self.batch.tokens() + token;
        let given = |all: &[f64]| alloc::copied(&all[at * dv..][..dv], ROW);
        let (d_o, d_lse) = (given(&self.outputs.o)?, self.outputs.lse[lse_at]);
        let (mut d_dot, mut d_mem) = (given(&self.outputs.a_dot)?, given(&self.outputs.a_mem)?);

        let [q, q_local] = query(self.inputs, &self.batch, seq, piece.start + i, h)?;
        let (weights, _) = softmax(p, &q_local, &segment.tokens[..seen], kv)?;
        let a_dot = attend(p, &weights, &segment.tokens[..seen], kv)?;
        let before = [&segment.m, &segment.z].map(|all| head(all, p.kv_heads(), kv));
        let a_mem = match piece.empty {
            true => alloc::zeroed(&[dv], ROW)?,
            false => retrieve(p, &q, before[0], before[1])?,
        };

        // Eq. (10): o = g A_mem + (1 − g) A_dot, and g' = g (1 − g).
        let (g, complement) = gate_weights(p, self.gate[h], piece.empty);
        for c in 0..dv {
            self.gradients.gate[h] += weigh(g * complement, d_o[c] * (a_mem[c] - a_dot[c]));
            d_mem[c] += weigh(g, d_o[c]);
            d_dot[c] += weigh(complement, d_o[c]);
        }

        let slots = self.state.open.len();
        let StateGradient { m, z, .. } = &mut self.state;
        let d_memory = [m, z].map(|d| head_mut(head_mut(d, slots, seq.slot), p.kv_heads(), kv));
        let d_q = &mut self.gradients.q[at * dk..][..dk];
        if matters(&d_dot) || d_lse != 0.0 {
            // Eq. (6): A_dot = Σ w_j v_j; for logits s, ∂w_j = w_j (∂s_j − Σ w ∂s), ∂lse = Σ w ∂s.
            let mean = dot(&d_dot, &a_dot);
            for (j, w) in weights.iter().enumerate() {
                let (k, v) = (&segment.tokens[j].k_local, &segment.tokens[j].v);
                let (k, v) = (&k[kv * dk..][..dk], &v[kv * dv..][..dv]);
                let d_logit = p.scale() * w * (dot(&d_dot, v) - mean + d_lse);
                add(d_q, d_logit, k);
                add(&mut tokens[j].k_rotated[kv * dk..][..dk], d_logit, &q_local);
                add(&mut tokens[j].v[kv * dv..][..dv], *w, &d_dot);
            }
            if let Some(rope) = &self.batch.rope {
                rope.rotate_back(d_q, self.batch.position(seq, piece.start + i));
            }
        }
        if matters(&d_mem) && !piece.empty {
            retrieve_back(p, &q, before, &d_mem, d_q, d_memory)?;
        }
        Ok(())
    }
}

/// Back through eq. (7), r = σ(x) M / σ(x) z: adds to the gradients of x and of M and z.
fn retrieve_back(
    p: &Problem,
    x: &[f64],
    [m, z]: [&[f64]; 2],
    d_r: &[f64],
    d_x: &mut [f64],
    [d_m, d_z]: [&mut [f64]; 2],
) -> Result<()> {
    let probe = Probe::new(p, x, z)?;
    let Some(den) = probe.den else { return Ok(()) };
    let r = retrieve(p, x, m, z)?;
    let d_den = if probe.follows { -dot(d_r, &r) / den } else { 0.0 };
    let (rows, d_rows) = (m.chunks_exact(r.len()), d_m.chunks_exact_mut(r.len()));
    for (i, (row, d_row)) in rows.zip(d_rows).enumerate() {
        d_x[i] += probe.slope[i] * (dot(d_r, row) / den + d_den * z[i]);
        add(d_row, probe.s[i] / den, d_r);
        d_z[i] += d_den * probe.s[i];
    }
    Ok(())
}
