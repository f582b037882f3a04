//! cp.async: groups, waits, buffers that are used again.

use ptxsim::diagnostic::Kind::{
    InvalidOperand, MissingProxyFence, PendingRead, PendingWrite, Race,
};

use super::case::Case;

#[test]
fn read_without_waiting_for_the_group() {
    Case::new(
        "mad.wide.u32 d0, tid, 16, in;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        cp.async.commit_group;
        +cp.async.wait_group 0;
        ld.shared.u32 r1, [quad];    // <-- here",
    )
    .reports(PendingWrite);
}

#[test]
fn wait_that_leaves_one_group_too_many() {
    Case::new(
        "mad.wide.u32 d0, tid, 16, in;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        cp.async.commit_group;
        cp.async.cg.shared.global [quad+512], [d0+512], 16;
        cp.async.commit_group;
        -cp.async.wait_group 2;
        +cp.async.wait_group 1;
        ld.shared.u32 r1, [quad];    // <-- here",
    )
    .reports(PendingWrite);
}

#[test]
fn wait_without_a_commit() {
    Case::new(
        "mad.wide.u32 d0, tid, 16, in;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        +cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.u32 r1, [quad];    // <-- here",
    )
    .reports(PendingWrite);
}

#[test]
fn read_of_another_warps_copy_without_a_barrier() {
    Case::new(
        "xor.b32 r1, tid, 32;
        mad.lo.u32 r1, r1, 16, sh;
        mad.wide.u32 d0, tid, 16, in;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        cp.async.commit_group;
        cp.async.wait_group 0;
        +bar.sync 0;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .threads(64)
    .reports_one_of(&[PendingWrite, PendingRead, Race]);
}

#[test]
fn read_of_another_lanes_copy_without_a_barrier() {
    Case::new(
        "xor.b32 r1, tid, 1;
        mad.lo.u32 r1, r1, 16, sh;
        mad.wide.u32 d0, tid, 16, in;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        cp.async.commit_group;
        cp.async.wait_group 0;
        +bar.warp.sync -1;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .reports_one_of(&[PendingWrite, PendingRead, Race]);
}

#[test]
fn barrier_before_the_wait() {
    Case::new(
        "xor.b32 r1, tid, 32;
        mad.lo.u32 r1, r1, 16, sh;
        mad.wide.u32 d0, tid, 16, in;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        cp.async.commit_group;
        -bar.sync 0;
        cp.async.wait_group 0;
        +bar.sync 0;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .threads(64)
    .reports_one_of(&[PendingWrite, PendingRead, Race]);
}

#[test]
fn copy_into_a_buffer_that_another_warp_still_reads() {
    Case::new(
        "xor.b32 r1, tid, 32;
        mad.lo.u32 r1, r1, 16, sh;
        mad.wide.u32 d0, tid, 16, in;
        st.shared.u32 [quad], tid;
        bar.sync 0;
        ld.shared.u32 r2, [r1];    // <-- here
        +bar.sync 0;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        cp.async.wait_all;",
    )
    .threads(64)
    .reports_one_of(&[PendingWrite, PendingRead, Race]);
}

#[test]
fn store_to_a_buffer_that_is_being_copied_to() {
    Case::new(
        "mad.wide.u32 d0, tid, 16, in;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        -st.shared.u32 [quad], tid;    // <-- here
        cp.async.wait_all;
        +st.shared.u32 [quad], tid;",
    )
    .reports(PendingWrite);
}

#[test]
fn store_to_the_source_of_a_copy() {
    Case::new(
        "mad.wide.u32 d0, tid, 16, out;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        -st.global.u32 [d0], tid;    // <-- here
        cp.async.wait_all;
        +st.global.u32 [d0], tid;",
    )
    .reports(PendingRead);
}

#[test]
fn source_larger_than_the_copy() {
    Case::new(
        "mad.wide.u32 d0, tid, 16, in;
        -mov.u32 r1, 17;
        +mov.u32 r1, 7;
        cp.async.cg.shared.global [quad], [d0], 16, r1;    // <-- here
        cp.async.wait_all;",
    )
    .reports(InvalidOperand);
}

#[test]
fn arrival_that_does_not_wait_for_the_copies() {
    Case::new(
        "mad.lo.u32 r0, lane, 16, sh;
        mad.wide.u32 d0, lane, 16, in;
        setp.ne.u32 p, warp, 0;
        @p bra WAIT;
        cp.async.ca.shared.global [r0], [d0], 16;    // <-- here
        -mbarrier.arrive.shared.b64 _, [mbar];
        +cp.async.mbarrier.arrive.noinc.shared.b64 [mbar];
        bra DONE;
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        ld.shared.u32 r1, [r0];    // <-- here
        DONE:
        cp.async.wait_all;",
    )
    .mbarrier(32)
    .threads(64)
    .reports_one_of(&[PendingWrite, PendingRead, Race]);
}

#[test]
fn copied_bytes_in_a_bulk_store_without_a_proxy_fence() {
    Case::new(
        "mad.wide.u32 d0, tid, 16, in;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        cp.async.wait_all;
        +fence.proxy.async;
        bar.sync 0;
        @!leader bra DONE;
        cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 512;    // <-- here
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:",
    )
    .reports(MissingProxyFence);
}

/// A loop over two buffers: the next tile is copied while one is read.
const PIPELINE: &str = "mov.u32 r0, 0;
    mad.wide.u32 d0, tid, 16, in;
    cp.async.cg.shared.global [quad], [d0], 16;
    cp.async.commit_group;
    LOOP:
    add.u32 r2, r0, 1;
    and.b32 r3, r2, 1;
    mad.lo.u32 r3, r3, 1024, quad;
    setp.lt.u32 p, r2, 4;
    @p cp.async.cg.shared.global [r3], [d0], 16;    // <-- here
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    and.b32 r4, r0, 1;
    xor.b32 r5, tid, 32;
    mad.lo.u32 r5, r5, 16, sh;
    mad.lo.u32 r5, r4, 1024, r5;
    ld.shared.u32 r6, [r5];    // <-- here
    +bar.sync 0;
    mov.u32 r0, r2;
    setp.lt.u32 p, r0, 4;
    @p bra LOOP;
    cp.async.wait_all;";

#[test]
fn pipeline_without_the_second_barrier() {
    Case::new(PIPELINE).threads(64).reports_one_of(&[PendingWrite, PendingRead, Race]);
}
