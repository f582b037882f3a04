use super::MbarrierError as E;
use super::*;

fn at_phase(count: u64, phase: u64) -> Mbarrier {
    let mut bar = Mbarrier::init(count).unwrap();
    for _ in 0..phase {
        let done = bar.arrive(count as u32).unwrap().completed;
        assert!(done.is_some());
        bar.observe();
    }
    bar
}

#[test]
fn init_takes_counts_of_20_bits() {
    assert_eq!(Mbarrier::init(0), Err(E::Count { count: 0 }));
    assert_eq!(Mbarrier::init(1 << 20), Err(E::Count { count: 1 << 20 }));
    assert_eq!(Mbarrier::init((1 << 20) - 1).unwrap().pending(), (1 << 20) - 1);
}

#[test]
fn a_fresh_barrier_passes_parity_one_only() {
    let bar = Mbarrier::init(1).unwrap();
    assert_eq!(bar.parity_complete(1, None), Ok(true));
    assert_eq!(bar.parity_complete(0, None), Ok(false));
}

#[test]
fn a_phase_needs_arrivals_and_bytes() {
    let mut bar = Mbarrier::init(2).unwrap();
    assert_eq!(bar.arrive_expect_tx(1, 4096).unwrap().completed, None);
    assert_eq!(bar.to_string(), "phase 0, pending 1 of 2, tx 4096");
    let issued = bar.issue_tx(4096);
    assert_eq!(bar.arrive(1).unwrap().completed, None);
    assert_eq!(bar.complete_tx(4096, issued), Ok(Some(0)));
    assert_eq!(bar.to_string(), "phase 1, pending 2 of 2, tx 0");
    assert_eq!(bar.parity_complete(0, None), Ok(true));
}

#[test]
fn the_count_may_be_negative_while_arrivals_are_pending() {
    let mut bar = Mbarrier::init(1).unwrap();
    let issued = bar.issue_tx(64);
    assert_eq!(bar.complete_tx(64, issued), Ok(None));
    assert_eq!(bar.tx(), -64);
    assert_eq!(bar.arrive_expect_tx(1, 64).unwrap().completed, Some(0));
}

#[test]
fn too_many_arrivals_and_zero_are_refused() {
    let mut bar = Mbarrier::init(2).unwrap();
    assert_eq!(bar.arrive(3), Err(E::Underflow { count: 3, pending: 2, phase: 0 }));
    assert_eq!(bar.arrive(0), Err(E::ArriveCount { count: 0 }));
    bar.expect_tx(8).unwrap();
    assert_eq!(bar.arrive(2).unwrap().completed, None);
    assert_eq!(bar.arrive(1), Err(E::Underflow { count: 1, pending: 0, phase: 0 }));
}

#[test]
fn a_refused_arrive_expects_no_bytes() {
    let mut bar = Mbarrier::init(1).unwrap();
    assert!(bar.arrive_expect_tx(2, 64).is_err());
    assert_eq!(bar.tx(), 0);
}

#[test]
fn the_transaction_count_keeps_its_range() {
    let mut bar = Mbarrier::init(1).unwrap();
    bar.expect_tx(MAX_COUNT).unwrap();
    assert_eq!(bar.expect_tx(1), Err(E::TxRange { tx: 1 << 20, phase: 0 }));
    let mut bar = Mbarrier::init(1).unwrap();
    assert_eq!(bar.simulate_complete_tx(1 << 20), Err(E::TxRange { tx: -(1 << 20), phase: 0 }));
    assert_eq!(bar.simulate_complete_tx(MAX_COUNT), Ok(None));
}

#[test]
fn more_bytes_than_expected_are_reported_by_the_last_event() {
    let mut bar = Mbarrier::init(1).unwrap();
    bar.simulate_complete_tx(16).unwrap();
    assert_eq!(bar.arrive(1), Err(E::OverDelivery { excess: 16, phase: 0 }));
    let mut bar = Mbarrier::init(1).unwrap();
    let _ = bar.arrive_expect_tx(1, 8).unwrap();
    assert_eq!(bar.simulate_complete_tx(24), Err(E::OverDelivery { excess: 16, phase: 0 }));
}

#[test]
fn bytes_must_land_in_their_phase() {
    let mut bar = Mbarrier::init(1).unwrap();
    let issued = bar.issue_tx(32);
    let _ = bar.arrive(1).unwrap();
    let error = E::BytesInOtherPhase { bytes: 32, issued: 0, landed: 1 };
    assert_eq!(bar.complete_tx(32, issued), Err(error));
}

#[test]
fn deferred_arrives_are_counted_by_init_or_by_themselves() {
    let mut bar = Mbarrier::init(1).unwrap();
    let deferred = bar.defer_arrive(false).unwrap();
    assert_eq!(bar.pending(), 2);
    assert_eq!(bar.arrive(1).unwrap().completed, None);
    assert_eq!(bar.trigger(deferred).unwrap().completed, Some(0));

    let mut bar = Mbarrier::init(1).unwrap();
    let deferred = bar.defer_arrive(true).unwrap();
    assert_eq!(bar.pending(), 1);
    assert_eq!(bar.trigger(deferred).unwrap().completed, Some(0));
}

#[test]
fn a_deferred_arrive_must_not_miss_its_phase() {
    let mut bar = Mbarrier::init(1).unwrap();
    let deferred = bar.defer_arrive(true).unwrap();
    let _ = bar.arrive(1).unwrap();
    bar.observe();
    assert_eq!(bar.trigger(deferred), Err(E::ArriveInOtherPhase { issued: 0, landed: 1 }));
}

#[test]
fn a_deferred_arrive_keeps_the_pending_range() {
    let mut bar = Mbarrier::init(u64::from(MAX_COUNT)).unwrap();
    assert_eq!(bar.defer_arrive(false), Err(E::PendingRange { pending: 1 << 20 }));
    assert!(bar.defer_arrive(true).is_ok());
}

#[test]
fn a_completed_phase_must_be_observed_before_the_next_arrive() {
    let mut bar = Mbarrier::init(1).unwrap();
    let _ = bar.arrive(1).unwrap();
    assert_eq!(bar.arrive(1), Err(E::Unobserved { phase: 1, completed: 0 }));
    assert_eq!(bar.observe(), Some(0));
    assert_eq!(bar.arrive(1).unwrap().completed, Some(1));
    // One observation serves one phase.
    assert_eq!(bar.arrive_drop(1), Err(E::Unobserved { phase: 2, completed: 1 }));
}

#[test]
fn observing_a_fresh_barrier_teaches_no_phase() {
    let mut bar = Mbarrier::init(1).unwrap();
    assert_eq!(bar.observe(), None);
    let _ = bar.arrive(1).unwrap();
    assert_eq!(bar.arrive(1), Err(E::Unobserved { phase: 1, completed: 0 }));
}

#[test]
fn parities_two_phases_behind_alias() {
    let bar = at_phase(1, 3);
    assert_eq!(bar.parity_complete(0, Some(2)), Ok(true));
    assert_eq!(bar.parity_complete(1, Some(2)), Ok(false));
    assert_eq!(bar.parity_complete(0, Some(1)), Ok(true));
    let passes = E::Aliased { parity: 0, meant: 0, current: 3, aliased: 2 };
    assert_eq!(bar.parity_complete(0, Some(0)), Err(passes));
    let hangs = E::Aliased { parity: 1, meant: 1, current: 3, aliased: 3 };
    assert_eq!(bar.parity_complete(1, Some(0)), Err(hangs));
}

#[test]
fn tokens_stand_for_their_phase() {
    let mut bar = Mbarrier::init(2).unwrap();
    let token = bar.arrive(1).unwrap().token;
    assert_eq!(bar.token_complete(token), Ok(false));
    let last = bar.arrive(1).unwrap();
    assert_eq!((last.token, last.completed), (token, Some(0)));
    assert_eq!(bar.token_complete(token), Ok(true));
    bar.observe();
    let _ = bar.arrive(2).unwrap();
    assert_eq!(bar.token_complete(token), Err(E::StaleToken { token: 0, current: 2 }));
    assert_eq!(bar.token_complete(1), Err(E::ForeignToken { token: 1, current: 2 }));
    let ahead = bar.state() + 1;
    assert_eq!(bar.token_complete(ahead), Err(E::ForeignToken { token: ahead, current: 2 }));
}

#[test]
fn dropping_lowers_the_following_phases() {
    let mut bar = Mbarrier::init(3).unwrap();
    assert_eq!(bar.arrive_drop(1).unwrap().completed, None);
    assert_eq!((bar.pending(), bar.expected()), (2, 2));
    assert_eq!(bar.arrive(2).unwrap().completed, Some(0));
    assert_eq!(bar.pending(), 2);
}

#[test]
fn dropping_more_than_expected_is_refused() {
    let mut bar = Mbarrier::init(1).unwrap();
    let _deferred = bar.defer_arrive(false).unwrap();
    assert_eq!(bar.arrive_drop(2), Err(E::Underflow { count: 2, pending: 1, phase: 0 }));
}

#[test]
fn a_busy_object_cannot_be_invalidated() {
    let mut bar = Mbarrier::init(2).unwrap();
    assert_eq!(bar.inval(), Ok(()));
    bar.expect_tx(16).unwrap();
    let issued = bar.issue_tx(16);
    let deferred = bar.defer_arrive(true).unwrap();
    assert_eq!(bar.inval(), Err(E::Busy { bytes: 16, arrivals: 1 }));
    bar.complete_tx(16, issued).unwrap();
    assert_eq!(bar.inval(), Err(E::Busy { bytes: 0, arrivals: 1 }));
    let _ = bar.trigger(deferred).unwrap();
    assert_eq!(bar.inval(), Err(E::Unwaited { phase: 0 }));
    let _ = bar.arrive(1).unwrap();
    assert_eq!(bar.inval(), Err(E::Unwaited { phase: 0 }));
    bar.observe();
    assert_eq!(bar.inval(), Ok(()));
}

#[test]
fn messages_carry_both_values() {
    let bar = at_phase(2, 3);
    assert_eq!(
        bar.reinit_error(4).to_string(),
        "mbarrier initialised with count 4 while live (phase 3, pending 2 of 2, tx 0); \
         invalidate it first"
    );
    assert_eq!(
        bar.access_error(8).to_string(),
        "ordinary access of 8 bytes to a live mbarrier (phase 3, pending 2 of 2, tx 0)"
    );
    assert_eq!(
        E::Underflow { count: 3, pending: 2, phase: 1 }.to_string(),
        "arrive of 3 in phase 1, but only 2 arrivals are pending"
    );
}
