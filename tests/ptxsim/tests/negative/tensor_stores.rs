//! Bulk and tensor copies from shared memory: proxies, groups, sources that are overwritten.

use ptxsim::diagnostic::Kind::{
    InvalidOperand, MissingProxyFence, PendingRead, PendingWrite, Race,
};
use ptxsim::tensor_map::{Dtype, TensorMap};

use crate::case::Case;

/// Tiles of 4 rows of 8 words out of the 32 rows of `out`.
fn output() -> TensorMap {
    TensorMap { address: 1, ..TensorMap::dense(Dtype::U32, vec![8, 32], vec![8, 4]) }
}

#[test]
fn store_from_shared_memory_without_a_proxy_fence() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;    // <-- here
        +fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [tensor, {0, 4}], [sh];    // <-- here
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:
        mov.u32 r2, 0;",
    )
    .map(output())
    .reports(MissingProxyFence);
}

#[test]
fn store_without_a_barrier_after_the_fence() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;    // <-- here
        fence.proxy.async.shared::cta;
        +bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [tensor, {0, 4}], [sh];    // <-- here
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:
        mov.u32 r2, 0;",
    )
    .map(output())
    .reports(Race);
}

#[test]
fn source_overwritten_before_it_was_read() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [tensor, {0, 4}], [sh];    // <-- here
        cp.async.bulk.commit_group;
        +cp.async.bulk.wait_group.read 0;
        st.shared.u32 [sh], 7;    // <-- here
        DONE:
        mov.u32 r2, 0;",
    )
    .map(output())
    .reports(PendingRead);
}

#[test]
fn source_overwritten_by_another_warp_before_it_was_read() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, lane, 4, sh;
        setp.eq.u32 p, warp, 0;
        setp.eq.u32 q, tid, 0;
        @p st.shared.u32 [r0], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @q cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [tensor, {0, 4}], [sh];    // <-- here
        @q cp.async.bulk.commit_group;
        +@q cp.async.bulk.wait_group.read 0;
        bar.sync 0;
        @!p st.shared.u32 [r0], 7;    // <-- here",
    )
    .threads(64)
    .map(output())
    .reports(PendingRead);
}

#[test]
fn result_read_after_only_the_source_was_waited_for() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        cp.async.bulk.commit_group;
        -cp.async.bulk.wait_group.read 0;
        +cp.async.bulk.wait_group 0;
        ld.global.u32 r1, [out];    // <-- here
        DONE:
        mov.u32 r2, 0;",
    )
    .reports(PendingWrite);
}

#[test]
fn group_that_was_never_committed() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        +cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;
        st.shared.u32 [sh], 7;    // <-- here
        DONE:
        mov.u32 r2, 0;",
    )
    .reports(PendingRead);
}

#[test]
fn copies_of_two_blocks_to_the_same_place() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        -cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        +cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [out], [sh], 128;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:
        mov.u32 r2, 0;",
    )
    .blocks(2)
    .reports_one_of(&[PendingWrite, Race]);
}

#[test]
fn size_that_is_no_multiple_of_sixteen() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        -cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 120;    // <-- here
        +cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 112;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:
        mov.u32 r2, 0;",
    )
    .reports(InvalidOperand);
}

#[test]
fn tensor_map_that_is_none() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        -mov.u64 tensor, in;
        cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [tensor, {0, 4}], [sh];    // <-- here
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:
        mov.u32 r2, 0;",
    )
    .map(output())
    .reports(InvalidOperand);
}

#[test]
fn fence_of_the_wrong_state_space() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;    // <-- here
        -fence.proxy.async.global;
        +fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:
        mov.u32 r2, 0;",
    )
    .reports(MissingProxyFence);
}

#[test]
fn block_that_ends_while_its_shared_memory_is_read() {
    Case::new(
        ".shared .align 128 .b8 tile[128];
        mov.u32 sh, tile;
        mad.lo.u32 r0, tid, 4, sh;
        st.shared.u32 [r0], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.ne.u32 p, tid, 0;
        @p bra DONE;
        cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        cp.async.bulk.commit_group;
        +cp.async.bulk.wait_group.read 0;
        DONE:
        mov.u32 r1, 0;",
    )
    .is_forgiven(PendingRead);
}
