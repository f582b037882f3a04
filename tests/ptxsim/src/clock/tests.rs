use super::*;

#[test]
fn lanes_of_one_actor() {
    let mut clock = Clock::default();
    let actor = Actor::thread(3);
    let at = |clock, lanes| Epoch { actor, clock, lanes };
    clock.learn(&at(5, 1));
    clock.learn(&at(2, ALL_LANES));
    assert!(clock.knows(&at(5, 1)) && clock.knows(&at(2, 0xF0)));
    assert!(!clock.knows(&at(3, 2)) && !clock.knows(&at(5, 3)) && !clock.knows(&at(6, 1)));
    clock.learn(&at(5, !1));
    assert!(clock.knows(&at(5, ALL_LANES)));
    assert!(clock.entries[0].single.is_none(), "equal lanes fold into one clock");
}

#[test]
fn join_is_the_union() {
    let e = |warp, clock, lanes| Epoch { actor: Actor::thread(warp), clock, lanes };
    let mut a = Clock::default();
    let mut b = Clock::default();
    [e(1, 4, 1), e(5, 2, ALL_LANES), e(9, 1, 2)].iter().for_each(|e| a.learn(e));
    [e(0, 1, 1), e(1, 3, 2), e(5, 1, ALL_LANES), e(7, 7, 8)].iter().for_each(|e| b.learn(e));
    a.join(&b);
    for known in [e(0, 1, 1), e(1, 4, 1), e(1, 3, 2), e(5, 2, 9), e(7, 7, 8), e(9, 1, 2)] {
        assert!(a.knows(&known), "{known:?}");
    }
    assert!(!a.knows(&e(1, 4, 2)) && !a.knows(&e(7, 7, 1)));
    assert!(a.entries.is_sorted_by_key(|entry| entry.actor));
}

#[test]
fn actors_keep_kind_and_index() {
    let kinds = [
        (Actor::thread(7), ActorKind::Thread),
        (Actor::cp_async(7), ActorKind::CpAsync),
        (Actor::bulk(7), ActorKind::Bulk),
        (Actor::wgmma(7), ActorKind::Wgmma),
        (Actor::barrier(7), ActorKind::Barrier),
    ];
    for (actor, kind) in kinds {
        assert_eq!((actor.kind(), actor.index()), (kind, 7));
    }
}

#[test]
fn extras_fold_at_a_full_synchronisation() {
    let mut other = WarpClock::new(1);
    let seen = other.epoch(ALL_LANES);
    let k = other.release(ALL_LANES);
    let mut warp = WarpClock::new(0);
    warp.acquire(1, &k);
    assert!(warp.knows(0, &seen) && !warp.knows(1, &seen));
    warp.sync_lanes(0b11);
    assert!(warp.knows(1, &seen) && !warp.knows(2, &seen));
    warp.sync_lanes(ALL_LANES);
    assert!(warp.knows(31, &seen) && warp.all_know(Actor::thread(1), seen.clock));
}

#[test]
fn retired_lanes_share_nothing_unreleased() {
    let mut warp = WarpClock::new(0);
    let last = warp.epoch(1 << 31);
    warp.retire(1 << 31);
    warp.sync_lanes(!(1 << 31));
    assert!(!warp.knows(0, &last));
    let mut other = WarpClock::new(1);
    let seen = other.epoch(1);
    let k = other.release(1);
    warp.acquire(!(1 << 31), &k);
    assert!(warp.all_know(Actor::thread(1), 0) && warp.knows(5, &seen));
}

#[test]
fn own_completions_reach_the_own_lane() {
    let mut warp = WarpClock::new(0);
    let copy = Epoch { actor: Actor::cp_async(0), clock: 1, lanes: ALL_LANES };
    warp.learn(ALL_LANES, &copy);
    let of = |lanes| Epoch { lanes, ..copy };
    assert!(warp.knows(4, &of(1 << 4)) && !warp.knows(4, &of(1 << 5)));
    warp.sync_lanes(ALL_LANES);
    assert!(warp.knows(4, &copy) && !warp.knows_async(4, ProxySpace::Shared, &copy));
}

#[test]
fn release_sequences() {
    let k = |warp: u32| WarpClock::new(warp).release(ALL_LANES);
    let e = |warp| Epoch { actor: Actor::thread(warp), clock: 1, lanes: ALL_LANES };
    let mut table = SyncTable::default();
    let seen = |table: &SyncTable, warp| {
        table.observe(64, Scope::Gpu, 9, 9).is_some_and(|k| k.generic.knows(&e(warp)))
    };
    table.publish(64, Scope::Gpu, 0, 0, Some(k(0)), false);
    table.publish(64, Scope::Sys, 1, 0, Some(k(1)), true);
    table.publish(64, Scope::Gpu, 2, 0, None, true);
    assert!(seen(&table, 0) && seen(&table, 1), "a read-modify-write continues");
    table.publish(64, Scope::Gpu, 2, 0, Some(k(2)), false);
    assert!(!seen(&table, 0) && seen(&table, 2), "a store replaces");
    table.weak_store(60, 4);
    assert!(seen(&table, 2));
    table.weak_store(60, 8);
    assert!(!seen(&table, 2), "a weak store removes");
}

#[test]
fn scopes_must_include_each_other() {
    let mut table = SyncTable::default();
    let cases = [
        (Scope::Cta, 0, Scope::Gpu, 0, 0, true),
        (Scope::Cta, 1, Scope::Gpu, 0, 0, false),
        (Scope::Gpu, 1, Scope::Cta, 0, 0, false),
        (Scope::Cluster, 1, Scope::Gpu, 0, 0, true),
        (Scope::Cluster, 1, Scope::Gpu, 0, 1, false),
        (Scope::Sys, 1, Scope::Gpu, 0, 1, true),
    ];
    for (i, (from, writer, to, reader, cluster, seen)) in cases.into_iter().enumerate() {
        let k = WarpClock::new(0).release(1);
        table.publish(i as u64, from, writer, 0, Some(k), false);
        assert_eq!(table.observe(i as u64, to, reader, cluster).is_some(), seen, "case {i}");
    }
}
