//! Bulk and tensor copies from shared memory: proxies, groups, sources that are overwritten.

use ptxsim::diagnostic::Kind::{
    InvalidOperand, MissingProxyFence, PendingRead, PendingWrite, Race,
};

use super::case::Case;

/// Each thread has stored its number in `tile`, where copies see it; thread 0 goes on with the rest.
fn stored(rest: &str) -> Case {
    Case::new(&format!(
        "st.shared.u32 [word], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @!leader bra DONE;
        {rest}
        DONE:"
    ))
}

#[test]
fn store_from_shared_memory_without_a_proxy_fence() {
    Case::new(
        "st.shared.u32 [word], tid;    // <-- here
        +fence.proxy.async.shared::cta;
        bar.sync 0;
        @!leader bra DONE;
        cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [out_map, {0, 4}], [sh];    // <-- here
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:",
    )
    .reports(MissingProxyFence);
}

#[test]
fn store_without_a_barrier_after_the_fence() {
    Case::new(
        "st.shared.u32 [word], tid;    // <-- here
        fence.proxy.async.shared::cta;
        +bar.sync 0;
        @!leader bra DONE;
        cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [out_map, {0, 4}], [sh];    // <-- here
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:",
    )
    .reports(Race);
}

#[test]
fn source_overwritten_before_it_was_read() {
    stored(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [out_map, {0, 4}], [sh];    // <-- here
        cp.async.bulk.commit_group;
        +cp.async.bulk.wait_group.read 0;
        st.shared.u32 [sh], 7;    // <-- here",
    )
    .reports(PendingRead);
}

#[test]
fn source_overwritten_by_another_warp_before_it_was_read() {
    Case::new(
        "mad.lo.u32 r0, lane, 4, sh;
        setp.eq.u32 p, warp, 0;
        @p st.shared.u32 [r0], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @leader cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [out_map, {0, 4}], [sh];    // <-- here
        @leader cp.async.bulk.commit_group;
        +@leader cp.async.bulk.wait_group.read 0;
        bar.sync 0;
        @!p st.shared.u32 [r0], 7;    // <-- here",
    )
    .threads(64)
    .reports(PendingRead);
}

#[test]
fn result_read_after_only_the_source_was_waited_for() {
    stored(
        "cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        cp.async.bulk.commit_group;
        -cp.async.bulk.wait_group.read 0;
        +cp.async.bulk.wait_group 0;
        ld.global.u32 r1, [out];    // <-- here",
    )
    .reports(PendingWrite);
}

#[test]
fn group_that_was_never_committed() {
    stored(
        "cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        +cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0;
        st.shared.u32 [sh], 7;    // <-- here",
    )
    .reports(PendingRead);
}

#[test]
fn copies_of_two_blocks_to_the_same_place() {
    stored(
        "-cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        +cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [out], [sh], 128;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;",
    )
    .blocks(2)
    .reports_one_of(&[PendingWrite, Race]);
}

#[test]
fn size_that_is_no_multiple_of_sixteen() {
    stored(
        "-cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 120;    // <-- here
        +cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 112;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;",
    )
    .reports(InvalidOperand);
}

#[test]
fn tensor_map_that_is_none() {
    stored(
        "-mov.u64 out_map, in;
        cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [out_map, {0, 4}], [sh];    // <-- here
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;",
    )
    .reports(InvalidOperand);
}

#[test]
fn fence_of_the_wrong_state_space() {
    Case::new(
        "st.shared.u32 [word], tid;    // <-- here
        -fence.proxy.async.global;
        +fence.proxy.async.shared::cta;
        bar.sync 0;
        @!leader bra DONE;
        cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:",
    )
    .reports(MissingProxyFence);
}

#[test]
fn block_that_ends_while_its_shared_memory_is_read() {
    stored(
        "cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;    // <-- here
        cp.async.bulk.commit_group;
        +cp.async.bulk.wait_group.read 0;",
    )
    .is_forgiven(PendingRead);
}
