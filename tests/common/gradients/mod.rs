//! Runs a case backward: its calls forward, keeping what their gradients need, then from the last to the
//! first, from random gradients of the outputs and of the state at the end; and compares with the
//! reference, which goes over one sequence at a time and uncut.
//!
//! A flush has no gradients: what stands before it ends in a loss of its own.

mod judge;

use infini_attn::reference::{self, OpenGradient, StateGradient};
use infini_attn::{Element, Problem, Result};
use rayon::prelude::*;

use super::buffers::{Arrangement, Asked, CANARY, MARGIN, OutputBuffers, Strided};
use super::call::{Call, CallShape};
use super::cases::Case;
use super::data::{Data, tables};
use super::driver::{Check, Summary};
use super::stream::normals;
use super::{WithType, narrow, scalar, widen, with_type};

/// An implementation of the operator and of its gradients.
pub trait Differentiable: Sync {
    type State;
    /// What a call leaves for its gradients, besides its outputs.
    type Tape;
    /// The gradient to a state.
    type Gradient;
    /// Cases run side by side.
    const PARALLEL: bool = false;
    fn new_state(&self, case: &Case, slots: usize) -> Self::State;
    fn call<T: Element>(
        &self,
        problem: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut Self::State,
        out: &mut OutputBuffers<T>,
    ) -> Result<Self::Tape>;
    fn flush(&self, problem: &Problem, state: &mut Self::State, slots: &[usize]) -> Result<()>;
    /// The gradient of these values, which f32 has.
    fn gradient(&self, case: &Case, values: &StateGradient) -> Self::Gradient;
    /// Its values: of every slot, so many rows of the open segment.
    fn values(&self, case: &Case, gradient: &Self::Gradient, open: &[usize]) -> StateGradient;
    fn backward<T: Element>(
        &self,
        problem: &Problem,
        back: &Back<'_, T, Self::Tape>,
        gradient: &mut Self::Gradient,
        into: &mut GradientBuffers<T>,
    ) -> Result<()>;
}

/// A call on its way back.
pub struct Back<'a, T, Tape> {
    pub call: &'a Call<'a, T>,
    pub gate: &'a [f32],
    pub tape: &'a Tape,
    /// What the call has put out; the log-sum-exp is always among it.
    pub out: &'a OutputBuffers<T>,
    /// The gradients to that, where the case asks for the output.
    pub upstream: &'a OutputBuffers<T>,
    pub bptt_segments: Option<usize>,
}

/// Gradients of one call.
pub struct GradientBuffers<T> {
    pub q: Strided<T>,
    pub k: Strided<T>,
    pub v: Strided<T>,
    pub gate: Vec<f32>,
}

impl<T: Element> GradientBuffers<T> {
    pub fn new(p: &Problem, lead: &[usize], how: Arrangement) -> Self {
        let new = |heads, dim| Strided::new(&[lead, &[heads, dim]].concat(), how, CANARY);
        Self {
            q: new(p.heads(), p.key_dim()),
            k: new(p.kv_heads(), p.key_dim()),
            v: new(p.kv_heads(), p.value_dim()),
            gate: vec![CANARY; p.heads()],
        }
    }

    pub fn named(&self) -> [(&'static str, &Strided<T>); 3] {
        [("dq", &self.q), ("dk", &self.k), ("dv", &self.v)]
    }

    pub fn bits(&self) -> Vec<u8> {
        let tensors = self.named().into_iter().flat_map(|(_, x)| x.bits());
        tensors.chain(self.gate.iter().flat_map(|x| x.to_le_bytes())).collect()
    }
}

/// Runs every case backward.
pub fn run_gradients<D: Differentiable>(
    of: &D,
    cases: &[Case],
    bptt_segments: Option<usize>,
) -> Summary {
    let run = |case: &Case| with_type(case.problem.dtype(), Job { of, case, bptt_segments });
    let outcomes: Vec<_> = match D::PARALLEL {
        true => cases.par_iter().with_max_len(1).map(run).collect(),
        false => cases.iter().map(run).collect(),
    };
    let mut summary = Summary::default();
    for (case, checks) in cases.iter().zip(outcomes) {
        summary.add(case, checks);
    }
    summary
}

struct Job<'a, D> {
    of: &'a D,
    case: &'a Case,
    bptt_segments: Option<usize>,
}

impl<D: Differentiable> WithType for Job<'_, D> {
    type Output = Vec<Check>;

    fn run<T: Element>(self) -> Vec<Check> {
        let (case, p) = (self.case, &self.case.problem);
        let tables = tables(case);
        let tables = tables.as_ref().map(|(cos, sin)| (&cos[..], &sin[..]));
        let sequences = 0..case.sequences();
        let slots = case.slots.as_ref().map_or(case.sequences(), |(_, n)| *n);
        let mut run = Run {
            of: self.of,
            case,
            bptt_segments: self.bptt_segments,
            data: Data::<T>::new(case, tables, MARGIN),
            upstream: sequences.clone().map(|b| Upstream::new(case, b)).collect(),
            slots,
            got: sequences.clone().map(|b| Got::new(p, case.tokens(b))).collect(),
            want: sequences.map(|_| Got::default()).collect(),
            gate: [vec![0.0; p.heads()], vec![0.0; p.heads()]],
            gate_terms: 0.0,
            largest_lse: 0.0,
            checks: vec![],
        };
        match run.forward() {
            Ok(graphs) => run.backward(&graphs),
            Err(error) => run.checks.push(Err(error)),
        }
        run.checks
    }
}

/// Gradients to the outputs for every token of a sequence: [tokens, Hq, Dv] and [tokens, Hq].
struct Upstream<T> {
    main: [Vec<T>; 3],
    lse: Vec<f32>,
}

impl<T: Element> Upstream<T> {
    fn new(case: &Case, b: usize) -> Self {
        let (p, asked) = (&case.problem, case.asked);
        let rows = case.tokens(b) * p.heads();
        let some = |i, asked: bool, len| match asked {
            true => normals((case.seed * 16 + b as u64) * 8 + i, len),
            false => vec![0.0; len],
        };
        let main = |i, asked| narrow(&some(i, asked, rows * p.value_dim()));
        let main = [main(1, true), main(2, asked.a_dot), main(3, asked.a_mem)];
        Self { main, lse: some(4, asked.lse, rows) }
    }
}

/// Gradients of a sequence: of its tokens, and of M and z at the beginning of every graph.
#[derive(Default)]
struct Got {
    /// dq, dk, dv: [tokens, heads, channels].
    main: [Vec<f64>; 3],
    memory: Vec<[Vec<f64>; 2]>,
}

impl Got {
    fn new(p: &Problem, tokens: usize) -> Self {
        let zeros = |[heads, dim]: [usize; 2]| vec![0.0; tokens * heads * dim];
        Self { main: widths(p).map(zeros), memory: vec![] }
    }
}

/// Heads and channels of q, k and v.
fn widths(p: &Problem) -> [[usize; 2]; 3] {
    let (hq, hkv) = (p.heads(), p.kv_heads());
    [[hq, p.key_dim()], [hkv, p.key_dim()], [hkv, p.value_dim()]]
}

/// A call, and what it has left.
struct Step<'a, T, Tape> {
    lens: &'a [usize],
    /// Tokens of every sequence in earlier calls.
    seen: Vec<usize>,
    shape: CallShape,
    call: Call<'a, T>,
    tape: Tape,
    out: OutputBuffers<T>,
    /// Open tokens of every slot, before and after.
    open: [Vec<usize>; 2],
}

/// Calls from flush to flush.
type Graph<'a, T, Tape> = Vec<Step<'a, T, Tape>>;

struct Run<'a, T, D> {
    of: &'a D,
    case: &'a Case,
    bptt_segments: Option<usize>,
    data: Data<'a, T>,
    upstream: Vec<Upstream<T>>,
    slots: usize,
    got: Vec<Got>,
    want: Vec<Got>,
    /// dβ, given and expected.
    gate: [Vec<f64>; 2],
    /// Sum of the squares that dβ is a sum of.
    gate_terms: f64,
    largest_lse: f64,
    checks: Vec<Check>,
}

impl<'a, T: Element, D: Differentiable> Run<'a, T, D> {
    fn expect(&mut self, holds: bool, otherwise: String) {
        if !holds {
            self.checks.push(Err(otherwise));
        }
    }

    fn forward(&mut self) -> std::result::Result<Vec<Graph<'a, T, D::Tape>>, String> {
        let (case, p) = (self.case, &self.case.problem);
        let mut state = self.of.new_state(case, self.slots);
        let mut graphs = vec![vec![]];
        let (mut seen, mut open) = (vec![0; case.sequences()], vec![0; self.slots]);
        for (i, lens) in case.calls.iter().enumerate() {
            let shape = CallShape::new(case.batch, lens);
            let call = self.data.assemble(&shape, lens, &seen);
            let asked = Asked { lse: true, ..case.asked };
            let (heads, dv) = (p.heads(), p.value_dim());
            let mut out = OutputBuffers::new(&shape.lead, heads, dv, case.arrangement, asked);
            let tape = self.of.call(p, &call, &self.data.gate, &mut state, &mut out);
            let tape = tape.map_err(|e| format!("call {i}: {e}"))?;
            let (before, first) = (open.clone(), seen.clone());
            for (b, len) in lens.iter().enumerate() {
                let open = &mut open[self.data.slot(b)];
                *open = (*open + len) % p.segment_len();
                seen[b] += len;
            }
            let open_lens = [before, open.clone()];
            let (slots, steps) = (call.slots(), graphs.last_mut().expect("the first"));
            steps.push(Step { lens, seen: first, shape, call, tape, out, open: open_lens });
            if case.flush_after.contains(&i) {
                self.of.flush(p, &mut state, &slots).map_err(|e| format!("flush: {e}"))?;
                slots.iter().for_each(|&slot| open[slot] = 0);
                graphs.push(vec![]);
            }
        }
        Ok(graphs)
    }

    fn backward(&mut self, graphs: &[Graph<'a, T, D::Tape>]) {
        let mut states: Vec<_> = (0..self.case.sequences())
            .map(|_| reference::State::new(&self.case.problem, 1).expect("a state"))
            .collect();
        for (i, graph) in graphs.iter().enumerate() {
            let Some(last) = graph.last() else { continue };
            let end = self.end(i, &last.open[1]);
            if !self.graph(graph, &end) {
                return;
            }
            for (b, state) in states.iter_mut().enumerate() {
                self.judge(b, graph, &end, state);
                state.flush(&self.case.problem, &[0]).expect("a state");
            }
        }
        self.compare();
    }

    /// Which slots no sequence uses.
    fn bystanders(&self) -> Vec<usize> {
        let used: Vec<_> = (0..self.case.sequences()).map(|b| self.data.slot(b)).collect();
        (0..self.slots).filter(|slot| !used.contains(slot)).collect()
    }

    /// A gradient to the state at the end of the `i`-th graph. Slots that no sequence uses have one,
    /// too, and, where segments have room, a row of an open segment.
    fn end(&self, i: usize, open: &[usize]) -> StateGradient {
        let (p, seed) = (&self.case.problem, self.case.seed * 16 + 15);
        let bystanders = self.bystanders();
        let (k, v) = (p.kv_heads() * p.key_dim(), p.kv_heads() * p.value_dim());
        let some = |j: usize, len| -> Vec<f64> {
            widen(&normals(seed * 4096 + (i * 1024 + j) as u64, len))
        };
        let rows = |slot: usize, len: usize| -> Vec<OpenGradient> {
            let row = |j| 8 + 3 * (slot * p.segment_len() + j);
            let rotated = |j| match self.case.rope {
                Some(_) => some(row(j) + 1, k),
                None => vec![0.0; k],
            };
            let row = |j| OpenGradient {
                k: some(row(j), k),
                k_rotated: rotated(j),
                v: some(row(j) + 2, v),
            };
            (0..len).map(row).collect()
        };
        let len = |slot| match bystanders.contains(&slot) {
            true => 1.min(p.segment_len() - 1),
            false => open[slot],
        };
        StateGradient {
            m: some(0, self.slots * k * p.value_dim()),
            z: some(1, self.slots * k),
            open: (0..self.slots).map(|slot| rows(slot, len(slot))).collect(),
        }
    }

    /// The implementation, from the last call of a graph to the first; false where it refused one.
    fn graph(&mut self, graph: &Graph<'a, T, D::Tape>, end: &StateGradient) -> bool {
        let (case, p) = (self.case, &self.case.problem);
        let mut gradient = self.of.gradient(case, end);
        for (i, step) in graph.iter().enumerate().rev() {
            let what = format!("call {i} of {}", graph.len());
            let mut into = GradientBuffers::new(p, &step.shape.lead, case.arrangement);
            let back = Back {
                call: &step.call,
                gate: &self.data.gate,
                tape: &step.tape,
                out: &step.out,
                upstream: &self.upstream(step),
                bptt_segments: self.bptt_segments,
            };
            let before = self.of.values(case, &gradient, &step.open[1]);
            if let Err(error) = self.of.backward(p, &back, &mut gradient, &mut into) {
                self.expect(false, format!("{what}: {error}"));
                return false;
            }
            let after = self.of.values(case, &gradient, &step.open[0]);
            for (b, _) in step.lens.iter().enumerate().filter(|(_, len)| **len == 0) {
                let same = same_slot(&before, &after, self.data.slot(b));
                self.expect(same, format!("{what}: an empty sequence changed the gradient"));
            }
            self.gather(&what, step, &into);
        }
        let others = self.bystanders();
        let mut open = graph[0].open[0].clone();
        others.iter().for_each(|&slot| open[slot] = end.open[slot].len());
        let start = self.of.values(case, &gradient, &open);
        for slot in others {
            self.expect(same_slot(end, &start, slot), format!("untouched slot {slot}: changed"));
        }
        for b in 0..case.sequences() {
            let [m, z, _] = of_slot(&start, self.data.slot(b));
            self.got[b].memory.push([m, z]);
        }
        true
    }

    /// Gradients to the outputs of a call; what belongs to no token is NaN.
    fn upstream(&self, step: &Step<'a, T, D::Tape>) -> OutputBuffers<T> {
        let (case, p) = (self.case, &self.case.problem);
        let (heads, dv, lead) = (p.heads(), p.value_dim(), &step.shape.lead);
        let mut up = OutputBuffers::<T>::new(lead, heads, dv, case.arrangement, case.asked);
        for (b, &len) in step.lens.iter().enumerate() {
            let padding = step.shape.padding(b, len).map(|t| (vec![b, t], None));
            let tokens = (0..len).map(|t| (step.shape.token(b, t), Some(step.seen[b] + t)));
            for (at, token) in padding.chain(tokens) {
                for h in 0..heads {
                    let from = &self.upstream[b];
                    let index = token.map(|t| t * heads + h);
                    let row = |all: &[T]| match index {
                        Some(i) => all[i * dv..][..dv].to_vec(),
                        None => vec![scalar(f32::NAN); dv],
                    };
                    let row_at = [&at[..], &[h]].concat();
                    up.o.set_row(&row_at, &row(&from.main[0]));
                    up.a_dot.iter_mut().for_each(|x| x.set_row(&row_at, &row(&from.main[1])));
                    up.a_mem.iter_mut().for_each(|x| x.set_row(&row_at, &row(&from.main[2])));
                    let lse_at = match at[..] {
                        [b, t] => vec![b, h, t],
                        _ => vec![h, at[0]],
                    };
                    let lse = index.map_or(f32::NAN, |i| from.lse[i]);
                    up.lse.iter_mut().for_each(|x| x.set(&lse_at, lse));
                }
            }
        }
        up
    }

    fn gather(&mut self, what: &str, step: &Step<'a, T, D::Tape>, into: &GradientBuffers<T>) {
        for (i, (name, x)) in into.named().into_iter().enumerate() {
            self.expect(x.guards_intact(), format!("{what}: wrote outside of {name}"));
            let [heads, dim] = widths(&self.case.problem)[i];
            for (b, &len) in step.lens.iter().enumerate() {
                for (t, h) in (0..len).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                    let row = widen(x.row(&[&step.shape.token(b, t)[..], &[h]].concat()));
                    let at = ((step.seen[b] + t) * heads + h) * dim;
                    self.got[b].main[i][at..][..dim].copy_from_slice(&row);
                }
                let mut rows =
                    step.shape.padding(b, len).flat_map(|t| (0..heads).map(move |h| [b, t, h]));
                let clean = rows.all(|at| widen(x.row(&at)).iter().all(|&x| x == 0.0));
                self.expect(clean, format!("{what}: padded rows of {name} are not 0"));
            }
        }
        for (sum, x) in self.gate[0].iter_mut().zip(&into.gate) {
            *sum += f64::from(*x);
        }
    }
}

/// M, z and the rows of the open segment (k, rotated k, v of each) of one slot.
fn of_slot(gradient: &StateGradient, slot: usize) -> [Vec<f64>; 3] {
    let slots = gradient.open.len();
    let part = |all: &[f64]| {
        let len = all.len() / slots;
        all[slot * len..][..len].to_vec()
    };
    let rows = gradient.open[slot].iter().flat_map(|row| [&row.k, &row.k_rotated, &row.v]);
    [part(&gradient.m), part(&gradient.z), rows.flatten().copied().collect()]
}

fn same_slot(a: &StateGradient, b: &StateGradient, slot: usize) -> bool {
    let bits = |x| of_slot(x, slot).map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    bits(a) == bits(b)
}
