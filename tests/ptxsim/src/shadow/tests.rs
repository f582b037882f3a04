//! Every rule as a pair: the mistake is reported, its correction is not.

use super::*;
use crate::clock::{ALL_LANES, Actor, Knowledge, Reach, SyncTable};

mod oracle;

const SHARED: ProxySpace = ProxySpace::Shared;
const LANE_0: u32 = 1;

/// Some warps over one allocation; every warp is a block of its own for scopes.
struct World {
    shadow: Shadow,
    warps: Vec<WarpClock>,
}

impl World {
    fn new(warps: u32) -> Self {
        Self { shadow: Shadow::new(4096), warps: (0..warps).map(WarpClock::new).collect() }
    }

    fn access(
        &mut self,
        (warp, lane): (usize, u32),
        (offset, bytes): (u64, u32),
        strong: Option<Scope>,
        write: bool,
    ) -> Result<(), Conflict> {
        let epoch = self.warps[warp].epoch(1 << lane);
        self.by((warp, lane), epoch, (offset, bytes), Proxy::Generic, strong, write)
    }

    fn by(
        &mut self,
        (warp, lane): (usize, u32),
        epoch: Epoch,
        (offset, bytes): (u64, u32),
        proxy: Proxy,
        strong: Option<Scope>,
        write: bool,
    ) -> Result<(), Conflict> {
        let clock = &self.warps[warp];
        let cta = warp as u32;
        let a = Access { offset, bytes, epoch, pc: 7, proxy, strong, cta, cluster: 0, clock, lane };
        let done = if write { self.shadow.write(&a, SHARED) } else { self.shadow.read(&a, SHARED) };
        done.map_err(|race| race.conflict)
    }

    fn read(&mut self, who: (usize, u32), offset: u64) -> Result<(), Conflict> {
        self.access(who, (offset, 4), None, false)
    }

    fn write(&mut self, who: (usize, u32), offset: u64) -> Result<(), Conflict> {
        self.access(who, (offset, 4), None, true)
    }

    /// All lanes, four bytes each.
    fn write_all(&mut self, warp: usize) {
        for lane in 0..32 {
            self.write((warp, lane), u64::from(lane) * 4).unwrap();
        }
    }

    fn read_all(&mut self, warp: usize) -> Result<(), Conflict> {
        (0..32).try_for_each(|lane| self.read((warp, lane), u64::from(lane) * 4))
    }

    fn bar_sync(&mut self) {
        let mut k = Knowledge::default();
        self.warps.iter_mut().for_each(|warp| warp.release_into(ALL_LANES, &mut k));
        self.warps.iter_mut().for_each(|warp| warp.acquire(ALL_LANES, &k));
    }

    /// An asynchronous access to the 128 bytes that `write_all` fills, issued by lane 0.
    fn issue(&mut self, warp: usize, epoch: Epoch, write: bool) -> Result<(), Conflict> {
        self.by((warp, 0), epoch, (0, 128), Proxy::Async, None, write)
    }
}

fn epoch(actor: Actor, clock: u32, lanes: u32) -> Epoch {
    Epoch { actor, clock, lanes }
}

/// A copy that lands in the first phase of an mbarrier.
fn landing() -> Epoch {
    epoch(Actor::barrier(0), 1, ALL_LANES)
}

#[test]
fn block_barrier() {
    for barrier in [false, true] {
        let mut w = World::new(2);
        w.write((0, 3), 64).unwrap();
        if barrier {
            w.bar_sync();
        }
        let expected = if barrier { Ok(()) } else { Err(Conflict::ReadAfterWrite) };
        assert_eq!(w.read((1, 3), 64), expected);
    }
}

#[test]
fn accesses_after_the_barrier_are_not_covered_by_it() {
    let mut w = World::new(2);
    w.bar_sync();
    w.write((0, 0), 0).unwrap();
    assert_eq!(w.write((1, 0), 0), Err(Conflict::WriteAfterWrite));
    w.read((1, 0), 8).unwrap();
    assert_eq!(w.write((0, 0), 8), Err(Conflict::WriteAfterRead));
}

#[test]
fn lanes_are_threads() {
    for (mask, ok) in [(0, false), (0b101, false), (0b11, true), (ALL_LANES, true)] {
        let mut w = World::new(1);
        w.write((0, 0), 0).unwrap();
        w.read((0, 0), 0).unwrap();
        if mask != 0 {
            w.warps[0].sync_lanes(mask);
        }
        assert_eq!(w.read((0, 1), 0).is_ok(), ok, "{mask:b}");
    }
}

#[test]
fn elected_lane_waits_for_the_warp() {
    for sync in [false, true] {
        let mut w = World::new(2);
        w.write_all(0);
        let k = w.warps[0].release(ALL_LANES);
        w.warps[1].acquire(LANE_0, &k);
        w.read((1, 0), 64).unwrap();
        if sync {
            w.warps[1].sync_lanes(ALL_LANES);
        }
        assert_eq!(w.read((1, 5), 64).is_ok(), sync);
    }
}

#[test]
fn elected_lane_arrives_for_the_warp() {
    for sync in [false, true] {
        let mut w = World::new(2);
        w.read_all(0).unwrap();
        if sync {
            w.warps[0].sync_lanes(ALL_LANES);
        }
        let k = w.warps[0].release(LANE_0);
        w.warps[1].acquire(ALL_LANES, &k);
        let expected = if sync { Ok(()) } else { Err(Conflict::WriteAfterRead) };
        assert_eq!(w.write((1, 1), 16), expected);
        assert_eq!(w.write((1, 0), 0), Ok(()), "lane 0 arrived for itself");
    }
}

#[test]
fn cp_async_is_known_to_its_lane_until_a_barrier() {
    let copy = |w: &mut World| {
        for lane in 0..32 {
            let e = epoch(Actor::cp_async(0), 1, 1 << lane);
            let bytes = (u64::from(lane) * 16, 16);
            w.by((0, lane), e, bytes, Proxy::Generic, None, true).unwrap();
        }
    };
    let mut w = World::new(2);
    copy(&mut w);
    assert_eq!(w.read((0, 0), 0), Err(Conflict::PendingWrite), "not waited for");

    let mut w = World::new(2);
    copy(&mut w);
    w.warps[0].learn(ALL_LANES, &epoch(Actor::cp_async(0), 1, ALL_LANES));
    assert_eq!(w.read((0, 0), 0), Ok(()));
    assert_eq!(w.read((0, 1), 0), Err(Conflict::PendingWrite), "another lane's copy");

    let mut w = World::new(2);
    copy(&mut w);
    w.warps[0].learn(ALL_LANES, &epoch(Actor::cp_async(0), 1, ALL_LANES));
    w.bar_sync();
    assert_eq!(w.read((1, 9), 0), Ok(()));
    let wgmma = epoch(Actor::wgmma(1), 1, ALL_LANES);
    assert_eq!(w.issue(1, wgmma, false), Err(Conflict::MissingProxyFence), "generic proxy");
}

#[test]
fn cp_async_then_fence_then_wgmma() {
    let mut w = World::new(1);
    let e = epoch(Actor::cp_async(0), 1, LANE_0);
    w.by((0, 0), e, (0, 16), Proxy::Generic, None, true).unwrap();
    w.warps[0].learn(ALL_LANES, &epoch(Actor::cp_async(0), 1, ALL_LANES));
    w.warps[0].proxy_fence(ALL_LANES, None);
    w.warps[0].sync_lanes(ALL_LANES);
    assert_eq!(w.issue(0, epoch(Actor::wgmma(0), 1, ALL_LANES), false), Ok(()));
}

#[test]
fn bulk_load_is_waited_for() {
    for wait in [false, true] {
        let mut w = World::new(2);
        w.issue(0, landing(), true).unwrap();
        if wait {
            w.warps[1].learn(ALL_LANES, &landing());
        }
        assert_eq!(w.read_all(1).is_ok(), wait);
        let wgmma = epoch(Actor::wgmma(1), 1, ALL_LANES);
        let expected = if wait { Ok(()) } else { Err(Conflict::PendingWrite) };
        assert_eq!(w.issue(1, wgmma, false), expected, "no fence needed");
    }
}

#[test]
fn buffer_reuse_waits_for_its_consumers() {
    for arrived in [false, true] {
        let mut w = World::new(2);
        w.issue(0, landing(), true).unwrap();
        w.warps[1].learn(ALL_LANES, &landing());
        w.read_all(1).unwrap();
        let k = w.warps[1].release(ALL_LANES);
        w.warps[0].learn(ALL_LANES, &landing());
        if arrived {
            w.warps[0].acquire(LANE_0, &k);
        }
        let next = epoch(Actor::barrier(0), 2, ALL_LANES);
        let expected = if arrived { Ok(()) } else { Err(Conflict::WriteAfterRead) };
        assert_eq!(w.issue(0, next, true), expected);
    }
}

#[test]
fn wgmma_reads_until_its_wait() {
    let wgmma = epoch(Actor::wgmma(0), 1, ALL_LANES);
    for wait in [false, true] {
        let mut w = World::new(1);
        w.issue(0, wgmma, false).unwrap();
        if wait {
            w.warps[0].learn(ALL_LANES, &wgmma);
        }
        let expected = if wait { Ok(()) } else { Err(Conflict::PendingRead) };
        assert_eq!(w.write((0, 2), 32), expected);
    }
}

/// Writer: warp 0. Issuer: lane 0 of warp 1, after a barrier.
fn fenced_store(by_writer: Option<ProxySpace>, by_issuer: Option<ProxySpace>) -> Option<Conflict> {
    let mut w = World::new(2);
    w.write_all(0);
    if by_writer.is_some() {
        w.warps[0].proxy_fence(ALL_LANES, by_writer);
    }
    w.bar_sync();
    if by_issuer.is_some() {
        w.warps[1].proxy_fence(LANE_0, by_issuer);
    }
    w.issue(1, epoch(Actor::bulk(1), 1, LANE_0), false).err()
}

#[test]
fn proxy_fence_lies_on_the_path() {
    let missing = Some(Conflict::MissingProxyFence);
    assert_eq!(fenced_store(None, None), missing);
    assert_eq!(fenced_store(Some(SHARED), None), None);
    assert_eq!(fenced_store(None, Some(SHARED)), None);
    assert_eq!(fenced_store(Some(ProxySpace::Global), None), missing);
    assert_eq!(fenced_store(None, Some(ProxySpace::Global)), missing);
}

#[test]
fn own_store_needs_a_proxy_fence_too() {
    let bulk = epoch(Actor::bulk(0), 1, LANE_0);
    let mut w = World::new(1);
    w.write((0, 0), 0).unwrap();
    assert_eq!(w.issue(0, bulk, false), Err(Conflict::MissingProxyFence));
    let mut w = World::new(1);
    w.write((0, 0), 0).unwrap();
    w.warps[0].proxy_fence(LANE_0, None);
    assert_eq!(w.issue(0, bulk, false), Ok(()));
    w.warps[0].learn(LANE_0, &bulk);
    w.write((0, 0), 0).unwrap();
    let next = epoch(Actor::bulk(0), 2, LANE_0);
    assert_eq!(w.issue(0, next, false), Err(Conflict::MissingProxyFence), "written since");
}

#[test]
fn generic_read_before_async_write_needs_no_fence() {
    let mut w = World::new(2);
    w.read_all(0).unwrap();
    w.bar_sync();
    assert_eq!(w.issue(1, landing(), true), Ok(()));
}

/// Each block writes its part and takes a ticket; the second reads the first's part.
fn ticket(fences: bool, sync: bool, scope: Scope) -> Result<(), Conflict> {
    let mut w = World::new(2);
    let mut table = SyncTable::default();
    for warp in 0..2 {
        w.write((warp, 4), 64 * warp as u64).unwrap();
        if fences {
            w.warps[warp].fence(ALL_LANES, Reach::Device);
        }
        if sync {
            w.warps[warp].sync_lanes(ALL_LANES);
            w.warps[warp].fence(LANE_0, Reach::Device);
        }
        let block = warp as u32;
        if let Some(k) = table.observe(1024, scope, block, block) {
            w.warps[warp].observe(LANE_0, &k, false, Reach::Device);
        }
        let k = w.warps[warp].publish(LANE_0, false, Reach::Device);
        table.publish(1024, scope, block, block, k, true);
        w.access((warp, 0), (1024, 4), Some(scope), true)?;
    }
    if fences {
        w.warps[1].fence(LANE_0, Reach::Device);
    }
    w.warps[1].sync_lanes(ALL_LANES);
    w.read((1, 7), 0)
}

#[test]
fn tickets() {
    assert_eq!(ticket(true, true, Scope::Gpu), Ok(()));
    let unordered = Err(Conflict::ReadAfterWrite);
    assert_eq!(ticket(false, false, Scope::Gpu), unordered, "no fence");
    assert_eq!(ticket(true, false, Scope::Gpu), unordered, "lane 4 wrote, lane 0 published");
    assert_eq!(ticket(true, true, Scope::Cta), Err(Conflict::WriteAfterWrite), "scope too small");
}

#[test]
fn atomics() {
    let gpu = Some(Scope::Gpu);
    let mut w = World::new(2);
    w.access((0, 0), (0, 4), gpu, true).unwrap();
    assert_eq!(w.access((1, 0), (0, 4), gpu, true), Ok(()), "two atomics");
    assert_eq!(w.access((1, 1), (0, 4), gpu, false), Ok(()), "a strong load");
    assert_eq!(w.read((1, 2), 0), Err(Conflict::ReadAfterWrite), "a weak load");

    let mut w = World::new(2);
    w.access((0, 0), (0, 4), gpu, true).unwrap();
    assert_eq!(w.write((1, 0), 0), Err(Conflict::WriteAfterWrite), "a weak store");

    let mut w = World::new(2);
    w.access((0, 0), (0, 4), gpu, true).unwrap();
    let half = w.access((1, 0), (2, 2), gpu, true);
    assert_eq!(half, Err(Conflict::WriteAfterWrite), "partial overlap");

    let mut w = World::new(2);
    w.access((0, 0), (0, 4), gpu, true).unwrap();
    w.access((1, 0), (0, 4), gpu, true).unwrap();
    let k = w.warps[1].release(LANE_0);
    w.warps[1].acquire(ALL_LANES, &k);
    assert_eq!(w.write((1, 0), 0), Err(Conflict::WriteAfterWrite), "the first still counts");
}

#[test]
fn lanes_storing_to_one_address() {
    let mut w = World::new(1);
    w.write((0, 0), 0).unwrap();
    assert_eq!(w.write((0, 1), 0), Err(Conflict::WriteAfterWrite));
    let mut w = World::new(1);
    for lane in 0..32 {
        w.access((0, lane), (0, 4), Some(Scope::Cta), true).unwrap();
    }
}

#[test]
fn neighbours_of_any_size_are_apart() {
    for bytes in [1, 2, 4, 8, 16u32] {
        let mut w = World::new(2);
        for i in 0..64 {
            let at = u64::from(i * bytes);
            w.access((i as usize % 2, i % 32), (at, bytes), None, true).unwrap();
        }
        let other = u64::from(bytes);
        let found = w.access((0, 0), (other, 1), None, false);
        assert_eq!(found, Err(Conflict::ReadAfterWrite), "{bytes}");
    }
}

#[test]
fn a_race_names_both_sides() {
    let mut w = World::new(2);
    w.write((0, 3), 300).unwrap();
    let clock = &w.warps[1];
    let epoch = clock.epoch(ALL_LANES);
    let a = Access {
        offset: 200,
        bytes: 128,
        epoch,
        pc: 9,
        proxy: Proxy::Generic,
        strong: None,
        cta: 0,
        cluster: 0,
        clock,
        lane: 0,
    };
    let race = w.shadow.read(&a, SHARED).unwrap_err();
    assert_eq!((race.offset, race.other_pc), (300, 7));
    assert_eq!(race.other_site(), Some(Site { pc: 7, warp: 0, lane: 3 }));
    w.shadow.reset_accesses();
    assert_eq!(w.shadow.read(&a, SHARED), Ok(()));
}

#[test]
fn initialised_bits() {
    let mut shadow = Shadow::new(200);
    shadow.mark_initialised(60, 10);
    assert!(shadow.is_initialised(60, 10) && shadow.is_initialised(64, 0));
    assert!(!shadow.is_initialised(59, 2) && !shadow.is_initialised(69, 2));
    shadow.mark_initialised(0, 300);
    shadow.reset_accesses();
    assert!(shadow.is_initialised(0, 200) && !shadow.is_initialised(0, 201));
}

#[test]
fn scopes_of_two_atomics_must_include_each_other() {
    for (first, second) in [(Scope::Cta, Scope::Gpu), (Scope::Gpu, Scope::Cta)] {
        let mut w = World::new(2);
        w.access((0, 0), (0, 4), Some(first), true).unwrap();
        let found = w.access((1, 0), (0, 4), Some(second), true);
        assert_eq!(found, Err(Conflict::WriteAfterWrite), "{first:?}, {second:?}");
        let mut w = World::new(2);
        w.access((0, 0), (0, 4), Some(first), true).unwrap();
        assert_eq!(w.access((0, 1), (0, 4), Some(second), true), Ok(()), "within a block");
    }
}

#[test]
fn elected_lane_fences_its_own_cp_async() {
    for fence in [false, true] {
        let mut w = World::new(1);
        let e = epoch(Actor::cp_async(0), 1, LANE_0);
        w.by((0, 0), e, (0, 16), Proxy::Generic, None, true).unwrap();
        w.warps[0].learn(ALL_LANES, &epoch(Actor::cp_async(0), 1, ALL_LANES));
        if fence {
            w.warps[0].proxy_fence(LANE_0, Some(SHARED));
        }
        let expected = if fence { Ok(()) } else { Err(Conflict::MissingProxyFence) };
        assert_eq!(w.issue(0, epoch(Actor::bulk(0), 1, LANE_0), false), expected);
    }
}

#[test]
fn relaxed_store_releases_up_to_the_fence() {
    for (late, acquire) in [(false, true), (true, true), (false, false)] {
        let mut w = World::new(2);
        w.write((0, 0), 0).unwrap();
        w.warps[0].fence(ALL_LANES, Reach::Device);
        if late {
            w.write((0, 0), 0).unwrap();
        }
        let k = w.warps[0].publish(LANE_0, false, Reach::Device).unwrap();
        w.warps[1].observe(LANE_0, &k, acquire, Reach::Device);
        assert_eq!(w.read((1, 0), 0).is_ok(), !late && acquire);
    }
}
