//! Memory of gradients: what a call allocates, what it says beforehand, and what happens without it.

use std::cell::RefCell;

use infini_attn::{
    InputGradients, Inputs, OutputGradients, Outputs, Problem, Result, State, StateGradient, Tape,
    TensorView, TensorViewMut, Update, prefill, prefill_backward,
};

use crate::alone;
use crate::memory::ALLOCATED;

/// Tokens that are all alike; what a call on them puts out.
pub struct Step {
    problem: Problem,
    tokens: usize,
    row: Vec<f32>,
    o: Vec<f32>,
    lse: Vec<f32>,
}

/// Gradients to q, k, v, gate and state.
pub struct Results {
    tensors: [Vec<f32>; 3],
    gate: Vec<f32>,
    pub state: StateGradient<'static>,
}

impl Results {
    /// Filled with 7.
    pub fn new(step: &Step) -> Result<Self> {
        let p = &step.problem;
        let filled = |heads, width| vec![7.0; step.tokens * heads * width];
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let tensors = [filled(p.heads(), dk), filled(p.kv_heads(), dk), filled(p.kv_heads(), dv)];
        Ok(Self { tensors, gate: vec![7.0; p.heads()], state: StateGradient::new(p, 1)? })
    }

    /// Whether nobody has written to them.
    pub fn are_untouched(&self) -> bool {
        let all = self.tensors.iter().flatten().chain(&self.gate);
        let state = self.state.memory();
        let state = state.as_slice().expect("contiguous").iter();
        all.clone().all(|x| *x == 7.0) && state.clone().all(|x| *x == 0.0)
    }
}

impl Step {
    pub fn new(problem: &Problem, tokens: usize) -> Self {
        let width = problem.key_dim().max(problem.value_dim());
        let rows = tokens * problem.heads();
        let (o, lse) = (vec![0.0; rows * problem.value_dim()], vec![0.0; rows]);
        Self { problem: *problem, tokens, row: vec![0.1; width], o, lse }
    }

    fn rows(&self, heads: usize, width: usize) -> TensorView<'_, f32> {
        let shape = [1, self.tokens, heads, width];
        TensorView::strided(&self.row, 0, &shape, &[0, 0, 0, 1]).expect("in the row")
    }

    fn inputs(&self) -> Inputs<'_, f32> {
        let p = &self.problem;
        let [q, k] = [p.heads(), p.kv_heads()].map(|heads| self.rows(heads, p.key_dim()));
        Inputs::new(q, k, self.rows(p.kv_heads(), p.value_dim()))
    }

    /// The call, with a tape.
    pub fn forward(&mut self, mut tape: Tape) -> Result<Tape> {
        let (mut o, mut lse) = (std::mem::take(&mut self.o), std::mem::take(&mut self.lse));
        let (p, mut state) = (self.problem, State::new(&self.problem, 1)?);
        let outputs =
            Outputs::new(TensorViewMut::new(&mut o, &[1, self.tokens, p.heads(), p.value_dim()])?);
        let outputs = outputs.lse(TensorViewMut::new(&mut lse, &[1, p.heads(), self.tokens])?);
        prefill(&p, &self.inputs(), &vec![0.5; p.heads()], &mut state, outputs.tape(&mut tape))?;
        (self.o, self.lse) = (o, lse);
        Ok(tape)
    }

    /// Its gradients for the loss Σ o / 10.
    pub fn backward(&self, tape: &Tape, results: &mut Results) -> Result<()> {
        let (p, t) = (&self.problem, self.tokens);
        let o = TensorView::new(&self.o, &[1, t, p.heads(), p.value_dim()])?;
        let lse = TensorView::new(&self.lse, &[1, p.heads(), t])?;
        let outputs = OutputGradients::new(o, lse, self.rows(p.heads(), p.value_dim()));
        let [dq, dk, dv] = &mut results.tensors;
        let into = |x, heads, width| TensorViewMut::new(x, &[1, t, heads, width]);
        let gradients = InputGradients::new(
            into(dq, p.heads(), p.key_dim())?,
            into(dk, p.kv_heads(), p.key_dim())?,
            into(dv, p.kv_heads(), p.value_dim())?,
            &mut results.gate,
        );
        prefill_backward(
            p,
            &self.inputs(),
            &vec![0.5; p.heads()],
            tape,
            &outputs,
            &mut results.state,
            gradients,
        )
    }
}

/// Bytes that the backward pass of `tokens` tokens allocates at its worst, beyond what it is given.
fn peak(problem: &Problem, tokens: usize, tape: Tape) -> usize {
    let mut step = Step::new(problem, tokens);
    let tape = step.forward(tape).expect("valid");
    let mut results = Results::new(&step).expect("room");
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    step.backward(&tape, &mut results).expect("valid");
    assert!(!results.are_untouched());
    ALLOCATED.peak_usage() - before
}

/// By chains (one thread) and by phases: with M and z of every segment on the tape nothing grows with the
/// tokens, with none what runs begin with.
#[test]
fn workspace_is_bounded() {
    let _alone = alone();
    for (threads, most) in [(1, 8 << 20), (4, 8 << 20)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        for update in [Update::Linear, Update::Delta] {
            let problem = Problem::builder().segment_len(64).update(update).build().expect("valid");
            let peak = |tokens, tape| pool.install(|| peak(&problem, tokens, tape));
            // The first call starts threads and makes room in them.
            peak(1 << 12, Tape::new());
            let every = || Tape::every(1).expect("at least 1");
            let [once, twice] = [1 << 14, 1 << 15].map(|tokens| peak(tokens, every()));
            assert!(
                twice <= once + once / 20,
                "{threads} threads, {update}: {once} B, then {twice}"
            );
            assert!(twice < most, "{threads} threads, {update}: {twice} B");
            let none = peak(1 << 15, Tape::new());
            let pieces = (1 << 15) / 64;
            let starts = 4 * 64 * 65 * pieces / 16;
            assert!(none <= twice + starts, "{threads} threads, {update}: {none} B, then {twice}");
        }
    }
}

#[test]
fn a_tape_says_its_bytes() -> Result<()> {
    let _alone = alone();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    pool.install(say)
}

fn say() -> Result<()> {
    let problem = Problem::builder().heads(1).head_dim(64).segment_len(64).build()?;
    // What products keep for later.
    Step::new(&problem, 200).forward(Tape::new())?;
    for (segments, checkpoints) in [(1, 100), (3, 33), (101, 0)] {
        let mut step = Step::new(&problem, 100 * 64 + 5);
        let tape = Tape::every(segments)?;
        let said = tape.bytes_for(&State::new(&problem, 1)?, step.tokens)?;
        let before = ALLOCATED.current_usage();
        let tape = step.forward(tape)?;
        let taken = ALLOCATED.current_usage() - before;
        assert_eq!((said, tape.bytes()), (checkpoints * 4 * 64 * 65, said));
        let state = State::new(&problem, 1)?.bytes() as u64;
        assert!((said..said + state + 4096).contains(&(taken as u64)), "{taken} B, {said} said");
    }
    Ok(())
}

/// A situation of `out_of_memory`: the gradients of a call of more than a segment, and the bytes they take.
pub fn starved(
    problem: &Problem,
    tokens: usize,
    without_memory: impl FnOnce(&dyn Fn() -> Result<()>, usize) -> Result<()>,
) -> Result<()> {
    // The first makes room for what products keep.
    let [_, bytes] = [(); 2].map(|()| peak(problem, tokens, Tape::new()));
    let mut step = Step::new(problem, tokens);
    let tape = step.forward(Tape::new())?;
    let results = RefCell::new(Results::new(&step)?);
    let backward = || {
        let mut results = results.borrow_mut();
        let result = step.backward(&tape, &mut results);
        assert!(result.is_ok() || results.are_untouched(), "something was changed");
        result
    };
    without_memory(&backward, bytes)
}
