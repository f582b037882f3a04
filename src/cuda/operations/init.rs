//! Empty states, and what follows a change of memories from outside of the kernels.
//!
//! 1. Fills: the whole allocation, or what belongs to the slots.
//! 2. `snapshot` of the memories.

use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Bytes, Operand};
use crate::cuda::plan::allocation::Allocation;
use crate::cuda::plan::effect::Effect;
use crate::cuda::plan::kernel::Arch;
use crate::cuda::plan::kernels::find;
use crate::cuda::plan::layout::StateLayout;
use crate::cuda::plan::params::*;
use crate::error::Result;
use crate::memory::{Counters, check_slots};

impl StateLayout {
    /// The plan that makes an allocation a pool of empty states: everything 0, snapshot scales 1.
    /// Run it before any other.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`], as [`Self::new`].
    pub fn plan_init(&self) -> Result<Plan> {
        let title = format!("init {}; slots: {}", self.problem().shapes(), self.slots());
        let mut plan = Plan::new(title, self, Effect::Reset((0..self.slots()).collect()));
        plan.fill(Operand::State.at(0), self.bytes(), 0);
        self.snapshots(&mut plan, 0, self.slots())?;
        Ok(plan.finish(Vec::new(), &Allocation::new(Operand::Workspace)))
    }

    /// The plan that makes the given slots forget everything they have seen.
    ///
    /// # Errors
    /// [`crate::Error::Value`] for a slot out of range or named twice.
    pub fn plan_reset(&self, slots: &[usize]) -> Result<Plan> {
        check_slots(slots, self.slots())?;
        let p = self.problem();
        let title = format!("reset {}; slots: {} of {}", p.shapes(), slots.len(), self.slots());
        let mut plan = Plan::new(title, self, Effect::Reset(slots.to_vec()));
        let z = (4 * p.kv_heads() * p.key_dim()) as u64;
        let parts = [
            (self.symbols().memory, z * p.value_dim() as u64),
            (self.symbols().normalizer, z),
            (self.symbols().counters, size_of::<InfiniCounters>() as u64),
        ];
        for &slot in slots {
            for (symbol, bytes) in parts {
                plan.fill(symbol + slot as u64 * bytes, bytes, 0);
            }
            self.snapshots(&mut plan, slot, 1)?;
        }
        Ok(plan.finish(Vec::new(), &Allocation::new(Operand::Workspace)))
    }

    /// Writes the counters of the slots from `first` on.
    pub(crate) fn set_counters(&self, plan: &mut Plan, first: usize, counters: &[Counters]) {
        let counters: Vec<InfiniCounters> = counters.iter().map(|&c| c.into()).collect();
        let at = self.symbols().counters + (first * size_of::<InfiniCounters>()) as u64;
        plan.copy(at, Bytes::plain(&counters));
    }

    /// Launches that make the snapshots of `count` slots from `first` on from their memories.
    pub(crate) fn snapshots(&self, plan: &mut Plan, first: usize, count: usize) -> Result<()> {
        /// Memories per launch: a grid's y.
        const MOST: usize = 65_535;
        let p = self.problem();
        let (dk, dv, t) = (p.key_dim(), p.value_dim(), p.dtype().bytes());
        let scales = dv / INFINI_SCALE_COLUMNS as usize;
        let end = (first + count) * p.kv_heads();
        for at in (first * p.kv_heads()..end).step_by(MOST) {
            let matrices = MOST.min(end - at);
            let params = InfiniSnapshot {
                memory: self.symbols().memory + (at * dk * dv * 4) as u64,
                snapshot: self.symbols().snapshot + (at * dk * dv * t) as u64,
                snapshot_scale: self.symbols().snapshot_scale + (at * scales * 4) as u64,
                matrices: matrices as i64,
                key_dim: dk as i32,
                value_dim: dv as i32,
            };
            let why = format!("snapshots and scales; memories: {matrices}");
            plan.launch(find("snapshot", p, Arch::Sm80)?, [scales, matrices, 1], params, why)?;
        }
        Ok(())
    }

    /// The plan that makes every snapshot from its memory.
    pub(crate) fn plan_snapshots(&self) -> Result<Plan> {
        let mut plan = Plan::new("snapshots".into(), self, Effect::Reset(Vec::new()));
        self.snapshots(&mut plan, 0, self.slots())?;
        Ok(plan.finish(Vec::new(), &Allocation::new(Operand::Workspace)))
    }
}
