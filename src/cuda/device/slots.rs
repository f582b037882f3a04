//! Slots as wholes: copied, taken back, brought from the host and to it.

use super::state::State;
use crate::cuda::operations::slots::{plan_copy_slots, plan_copy_within, plan_truncate};
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Addresses, Operand};
use crate::cuda::plan::layout::StateLayout;
use crate::error::{Error, Result};
use crate::memory::check_slots;
use crate::memory::slots::{check_resized, check_restored};
use crate::pool::slots::slots;
use crate::problem::Problem;

impl State {
    /// For every (slot of `from`, slot of this state) the second continues where the first will stand.
    /// A slot of `from` may be named several times; a call that was broken off in a slot that becomes a
    /// copy is forgotten. The states may have different numbers of slots. One kernel; of open segments
    /// only the rows in use are moved.
    ///
    /// # Errors
    /// [`Error::Problem`] for a state of another problem; [`Error::Value`] for a slot out of range, one of
    /// this state named twice, rotated keys of an open segment for which this state has no room, and a
    /// state of another stream; [`Error::Unfinished`] for a slot of `from` in which a call was broken
    /// off. Nothing is copied then. The device's.
    pub fn copy_slots(&mut self, from: &Self, pairs: &[(usize, usize)]) -> Result<()> {
        let plan = plan_copy_slots(from.mirror(), self.mirror(), pairs)?;
        self.device().check_stream("from", from.device())?;
        self.change(&plan, Addresses::new().with(Operand::Source(0), from.address()))
    }

    /// The same within this state: (slot, slot that becomes its copy).
    ///
    /// # Errors
    /// Those of [`Self::copy_slots`], and [`Error::Value`] for a slot that is to be copied and to become a
    /// copy.
    pub fn copy_within(&mut self, pairs: &[(usize, usize)]) -> Result<()> {
        let plan = plan_copy_within(self.mirror(), pairs)?;
        self.change(&plan, Addresses::new())
    }

    /// Keeps the first `tokens` tokens that the slot has seen: the others, of a draft that was rejected,
    /// are forgotten. What is committed cannot be taken back.
    ///
    /// # Errors
    /// [`Error::Value`] for a slot out of range, and for more tokens than it has seen;
    /// [`Error::Committed`] for fewer than came before its open segment; [`Error::Unfinished`]. The
    /// device's.
    pub fn truncate(&mut self, slot: usize, tokens: u64) -> Result<()> {
        let plan = plan_truncate(self.mirror(), slot, tokens)?;
        self.change(&plan, Addresses::new())
    }

    /// A new state whose slot i continues where `slots[i]` will stand. A slot may be named several
    /// times.
    ///
    /// # Errors
    /// [`Error::Value`] for a slot out of range, [`Error::Unfinished`], and those of [`Self::new`].
    pub fn fork(&self, slots: &[usize]) -> Result<Self> {
        let from = self.mirror().layout();
        if let Some(i) = slots.iter().position(|&slot| slot >= from.slots()) {
            let expected = format!("less than the state's {} slots", from.slots());
            return Err(Error::value(format!("slots[{i}]"), slots[i], expected));
        }
        self.mirror().check_finished(slots.iter().copied())?;
        let mut fork = Self::new(self.device(), self.problem(), slots.len(), from.rotation())?;
        let pairs: Vec<_> = slots.iter().enumerate().map(|(i, &slot)| (slot, i)).collect();
        fork.copy_slots(self, &pairs)?;
        Ok(fork)
    }

    /// A new state of `slots` slots, of which the first are as here, the others empty. Those in which a
    /// call was broken off are refused there too, until they are reset.
    ///
    /// # Errors
    /// [`Error::Value`] for fewer slots than this state has; those of [`Self::new`].
    pub fn resized(&self, slots: usize) -> Result<Self> {
        check_resized(self.sequences(), slots)?;
        let rotation = self.mirror().layout().rotation();
        let layout = StateLayout::new(self.problem(), slots, rotation)?;
        let (mirror, kept) = self.mirror().resized(&layout);
        let mut resized = Self::empty(self.device(), mirror)?;
        resized.copy_slots(self, &kept.into_iter().map(|slot| (slot, slot)).collect::<Vec<_>>())?;
        Ok(resized)
    }

    /// The host copy of some slots: its slot i is `slots[i]`. Only these are downloaded. Waits for the
    /// device.
    ///
    /// # Errors
    /// Those of [`Self::fork`] and [`Self::to_host`].
    pub fn to_host_slots(&self, slots: &[usize]) -> Result<crate::State> {
        self.device().refuse_capture("reading a state", "read it after the capture has ended")?;
        self.fork(slots)?.to_host()
    }

    /// Puts a host state into slots of this one: `slots[i]` continues where its slot i stands. A call
    /// that was broken off there is forgotten. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Problem`] for a state of another problem, [`Error::Length`] for another number of slots
    /// than it has, [`Error::Value`] for a slot out of range or named twice, and those of
    /// [`Self::from_host`]. Nothing is written then.
    pub fn restore(&mut self, slots: &[usize], from: &crate::State) -> Result<()> {
        from.problem().check_same(self.problem())?;
        check_slots(slots, self.sequences())?;
        check_restored(slots, from)?;
        let rotation = self.mirror().layout().rotation();
        let from = Self::from_host(self.device(), from, rotation)?;
        self.copy_slots(&from, &slots.iter().copied().enumerate().collect::<Vec<_>>())
    }

    /// Runs a plan now, and moves the mirror with it.
    fn change(&mut self, plan: &Plan, others: Addresses) -> Result<()> {
        self.device().refuse_capture("a change of slots", "record its plan")?;
        self.advance_with(plan, others)
    }
}

slots! { State,
    fn check_truncate(&self, slot: usize, tokens: u64) -> Result<()> {
        plan_truncate(self.mirror(), slot, tokens).map(drop)
    }
    fn to_host_slots(&self, slots: &[usize]) -> Result<crate::State> {
        self.to_host_slots(slots)
    }
    fn state_bytes(problem: &Problem, slots: usize, rotation: bool) -> Result<u64> {
        Ok(StateLayout::new(problem, slots, rotation)?.bytes())
    }
}
