//! Calls on a state in the caller's memory.

use super::{Entry, flush, run};
use crate::call::{Inputs, Outputs};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::State;
use crate::memory::layout::HostLayout;
use crate::memory::lent::Stored;
use crate::problem::Problem;

/// A state in memory of the caller's, in the form of a [`HostLayout`], worked on in place: of a tensor of
/// another library, say. What a call changes is in that memory when it returns, and an error leaves
/// it as it was, byte for byte; but [`Error::Cancelled`](crate::Error::Cancelled), as everywhere.
///
/// ```
/// use infini_attn::{HostLayout, Inputs, Outputs, Problem, StateViewMut, TensorView, TensorViewMut};
/// let problem = Problem::builder().head_dim(8).segment_len(16).build()?;
/// let layout = HostLayout::new(&problem, 1, false)?;
/// // An allocator of yours gives bytes that begin at a multiple of 8.
/// let mut memory = vec![0u64; layout.bytes() as usize / 8];
/// let (x, mut o) = ([0.5f32; 20 * 8], [0.0f32; 20 * 8]);
/// let mut state = StateViewMut::new(&layout, bytemuck::cast_slice_mut(&mut memory))?;
/// let tensor = TensorView::new(&x, &[1, 20, 1, 8])?;
/// let outputs = Outputs::new(TensorViewMut::new(&mut o, &[1, 20, 1, 8])?);
/// state.prefill(&problem, &Inputs::new(tensor, tensor, tensor), &[0.0], outputs)?;
/// let counters = layout.parts().last().unwrap().offset as usize / 8;
/// assert_eq!(memory[counters..][..4], [20, 16, 4, 0]); // tokens, committed, open_len, rotated
/// # Ok::<(), infini_attn::Error>(())
/// ```
#[derive(Debug)]
pub struct StateViewMut<'a> {
    // Never handed out for writing: it must not outlive the memory.
    state: State,
    stored: &'a mut [Stored],
}

impl<'a> StateViewMut<'a> {
    /// The state in `memory`, as its counters say. A slot whose counters are 0 has M and z of zeros.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) and [`Error::Address`](crate::Error::Address) unless it is
    /// as many bytes as the layout's at a multiple of 8, [`Error::Value`](crate::Error::Value) for counters
    /// that no sequence of calls leads to.
    pub fn new(layout: &HostLayout, memory: &'a mut [u8]) -> Result<Self> {
        // SAFETY: borrowed for as long as the state lives, which does not leave `self`.
        let (state, stored) = unsafe { State::lent(layout, memory) }?;
        Ok(Self { state, stored })
    }

    /// The state, to read; its copies are in memory of their own.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// [`prefill()`](crate::prefill()) on this state.
    ///
    /// # Errors
    /// As there, and [`Error::Value`](crate::Error::Value) for a rotation without room for rotated keys.
    pub fn prefill<T: Element>(
        &mut self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        gate: &[f32],
        outputs: Outputs<'_, T>,
    ) -> Result<()> {
        self.advance(|state| run(problem, inputs, gate, state, outputs, Entry::Prefill))
    }

    /// [`decode()`](crate::decode()) on this state.
    ///
    /// # Errors
    /// As there, and those of [`Self::prefill`].
    pub fn decode<T: Element>(
        &mut self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        gate: &[f32],
        outputs: Outputs<'_, T>,
    ) -> Result<()> {
        self.advance(|state| run(problem, inputs, gate, state, outputs, Entry::Decode))
    }

    /// [`forward()`](crate::forward()) on this state.
    ///
    /// # Errors
    /// As there, and those of [`Self::prefill`].
    pub fn forward<T: Element>(
        &mut self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        gate: &[f32],
        outputs: Outputs<'_, T>,
    ) -> Result<()> {
        self.advance(|state| run(problem, inputs, gate, state, outputs, Entry::Forward))
    }

    /// [`flush()`](crate::flush()) of this state.
    ///
    /// # Errors
    /// As there.
    pub fn flush(&mut self, slots: &[usize]) -> Result<()> {
        let problem = *self.state.problem();
        self.advance(|state| flush(&problem, state, slots))
    }

    /// [`State::reset`].
    ///
    /// # Errors
    /// As there.
    pub fn reset(&mut self, slots: &[usize]) -> Result<()> {
        self.advance(|state| state.reset(slots))
    }

    /// [`State::truncate`].
    ///
    /// # Errors
    /// As there.
    pub fn truncate(&mut self, slot: usize, tokens: u64) -> Result<()> {
        self.advance(|state| state.truncate(slot, tokens))
    }

    /// [`State::copy_slots`].
    ///
    /// # Errors
    /// As there, and [`Error::Value`](crate::Error::Value) for rotated keys without room for them.
    pub fn copy_slots(&mut self, from: &State, pairs: &[(usize, usize)]) -> Result<()> {
        self.advance(|state| state.copy_slots(from, pairs))
    }

    /// [`State::copy_within`].
    ///
    /// # Errors
    /// As there.
    pub fn copy_within(&mut self, pairs: &[(usize, usize)]) -> Result<()> {
        self.advance(|state| state.copy_within(pairs))
    }

    /// Whatever came of it, the memory's counters are the state's: a call that is cancelled has moved some.
    fn advance(&mut self, work: impl FnOnce(&mut State) -> Result<()>) -> Result<()> {
        let result = work(&mut self.state);
        self.state.store_counters(self.stored);
        result
    }
}
