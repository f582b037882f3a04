//! One sequence through the fast operator or the float64 reference, for tests of properties.

use infini_attn::{
    Element, Inputs, Outputs, Problem, Result, State, decode, flush, forward, prefill, reference,
};

use super::buffers::{Arrangement, Asked, OutputBuffers, Strided, indices};
use super::stream::Stream;
use super::widen;

/// Outputs of one sequence, as float64: [T, Hq, Dv] and, for `lse`, [Hq, T].
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    pub o: Vec<f64>,
    pub a_dot: Vec<f64>,
    pub a_mem: Vec<f64>,
    pub lse: Vec<f64>,
}

/// An implementation of the operator, holding the state of one sequence.
pub trait Model: Clone {
    /// How close two runs of the same mathematics come: rounding of the arithmetic inside.
    const TOLERANCE: f64;
    fn new(problem: &Problem) -> Self;
    /// A batch of one of `tokens` tokens.
    fn call<T: Element>(&mut self, tokens: usize, inputs: &Inputs<'_, T>, gate: &[f32]) -> Output;
    fn flush(&mut self);
    /// M, [Hkv, Dk, Dv].
    fn memory(&self) -> Vec<f64>;
    /// z, [Hkv, Dk].
    fn normalizer(&self) -> Vec<f64>;

    fn run<T: Element>(&mut self, stream: &Stream<T>, gate: &[f32]) -> Output {
        self.call(stream.tokens, &stream.inputs(), gate)
    }
}

/// The fast CPU backend.
#[derive(Clone)]
pub struct Fast(pub State);

impl Model for Fast {
    const TOLERANCE: f64 = 1e-5;

    fn new(problem: &Problem) -> Self {
        Fast(State::new(problem, 1).unwrap())
    }

    fn call<T: Element>(&mut self, tokens: usize, inputs: &Inputs<'_, T>, gate: &[f32]) -> Output {
        run_entry(Entry::Prefill, tokens, inputs, gate, &mut self.0)
    }

    fn flush(&mut self) {
        let problem = *self.0.problem();
        flush(&problem, &mut self.0, &[0]).expect("slot 0 exists");
    }

    fn memory(&self) -> Vec<f64> {
        slot_values(&self.0.memory(), 0)
    }

    fn normalizer(&self) -> Vec<f64> {
        slot_values(&self.0.normalizer(), 0)
    }
}

/// One of the ways into the fast backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    Prefill,
    Decode,
    Forward,
}

impl Entry {
    /// The function by that name.
    pub fn call<T: Element>(
        self,
        inputs: &Inputs<'_, T>,
        gate: &[f32],
        state: &mut State,
        outputs: Outputs<'_, T>,
    ) -> Result<()> {
        let problem = *state.problem();
        match self {
            Entry::Prefill => prefill(&problem, inputs, gate, state, outputs),
            Entry::Decode => decode(&problem, inputs, gate, state, outputs),
            Entry::Forward => forward(&problem, inputs, gate, state, outputs),
        }
    }
}

/// A stream of one sequence through an entry, `chunk` tokens at a time: the outputs of all calls together.
pub fn run_in_chunks<T: Element>(
    entry: Entry,
    chunk: usize,
    stream: &Stream<T>,
    gate: &[f32],
    state: &mut State,
) -> Output {
    let mut all = Output { o: vec![], a_dot: vec![], a_mem: vec![], lse: vec![] };
    let mut lse = vec![vec![]; stream.problem.heads()];
    for start in (0..stream.tokens).step_by(chunk) {
        let part = stream.slice(start..(start + chunk).min(stream.tokens));
        let out = run_entry(entry, part.tokens, &part.inputs(), gate, state);
        all.o.extend(out.o);
        all.a_dot.extend(out.a_dot);
        all.a_mem.extend(out.a_mem);
        for (all, part) in lse.iter_mut().zip(out.lse.chunks(part.tokens)) {
            all.extend_from_slice(part);
        }
    }
    all.lse = lse.concat();
    all
}

/// A batch of one of `tokens` tokens through an entry, with every output asked for.
pub fn run_entry<T: Element>(
    entry: Entry,
    tokens: usize,
    inputs: &Inputs<'_, T>,
    gate: &[f32],
    state: &mut State,
) -> Output {
    let p = *state.problem();
    let (lead, how) = ([1, tokens], Arrangement::Contiguous);
    let mut out = OutputBuffers::<T>::new(&lead, p.heads(), p.value_dim(), how, Asked::ALL);
    entry.call(inputs, gate, state, out.views()).expect("a valid call");
    let rows = |b: &Strided<T>| -> Vec<f64> {
        let index = (0..tokens).flat_map(|t| (0..p.heads()).map(move |h| [0, t, h]));
        index.flat_map(|at| widen(b.row(&at))).collect()
    };
    let lse = out.lse.as_ref().expect("asked for");
    Output {
        o: rows(&out.o),
        a_dot: rows(out.a_dot.as_ref().expect("asked for")),
        a_mem: rows(out.a_mem.as_ref().expect("asked for")),
        lse: (0..p.heads()).flat_map(|h| widen(lse.row(&[0, h]))).collect(),
    }
}

/// The float64 reference.
#[derive(Clone)]
pub struct Oracle {
    problem: Problem,
    pub state: reference::State,
}

impl Model for Oracle {
    const TOLERANCE: f64 = 1e-12;

    fn new(problem: &Problem) -> Self {
        Oracle { problem: *problem, state: reference::State::new(problem, 1).unwrap() }
    }

    fn call<T: Element>(&mut self, _: usize, inputs: &Inputs<'_, T>, gate: &[f32]) -> Output {
        let out =
            reference::prefill(&self.problem, inputs, gate, &mut self.state).expect("a valid call");
        Output { o: out.o, a_dot: out.a_dot, a_mem: out.a_mem, lse: out.lse }
    }

    fn flush(&mut self) {
        self.state.flush(&self.problem, &[0]).expect("slot 0 exists");
    }

    fn memory(&self) -> Vec<f64> {
        self.state.m.clone()
    }

    fn normalizer(&self) -> Vec<f64> {
        self.state.z.clone()
    }
}

/// All of one slot's elements of a state's M or z, row-major.
pub fn slot_values(view: &infini_attn::TensorView<'_, f32>, slot: usize) -> Vec<f64> {
    let all = indices(&view.shape()[1..]);
    all.map(|at| view.at(&[&[slot], &at[..]].concat()).into()).collect()
}
