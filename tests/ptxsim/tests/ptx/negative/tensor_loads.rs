//! Bulk and tensor copies to shared memory: waits, bytes, proxies, buffers that are used again.

use ptxsim::diagnostic::Kind::{
    Deadlock, Mbarrier, MissingProxyFence, PendingRead, PendingWrite, Race,
};

use super::case::Case;

#[test]
fn read_before_the_wait() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 4}], [mbar];    // <-- here
        -ld.shared.u32 r1, [sh];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        +ld.shared.u32 r1, [sh];
        DONE:",
    )
    .mbarrier(1)
    .says("tile+0")
    .reports(PendingWrite);
}

#[test]
fn read_by_a_warp_that_has_not_waited_itself() {
    Case::new(
        "mad.lo.u32 r1, lane, 4, sh;
        @!leader bra CONSUME;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 4}], [mbar];    // <-- here
        CONSUME:
        bar.sync 0;
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        +@!p bra WAIT;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .mbarrier(1)
    .threads(64)
    .reports(PendingWrite);
}

#[test]
fn more_bytes_expected_than_copied() {
    Case::new(
        "@!leader bra DONE;
        -mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 160;
        +mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 4}], [mbar];
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;    // <-- here
        @!p bra WAIT;    // <-- here
        DONE:",
    )
    .mbarrier(1)
    .says("phase 0, pending 0 of 1, tx 32")
    .reports_at_one(Deadlock);
}

#[test]
fn fewer_bytes_expected_than_copied() {
    Case::new(
        "@!leader bra DONE;
        -mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 96;
        +mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 4}], [mbar];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        DONE:",
    )
    .mbarrier(1)
    .reports(Mbarrier);
}

#[test]
fn initialisation_without_a_fence() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.init.shared.b64 [mbar], 1;    // <-- here
        +fence.mbarrier_init.release.cluster;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 4}], [mbar];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        DONE:",
    )
    .reports(MissingProxyFence);
}

#[test]
fn destination_written_by_stores_before() {
    Case::new(
        "@!leader bra DONE;
        st.shared.u32 [sh], 0;    // <-- here
        +fence.proxy.async.shared::cta;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 4}], [mbar];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        DONE:",
    )
    .mbarrier(1)
    .reports(MissingProxyFence);
}

/// A producer fills one buffer twice; the consumers say when they have read it.
const REUSE: &str = ".shared .align 8 .b8 full[16];
    .shared .align 8 .b8 empty[8];
    mov.u32 r0, full;
    mov.u32 r1, empty;
    mad.lo.u32 r2, lane, 4, sh;
    @!leader bra READY;
    mbarrier.init.shared.b64 [r0], 1;
    mbarrier.init.shared.b64 [r0+8], 1;
    mbarrier.init.shared.b64 [r1], 32;
    fence.proxy.async;
    READY:
    bar.sync 0;
    setp.ne.u32 p, warp, 0;
    @p bra CONSUMER;
    @!leader bra DONE;
    mbarrier.arrive.expect_tx.shared.b64 _, [r0], 128;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 0}], [r0];
    +EMPTY:
    +mbarrier.try_wait.parity.shared.b64 p, [r1], 0;
    +@!p bra EMPTY;
    mbarrier.arrive.expect_tx.shared.b64 _, [r0+8], 128;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 4}], [r0+8];    // <-- here
    bra DONE;
    CONSUMER:
    mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
    @!p bra CONSUMER;
    ld.shared.u32 r3, [r2];    // <-- here
    mbarrier.arrive.shared.b64 _, [r1];
    NEXT:
    mbarrier.try_wait.parity.shared.b64 p, [r0+8], 0;
    @!p bra NEXT;
    ld.shared.u32 r4, [r2];
    DONE:";

#[test]
fn buffer_filled_again_before_the_consumer_has_arrived() {
    Case::new(REUSE).threads(64).reports_one_of(&[PendingWrite, PendingRead, Race]);
}

#[test]
fn global_memory_written_by_stores_before_a_load() {
    Case::new(
        "@!leader bra DONE;
        st.global.u32 [out], 3;    // <-- here
        +fence.proxy.async;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 64;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [out], 64, [mbar];   // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        DONE:",
    )
    .mbarrier(1)
    .reports(MissingProxyFence);
}

#[test]
fn multicast_to_a_block_whose_mbarrier_is_not_initialised() {
    Case::new(
        "setp.eq.u32 q, rank, 0;
        and.pred q, leader, q;
        -@q mbarrier.init.shared.b64 [mbar], 1;
        +@leader mbarrier.init.shared.b64 [mbar], 1;
        fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        cvt.u16.u32 h0, 3;
        -@q mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 64;
        +@leader mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 64;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        @q cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [sh], [in], 64, [mbar], h0;   // <-- here
        -@!q bra DONE;
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        ld.shared.u32 r2, [sh];
        DONE:
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;",
    )
    .cluster(2)
    .reports(Mbarrier);
}

#[test]
fn block_that_ends_while_its_shared_memory_is_written() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 64;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in], 64, [mbar];
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        +@!p bra WAIT;
        DONE:
        exit;    // <-- here",
    )
    .mbarrier(1)
    .reports(PendingWrite);
}

#[test]
fn a_barrier_hands_on_what_one_thread_has_waited_for() {
    Case::new(
        "mad.lo.u32 r1, lane, 4, sh;
        @!leader bra CONSUME;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 4}], [mbar];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        CONSUME:
        +bar.sync 0;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .mbarrier(1)
    .threads(64)
    .reports_one_of(&[PendingWrite, PendingRead, Race]);
}

/// A ring of two buffers through which four tiles pass.
const RING: &str = ".shared .align 8 .b8 full[16];
    .shared .align 8 .b8 empty[16];
    mov.u32 r0, full;
    mov.u32 r1, empty;
    @!leader bra READY;
    mbarrier.init.shared.b64 [r0], 1;
    mbarrier.init.shared.b64 [r0+8], 1;
    mbarrier.init.shared.b64 [r1], 32;
    mbarrier.init.shared.b64 [r1+8], 32;
    fence.mbarrier_init.release.cluster;
    READY:
    bar.sync 0;
    mov.u32 r2, 0;
    setp.ne.u32 p, warp, 0;
    @p bra CONSUMER;
    @!leader bra DONE;
    PRODUCER:
    and.b32 r3, r2, 1;
    mad.lo.u32 r4, r3, 8, r0;
    mad.lo.u32 r5, r3, 8, r1;
    mad.lo.u32 r7, r3, 128, sh;
    shr.u32 r6, r2, 1;
    xor.b32 r6, r6, 1;
    EMPTY:
    mbarrier.try_wait.parity.shared.b64 p, [r5], r6;
    @!p bra EMPTY;
    mbarrier.arrive.expect_tx.shared.b64 _, [r4], 128;
    shl.b32 r8, r2, 2;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [r7], [in_map, {0, r8}], [r4];    // <-- here
    add.u32 r2, r2, 1;
    setp.lt.u32 p, r2, 4;
    @p bra PRODUCER;
    bra DONE;
    CONSUMER:
    and.b32 r3, r2, 1;
    mad.lo.u32 r4, r3, 8, r0;
    mad.lo.u32 r5, r3, 8, r1;
    mad.lo.u32 r7, r3, 128, sh;
    mad.lo.u32 r7, lane, 4, r7;
    shr.u32 r6, r2, 1;
    FULL:
    mbarrier.try_wait.parity.shared.b64 p, [r4], r6;
    @!p bra FULL;
    -mbarrier.arrive.shared.b64 _, [r5];
    ld.shared.u32 r8, [r7];    // <-- here
    +mbarrier.arrive.shared.b64 _, [r5];
    add.u32 r2, r2, 1;
    setp.lt.u32 p, r2, 4;
    @p bra CONSUMER;
    DONE:";

#[test]
fn arrival_before_the_last_read() {
    Case::new(RING).threads(64).reports_one_of(&[PendingWrite, PendingRead, Race]);
}
