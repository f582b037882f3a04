//! mbarrier: arrivals, phases, bytes.

use ptxsim::diagnostic::Kind::{Deadlock, Mbarrier, Race};

use super::case::Case;

#[test]
fn more_arrivals_than_the_count() {
    Case::new(
        "-@leader mbarrier.init.shared.b64 [mbar], 31;
        +@leader mbarrier.init.shared.b64 [mbar], 32;
        bar.sync 0;
        -mbarrier.arrive.shared.b64 _, [mbar], 2;     // <-- here
        +mbarrier.arrive.shared.b64 _, [mbar], 1;",
    )
    .says("arrive of 2")
    .reports(Mbarrier);
}

#[test]
fn initialised_twice() {
    Case::new(
        "@leader mbarrier.init.shared.b64 [mbar], 1;
        +@leader mbarrier.inval.shared.b64 [mbar];
        @leader mbarrier.init.shared.b64 [mbar], 2;     // <-- here",
    )
    .says("invalidate it first")
    .reports(Mbarrier);
}

#[test]
fn initialised_by_lanes_that_differ() {
    Case::new(
        "add.u32 r1, lane, 1;
        -mbarrier.init.shared.b64 [mbar], r1;     // <-- here
        +@leader mbarrier.init.shared.b64 [mbar], r1;",
    )
    .says("invalidate it first")
    .reports(Mbarrier);
}

#[test]
fn initialised_by_all_lanes() {
    Case::new(
        "+@leader mbarrier.init.shared.b64 [mbar], 1;
        -mbarrier.init.shared.b64 [mbar], 1;    // <-- here
        bar.sync 0;",
    )
    .says("32 lanes")
    .is_forgiven(Mbarrier);
}

#[test]
fn initialised_with_zero() {
    Case::new(
        "-@leader mbarrier.init.shared.b64 [mbar], 0;     // <-- here
        +@leader mbarrier.init.shared.b64 [mbar], 1;",
    )
    .reports(Mbarrier);
}

#[test]
fn ordinary_store_to_the_object() {
    Case::new(
        "@leader mbarrier.init.shared.b64 [mbar], 1;
        -@leader st.shared.u32 [mbar+4], 0;     // <-- here
        +@leader st.shared.u32 [mbar+8], 0;",
    )
    .reports(Mbarrier);
}

#[test]
fn ordinary_load_of_the_object() {
    Case::new(
        "@leader mbarrier.init.shared.b64 [mbar], 1;
        -@leader ld.shared.u64 d0, [mbar];     // <-- here
        +@leader mbarrier.inval.shared.b64 [mbar];",
    )
    .reports(Mbarrier);
}

#[test]
fn use_without_initialisation() {
    Case::new(
        "+@leader mbarrier.init.shared.b64 [mbar], 1;
        @leader mbarrier.arrive.shared.b64 _, [mbar];     // <-- here",
    )
    .reports(Mbarrier);
}

#[test]
fn use_by_others_before_the_initialisation_is_ordered() {
    Case::new(
        "@leader mbarrier.init.shared.b64 [mbar], 32;     // <-- here
        +bar.warp.sync -1;
        mbarrier.arrive.shared.b64 _, [mbar];     // <-- here",
    )
    .reports(Race);
}

#[test]
fn phase_nobody_waited_for() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.init.shared.b64 [mbar], 1;
        mbarrier.arrive.shared.b64 _, [mbar];
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        +@!p bra WAIT;
        mbarrier.arrive.shared.b64 _, [mbar];     // <-- here
        DONE:",
    )
    .says("phase 0")
    .reports(Mbarrier);
}

#[test]
fn invalidated_while_a_copy_is_under_way() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 64;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in], 64, [mbar];
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        +@!p bra WAIT;
        mbarrier.inval.shared.b64 [mbar];     // <-- here
        DONE:",
    )
    .mbarrier(1)
    .reports(Mbarrier);
}

#[test]
fn wait_that_nobody_answers() {
    Case::new(
        "@!leader bra DONE;
        -mbarrier.init.shared.b64 [mbar], 2;
        +mbarrier.init.shared.b64 [mbar], 1;
        mbarrier.arrive.shared.b64 _, [mbar];
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;     // <-- here
        @!p bra WAIT;     // <-- here
        DONE:",
    )
    .says("pending 1 of 2")
    .reports_at_one(Deadlock);
}

#[test]
fn wait_for_the_wrong_parity() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.init.shared.b64 [mbar], 1;
        mbarrier.arrive.shared.b64 _, [mbar];
        mov.u32 r1, 0;
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], r1;     // <-- here
        @!p bra WAIT;     // <-- here
        -add.u32 r1, r1, 1;
        setp.eq.u32 q, r1, 1;
        @q bra WAIT;
        DONE:",
    )
    .says("parity 1")
    .reports_at_one(Deadlock);
}

#[test]
fn wait_two_phases_behind() {
    Case::new(
        ".shared .align 4 .b8 flag[4];
        mov.u32 r1, flag;
        @leader mbarrier.init.shared.b64 [mbar], 1;
        @leader st.shared.u32 [r1], 0;
        bar.sync 0;
        @leader mbarrier.arrive.shared.b64 _, [mbar];
        FIRST:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra FIRST;
        bar.sync 1;
        setp.ne.u32 p, warp, 0;
        @p bra OTHER;
        @leader mbarrier.arrive.shared.b64 _, [mbar];
        SECOND:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 1;
        @!p bra SECOND;
        +bar.sync 2;
        @leader mbarrier.arrive.shared.b64 _, [mbar];
        THIRD:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra THIRD;
        @leader st.relaxed.cta.shared.u32 [r1], 1;
        bra DONE;
        OTHER:
        +AGAIN:
        +mbarrier.try_wait.parity.shared.b64 p, [mbar], 1;
        +@!p bra AGAIN;
        +bar.sync 2;
        POLL:
        ld.relaxed.cta.shared.u32 r2, [r1];
        setp.eq.u32 p, r2, 0;
        @p bra POLL;
        -mbarrier.try_wait.parity.shared.b64 p, [mbar], 1;     // <-- here
        DONE:",
    )
    .threads(64)
    .says("aliases")
    .reports(Mbarrier);
}

#[test]
fn arrival_that_releases_nothing() {
    Case::new(
        "mad.lo.u32 r1, lane, 4, sh;
        setp.ne.u32 p, warp, 0;
        @p bra WAIT;
        st.shared.u32 [r1], lane;     // <-- here
        -mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [mbar];
        +mbarrier.arrive.release.cta.shared::cta.b64 _, [mbar];
        bra DONE;
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        ld.shared.u32 r2, [r1];     // <-- here
        DONE:",
    )
    .mbarrier(32)
    .threads(64)
    .reports(Race);
}

#[test]
fn more_bytes_than_the_object_can_count() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.init.shared.b64 [mbar], 1;
        -mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [mbar], 1048576;     // <-- here
        +mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [mbar], 1048575;
        DONE:",
    )
    .reports(Mbarrier);
}

#[test]
fn token_of_an_old_phase() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.init.shared.b64 [mbar], 1;
        mbarrier.arrive.shared.b64 d0, [mbar];
        mbarrier.test_wait.shared.b64 p, [mbar], d0;
        mbarrier.arrive.shared.b64 d1, [mbar];
        -mbarrier.test_wait.shared.b64 p, [mbar], d1;
        -mov.b64 d1, d0;
        mbarrier.test_wait.shared.b64 p, [mbar], d1;     // <-- here
        DONE:",
    )
    .reports(Mbarrier);
}

#[test]
fn remote_arrival_that_underflows() {
    Case::new(
        "-@leader mbarrier.init.shared.b64 [mbar], 1;
        +@leader mbarrier.init.shared.b64 [mbar], 2;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        mapa.shared::cluster.u32 r2, mbar, 0;
        @leader mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r2];     // <-- here
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;",
    )
    .cluster(2)
    .reports(Mbarrier);
}

#[test]
fn remote_arrival_that_releases_nothing() {
    Case::new(
        "@leader mbarrier.init.shared.b64 [mbar], 1;
        @leader st.shared.u32 [sh], 0;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        @!leader bra DONE;
        mapa.shared::cluster.u32 r2, mbar, 0;
        mapa.shared::cluster.u32 r3, sh, 0;
        setp.eq.u32 p, rank, 0;
        @p bra WAIT;
        st.shared::cluster.u32 [r3], 5;     // <-- here
        -mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [r2];
        +mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r2];
        bra DONE;
        WAIT:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [mbar], 0;
        @!p bra WAIT;
        ld.shared.u32 r4, [sh];     // <-- here
        DONE:
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;",
    )
    .cluster(2)
    .reports(Race);
}
