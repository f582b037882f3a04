//! Who knows what: vector clocks of lanes, proxies and asynchronous operations.
//!
//! An access is an [`Epoch`]: an actor, some of its lanes, and a time of that actor's clock. It
//! happens before a lane's next access iff the lane's clock of that actor has reached that time.
//! Knowledge only grows; it moves by [`WarpClock::release`] and [`WarpClock::acquire`].
//!
//! A converged warp costs as much as one thread: what all lanes know is kept once, and a lane has
//! knowledge of its own only until the next synchronisation of the whole warp.

use std::cmp::Ordering;

mod memo;
mod own;
mod sync;
mod warp;

pub(crate) use sync::Block;
pub use sync::{Scope, SyncTable};
pub use warp::{Reach, WarpClock};

/// All lanes of a warp.
pub const ALL_LANES: u32 = !0;

/// What kind of agent accesses memory.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub enum ActorKind {
    /// The threads of a warp.
    Thread,
    /// The `mbarrier.init` of a warp's threads, which have a fence of their own.
    Init,
    /// The `cp.async` groups of a warp's lanes; generic proxy.
    CpAsync,
    /// The bulk copy groups of a warp's lanes; async proxy.
    Bulk,
    /// The source reads of a warp's bulk copies; async proxy.
    BulkRead,
    /// The `wgmma` groups of a warpgroup; async proxy.
    Wgmma,
    /// The bulk copies that complete at one mbarrier; async proxy.
    Barrier,
}

/// One agent that accesses memory.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct Actor(u32);

impl Actor {
    const KIND_BITS: u32 = 3;
    /// The least and the greatest.
    const FIRST: Self = Self(0);
    const LAST: Self = Self(u32::MAX);

    const fn new(kind: ActorKind, index: u32) -> Self {
        Self(index << Self::KIND_BITS | kind as u32)
    }

    /// The threads of a warp, by its index in the grid.
    pub const fn thread(warp: u32) -> Self {
        Self::new(ActorKind::Thread, warp)
    }

    /// The `mbarrier.init` of a warp.
    pub const fn init(warp: u32) -> Self {
        Self::new(ActorKind::Init, warp)
    }

    /// The `cp.async` operations of a warp.
    pub const fn cp_async(warp: u32) -> Self {
        Self::new(ActorKind::CpAsync, warp)
    }

    /// The bulk copies of a warp that complete by groups.
    pub const fn bulk(warp: u32) -> Self {
        Self::new(ActorKind::Bulk, warp)
    }

    /// What those copies read, which a wait may cover without the writes.
    pub const fn bulk_read(warp: u32) -> Self {
        Self::new(ActorKind::BulkRead, warp)
    }

    /// The `wgmma` operations of a warpgroup, by its first warp.
    pub const fn wgmma(warp: u32) -> Self {
        Self::new(ActorKind::Wgmma, warp)
    }

    /// The bulk copies that complete at an mbarrier, by its number in the launch.
    pub const fn barrier(id: u32) -> Self {
        Self::new(ActorKind::Barrier, id)
    }

    /// Whether its accesses take place when they are made, and not some time before a wait.
    pub const fn is_synchronous(self) -> bool {
        matches!(self.kind(), ActorKind::Thread | ActorKind::Init)
    }

    /// What the actor is.
    pub const fn kind(self) -> ActorKind {
        match self.0 & ((1 << Self::KIND_BITS) - 1) {
            0 => ActorKind::Thread,
            1 => ActorKind::Init,
            2 => ActorKind::CpAsync,
            3 => ActorKind::Bulk,
            4 => ActorKind::BulkRead,
            5 => ActorKind::Wgmma,
            _ => ActorKind::Barrier,
        }
    }

    /// The warp in the grid, or the number of the barrier.
    pub const fn index(self) -> u32 {
        self.0 >> Self::KIND_BITS
    }
}

/// Accesses of some lanes of an actor at one time; times start at 1.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub struct Epoch {
    /// Who.
    pub actor: Actor,
    /// When, on the actor's own clock.
    pub clock: u32,
    /// Which of its lanes.
    pub lanes: u32,
}

/// State spaces that a proxy fence tells apart.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Hash)]
pub enum ProxySpace {
    /// Shared memory.
    Shared,
    /// Global memory.
    Global,
}

/// The time of one actor that is known for all lanes, and what is known beyond it of single lanes.
#[derive(Clone, Debug)]
struct Entry {
    actor: Actor,
    all: u32,
    single: Option<Box<[u32; 32]>>,
}

impl Entry {
    fn raise(&mut self, lanes: u32, clock: u32) {
        if clock <= self.all {
            return;
        }
        if lanes == ALL_LANES {
            self.all = clock;
        } else {
            let single = self.single.get_or_insert_with(|| Box::new([0; 32]));
            for lane in bits(lanes) {
                single[lane] = single[lane].max(clock);
            }
        }
        self.fold();
    }

    fn join(&mut self, other: &Self) {
        self.all = self.all.max(other.all);
        if let Some(theirs) = &other.single {
            let single = self.single.get_or_insert_with(|| Box::new([0; 32]));
            single
                .iter_mut()
                .zip(theirs.iter())
                .for_each(|(mine, &their)| *mine = their.max(*mine));
        }
        self.fold();
    }

    /// Moves what all single lanes share into the common clock.
    fn fold(&mut self) {
        let Some(single) = &self.single else { return };
        let (least, most) =
            single.iter().fold((u32::MAX, 0), |(least, most), &c| (c.min(least), c.max(most)));
        self.all = self.all.max(least);
        if most <= self.all {
            self.single = None;
        }
    }

    fn known_lanes(&self, clock: u32) -> u32 {
        match &self.single {
            _ if clock <= self.all => ALL_LANES,
            None => 0,
            Some(single) => (0..32).fold(0, |mask, l| mask | u32::from(single[l] >= clock) << l),
        }
    }
}

/// A vector clock: for every actor the time up to which its accesses are known.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    entries: Vec<Entry>,
}

impl Clock {
    /// Whether all accesses of the epoch are known.
    pub fn knows(&self, e: &Epoch) -> bool {
        e.lanes & !self.known_lanes(e.actor, e.clock) == 0
    }

    /// The first and the last actor of whom anything is known.
    #[inline]
    fn ends(&self) -> Option<(Actor, Actor)> {
        Some((self.entries.first()?.actor, self.entries.last()?.actor))
    }

    /// What is known of an actor.
    fn known(&self, actor: Actor) -> memo::Known {
        match self.entries.binary_search_by_key(&actor, |entry| entry.actor) {
            Ok(i) => {
                let entry = &self.entries[i];
                memo::Known { all: entry.all, exactly: entry.single.is_none() }
            }
            Err(_) => memo::Known { all: 0, exactly: true },
        }
    }

    /// The lanes of an actor that are known up to a time.
    fn known_lanes(&self, actor: Actor, clock: u32) -> u32 {
        match self.entries.binary_search_by_key(&actor, |entry| entry.actor) {
            Ok(i) => self.entries[i].known_lanes(clock),
            Err(_) => 0,
        }
    }

    /// The time up to which all lanes of an actor are known; 0: not at all.
    pub fn time(&self, actor: Actor) -> u32 {
        let found = self.entries.binary_search_by_key(&actor, |entry| entry.actor);
        found.map_or(0, |i| self.entries[i].all)
    }

    /// Adds all that another clock knows.
    pub fn join(&mut self, other: &Clock) {
        let mut i = 0;
        for theirs in &other.entries {
            while i < self.entries.len() && self.entries[i].actor < theirs.actor {
                i += 1;
            }
            match self.entries.get_mut(i).map(|mine| mine.actor.cmp(&theirs.actor)) {
                Some(Ordering::Equal) => self.entries[i].join(theirs),
                _ => self.entries.insert(i, theirs.clone()),
            }
        }
    }

    /// Adds the accesses of an epoch and all before them of the same lanes.
    pub fn learn(&mut self, e: &Epoch) {
        if e.clock == 0 || e.lanes == 0 {
            return;
        }
        let i = match self.entries.binary_search_by_key(&e.actor, |entry| entry.actor) {
            Ok(i) => i,
            Err(i) => {
                self.entries.insert(i, Entry { actor: e.actor, all: 0, single: None });
                i
            }
        };
        self.entries[i].raise(e.lanes, e.clock);
    }
}

/// What happens before, and what of it has passed a proxy fence.
#[derive(Clone, Debug, Default)]
pub struct Knowledge {
    /// All that happens before.
    pub generic: Clock,
    /// What an asynchronous access to shared memory may rely on.
    pub shared: Clock,
    /// What an asynchronous access to global memory may rely on.
    pub global: Clock,
}

impl Knowledge {
    /// Adds all that another knows.
    pub fn join(&mut self, other: &Knowledge) {
        self.generic.join(&other.generic);
        self.shared.join(&other.shared);
        self.global.join(&other.global);
    }

    /// Adds the completion of an asynchronous operation. Completion of the async proxy carries
    /// its own fence; `cp.async` belongs to the generic proxy and has none.
    pub fn learn(&mut self, e: &Epoch) {
        self.generic.learn(e);
        if completes_with_fence(e.actor.kind()) {
            self.shared.learn(e);
            self.global.learn(e);
        }
    }

    fn clocks(&self) -> [&Clock; 3] {
        [&self.generic, &self.shared, &self.global]
    }

    fn clocks_mut(&mut self) -> [&mut Clock; 3] {
        [&mut self.generic, &mut self.shared, &mut self.global]
    }
}

fn completes_with_fence(kind: ActorKind) -> bool {
    !matches!(kind, ActorKind::Thread | ActorKind::Init | ActorKind::CpAsync)
}

/// The positions of the set bits.
fn bits(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

#[cfg(test)]
mod tests;
