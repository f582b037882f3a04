//! What a lane knows of itself.

use super::{Actor, ActorKind, Epoch, Knowledge, ProxySpace};

/// Index of a clock in [`Knowledge`]: all, or what passed a fence of a space.
pub(super) const GENERIC: usize = 0;

/// The same of the clock that a fence of a space serves.
pub(super) fn fenced(space: ProxySpace) -> usize {
    match space {
        ProxySpace::Shared => 1,
        ProxySpace::Global => 2,
    }
}

/// Kinds of actors whose lanes are the warp's.
pub(super) const OWN: [ActorKind; 5] =
    [ActorKind::Thread, ActorKind::Init, ActorKind::CpAsync, ActorKind::Bulk, ActorKind::BulkRead];
/// Positions in it.
pub(super) const THREAD: usize = 0;
const INIT: usize = 1;

/// What a lane knows of its own operations of each kind, per clock. The same numbers serve all lanes
/// though each stands for another access: lane 3 knows those of lane 3.
#[derive(Copy, Clone, Debug, Default)]
pub(super) struct Own(pub(super) [[u32; OWN.len()]; 3]);

impl Own {
    pub(super) fn join(&mut self, other: &Self) {
        for (mine, theirs) in self.0.as_flattened_mut().iter_mut().zip(other.0.as_flattened()) {
            *mine = (*mine).max(*theirs);
        }
    }

    /// What passed a fence of that space: all so far.
    pub(super) fn fence(&mut self, clock: usize, now: u32) {
        self.0[clock] = self.0[GENERIC];
        self.0[clock][THREAD] = now;
    }

    /// Initialisations of mbarriers pass the fences of all spaces.
    pub(super) fn fence_inits(&mut self) {
        let known = self.0[GENERIC][INIT];
        self.0.iter_mut().for_each(|clock| clock[INIT] = known);
    }

    /// Nothing but the initialisations.
    pub(super) fn inits(&self) -> Self {
        let mut inits = Self::default();
        inits.0[GENERIC][INIT] = self.0[GENERIC][INIT];
        inits.fence_inits();
        inits
    }
}

/// Adds what lanes know of themselves.
pub(super) fn add_own(k: &mut Knowledge, warp: u32, lanes: u32, now: u32, own: &Own) {
    for (i, (clock, mut times)) in k.clocks_mut().into_iter().zip(own.0).enumerate() {
        if i == GENERIC {
            times[THREAD] = now;
        }
        for (kind, time) in OWN.into_iter().zip(times) {
            clock.learn(&Epoch { actor: Actor::new(kind, warp), clock: time, lanes });
        }
    }
}
