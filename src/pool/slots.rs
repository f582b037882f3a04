//! What a pool needs of a state, on whichever device.

use crate::error::Result;
use crate::memory::State;
use crate::problem::Problem;

/// States by slot, on the host or on a device: [`State`], and `cuda::State` with the feature `cuda`, whose
/// own methods of the same names say more, errors included. A type that holds one of them and forwards to
/// it has pools as well.
pub trait Slots: Sized {
    /// The problem the state belongs to.
    fn problem(&self) -> &Problem;
    /// Number of slots.
    fn sequences(&self) -> usize;
    /// Tokens the slot has seen. Panics, as the next does, for a slot that there is not.
    fn tokens(&self, slot: usize) -> u64;
    /// Tokens in the slot's open segment.
    fn open_len(&self, slot: usize) -> usize;
    /// Bytes held.
    fn bytes(&self) -> usize;
    /// Forgets what the slots have seen.
    fn reset(&mut self, slots: &[usize]) -> Result<()>;
    /// A new state whose slot i continues where `slots[i]` stands.
    fn fork(&self, slots: &[usize]) -> Result<Self>;
    /// Targets continue where sources of another state stand: (source, target).
    fn copy_slots(&mut self, from: &Self, pairs: &[(usize, usize)]) -> Result<()>;
    /// The same inside this state, where no target is a source.
    fn copy_within(&mut self, pairs: &[(usize, usize)]) -> Result<()>;
    /// Takes back all but the first `tokens` tokens of a slot, inside its open segment.
    fn truncate(&mut self, slot: usize, tokens: u64) -> Result<()>;
    /// Whether [`Self::truncate`] would be accepted.
    fn check_truncate(&self, slot: usize, tokens: u64) -> Result<()>;
    /// A host copy of these slots; on the host [`State::fork`].
    fn to_host_slots(&self, slots: &[usize]) -> Result<State>;
    /// Slot i of a host state takes the place of `slots[i]`.
    fn restore(&mut self, slots: &[usize], from: &State) -> Result<()>;
    /// A new state of so many slots, whose first are those of this one.
    fn resized(&self, slots: usize) -> Result<Self>;
    /// Bytes of a state before it is made: [`Problem::state_bytes`], or those of a `cuda::StateLayout`.
    fn state_bytes(problem: &Problem, slots: usize, rotation: bool) -> Result<u64>;
}

/// Forwards to the type's own methods.
macro_rules! slots {
    ($state:ty, $($more:tt)*) => {
        impl $crate::pool::slots::Slots for $state {
            fn problem(&self) -> &Problem {
                self.problem()
            }
            fn sequences(&self) -> usize {
                self.sequences()
            }
            fn tokens(&self, slot: usize) -> u64 {
                self.tokens(slot)
            }
            fn open_len(&self, slot: usize) -> usize {
                self.open_len(slot)
            }
            fn bytes(&self) -> usize {
                self.bytes()
            }
            fn reset(&mut self, slots: &[usize]) -> Result<()> {
                self.reset(slots)
            }
            fn fork(&self, slots: &[usize]) -> Result<Self> {
                self.fork(slots)
            }
            fn copy_slots(&mut self, from: &Self, pairs: &[(usize, usize)]) -> Result<()> {
                self.copy_slots(from, pairs)
            }
            fn copy_within(&mut self, pairs: &[(usize, usize)]) -> Result<()> {
                self.copy_within(pairs)
            }
            fn truncate(&mut self, slot: usize, tokens: u64) -> Result<()> {
                self.truncate(slot, tokens)
            }
            fn restore(&mut self, slots: &[usize], from: &$crate::memory::State) -> Result<()> {
                self.restore(slots, from)
            }
            fn resized(&self, slots: usize) -> Result<Self> {
                self.resized(slots)
            }
            $($more)*
        }
    };
}

#[cfg(feature = "cuda")]
pub(crate) use slots;

slots! { State,
    fn check_truncate(&self, slot: usize, tokens: u64) -> Result<()> {
        self.truncated(slot, tokens).map(drop)
    }
    fn to_host_slots(&self, slots: &[usize]) -> Result<State> {
        self.fork(slots)
    }
    fn state_bytes(problem: &Problem, slots: usize, rotation: bool) -> Result<u64> {
        problem.state_bytes(slots, rotation)
    }
}
