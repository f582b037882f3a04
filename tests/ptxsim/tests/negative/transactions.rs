//! mbarrier: arrivals, phases, bytes.

use ptxsim::diagnostic::Kind::{Deadlock, Mbarrier, Race};

use crate::case::Case;

#[test]
fn more_arrivals_than_the_count() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.eq.u32 p, tid, 0;
        -@p mbarrier.init.shared.b64 [r0], 31;
        +@p mbarrier.init.shared.b64 [r0], 32;
        bar.sync 0;
        -mbarrier.arrive.shared.b64 _, [r0], 2;     // <-- here
        +mbarrier.arrive.shared.b64 _, [r0], 1;",
    )
    .says("arrive of 2")
    .reports(Mbarrier);
}

#[test]
fn initialised_twice() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.eq.u32 p, tid, 0;
        @p mbarrier.init.shared.b64 [r0], 1;
        +@p mbarrier.inval.shared.b64 [r0];
        @p mbarrier.init.shared.b64 [r0], 2;     // <-- here",
    )
    .says("invalidate it first")
    .reports(Mbarrier);
}

#[test]
fn initialised_by_lanes_that_differ() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        add.u32 r1, lane, 1;
        setp.eq.u32 p, tid, 0;
        -mbarrier.init.shared.b64 [r0], r1;     // <-- here
        +@p mbarrier.init.shared.b64 [r0], r1;",
    )
    .says("invalidate it first")
    .reports(Mbarrier);
}

#[test]
fn initialised_with_zero() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.eq.u32 p, tid, 0;
        -@p mbarrier.init.shared.b64 [r0], 0;     // <-- here
        +@p mbarrier.init.shared.b64 [r0], 1;",
    )
    .reports(Mbarrier);
}

#[test]
fn ordinary_store_to_the_object() {
    Case::new(
        ".shared .align 8 .b8 bar[16];
        mov.u32 r0, bar;
        setp.eq.u32 p, tid, 0;
        @p mbarrier.init.shared.b64 [r0], 1;
        -@p st.shared.u32 [r0+4], 0;     // <-- here
        +@p st.shared.u32 [r0+8], 0;",
    )
    .reports(Mbarrier);
}

#[test]
fn ordinary_load_of_the_object() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.eq.u32 p, tid, 0;
        @p mbarrier.init.shared.b64 [r0], 1;
        -@p ld.shared.u64 d0, [r0];     // <-- here
        +@p mbarrier.inval.shared.b64 [r0];",
    )
    .reports(Mbarrier);
}

#[test]
fn use_without_initialisation() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.eq.u32 p, tid, 0;
        +@p mbarrier.init.shared.b64 [r0], 1;
        @p mbarrier.arrive.shared.b64 _, [r0];     // <-- here",
    )
    .reports(Mbarrier);
}

#[test]
fn use_by_others_before_the_initialisation_is_ordered() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.eq.u32 p, tid, 0;
        @p mbarrier.init.shared.b64 [r0], 32;     // <-- here
        +bar.warp.sync -1;
        mbarrier.arrive.shared.b64 _, [r0];     // <-- here",
    )
    .reports(Race);
}

#[test]
fn phase_nobody_waited_for() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        mbarrier.arrive.shared.b64 _, [r0];
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        +@!p bra WAIT;
        mbarrier.arrive.shared.b64 _, [r0];     // <-- here
        DONE:
        mov.u32 r1, 0;",
    )
    .says("phase 0")
    .reports(Mbarrier);
}

#[test]
fn invalidated_while_a_copy_is_under_way() {
    Case::new(
        ".shared .align 16 .b8 tile[64];
        .shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        mov.u32 sh, tile;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        fence.proxy.async;
        mbarrier.arrive.expect_tx.shared.b64 _, [r0], 64;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in], 64, [r0];
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        +@!p bra WAIT;
        mbarrier.inval.shared.b64 [r0];     // <-- here
        DONE:
        mov.u32 r1, 0;",
    )
    .reports(Mbarrier);
}

#[test]
fn wait_that_nobody_answers() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        -mbarrier.init.shared.b64 [r0], 2;
        +mbarrier.init.shared.b64 [r0], 1;
        mbarrier.arrive.shared.b64 _, [r0];
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;     // <-- here
        @!p bra WAIT;     // <-- here
        DONE:
        mov.u32 r1, 0;",
    )
    .says("pending 1 of 2")
    .reports_at_one(Deadlock);
}

#[test]
fn wait_for_the_wrong_parity() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        mbarrier.arrive.shared.b64 _, [r0];
        mov.u32 r1, 0;
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], r1;     // <-- here
        @!p bra WAIT;     // <-- here
        -add.u32 r1, r1, 1;
        setp.eq.u32 q, r1, 1;
        @q bra WAIT;
        DONE:
        mov.u32 r2, 0;",
    )
    .says("parity 1")
    .reports_at_one(Deadlock);
}

#[test]
fn wait_two_phases_behind() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        .shared .align 4 .b8 flag[4];
        mov.u32 r0, bar;
        mov.u32 r1, flag;
        setp.eq.u32 q, tid, 0;
        @q mbarrier.init.shared.b64 [r0], 1;
        @q st.shared.u32 [r1], 0;
        bar.sync 0;
        @q mbarrier.arrive.shared.b64 _, [r0];
        FIRST:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        @!p bra FIRST;
        bar.sync 1;
        setp.ne.u32 p, warp, 0;
        @p bra OTHER;
        @q mbarrier.arrive.shared.b64 _, [r0];
        SECOND:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 1;
        @!p bra SECOND;
        +bar.sync 2;
        @q mbarrier.arrive.shared.b64 _, [r0];
        THIRD:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        @!p bra THIRD;
        @q st.relaxed.cta.shared.u32 [r1], 1;
        bra DONE;
        OTHER:
        +AGAIN:
        +mbarrier.try_wait.parity.shared.b64 p, [r0], 1;
        +@!p bra AGAIN;
        +bar.sync 2;
        POLL:
        ld.relaxed.cta.shared.u32 r2, [r1];
        setp.eq.u32 p, r2, 0;
        @p bra POLL;
        -mbarrier.try_wait.parity.shared.b64 p, [r0], 1;     // <-- here
        DONE:
        mov.u32 r3, 0;",
    )
    .threads(64)
    .says("aliases")
    .reports(Mbarrier);
}

#[test]
fn arrival_that_releases_nothing() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        .shared .align 4 .b8 tile[128];
        mov.u32 r0, bar;
        mov.u32 sh, tile;
        mad.lo.u32 r1, lane, 4, sh;
        setp.eq.u32 p, tid, 0;
        @p mbarrier.init.shared.b64 [r0], 32;
        bar.sync 0;
        setp.ne.u32 p, warp, 0;
        @p bra WAIT;
        st.shared.u32 [r1], lane;     // <-- here
        -mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [r0];
        +mbarrier.arrive.release.cta.shared::cta.b64 _, [r0];
        bra DONE;
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        @!p bra WAIT;
        ld.shared.u32 r2, [r1];     // <-- here
        DONE:
        mov.u32 r3, 0;",
    )
    .threads(64)
    .reports(Race);
}

#[test]
fn more_bytes_than_the_object_can_count() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        -mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [r0], 1048576;     // <-- here
        +mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [r0], 1048575;
        DONE:
        mov.u32 r1, 0;",
    )
    .reports(Mbarrier);
}

#[test]
fn token_of_an_old_phase() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        mbarrier.arrive.shared.b64 d0, [r0];
        mbarrier.test_wait.shared.b64 p, [r0], d0;
        mbarrier.arrive.shared.b64 d1, [r0];
        -mbarrier.test_wait.shared.b64 p, [r0], d1;
        -mov.b64 d1, d0;
        mbarrier.test_wait.shared.b64 p, [r0], d1;     // <-- here
        DONE:
        mov.u32 r1, 0;",
    )
    .reports(Mbarrier);
}

#[test]
fn remote_arrival_that_underflows() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        mov.u32 r0, bar;
        mov.u32 r1, %cluster_ctarank;
        setp.eq.u32 p, tid, 0;
        -@p mbarrier.init.shared.b64 [r0], 1;
        +@p mbarrier.init.shared.b64 [r0], 2;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        mapa.shared::cluster.u32 r2, r0, 0;
        @p mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r2];     // <-- here
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;",
    )
    .cluster(2)
    .reports(Mbarrier);
}

#[test]
fn remote_arrival_that_releases_nothing() {
    Case::new(
        ".shared .align 8 .b8 bar[8];
        .shared .align 4 .b8 tile[4];
        mov.u32 r0, bar;
        mov.u32 sh, tile;
        mov.u32 r1, %cluster_ctarank;
        setp.eq.u32 p, tid, 0;
        @p mbarrier.init.shared.b64 [r0], 1;
        @p st.shared.u32 [sh], 0;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mapa.shared::cluster.u32 r2, r0, 0;
        mapa.shared::cluster.u32 r3, sh, 0;
        setp.eq.u32 p, r1, 0;
        @p bra WAIT;
        st.shared::cluster.u32 [r3], 5;     // <-- here
        -mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [r2];
        +mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r2];
        bra DONE;
        WAIT:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [r0], 0;
        @!p bra WAIT;
        ld.shared.u32 r4, [sh];     // <-- here
        DONE:
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;",
    )
    .cluster(2)
    .reports(Race);
}
