use super::BarrierError as E;
use super::*;

const ALL: u32 = u32::MAX;

fn call(warp: u32, id: u64, count: u64, operation: Operation) -> Arrive {
    Arrive { warp, id, count: Some(count), operation, lanes: ALL, aligned: true, predicate: 0 }
}

fn sync(warp: u32) -> Arrive {
    Arrive { count: None, ..call(warp, 0, 0, Operation::Sync) }
}

#[test]
fn the_default_count_is_the_block() {
    let mut bars = NamedBarriers::new(96);
    assert_eq!(bars.arrive(sync(0)), Ok(None));
    assert_eq!(bars.arrive(sync(2)), Ok(None));
    assert_eq!(
        bars.incomplete(),
        [(0, "barrier 0: 64 of 96 threads arrived (warps 0, 2)".to_string())]
    );
    let release = Release { id: 0, arrived: 7, released: 7, value: 0 };
    assert_eq!(bars.arrive(sync(1)), Ok(Some(release)));
    // The barrier is reset.
    assert!(bars.incomplete().is_empty());
    assert_eq!(bars.arrive(sync(1)), Ok(None));
}

#[test]
fn arriving_warps_are_not_released() {
    let mut bars = NamedBarriers::new(128);
    assert_eq!(bars.arrive(call(3, 5, 64, Operation::Arrive)), Ok(None));
    let release = Release { id: 5, arrived: 0b1010, released: 0b0010, value: 0 };
    assert_eq!(bars.arrive(call(1, 5, 64, Operation::Sync)), Ok(Some(release)));
}

#[test]
fn reductions_see_all_lanes() {
    for (op, expected) in [(Reduction::Popc, 35), (Reduction::And, 0), (Reduction::Or, 1)] {
        let mut bars = NamedBarriers::new(64);
        let red = |warp, predicate| Arrive { predicate, ..call(warp, 1, 64, Operation::Red(op)) };
        assert_eq!(bars.arrive(red(0, 7)), Ok(None));
        assert_eq!(bars.arrive(red(1, ALL)).unwrap().unwrap().value, expected);
    }
    let mut bars = NamedBarriers::new(32);
    let one = |op, predicate| Arrive { predicate, ..call(0, 1, 32, Operation::Red(op)) };
    assert_eq!(bars.arrive(one(Reduction::And, ALL)).unwrap().unwrap().value, 1);
    assert_eq!(bars.arrive(one(Reduction::Or, 0)).unwrap().unwrap().value, 0);
}

#[test]
fn identifiers_and_counts_are_checked() {
    let mut bars = NamedBarriers::new(64);
    let op = Operation::Sync;
    assert_eq!(bars.arrive(call(0, 16, 64, op)), Err(E::Id { id: 16 }));
    assert_eq!(bars.arrive(call(0, 1, 48, op)), Err(E::CountMultiple { id: 1, count: 48 }));
    assert_eq!(bars.arrive(call(0, 1, 0, op)), Err(E::CountMultiple { id: 1, count: 0 }));
    let large = E::CountTooLarge { id: 1, count: 96, threads: 64 };
    assert_eq!(bars.arrive(call(0, 1, 96, op)), Err(large));
    let bare = Arrive { operation: Operation::Arrive, ..sync(0) };
    assert_eq!(bars.arrive(bare), Err(E::CountMissing { id: 0, warp: 0 }));
    // The last, partial warp counts as a whole one.
    let mut bars = NamedBarriers::new(40);
    assert_eq!(bars.arrive(call(0, 1, 64, op)), Ok(None));
    assert!(bars.arrive(Arrive { lanes: 0xff, ..call(1, 1, 64, op) }).unwrap().is_some());
}

#[test]
fn a_round_has_one_count_and_no_mixed_reduction() {
    let mut bars = NamedBarriers::new(128);
    let red = Operation::Red(Reduction::Or);
    bars.arrive(call(0, 2, 96, Operation::Sync)).unwrap();
    let error = E::CountMismatch { id: 2, warp: 1, count: 64, expected: 96 };
    assert_eq!(bars.arrive(call(1, 2, 64, Operation::Sync)), Err(error));
    let error = E::Mixed { id: 2, warp: 1, first: Operation::Sync, second: red };
    assert_eq!(bars.arrive(call(1, 2, 96, red)), Err(error));
    bars.arrive(call(0, 3, 96, red)).unwrap();
    let second = Operation::Red(Reduction::And);
    let error = E::Mixed { id: 3, warp: 1, first: red, second };
    assert_eq!(bars.arrive(call(1, 3, 96, second)), Err(error));
}

#[test]
fn threads_are_counted_not_warps() {
    let mut bars = NamedBarriers::new(128);
    assert_eq!(bars.arrive(call(2, 4, 96, Operation::Arrive)), Ok(None));
    assert_eq!(bars.arrive(call(2, 4, 96, Operation::Arrive)), Ok(None));
    let release = Release { id: 4, arrived: 4, released: 4, value: 0 };
    assert_eq!(bars.arrive(call(2, 4, 96, Operation::Sync)), Ok(Some(release)));
}

#[test]
fn a_warp_that_waits_cannot_arrive_again() {
    let mut bars = NamedBarriers::new(128);
    bars.arrive(call(2, 4, 96, Operation::Sync)).unwrap();
    let error = E::Twice { id: 4, warp: 2, arrived: 32, needed: 96 };
    assert_eq!(bars.arrive(call(2, 4, 96, Operation::Arrive)), Err(error));
}

#[test]
fn a_given_count_is_waited_for_whoever_exits() {
    let mut bars = NamedBarriers::new(96);
    bars.arrive(call(0, 1, 96, Operation::Arrive)).unwrap();
    bars.arrive(call(1, 1, 96, Operation::Arrive)).unwrap();
    assert_eq!(bars.exit(2, ALL), []);
    assert_eq!(bars.exit(0, ALL), []);
    let release = Release { id: 1, arrived: 3, released: 2, value: 0 };
    assert_eq!(bars.arrive(call(1, 1, 96, Operation::Sync)), Ok(Some(release)));
}

#[test]
fn aligned_needs_the_whole_warp_and_unaligned_collects_it() {
    let mut bars = NamedBarriers::new(32);
    let half = Arrive { lanes: 0xffff, ..sync(0) };
    let error = E::PartialWarp { id: 0, warp: 0, lanes: 0xffff, live: ALL };
    assert_eq!(bars.arrive(half), Err(error));
    let half = Arrive { aligned: false, ..half };
    assert_eq!(bars.arrive(half), Ok(None));
    let error = E::Twice { id: 0, warp: 0, arrived: 0, needed: 32 };
    assert_eq!(bars.arrive(half), Err(error));
    assert!(bars.arrive(Arrive { lanes: !0xffff, ..half }).unwrap().is_some());
}

#[test]
fn exits_release_what_waits_for_nobody_else() {
    let mut bars = NamedBarriers::new(96);
    bars.arrive(sync(0)).unwrap();
    assert_eq!(bars.exit(1, ALL), []);
    let release = Release { id: 0, arrived: 1, released: 1, value: 0 };
    assert_eq!(bars.exit(2, ALL), [release]);
    assert_eq!(bars.arrive(sync(0)), Ok(Some(release)));
    let error = E::NotLive { id: 0, warp: 1, lanes: ALL, live: 0 };
    assert_eq!(bars.arrive(sync(1)), Err(error));
    let error = E::NotLive { id: 0, warp: 9, lanes: ALL, live: 0 };
    assert_eq!(bars.arrive(sync(9)), Err(error));
}

#[test]
fn exited_lanes_are_not_waited_for() {
    let mut bars = NamedBarriers::new(64);
    bars.arrive(sync(1)).unwrap();
    let half = Arrive { lanes: 0xffff, aligned: false, ..sync(0) };
    assert_eq!(bars.arrive(half), Ok(None));
    assert_eq!(bars.exit(0, !0xffff), [Release { id: 0, arrived: 3, released: 3, value: 0 }]);
}

#[test]
fn the_cluster_barrier_waits_for_every_thread() {
    let mut bar = ClusterBarrier::new(2, 40);
    for (warp, lanes) in [(0, ALL), (1, 0xff), (2, ALL), (3, 0x0f)] {
        assert_eq!(bar.arrive(warp, lanes), Ok(None));
    }
    assert_eq!(bar.wait(0, ALL), Ok(false));
    assert_eq!(bar.arrive(3, 0xf0), Ok(Some(0)));
    assert_eq!(bar.wait(0, ALL), Ok(true));
    let error = E::WaitWithoutArrive { warp: 0, lanes: ALL, round: 1 };
    assert_eq!(bar.wait(0, ALL), Err(error));
    // A fast warp may arrive for the next round while others have not waited yet.
    assert_eq!(bar.arrive(0, ALL), Ok(None));
    assert_eq!(bar.wait(0, ALL), Ok(false));
    assert_eq!(bar.wait(1, 0xff), Ok(true));
}

#[test]
fn a_thread_arrives_at_the_cluster_barrier_once_per_round() {
    let mut bar = ClusterBarrier::new(2, 32);
    bar.arrive(0, 3).unwrap();
    assert_eq!(bar.arrive(0, 6), Err(E::ClusterTwice { warp: 0, lanes: 2, round: 0 }));
    assert_eq!(bar.arrive(4, 1), Err(E::ClusterNotLive { warp: 4, lanes: 1, live: 0 }));
}

#[test]
fn exited_threads_do_not_hold_the_cluster() {
    let mut bar = ClusterBarrier::new(2, 32);
    assert_eq!(bar.exit(1, 1), None);
    bar.arrive(0, ALL).unwrap();
    assert_eq!(bar.exit(1, !1), Some(0));
    assert_eq!((bar.round(), bar.wait(0, ALL)), (1, Ok(true)));
}
