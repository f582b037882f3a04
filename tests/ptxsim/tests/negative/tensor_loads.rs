//! Bulk and tensor copies to shared memory: waits, bytes, proxies, buffers that are used again.

use ptxsim::diagnostic::Kind::{
    Deadlock, Mbarrier, MissingProxyFence, PendingRead, PendingWrite, Race,
};
use ptxsim::tensor_map::{Dtype, TensorMap};

use crate::case::Case;

/// Tiles of 4 rows of 8 words out of the 32 rows of `in`.
fn tiles() -> TensorMap {
    TensorMap::dense(Dtype::U32, vec![8, 32], vec![8, 4])
}

#[test]
fn read_before_the_wait() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        fence.proxy.async;
        mbarrier.arrive.expect_tx.shared.b64 _, [r0], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, 4}], [r0];    // <-- here
        -ld.shared.u32 r1, [sh];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        @!p bra WAIT;
        +ld.shared.u32 r1, [sh];
        DONE:
        mov.u32 r2, 0;",
    )
    .map(tiles())
    .says("tile+0")
    .reports(PendingWrite);
}

#[test]
fn read_by_a_warp_that_has_not_waited_itself() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        mad.lo.u32 r1, lane, 4, sh;
        setp.ne.u32 p, tid, 0;
        @p bra CONSUME;
        mbarrier.init.shared.b64 [r0], 1;
        fence.proxy.async;
        mbarrier.arrive.expect_tx.shared.b64 _, [r0], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, 4}], [r0];    // <-- here
        CONSUME:
        bar.sync 0;
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        +@!p bra WAIT;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .threads(64)
    .map(tiles())
    .reports(PendingWrite);
}

#[test]
fn more_bytes_expected_than_copied() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        fence.proxy.async;
        -mbarrier.arrive.expect_tx.shared.b64 _, [r0], 160;
        +mbarrier.arrive.expect_tx.shared.b64 _, [r0], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, 4}], [r0];
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;    // <-- here
        @!p bra WAIT;    // <-- here
        DONE:
        mov.u32 r2, 0;",
    )
    .map(tiles())
    .says("phase 0, pending 0 of 1, tx 32")
    .reports_at_one(Deadlock);
}

#[test]
fn fewer_bytes_expected_than_copied() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        fence.proxy.async;
        -mbarrier.arrive.expect_tx.shared.b64 _, [r0], 96;
        +mbarrier.arrive.expect_tx.shared.b64 _, [r0], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, 4}], [r0];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        @!p bra WAIT;
        DONE:
        mov.u32 r2, 0;",
    )
    .map(tiles())
    .reports(Mbarrier);
}

#[test]
fn initialisation_without_a_fence() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;    // <-- here
        +fence.mbarrier_init.release.cluster;
        mbarrier.arrive.expect_tx.shared.b64 _, [r0], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, 4}], [r0];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        @!p bra WAIT;
        DONE:
        mov.u32 r2, 0;",
    )
    .map(tiles())
    .reports(MissingProxyFence);
}

#[test]
fn destination_written_by_stores_before() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        fence.proxy.async;
        st.shared.u32 [sh], 0;    // <-- here
        +fence.proxy.async.shared::cta;
        mbarrier.arrive.expect_tx.shared.b64 _, [r0], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, 4}], [r0];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        @!p bra WAIT;
        DONE:
        mov.u32 r2, 0;",
    )
    .map(tiles())
    .reports(MissingProxyFence);
}

/// A producer fills one buffer twice; the consumers say when they have read it.
const REUSE: &str = ".shared .align 128 .b8 tile[128];
    .shared .align 8 .b8 full[16];
    .shared .align 8 .b8 empty[8];
    mov.u32 sh, tile;
    mov.u32 r0, full;
    mov.u32 r1, empty;
    mad.lo.u32 r2, lane, 4, sh;
    setp.ne.u32 p, tid, 0;
    @p bra READY;
    mbarrier.init.shared.b64 [r0], 1;
    mbarrier.init.shared.b64 [r0+8], 1;
    mbarrier.init.shared.b64 [r1], 32;
    fence.proxy.async;
    READY:
    bar.sync 0;
    setp.ne.u32 p, warp, 0;
    @p bra CONSUMER;
    setp.ne.u32 p, tid, 0;
    @p bra DONE;
    mbarrier.arrive.expect_tx.shared.b64 _, [r0], 128;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, 0}], [r0];
    +EMPTY:
    +mbarrier.try_wait.parity.shared.b64 p, [r1], 0;
    +@!p bra EMPTY;
    mbarrier.arrive.expect_tx.shared.b64 _, [r0+8], 128;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, 4}], [r0+8];    // <-- here
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
    DONE:
    mov.u32 r5, 0;";

#[test]
fn buffer_filled_again_before_the_consumer_has_arrived() {
    Case::new(REUSE).threads(64).map(tiles()).reports_one_of(&[PendingWrite, PendingRead, Race]);
}

#[test]
fn global_memory_written_by_stores_before_a_load() {
    Case::new(
        ".shared .align 128 .b8 tile[64];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        fence.proxy.async;
        st.global.u32 [out], 3;    // <-- here
        +fence.proxy.async;
        mbarrier.arrive.expect_tx.shared.b64 _, [r0], 64;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [out], 64, [r0];   // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        @!p bra WAIT;
        DONE:
        mov.u32 r1, 0;",
    )
    .reports(MissingProxyFence);
}

#[test]
fn multicast_to_a_block_whose_mbarrier_is_not_initialised() {
    Case::new(
        ".shared .align 128 .b8 tile[64];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        mov.u32 r1, %cluster_ctarank;
        setp.eq.u32 p, tid, 0;
        setp.eq.u32 q, r1, 0;
        and.pred q, p, q;
        -@q mbarrier.init.shared.b64 [r0], 1;
        +@p mbarrier.init.shared.b64 [r0], 1;
        fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        cvt.u16.u32 h0, 3;
        -@q mbarrier.arrive.expect_tx.shared.b64 _, [r0], 64;
        +@p mbarrier.arrive.expect_tx.shared.b64 _, [r0], 64;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        @q cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [sh], [in], 64, [r0], h0;   // <-- here
        -@!q bra DONE;
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
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
        ".shared .align 128 .b8 tile[64];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        mbarrier.init.shared.b64 [r0], 1;
        fence.proxy.async;
        mbarrier.arrive.expect_tx.shared.b64 _, [r0], 64;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in], 64, [r0];
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        +@!p bra WAIT;
        DONE:
        exit;    // <-- here",
    )
    .reports(PendingWrite);
}

#[test]
fn a_barrier_hands_on_what_one_thread_has_waited_for() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        .shared .align 8 .b8 bar[8];
        mov.u32 sh, tile;
        mov.u32 r0, bar;
        mad.lo.u32 r1, lane, 4, sh;
        setp.ne.u32 p, tid, 0;
        @p bra CONSUME;
        mbarrier.init.shared.b64 [r0], 1;
        fence.proxy.async;
        mbarrier.arrive.expect_tx.shared.b64 _, [r0], 128;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, 4}], [r0];    // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [r0], 0;
        @!p bra WAIT;
        CONSUME:
        +bar.sync 0;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .threads(64)
    .map(tiles())
    .reports_one_of(&[PendingWrite, PendingRead, Race]);
}

/// A ring of two buffers through which four tiles pass.
const RING: &str = ".shared .align 128 .b8 tile[256];
    .shared .align 8 .b8 full[16];
    .shared .align 8 .b8 empty[16];
    mov.u32 r0, full;
    mov.u32 r1, empty;
    setp.ne.u32 p, tid, 0;
    @p bra READY;
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
    setp.ne.u32 p, tid, 0;
    @p bra DONE;
    PRODUCER:
    and.b32 r3, r2, 1;
    mad.lo.u32 r4, r3, 8, r0;
    mad.lo.u32 r5, r3, 8, r1;
    mov.u32 sh, tile;
    mad.lo.u32 sh, r3, 128, sh;
    shr.u32 r6, r2, 1;
    xor.b32 r6, r6, 1;
    EMPTY:
    mbarrier.try_wait.parity.shared.b64 p, [r5], r6;
    @!p bra EMPTY;
    mbarrier.arrive.expect_tx.shared.b64 _, [r4], 128;
    shl.b32 r7, r2, 2;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [tensor, {0, r7}], [r4];    // <-- here
    add.u32 r2, r2, 1;
    setp.lt.u32 p, r2, 4;
    @p bra PRODUCER;
    bra DONE;
    CONSUMER:
    and.b32 r3, r2, 1;
    mad.lo.u32 r4, r3, 8, r0;
    mad.lo.u32 r5, r3, 8, r1;
    mov.u32 sh, tile;
    mad.lo.u32 sh, r3, 128, sh;
    mad.lo.u32 sh, lane, 4, sh;
    shr.u32 r6, r2, 1;
    FULL:
    mbarrier.try_wait.parity.shared.b64 p, [r4], r6;
    @!p bra FULL;
    -mbarrier.arrive.shared.b64 _, [r5];
    ld.shared.u32 r8, [sh];    // <-- here
    +mbarrier.arrive.shared.b64 _, [r5];
    add.u32 r2, r2, 1;
    setp.lt.u32 p, r2, 4;
    @p bra CONSUMER;
    DONE:
    mov.u32 r9, 0;";

#[test]
fn arrival_before_the_last_read() {
    Case::new(RING).threads(64).map(tiles()).reports_one_of(&[PendingWrite, PendingRead, Race]);
}
