//! Where the memory lies: on the CPU, or on a CUDA device (`device.rs`).

use anyhow::Result;
use infini_attn::{
    DType, Inputs, Outputs, Problem, Slots, State, TensorView, TensorViewMut, prefill,
};

/// A place that was opened, and what the experiment does there besides what every state can.
pub trait Backend {
    type State: Slots;
    /// A text's features in the form that calls take.
    type Features;

    /// Element type of keys, values and outputs: the constructed ones are exact in either.
    fn dtype(&self) -> DType;

    fn describe(&self) -> Result<String>;

    /// One empty stream.
    fn state(&self, problem: &Problem) -> Result<Self::State>;

    fn features(&self, text: &Text) -> Result<Self::Features>;

    /// Feeds a text to each of `slots`; gives the last token's output, [H, D], in the last of them.
    fn prefill(
        &self,
        text: &Text,
        features: &mut Self::Features,
        slots: &[usize],
        state: &mut Self::State,
    ) -> Result<Vec<f32>>;
}

/// Features of one text.
pub struct Text {
    pub problem: Problem,
    pub gate: Vec<f32>,
    /// Keys [T + 1, H, D], values [T, H, D].
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

impl Text {
    /// With the gate open: the local attention contributes nothing.
    pub fn new(problem: &Problem) -> Self {
        let gate = vec![f32::INFINITY; problem.heads()];
        Self { problem: *problem, gate, keys: vec![], values: vec![] }
    }

    /// Elements of a token.
    pub fn width(&self) -> usize {
        self.problem.heads() * self.problem.key_dim()
    }

    /// Shape and strides of this text for so many slots: batch stride 0.
    pub fn shared(&self, slots: usize) -> ([usize; 4], [i64; 4]) {
        let (heads, dim, width) = (self.problem.heads(), self.problem.key_dim(), self.width());
        ([slots, self.values.len() / width, heads, dim], [0, width as i64, dim as i64, 1])
    }
}

/// The CPU, in f32.
pub struct Cpu;

impl Backend for Cpu {
    type State = State;
    /// Room for outputs.
    type Features = Vec<f32>;

    fn dtype(&self) -> DType {
        DType::F32
    }

    fn describe(&self) -> Result<String> {
        Ok("the CPU, f32".into())
    }

    fn state(&self, problem: &Problem) -> Result<State> {
        Ok(State::new(problem, 1)?)
    }

    fn features(&self, _: &Text) -> Result<Vec<f32>> {
        Ok(vec![])
    }

    fn prefill(
        &self,
        text: &Text,
        o: &mut Vec<f32>,
        slots: &[usize],
        state: &mut State,
    ) -> Result<Vec<f32>> {
        let (shape, strides) = text.shared(slots.len());
        let view = |data, offset| TensorView::strided(data, offset, &shape, &strides);
        // The query of a token is the key of the next.
        let (q, k) = (view(&text.keys, text.width())?, view(&text.keys, 0)?);
        let inputs = Inputs::new(q, k, view(&text.values, 0)?).slots(slots);
        o.resize(shape.iter().product(), 0.0);
        let outputs = Outputs::new(TensorViewMut::new(o, &shape)?);
        prefill(&text.problem, &inputs, &text.gate, state, outputs)?;
        Ok(o[o.len() - text.width()..].to_vec())
    }
}
