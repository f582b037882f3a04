//! What the tests of gradients rest on: the driver passes what is right and fails on what is not.

use crate::common::backend::{Backend, ReferenceBackend};
use crate::common::buffers::{OutputBuffers, Strided, indices};
use crate::common::call::{Call, CallShape};
use crate::common::cases::{Batch, Case, cases};
use crate::common::gradients::{Back, Differentiable, GradientBuffers, run_gradients};
use crate::common::phases::{self, Mistake, Token};
use crate::common::{narrow, scalar, widen};
use infini_attn::reference::{self, OpenGradient, Output, StateGradient};
use infini_attn::{Element, EmptyMemory, Problem, Result};

/// The reference, rounded to the types of a backend.
struct Rounded;

impl Differentiable for Rounded {
    type State = reference::State;
    type Tape = reference::State;
    type Gradient = StateGradient;
    const PARALLEL: bool = true;

    fn new_state(&self, case: &Case, slots: usize) -> reference::State {
        reference::State::new(&case.problem, slots).expect("a state")
    }

    fn call<T: Element>(
        &self,
        problem: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut reference::State,
        out: &mut OutputBuffers<T>,
    ) -> Result<reference::State> {
        let before = state.clone();
        ReferenceBackend.call(problem, call, gate, state, out)?;
        Ok(before)
    }

    fn flush(
        &self,
        problem: &Problem,
        state: &mut reference::State,
        slots: &[usize],
    ) -> Result<()> {
        state.flush(problem, slots)
    }

    fn gradient(&self, _: &Case, values: &StateGradient) -> StateGradient {
        values.clone()
    }

    fn values(&self, _: &Case, gradient: &StateGradient, open: &[usize]) -> StateGradient {
        let mut values = gradient.clone();
        values.open.iter_mut().zip(open).for_each(|(rows, &len)| rows.truncate(len));
        values
    }

    fn backward<T: Element>(
        &self,
        p: &Problem,
        back: &Back<'_, T, reference::State>,
        gradient: &mut StateGradient,
        into: &mut GradientBuffers<T>,
    ) -> Result<()> {
        let outputs = upstream(back);
        let (inputs, gate, bptt) = (back.call.inputs(), back.gate, back.bptt_segments);
        let got =
            reference::prefill_backward(p, &inputs, gate, back.tape, &outputs, gradient, bptt)?;
        into.q.assign(&got.q);
        into.k.assign(&got.k);
        into.v.assign(&got.v);
        into.gate = got.gate.iter().map(|&x| x as f32).collect();
        let round = |x: &mut f64| *x = f64::from(*x as f32);
        gradient.m.iter_mut().chain(&mut gradient.z).for_each(round);
        Ok(())
    }
}

/// The phases in float64, rounded to the types of a backend.
struct Phases(Option<Mistake>);

/// What the reference is before a call, and the tokens of its open segments.
type Streams = (reference::State, Vec<Vec<Token>>);

/// One sequence of a call: slot, index in the batch, tokens.
type Sequence = (usize, usize, usize);

fn sequences<T: Element>(call: &Call<'_, T>) -> (CallShape, Vec<Sequence>) {
    let lens: Vec<usize> = call.lens.iter().map(|&len| len as usize).collect();
    let named = call.slots().into_iter().zip(&lens).enumerate();
    (CallShape::new(call.batch, &lens), named.map(|(b, (slot, &len))| (slot, b, len)).collect())
}

/// All heads of a token's row.
fn row<T: Element>(x: &Strided<T>, at: &[usize]) -> Vec<f64> {
    let heads = x.shape()[x.shape().len() - 2];
    (0..heads).flat_map(|h| widen(x.row(&[at, &[h]].concat()))).collect()
}

/// Rotates rows of `dim` to the place of a token, or back.
fn turn<T: Element>(call: &Call<'_, T>, rows: &mut [f64], dim: usize, position: usize, sign: f64) {
    let Some(rope) = &call.rope else { return };
    let half = rope.rotation.channels / 2;
    for row in rows.chunks_exact_mut(dim) {
        for i in 0..half {
            let (a, b) = if rope.rotation.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let [c, s] = [rope.cos, rope.sin].map(|table| f64::from(table[position * half + i]));
            (row[a], row[b]) = (c * row[a] - sign * s * row[b], sign * s * row[a] + c * row[b]);
        }
    }
}

/// Table row of a token.
fn position<T: Element>(
    call: &Call<'_, T>,
    shape: &CallShape,
    b: usize,
    t: usize,
    seen: u64,
) -> usize {
    let Some(list) = call.rope.as_ref().and_then(|rope| rope.positions.as_ref()) else {
        return seen as usize + t;
    };
    let (at, row) = (shape.token(b, t), shape.lead[shape.lead.len() - 1]);
    let shared = list.len() == row;
    list[if shared { at[at.len() - 1] } else { at[0] * row + at[1] }] as usize
}

impl Phases {
    /// The new tokens of a sequence.
    fn tokens<T: Element>(
        p: &Problem,
        call: &Call<'_, T>,
        shape: &CallShape,
        (_, b, len): Sequence,
        seen: u64,
    ) -> Vec<Token> {
        let token = |t| {
            let at = shape.token(b, t);
            let k = row(&call.k, &at);
            let mut rotated = k.clone();
            turn(call, &mut rotated, p.key_dim(), position(call, shape, b, t, seen), 1.0);
            Token { k, rotated, v: row(&call.v, &at) }
        };
        (0..len).map(token).collect()
    }

    /// What a sequence's call found and was given.
    fn found<'a, T: Element>(
        &self,
        p: &'a Problem,
        back: &Back<'a, T, Streams>,
        shape: &CallShape,
        sequence: Sequence,
    ) -> phases::Call<'a> {
        let ((slot, b, len), (state, open)) = (sequence, back.tape);
        let (call, seen) = (back.call, state.tokens(slot));
        let query = |t| {
            let q = row(&call.q, &shape.token(b, t));
            let mut rotated = q.clone();
            turn(call, &mut rotated, p.key_dim(), position(call, shape, b, t, seen), 1.0);
            [q, rotated]
        };
        let mut tokens = open[slot].clone();
        tokens.extend(Phases::tokens(p, call, shape, sequence, seen));
        let main = |x: Option<&Strided<T>>| match x {
            Some(x) => (0..len).flat_map(|t| row(x, &shape.token(b, t))).collect(),
            None => vec![0.0; len * p.heads() * p.value_dim()],
        };
        let up = back.upstream;
        let d_lse = |i: usize| {
            let at = shape.lse(b, i / p.heads(), i % p.heads());
            up.lse.as_ref().map_or(0.0, |x| x.get(&at).into())
        };
        phases::Call {
            p,
            q: (0..len).map(query).collect(),
            tokens,
            gate: back.gate,
            memory: [&state.m, &state.z].map(|all| part(all, open.len(), slot).to_vec()),
            empty: state.committed(slot) == 0,
            upstream: Output {
                o: main(Some(&up.o)),
                a_dot: main(up.a_dot.as_ref()),
                a_mem: main(up.a_mem.as_ref()),
                lse: (0..len * p.heads()).map(d_lse).collect(),
            },
            bptt_segments: back.bptt_segments,
            mistake: self.0,
        }
    }

    /// Gradients to the query and to a new token, turned back, in the place of the token.
    fn put<T: Element>(
        &self,
        call: &Call<'_, T>,
        (at, position): (&[usize], usize),
        [mut q, mut q_rotated]: [Vec<f64>; 2],
        mut token: OpenGradient,
        into: &mut GradientBuffers<T>,
    ) {
        let dim = call.k.shape()[at.len() + 1];
        turn(call, &mut q_rotated, dim, position, -1.0);
        add(&mut q, &q_rotated);
        if self.0 != Some(Mistake::KeysNotRotatedBack) {
            turn(call, &mut token.k_rotated, dim, position, -1.0);
        }
        add(&mut token.k, &token.k_rotated);
        for (x, row) in [(&mut into.q, &q), (&mut into.k, &token.k), (&mut into.v, &token.v)] {
            let dim = x.shape()[at.len() + 1];
            for (h, row) in row.chunks_exact(dim).enumerate() {
                let row: Vec<f32> = row.iter().map(|&x| x as f32).collect();
                x.set_row(&[at, &[h]].concat(), &narrow(&row));
            }
        }
    }
}

fn add(a: &mut [f64], b: &[f64]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
}

/// A slot's part of M or z of so many.
fn part(all: &[f64], slots: usize, slot: usize) -> &[f64] {
    let len = all.len() / slots;
    &all[slot * len..][..len]
}

impl Differentiable for Phases {
    type State = Streams;
    type Tape = Streams;
    type Gradient = StateGradient;
    const PARALLEL: bool = true;

    fn new_state(&self, case: &Case, slots: usize) -> Streams {
        (Rounded.new_state(case, slots), vec![vec![]; slots])
    }

    fn call<T: Element>(
        &self,
        p: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        (state, open): &mut Streams,
        out: &mut OutputBuffers<T>,
    ) -> Result<Streams> {
        let before = (state.clone(), open.clone());
        ReferenceBackend.call(p, call, gate, state, out)?;
        let (shape, sequences) = sequences(call);
        for sequence in sequences {
            let open = &mut open[sequence.0];
            open.extend(Phases::tokens(p, call, &shape, sequence, before.0.tokens(sequence.0)));
            open.drain(..open.len() / p.segment_len() * p.segment_len());
        }
        Ok(before)
    }

    fn flush(&self, p: &Problem, (state, open): &mut Streams, slots: &[usize]) -> Result<()> {
        slots.iter().for_each(|&slot| open[slot].clear());
        state.flush(p, slots)
    }

    fn gradient(&self, _: &Case, values: &StateGradient) -> StateGradient {
        values.clone()
    }

    fn values(&self, case: &Case, gradient: &StateGradient, open: &[usize]) -> StateGradient {
        Rounded.values(case, gradient, open)
    }

    fn backward<T: Element>(
        &self,
        p: &Problem,
        back: &Back<'_, T, Streams>,
        gradient: &mut StateGradient,
        into: &mut GradientBuffers<T>,
    ) -> Result<()> {
        let (call, (state, open), mistake) = (back.call, back.tape, self.0);
        let (shape, sequences) = sequences(call);
        let padding = if mistake == Some(Mistake::PaddingNotZero) { 1e-4 } else { 0.0 };
        for x in [&mut into.q, &mut into.k, &mut into.v] {
            indices(x.shape()).for_each(|at| x.set(&at, scalar(padding)));
        }
        into.gate.fill(0.0);
        for sequence in sequences.into_iter().filter(|s| s.2 > 0) {
            let (slot, b, _) = sequence;
            let mut memory =
                [&gradient.m, &gradient.z].map(|all| part(all, open.len(), slot).to_vec());
            let found = self.found(p, back, &shape, sequence);
            let mut got = found.backward(&mut memory, &gradient.open[slot]);
            for (all, part) in [&mut gradient.m, &mut gradient.z].into_iter().zip(&memory) {
                all[slot * part.len()..][..part.len()].copy_from_slice(part);
            }
            let new = got.tokens.split_off(open[slot].len());
            gradient.open[slot] = got.tokens;
            if call.rope.is_none() {
                for row in &mut gradient.open[slot] {
                    add(&mut row.k, &std::mem::take(&mut row.k_rotated));
                    row.k_rotated = vec![0.0; row.k.len()];
                }
            }
            for (t, (mut token, q)) in new.into_iter().zip(got.q).enumerate() {
                if mistake == Some(Mistake::NotANumber) && t == 7 {
                    token.v[0] = f64::NAN;
                }
                let place = position(call, &shape, b, t, state.tokens(slot));
                self.put(call, (&shape.token(b, t), place), q, token, into);
            }
            into.gate.iter_mut().zip(got.gate).for_each(|(sum, x)| *sum += x as f32);
        }
        Ok(())
    }
}

/// Gradients to the outputs as the reference takes them: zeros where nothing was asked for.
fn upstream<T: Element, Tape>(back: &Back<'_, T, Tape>) -> Output {
    let up = back.upstream;
    let all = |x: &Strided<T>| indices(x.shape()).map(|at| x.get(&at).into()).collect::<Vec<f64>>();
    let zeros = vec![0.0; all(&up.o).len()];
    let main = |x: &Option<Strided<T>>| x.as_ref().map_or_else(|| zeros.clone(), all);
    let lse = back.out.lse.as_ref().expect("always asked for");
    let lse = match &up.lse {
        Some(lse) => indices(lse.shape()).map(|at| f64::from(lse.get(&at))).collect(),
        None => vec![0.0; lse.shape().iter().product()],
    };
    Output { o: all(&up.o), a_dot: main(&up.a_dot), a_mem: main(&up.a_mem), lse }
}

#[test]
fn the_reference_passes_its_own_judge() {
    let all: Vec<_> = cases().into_iter().step_by(4).collect();
    let summary = run_gradients(&Rounded, &all, None).finish("rounded reference");
    assert_eq!(summary.ran, all.len());
}

/// Of the table, what the phases do not take long for.
fn some(wanted: impl Fn(&Case) -> bool) -> Vec<Case> {
    let small = |c: &Case| {
        let tokens: usize = c.calls.iter().flatten().sum();
        tokens * c.problem.heads() * c.problem.key_dim().max(16) < 40_000
    };
    cases().into_iter().filter(|c| small(c) && wanted(c)).collect()
}

#[test]
fn the_phases_agree_with_the_reference() {
    let all: Vec<_> = some(|_| true).into_iter().step_by(3).collect();
    assert!(all.len() > 170, "{} cases", all.len());
    run_gradients(&Phases(None), &all, None).finish("phases");
    let several = |c: &Case| c.calls.concat().iter().any(|n| *n > 2 * c.problem.segment_len());
    let some: Vec<_> = some(several).into_iter().step_by(3).collect();
    run_gradients(&Phases(None), &some, Some(2)).finish("truncated phases");
}

/// Cases in which a mistake must show, the blocks of truncated propagation, and in which tensors.
fn shows(mistake: Mistake, wanted: impl Fn(&Case) -> bool, tensors: &[&str]) {
    let bptt = (mistake == Mistake::TruncationLeaks).then_some(2);
    let cases = some(wanted);
    assert!(cases.len() >= 10, "{mistake:?}: {} cases", cases.len());
    let step = cases.len().div_ceil(20);
    for case in cases.into_iter().step_by(step) {
        assert!(
            run_gradients(&Phases(None), std::slice::from_ref(&case), bptt).failures.is_empty()
        );
        let summary = run_gradients(&Phases(Some(mistake)), std::slice::from_ref(&case), bptt);
        let told = |t: &&&str| summary.failures.iter().any(|f| f.contains(&format!(": {t}")));
        let missing: Vec<_> = tensors.iter().filter(|t| !told(t)).collect();
        assert!(missing.is_empty(), "{mistake:?}, {}: {missing:?} pass", case.name);
    }
}

/// One sequence in one call of several segments, of which the last stays open, with gates that close no
/// branch.
fn usual(c: &Case) -> bool {
    let n = c.problem.segment_len();
    c.name.starts_with("length N=")
        && n > 2
        && c.tokens(0) > 2 * n
        && !c.tokens(0).is_multiple_of(n)
}

#[test]
fn mistakes_show() {
    let bypass = |c: &Case| c.problem.empty_memory() == EmptyMemory::Bypass;
    let policy = |c: &Case| c.name.starts_with("policy");
    shows(Mistake::DenominatorForgotten, usual, &["dk"]);
    shows(Mistake::BranchesSwapped, usual, &["dgate"]);
    shows(
        Mistake::KeysNotRotatedBack,
        |c| c.name.starts_with("rope") && c.rope.is_some_and(|r| r.channels > 2),
        &["dk"],
    );
    shows(Mistake::FirstNotEmpty, |c| policy(c) && bypass(c), &["dq", "dv", "dgate"]);
    shows(Mistake::OpenCommitted, usual, &["dk", "dv"]);
    shows(Mistake::GroupNotSummed, usual, &["dk", "dv", "dM", "dz"]);
    shows(Mistake::TruncationLeaks, usual, &["dk", "dv", "dM", "dz"]);
    let padded = |c: &Case| {
        matches!(c.batch, Batch::Padded | Batch::Ranges) && c.calls.concat().iter().any(|n| *n > 0)
    };
    shows(Mistake::PaddingNotZero, padded, &["padded rows of dq", "padded rows of dk"]);
    shows(Mistake::NotANumber, usual, &["dv: NaN"]);
}
