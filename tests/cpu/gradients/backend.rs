//! The CPU backend as the driver of gradients takes it.

use crate::common::buffers::OutputBuffers;
use crate::common::call::Call;
use crate::common::cases::Case;
use crate::common::gradients::{Back, Differentiable, GradientBuffers};
use infini_attn::reference::{self, OpenGradient};
use infini_attn::{
    Element, HostLayout, HostPart, InputGradients, OutputGradients, Problem, Result, State,
    StateGradient, Tape, decode, flush, prefill, prefill_backward,
};

/// The CPU backend, by how its tapes are made.
#[derive(Clone, Copy, Debug)]
pub enum Cpu {
    /// By the call, with the memory before so many segments.
    Every(usize),
    /// By `decode`, which notes nothing of what it is asked for.
    Decode,
    /// By the call.
    New,
    /// Of the state before the call.
    Of,
}

/// A state's gradient in memory of the test's, zeros at first.
pub struct Lent {
    layout: HostLayout,
    memory: Vec<u64>,
}

impl Lent {
    fn new(p: &Problem, slots: usize, rotation: bool) -> Self {
        let layout = HostLayout::new(p, slots, rotation).expect("a layout");
        let memory = vec![0; layout.bytes() as usize / 8];
        Self { layout, memory }
    }

    fn view(&mut self) -> StateGradient<'_> {
        StateGradient::lent(&self.layout, bytemuck::cast_slice_mut(&mut self.memory))
            .expect("it fits")
    }

    fn part(&self, name: &str) -> Option<&HostPart> {
        self.layout.parts().iter().find(|part| part.name == name)
    }

    /// Where an element is, in floats.
    fn at(part: &HostPart, at: &[usize]) -> usize {
        let index = at.iter().zip(&part.shape).fold(0, |i, (at, extent)| i * extent + at);
        part.offset as usize / 4 + index
    }

    fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(&self.memory)
    }

    /// Places of channels of the `j`-th row of an open segment, all heads.
    fn row(&self, name: &str, slot: usize, j: usize) -> Vec<usize> {
        let p = self.layout.problem();
        let Some(part) = self.part(name) else { return vec![] };
        let heads = 0..p.kv_heads();
        if name == "open_v" {
            let places = |h| (0..p.value_dim()).map(move |c| Self::at(part, &[slot, h, j, c]));
            return heads.flat_map(places).collect();
        }
        let width = part.shape[4];
        let place = move |h, d| Self::at(part, &[slot, h, j / width, d, j % width]);
        heads.flat_map(|h| (0..p.key_dim()).map(move |d| place(h, d))).collect()
    }

    /// Places of all of M or z.
    fn all(&self, name: &str) -> std::ops::Range<usize> {
        let part = self.part(name).expect("of every state");
        let start = part.offset as usize / 4;
        start..start + part.shape.iter().product::<usize>()
    }

    fn set(&mut self, places: impl IntoIterator<Item = usize>, values: &[f64]) {
        let memory: &mut [f32] = bytemuck::cast_slice_mut(&mut self.memory);
        places.into_iter().zip(values).for_each(|(i, &x)| memory[i] = x as f32);
    }

    fn get(&self, places: impl IntoIterator<Item = usize>) -> Vec<f64> {
        places.into_iter().map(|i| self.floats()[i].into()).collect()
    }
}

const OPEN: [&str; 3] = ["open_k", "open_k_rotated", "open_v"];

impl Differentiable for Cpu {
    type State = State;
    type Tape = Tape;
    type Gradient = Lent;

    fn new_state(&self, case: &Case, slots: usize) -> State {
        State::new(&case.problem, slots).expect("a state")
    }

    fn call<T: Element>(
        &self,
        problem: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut State,
        out: &mut OutputBuffers<T>,
    ) -> Result<Tape> {
        let mut tape = match self {
            Cpu::Every(segments) => Tape::every(*segments)?,
            Cpu::Decode => {
                let mut tape = Tape::every(1)?;
                decode(problem, &call.inputs(), gate, state, out.views().tape(&mut tape))?;
                return Ok(tape);
            }
            Cpu::New => Tape::new(),
            Cpu::Of => {
                let tape = Tape::of(state)?;
                prefill(problem, &call.inputs(), gate, state, out.views())?;
                return Ok(tape);
            }
        };
        prefill(problem, &call.inputs(), gate, state, out.views().tape(&mut tape))?;
        Ok(tape)
    }

    fn flush(&self, problem: &Problem, state: &mut State, slots: &[usize]) -> Result<()> {
        flush(problem, state, slots)
    }

    fn gradient(&self, case: &Case, values: &reference::StateGradient) -> Lent {
        let mut lent = Lent::new(&case.problem, values.open.len(), case.rope.is_some());
        lent.set(lent.all("memory"), &values.m);
        lent.set(lent.all("normalizer"), &values.z);
        for (slot, rows) in values.open.iter().enumerate() {
            for (j, row) in rows.iter().enumerate() {
                for (name, values) in OPEN.into_iter().zip([&row.k, &row.k_rotated, &row.v]) {
                    lent.set(lent.row(name, slot, j), values);
                }
            }
        }
        lent
    }

    fn values(&self, _: &Case, lent: &Lent, open: &[usize]) -> reference::StateGradient {
        let row = |slot, j| {
            let [k, mut k_rotated, v] = OPEN.map(|name| lent.get(lent.row(name, slot, j)));
            k_rotated.resize(k.len(), 0.0);
            OpenGradient { k, k_rotated, v }
        };
        let rows = |(slot, &len): (usize, &usize)| (0..len).map(|j| row(slot, j)).collect();
        reference::StateGradient {
            m: lent.get(lent.all("memory")),
            z: lent.get(lent.all("normalizer")),
            open: open.iter().enumerate().map(rows).collect(),
        }
    }

    fn backward<T: Element>(
        &self,
        problem: &Problem,
        back: &Back<'_, T, Tape>,
        gradient: &mut Lent,
        into: &mut GradientBuffers<T>,
    ) -> Result<()> {
        let (out, up) = (back.out, back.upstream);
        let lse = out.lse.as_ref().expect("always asked for");
        let mut outputs = OutputGradients::new(out.o.view(), lse.view(), up.o.view());
        if let (Some(a_dot), Some(given)) = (&out.a_dot, &up.a_dot) {
            outputs = outputs.a_dot(a_dot.view(), given.view());
        }
        if let Some(given) = &up.a_mem {
            outputs = outputs.a_mem(given.view());
        }
        if let Some(given) = &up.lse {
            outputs = outputs.lse(given.view());
        }
        let (q, k, v) = (into.q.view_mut(), into.k.view_mut(), into.v.view_mut());
        let mut gradients = InputGradients::new(q, k, v, &mut into.gate);
        if let Some(segments) = back.bptt_segments {
            gradients = gradients.bptt_segments(segments);
        }
        let (inputs, tape) = (back.call.inputs(), back.tape);
        let mut state = gradient.view();
        prefill_backward(problem, &inputs, back.gate, tape, &outputs, &mut state, gradients)
    }
}
