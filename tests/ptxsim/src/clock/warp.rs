//! What the lanes of one warp know.

use std::ops::RangeInclusive;

use super::memo::Memo;
use super::own::{GENERIC, OWN, Own, THREAD, add_own, fenced};
use super::{ALL_LANES, Actor, Epoch, Knowledge, ProxySpace, Scope, bits, completes_with_fence};

/// How far a fence reaches: the patterns of relaxed accesses and fences are kept apart for each.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum Reach {
    /// The threads of the block.
    Block,
    /// All threads.
    Device,
}

impl Reach {
    /// Of a scope; clusters count as the device.
    pub fn of(scope: Scope) -> Self {
        if scope == Scope::Cta { Self::Block } else { Self::Device }
    }

    /// The reaches that a fence of this one serves.
    fn served(self) -> &'static [usize] {
        if self == Self::Block { &[0] } else { &[0, 1] }
    }
}

/// What one lane knows beyond the others.
#[derive(Clone, Debug, Default)]
struct Lane {
    known: Knowledge,
    own: Own,
    /// What a relaxed store of the lane releases, if it fenced apart from the others; by [`Reach`].
    snapshots: [Option<Knowledge>; 2],
    /// What relaxed loads saw and the next fence acquires.
    observed: [Option<Knowledge>; 2],
}

/// What all lanes knew at a fence they executed together.
#[derive(Clone, Debug)]
struct Snapshot {
    known: Knowledge,
    own: Own,
    at: u32,
}

/// What each lane of a warp knows: common to all, plus what single lanes know while they differ.
#[derive(Clone, Debug)]
pub struct WarpClock {
    warp: u32,
    now: u32,
    /// Lanes that have not ended; "all lanes" below means all of these.
    live: u32,
    common: Knowledge,
    /// What was looked up in the clocks of `common` since they last changed.
    memo: [Memo; 3],
    own: Own,
    lanes: Option<Box<[Option<Box<Lane>>; 32]>>,
    snapshots: [Option<Box<Snapshot>>; 2],
    observed: [Option<Box<Knowledge>>; 2],
}

impl WarpClock {
    /// A warp that knows nothing yet, by its index in the grid.
    pub fn new(warp: u32) -> Self {
        Self {
            warp,
            now: 1,
            live: ALL_LANES,
            common: Knowledge::default(),
            memo: Default::default(),
            own: Own::default(),
            lanes: None,
            snapshots: [None, None],
            observed: [None, None],
        }
    }

    /// The warp's index in the grid.
    #[inline]
    pub fn warp(&self) -> u32 {
        self.warp
    }

    /// These lanes have ended, or never were: what the others share counts as common.
    pub fn retire(&mut self, lanes: u32) {
        self.live &= !lanes;
    }

    fn all(&self, lanes: u32) -> bool {
        self.live & !lanes == 0
    }

    /// The epoch of an access that these lanes make now.
    #[inline]
    pub fn epoch(&self, lanes: u32) -> Epoch {
        Epoch { actor: Actor::thread(self.warp), clock: self.now, lanes }
    }

    /// The epoch of an `mbarrier.init` of a lane, which knows it at once.
    pub fn init(&mut self, lane: u32) -> Epoch {
        let actor = Actor::init(self.warp);
        let epoch = Epoch { actor, clock: self.now, lanes: 1 << lane };
        self.learn(epoch.lanes, &epoch);
        epoch
    }

    /// What all lanes know, to be changed.
    fn common_mut(&mut self) -> &mut Knowledge {
        self.memo.iter_mut().for_each(Memo::clear);
        &mut self.common
    }

    /// Whether the epoch happens before the lane's next access.
    #[inline]
    pub fn knows(&self, lane: u32, e: &Epoch) -> bool {
        self.is_own(lane, e) || self.covers(lane, GENERIC, e)
    }

    /// Whether the lane itself, and no other, made these accesses.
    #[inline]
    fn is_own(&self, lane: u32, e: &Epoch) -> bool {
        e.actor == Actor::thread(self.warp) && e.lanes == 1 << lane
    }

    /// No lane knows anything of an actor outside of these.
    #[inline]
    pub fn within(&self) -> RangeInclusive<Actor> {
        if self.lanes.is_some() {
            return Actor::FIRST..=Actor::LAST;
        }
        let own = (Actor::thread(self.warp), Actor::wgmma(self.warp));
        let (first, last) = self.common.generic.ends().unwrap_or(own);
        first.min(own.0)..=last.max(own.1)
    }

    /// The time up to which a lane knows all lanes of an actor; 0: not at all.
    pub fn known(&self, lane: u32, actor: Actor) -> u32 {
        let extra = self.lane(lane as usize).map_or(0, |l| l.known.generic.time(actor));
        self.common.generic.time(actor).max(extra)
    }

    /// Whether it happens before and a proxy fence of that space lies between.
    pub fn knows_async(&self, lane: u32, space: ProxySpace, e: &Epoch) -> bool {
        self.covers(lane, fenced(space), e)
    }

    /// Whether every lane knows all of the actor's lanes up to that time.
    #[cfg(test)]
    pub(crate) fn all_know(&self, actor: Actor, clock: u32) -> bool {
        self.common.generic.known_lanes(actor, clock) == ALL_LANES
    }

    #[inline]
    fn covers(&self, lane: u32, clock: usize, e: &Epoch) -> bool {
        let common = self.memo[clock].known(self.common.clocks()[clock], e.actor);
        if e.clock <= common.all {
            return true;
        }
        if common.exactly && self.lanes.is_none() && e.actor.index() != self.warp {
            return false;
        }
        let known = match common.exactly {
            true => 0,
            false => self.common.clocks()[clock].known_lanes(e.actor, e.clock),
        };
        self.lane_covers(lane, clock, e, e.lanes & !known)
    }

    /// The same for the lanes of the epoch that not all lanes know of.
    fn lane_covers(&self, lane: u32, clock: usize, e: &Epoch, mut rest: u32) -> bool {
        if rest == 0 {
            return true;
        }
        let extra = self.lane(lane as usize);
        if let Some(of) = self.own_slot(e.actor) {
            let mut reached = self.own.0[clock][of];
            if let Some(extra) = extra {
                reached = reached.max(extra.own.0[clock][of]);
            }
            if clock == GENERIC && of == THREAD {
                reached = self.now;
            }
            if e.clock <= reached {
                rest &= !(1 << lane);
            }
        }
        if let Some(extra) = extra {
            rest &= !extra.known.clocks()[clock].known_lanes(e.actor, e.clock);
        }
        rest == 0
    }

    /// Everything these lanes know or did so far, for others; the time moves on.
    pub fn release(&mut self, lanes: u32) -> Knowledge {
        let mut k = Knowledge::default();
        self.release_into(lanes, &mut k);
        k
    }

    /// [`release`](Self::release) into what others released already.
    pub fn release_into(&mut self, lanes: u32, k: &mut Knowledge) {
        self.add_known(lanes, k);
        self.now += 1;
    }

    /// These lanes know what another released.
    pub fn acquire(&mut self, lanes: u32, k: &Knowledge) {
        if self.all(lanes) {
            return self.common_mut().join(k);
        }
        bits(lanes).for_each(|lane| self.lane_mut(lane).known.join(k));
    }

    /// `bar.warp.sync`: these lanes know all that each of them knows or did.
    pub fn sync_lanes(&mut self, lanes: u32) {
        if self.all(lanes) && self.lanes.is_none() {
            let (warp, now, own) = (self.warp, self.now, self.own);
            add_own(self.common_mut(), warp, lanes, now, &own);
        } else {
            let mut k = Knowledge::default();
            self.add_lanes(lanes, &mut k);
            self.acquire(lanes, &k);
            if self.all(lanes) {
                self.drop_extras();
            }
        }
        self.now += 1;
    }

    /// An asynchronous operation has completed for these lanes. Groups of `cp.async` and of bulk
    /// copies complete only for the lane that issued them: each lane learns of its own.
    pub fn learn(&mut self, lanes: u32, e: &Epoch) {
        let Some(of) = self.own_slot(e.actor) else {
            if self.all(lanes) {
                return self.common_mut().learn(e);
            }
            return bits(lanes).for_each(|lane| self.lane_mut(lane).known.learn(e));
        };
        let clocks = if completes_with_fence(e.actor.kind()) { 0..3 } else { GENERIC..1 };
        let lanes = lanes & e.lanes;
        for clock in clocks {
            let raise = |own: &mut Own| own.0[clock][of] = own.0[clock][of].max(e.clock);
            if self.all(lanes) {
                raise(&mut self.own);
            } else {
                bits(lanes).for_each(|lane| raise(&mut self.lane_mut(lane).own));
            }
        }
    }

    /// `fence.proxy.async`: asynchronous accesses may rely on what these lanes know or did; of
    /// one space, or of all.
    pub fn proxy_fence(&mut self, lanes: u32, space: Option<ProxySpace>) {
        let (now, together) = (self.now, self.all(lanes));
        for clock in space.map_or(1..3, |space| fenced(space)..fenced(space) + 1) {
            if together {
                copy_generic(self.common_mut(), clock);
                self.own.fence(clock, now);
                let extras = self.lanes.iter_mut().flat_map(|lanes| lanes.iter_mut().flatten());
                for extra in extras {
                    copy_generic(&mut extra.known, clock);
                    extra.own.fence(clock, now);
                }
                continue;
            }
            for lane in bits(lanes) {
                let (common, own) = (self.common.generic.clone(), self.own);
                let extra = self.lane_mut(lane);
                extra.known.generic.join(&common);
                copy_generic(&mut extra.known, clock);
                extra.own.join(&own);
                extra.own.fence(clock, now);
            }
        }
        self.now += 1;
    }

    /// `fence.acq_rel`, `fence.sc`, `membar`: acquires what relaxed loads of these lanes saw, and
    /// lets their later relaxed stores release all up to here; as far as the fence reaches.
    pub fn fence(&mut self, lanes: u32, reach: Reach) {
        for &i in reach.served() {
            self.acquire_observed(lanes, i);
        }
        for &i in reach.served() {
            self.take_snapshot(lanes, i);
        }
        self.now += 1;
    }

    /// `fence.mbarrier_init`: a fence and a proxy fence for these lanes' initialisations of mbarriers
    /// alone.
    pub fn fence_inits(&mut self, lanes: u32) {
        let (together, i) = (self.all(lanes), Reach::Device as usize);
        for lane in bits(lanes) {
            if together && self.lane(lane).is_none() {
                continue;
            }
            let mut own = self.own;
            own.join(&self.lane_mut(lane).own);
            let mut k = self.snapshot(lane, i).unwrap_or_default();
            add_own(&mut k, self.warp, 1 << lane, 0, &own.inits());
            let extra = self.lane_mut(lane);
            extra.snapshots[i] = Some(k);
            extra.own.join(&own.inits());
        }
        if together {
            self.own.fence_inits();
            let inits = self.own.inits();
            let nothing = || Snapshot { known: Knowledge::default(), own: Own::default(), at: 0 };
            let snapshot = self.snapshots[i].get_or_insert_with(|| Box::new(nothing()));
            snapshot.own.join(&inits);
        }
        self.now += 1;
    }

    fn take_snapshot(&mut self, lanes: u32, i: usize) {
        let together = self.all(lanes);
        for lane in bits(lanes) {
            if !together || self.lane(lane).is_some() {
                let mut k = Knowledge::default();
                self.add_known(1 << lane, &mut k);
                self.lane_mut(lane).snapshots[i] = Some(k);
            }
        }
        if together {
            let (known, own, at) = (self.common.clone(), self.own, self.now);
            self.snapshots[i] = Some(Box::new(Snapshot { known, own, at }));
        }
    }

    /// A strong store or read-modify-write of these lanes: what it hands on, which is all so far
    /// with release semantics, else all up to the lanes' last fence of that reach.
    pub fn publish(&mut self, lanes: u32, release: bool, reach: Reach) -> Option<Knowledge> {
        if release {
            return Some(self.release(lanes));
        }
        let mut sum: Option<Knowledge> = None;
        for snapshot in bits(lanes).filter_map(|lane| self.snapshot(lane, reach as usize)) {
            match &mut sum {
                Some(sum) => sum.join(&snapshot),
                None => sum = Some(snapshot),
            }
        }
        sum
    }

    /// What a lane's last fence of a reach lets its relaxed stores release.
    fn snapshot(&self, lane: usize, reach: usize) -> Option<Knowledge> {
        if let Some(k) = self.lane(lane).and_then(|extra| extra.snapshots[reach].as_ref()) {
            return Some(k.clone());
        }
        let snapshot = self.snapshots[reach].as_ref()?;
        let mut k = snapshot.known.clone();
        add_own(&mut k, self.warp, 1 << lane, snapshot.at, &snapshot.own);
        Some(k)
    }

    /// A strong load or read-modify-write of these lanes saw what another published: known now
    /// with acquire semantics, else from their next fence of that reach on.
    pub fn observe(&mut self, lanes: u32, k: &Knowledge, acquire: bool, reach: Reach) {
        if acquire {
            return self.acquire(lanes, k);
        }
        let i = reach as usize;
        if self.all(lanes) {
            return self.observed[i].get_or_insert_default().join(k);
        }
        for lane in bits(lanes) {
            self.lane_mut(lane).observed[i].get_or_insert_default().join(k);
        }
    }

    /// What the warp saw together stays for lanes that have not fenced yet.
    fn acquire_observed(&mut self, lanes: u32, i: usize) {
        if let Some(k) = &self.observed[i].clone() {
            self.acquire(lanes, k);
            if self.all(lanes) {
                self.observed[i] = None;
            }
        }
        for lane in bits(lanes) {
            let extra = self.lanes.as_mut().and_then(|lanes| lanes[lane].as_mut());
            let Some(extra) = extra else { continue };
            if let Some(k) = extra.observed[i].take() {
                extra.known.join(&k);
            }
        }
    }

    /// Adds what these lanes know, themselves included.
    fn add_known(&self, lanes: u32, k: &mut Knowledge) {
        k.join(&self.common);
        self.add_lanes(lanes, k);
    }

    /// Adds what these lanes know beyond the common knowledge.
    fn add_lanes(&self, lanes: u32, k: &mut Knowledge) {
        add_own(k, self.warp, lanes, self.now, &self.own);
        if self.lanes.is_none() {
            return;
        }
        for lane in bits(lanes) {
            if let Some(extra) = self.lane(lane) {
                k.join(&extra.known);
                add_own(k, self.warp, 1 << lane, self.now, &extra.own);
            }
        }
    }

    fn lane(&self, lane: usize) -> Option<&Lane> {
        self.lanes.as_ref()?[lane].as_deref()
    }

    fn lane_mut(&mut self, lane: usize) -> &mut Lane {
        self.lanes.get_or_insert_default()[lane].get_or_insert_default()
    }

    /// After a synchronisation of all lanes only the state of relaxed accesses is left apart.
    fn drop_extras(&mut self) {
        let Some(lanes) = &mut self.lanes else { return };
        for slot in lanes.iter_mut() {
            let Some(lane) = slot else { continue };
            let idle = lane.snapshots.iter().chain(&lane.observed).all(Option::is_none);
            if idle {
                *slot = None;
            } else {
                lane.known = Knowledge::default();
                lane.own = Own::default();
            }
        }
        if lanes.iter().all(Option::is_none) {
            self.lanes = None;
        }
    }

    /// Position in [`Own`] of an actor whose lanes are this warp's.
    fn own_slot(&self, actor: Actor) -> Option<usize> {
        if actor.index() != self.warp {
            return None;
        }
        OWN.iter().position(|kind| *kind == actor.kind())
    }
}

fn copy_generic(k: &mut Knowledge, clock: usize) {
    let [generic, rest @ ..] = k.clocks_mut();
    rest[clock - 1].join(generic);
}
