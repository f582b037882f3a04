//! What the driver asks of an implementation, the CPU backend, and the reference as a backend.

use infini_attn::{
    Element, MAX_DECODE_TOKENS, Problem, Result, State, decode, flush, forward, prefill, reference,
};

use crate::common::buffers::{MARGIN, OutputBuffers};
use crate::common::call::Call;
use crate::common::cases::Case;
use crate::common::model::slot_values;
use crate::common::tolerance::Precision;

/// An implementation of the operator.
pub trait Backend: Sync {
    type State: Send;
    /// What it is judged by.
    const PRECISION: Precision;
    /// Guard elements between the rows of strided buffers.
    const MARGIN: usize = MARGIN;
    /// Cases run side by side.
    const PARALLEL: bool = false;
    /// Why the backend does not run a case; none: it runs it.
    fn refuses(&self, case: &Case) -> Option<&'static str>;
    fn new_state(&self, case: &Case, slots: usize) -> Self::State;
    fn call<T: Element>(
        &self,
        problem: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut Self::State,
        out: &mut OutputBuffers<T>,
    ) -> Result<()>;
    fn flush(&self, problem: &Problem, state: &mut Self::State, slots: &[usize]) -> Result<()>;
    /// M [Hkv, Dk, Dv] and z [Hkv, Dk] of one slot.
    fn memory(&self, problem: &Problem, state: &Self::State, slot: usize) -> [Vec<f64>; 2];
    /// Tokens seen, tokens committed, tokens in the open segment.
    fn counters(&self, state: &Self::State, slot: usize) -> [u64; 3];
    /// What went wrong besides wrong results since the last question.
    fn findings(&self, _: &mut Self::State) -> Vec<String> {
        vec![]
    }
}

/// The crate's CPU entry points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// Every call by `prefill`.
    Prefill,
    /// Every call by `decode`.
    Decode,
    /// Every call by `forward`.
    Forward,
}

impl Backend for Cpu {
    type State = State;
    const PRECISION: Precision = Precision::F32;

    fn refuses(&self, case: &Case) -> Option<&'static str> {
        let beyond = *self == Cpu::Decode && case.largest_chunk() > MAX_DECODE_TOKENS;
        beyond.then_some("decode takes at most 16 new tokens per sequence")
    }

    fn new_state(&self, case: &Case, slots: usize) -> State {
        State::new(&case.problem, slots).unwrap()
    }

    fn call<T: Element>(
        &self,
        problem: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut State,
        out: &mut OutputBuffers<T>,
    ) -> Result<()> {
        let (inputs, outputs) = (&call.inputs(), out.views());
        match self {
            Cpu::Prefill => prefill(problem, inputs, gate, state, outputs),
            Cpu::Decode => decode(problem, inputs, gate, state, outputs),
            Cpu::Forward => forward(problem, inputs, gate, state, outputs),
        }
    }

    fn flush(&self, problem: &Problem, state: &mut State, slots: &[usize]) -> Result<()> {
        flush(problem, state, slots)
    }

    fn memory(&self, _: &Problem, state: &State, slot: usize) -> [Vec<f64>; 2] {
        [slot_values(&state.memory(), slot), slot_values(&state.normalizer(), slot)]
    }

    fn counters(&self, state: &State, slot: usize) -> [u64; 3] {
        [state.tokens(slot), state.committed(slot), state.open_len(slot) as u64]
    }
}

/// The reference as a backend: its own batches, slots and splits against its single streams.
#[derive(Clone, Copy, Debug)]
pub struct ReferenceBackend;

impl Backend for ReferenceBackend {
    type State = reference::State;
    const PRECISION: Precision = Precision::F32;

    fn refuses(&self, _: &Case) -> Option<&'static str> {
        None
    }

    fn new_state(&self, case: &Case, slots: usize) -> reference::State {
        reference::State::new(&case.problem, slots).unwrap()
    }

    fn call<T: Element>(
        &self,
        problem: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut reference::State,
        out: &mut OutputBuffers<T>,
    ) -> Result<()> {
        let result = reference::prefill(problem, &call.inputs(), gate, state)?;
        out.o.assign(&result.o);
        out.a_dot.iter_mut().for_each(|x| x.assign(&result.a_dot));
        out.a_mem.iter_mut().for_each(|x| x.assign(&result.a_mem));
        out.lse.iter_mut().for_each(|x| x.assign(&result.lse));
        Ok(())
    }

    fn flush(
        &self,
        problem: &Problem,
        state: &mut reference::State,
        slots: &[usize],
    ) -> Result<()> {
        state.flush(problem, slots)
    }

    fn memory(&self, p: &Problem, state: &reference::State, slot: usize) -> [Vec<f64>; 2] {
        let m = p.kv_heads() * p.key_dim() * p.value_dim();
        let z = p.kv_heads() * p.key_dim();
        [state.m[slot * m..][..m].to_vec(), state.z[slot * z..][..z].to_vec()]
    }

    fn counters(&self, state: &reference::State, slot: usize) -> [u64; 3] {
        [state.tokens(slot), state.committed(slot), state.open_len(slot) as u64]
    }
}
