//! What a pool needs of a state, on whichever device.

use crate::error::Result;
use crate::memory::State;
use crate::problem::Problem;

/// States by slot, on the host or on a device: [`State`], and `cuda::State` with the feature `cuda`. Each
/// method is the type's own of the same name, which says what it does.
#[allow(missing_docs, reason = "documented at the types")]
pub trait Slots: Sized + sealed::Sealed {
    fn problem(&self) -> &Problem;
    fn sequences(&self) -> usize;
    fn tokens(&self, slot: usize) -> u64;
    fn open_len(&self, slot: usize) -> usize;
    fn bytes(&self) -> usize;
    fn reset(&mut self, slots: &[usize]) -> Result<()>;
    fn fork(&self, slots: &[usize]) -> Result<Self>;
    fn copy_slots(&mut self, from: &Self, pairs: &[(usize, usize)]) -> Result<()>;
    fn copy_within(&mut self, pairs: &[(usize, usize)]) -> Result<()>;
    fn truncate(&mut self, slot: usize, tokens: u64) -> Result<()>;
    /// Whether [`Self::truncate`] would be accepted.
    fn check_truncate(&self, slot: usize, tokens: u64) -> Result<()>;
    /// A host copy of these slots; on the host [`State::fork`].
    fn to_host_slots(&self, slots: &[usize]) -> Result<State>;
    fn restore(&mut self, slots: &[usize], from: &State) -> Result<()>;
    fn resized(&self, slots: usize) -> Result<Self>;
    /// Bytes of a state before it is made: [`Problem::state_bytes`], or those of a `cuda::StateLayout`.
    fn state_bytes(problem: &Problem, slots: usize, rotation: bool) -> Result<u64>;
}

pub(crate) mod sealed {
    pub trait Sealed {}
    impl Sealed for crate::memory::State {}
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
