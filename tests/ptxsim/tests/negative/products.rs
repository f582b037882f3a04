//! wgmma: fences, waits, operands in shared memory.

use ptxsim::diagnostic::Kind::{
    AccumulatorInFlight, Divergence, InvalidOperand, MissingProxyFence, MissingWgmmaFence,
    OutOfBounds, PendingRead,
};

use crate::case::Case;

/// Fills operands of m64n8k16 with zeros, A at the start of `tile`, B behind it, then `middle`
/// between the stores and `product`. Descriptors are d0 and d1.
macro_rules! kernel {
    ($middle:literal, $product:literal) => {
        concat!(
            ".shared .align 128 .b8 tile[2304];
            mov.u32 sh, tile;
            mad.lo.u32 r8, tid, 16, sh;
            mov.u32 r9, 0;
            st.shared.v4.u32 [r8], {r9, r9, r9, r9};
            setp.lt.u32 q, tid, 16;
            @q st.shared.v4.u32 [r8+2048], {r9, r9, r9, r9};
            ",
            $middle,
            "
            shr.u32 r10, sh, 4;
            cvt.u64.u32 d0, r10;
            or.b64 d0, d0, 0x1000080000;
            add.u64 d1, d0, 128;
            setp.ne.u32 p, r9, 0;
            ",
            $product
        )
    };
}

/// With the stores visible to the async proxy.
macro_rules! published {
    ($product:literal) => {
        kernel!("fence.proxy.async;\nbar.sync 0;", $product)
    };
}

fn case(text: &'static str) -> Case {
    Case::new(text).threads(128)
}

#[test]
fn missing_fence() {
    case(published!(
        "+wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;"
    ))
    .reports(MissingWgmmaFence);
}

#[test]
fn accumulator_written_after_the_fence() {
    case(published!(
        "mov.b32 f0, 0;
        mov.b32 f1, 0;
        mov.b32 f2, 0;
        +mov.b32 f3, 0;
        wgmma.fence.sync.aligned;
        -mov.b32 f3, 0;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, 1, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;"
    ))
    .says("f3")
    .reports(MissingWgmmaFence);
}

#[test]
fn fragment_written_after_the_fence() {
    case(published!(
        "mov.b32 r0, 0;
        wgmma.fence.sync.aligned;
        -mov.b32 r0, 0;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, {r0, r0, r0, r0}, d1, p, 1, 1, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;"
    ))
    .says("r0")
    .reports(MissingWgmmaFence);
}

#[test]
fn accumulator_read_before_the_wait() {
    case(published!(
        "mad.wide.u32 d2, tid, 4, out;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        +wgmma.wait_group.sync.aligned 0;
        st.global.f32 [d2], f2;     // <-- here
        wgmma.wait_group.sync.aligned 0;"
    ))
    .says("f2")
    .reports(AccumulatorInFlight);
}

#[test]
fn wait_that_leaves_one_group_too_many() {
    case(published!(
        "wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f4, f5, f6, f7}, d0, d1, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        -wgmma.wait_group.sync.aligned 2;
        +wgmma.wait_group.sync.aligned 1;
        add.f32 f8, f0, f1;     // <-- here
        wgmma.wait_group.sync.aligned 0;"
    ))
    .reports(AccumulatorInFlight);
}

#[test]
fn fragment_overwritten_before_the_wait() {
    case(published!(
        "mov.b32 r0, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, {r0, r0, r0, r0}, d1, p, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        +wgmma.wait_group.sync.aligned 0;
        mov.b32 r0, 1;      // <-- here
        wgmma.wait_group.sync.aligned 0;"
    ))
    .reports(AccumulatorInFlight);
}

#[test]
fn product_nobody_waits_for() {
    case(published!(
        "wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        +wgmma.wait_group.sync.aligned 0;
        exit;   // <-- here"
    ))
    .says("never waited for")
    .reports(AccumulatorInFlight);
}

#[test]
fn operands_stored_without_a_proxy_fence() {
    case(kernel!(
        "+fence.proxy.async;
        bar.sync 0;",
        "wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;"
    ))
    .reports_at_one(MissingProxyFence);
}

#[test]
fn operand_overwritten_before_the_wait() {
    case(published!(
        "wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        +wgmma.wait_group.sync.aligned 0;
        bar.sync 0;
        st.shared.v4.u32 [r8], {r9, r9, r9, r9};    // <-- here
        wgmma.wait_group.sync.aligned 0;"
    ))
    .reports(PendingRead);
}

#[test]
fn operand_beyond_the_end() {
    case(published!(
        "-add.u64 d1, d0, 136;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;"
    ))
    .says("tile+2304")
    .reports(OutOfBounds);
}

#[test]
fn product_by_the_elected_lane() {
    case(published!(
        "wgmma.fence.sync.aligned;
        elect.sync _|q, -1;
        -@q wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;    // <-- here
        +wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;"
    ))
    .reports(Divergence);
}

#[test]
fn warps_with_different_descriptors() {
    case(published!(
        "setp.eq.u32 q, warp, 2;
        -@q add.u64 d1, d0, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;"
    ))
    .reports(Divergence);
}

#[test]
fn product_by_one_warp_of_the_four() {
    case(published!(
        "wgmma.fence.sync.aligned;
        setp.ne.u32 q, warp, 0;
        -@q bra DONE;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;    // <-- here
        DONE:
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;"
    ))
    .reports(Divergence);
}

#[test]
fn descriptor_that_differs_between_lanes() {
    case(published!(
        "setp.eq.u32 q, lane, 7;
        -@q add.u64 d1, d0, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d0, d1, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;"
    ))
    .reports(InvalidOperand);
}
