//! wgmma: fences, waits, operands in shared memory.

use ptxsim::diagnostic::Kind::{
    AccumulatorInFlight, Deadlock, Divergence, InvalidOperand, MissingProxyFence,
    MissingWgmmaFence, OutOfBounds, PendingRead, UninitialisedRegister,
};

use super::case::Case;

/// Zeros for both operands of m64n8k16 in `tile`, A (descriptor `front`) and B behind it (`back`), and
/// p is false. Nothing orders the stores before a product.
const ZEROS: &str = "\
    mov.u32 r9, 0;
    st.shared.v4.u32 [quad], {r9, r9, r9, r9};
    setp.lt.u32 q, tid, 16;
    @q st.shared.v4.u32 [quad+2048], {r9, r9, r9, r9};
    setp.ne.u32 p, r9, 0;
";

fn case(text: &str) -> Case {
    Case::new(text).threads(128).descriptors()
}

/// What follows `ZEROS`.
fn zeros(rest: &str) -> Case {
    case(&format!("{ZEROS}{rest}"))
}

/// What follows when all of `ZEROS` is visible to products.
fn published(rest: &str) -> Case {
    zeros(&format!("fence.proxy.async;\nbar.sync 0;\n{rest}"))
}

#[test]
fn missing_fence() {
    published(
        "+wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .reports(MissingWgmmaFence);
}

#[test]
fn accumulator_written_after_the_fence() {
    published(
        "mov.b32 f0, 0;
        mov.b32 f1, 0;
        mov.b32 f2, 0;
        +mov.b32 f3, 0;
        wgmma.fence.sync.aligned;
        -mov.b32 f3, 0;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, 1, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .says("f3")
    .reports(MissingWgmmaFence);
}

#[test]
fn fragment_written_after_the_fence() {
    published(
        "mov.b32 r0, 0;
        wgmma.fence.sync.aligned;
        -mov.b32 r0, 0;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, {r0, r0, r0, r0}, back, p, 1, 1, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .says("r0")
    .reports(MissingWgmmaFence);
}

#[test]
fn accumulator_read_before_the_wait() {
    published(
        "mad.wide.u32 d0, tid, 4, out;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        +wgmma.wait_group.sync.aligned 0;
        st.global.f32 [d0], f2;     // <-- here
        wgmma.wait_group.sync.aligned 0;",
    )
    .says("f2")
    .reports(AccumulatorInFlight);
}

#[test]
fn wait_that_leaves_one_group_too_many() {
    published(
        "wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f4, f5, f6, f7}, front, back, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        -wgmma.wait_group.sync.aligned 2;
        +wgmma.wait_group.sync.aligned 1;
        add.f32 f8, f0, f1;     // <-- here
        wgmma.wait_group.sync.aligned 0;",
    )
    .reports(AccumulatorInFlight);
}

#[test]
fn fragment_overwritten_before_the_wait() {
    published(
        "mov.b32 r0, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, {r0, r0, r0, r0}, back, p, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        +wgmma.wait_group.sync.aligned 0;
        mov.b32 r0, 1;      // <-- here
        wgmma.wait_group.sync.aligned 0;",
    )
    .reports(AccumulatorInFlight);
}

#[test]
fn product_nobody_waits_for() {
    published(
        "wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        +wgmma.wait_group.sync.aligned 0;
        exit;   // <-- here",
    )
    .says("never waited for")
    .reports(AccumulatorInFlight);
}

#[test]
fn operands_stored_without_a_proxy_fence() {
    zeros(
        "+fence.proxy.async;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .reports_at_one(MissingProxyFence);
}

#[test]
fn operand_overwritten_before_the_wait() {
    published(
        "wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        +wgmma.wait_group.sync.aligned 0;
        bar.sync 0;
        st.shared.v4.u32 [quad], {r9, r9, r9, r9};    // <-- here
        wgmma.wait_group.sync.aligned 0;",
    )
    .reports(PendingRead);
}

/// The product reads its operands when all four warps have issued it, or as late as the wait allows.
#[test]
fn operand_overwritten_before_the_wait_is_read_early_or_late() {
    published(
        "mov.u32 r11, 0x3f803f80;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        bar.sync 0;
        st.shared.v4.u32 [quad], {r11, r11, r11, r11};
        @q st.shared.v4.u32 [quad+2048], {r11, r11, r11, r11};
        bar.sync 0;
        wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 d0, tid, 4, out;
        st.global.f32 [d0], f3;",
    )
    .differs_by_timing(&[0; 128], &[16f32.to_bits(); 128]);
}

#[test]
fn operand_beyond_the_end() {
    published(
        "-add.u64 back, front, 248;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .says("tile+4096")
    .reports(OutOfBounds);
}

#[test]
fn product_by_the_elected_lane() {
    published(
        "wgmma.fence.sync.aligned;
        elect.sync _|q, -1;
        -@q wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;    // <-- here
        +wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .reports(Divergence);
}

#[test]
fn warps_with_different_descriptors() {
    published(
        "setp.eq.u32 q, warp, 2;
        -@q add.u64 back, front, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .reports(Divergence);
}

#[test]
fn product_by_one_warp_of_the_four() {
    published(
        "wgmma.fence.sync.aligned;
        setp.ne.u32 q, warp, 0;
        -@q bra DONE;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;    // <-- here
        DONE:
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .reports(Divergence);
}

#[test]
fn descriptor_that_differs_between_lanes() {
    published(
        "setp.eq.u32 q, lane, 7;
        -@q add.u64 back, front, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .reports(InvalidOperand);
}

#[test]
fn warps_that_end_before_the_product() {
    published(
        "setp.ge.u32 q, warp, 3;
        -@q exit;
        wgmma.fence.sync.aligned;       // <-- here
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .says("the warp has ended")
    .reports(Divergence);
}

#[test]
fn group_that_a_warp_commits_only_after_another_barrier() {
    published(
        "wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
        setp.eq.u32 q, warp, 3;
        -@q bar.sync 1, 128;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;    // <-- here
        -@!q bar.sync 1, 128;",
    )
    .says("wgmma group 1, which warps 3 of the warpgroup have not committed")
    .reports_at_one(Deadlock);
}

/// Only the first 32 rows of A and all of B are written; the product stands in f0 to f3.
const HALF_OF_A: &str = "\
    mad.lo.u32 r0, tid, 8, sh;
    mov.u32 r1, 0x3f803f80;
    st.shared.v2.u32 [r0], {r1, r1};
    setp.lt.u32 p, tid, 32;
    @p st.shared.v2.u32 [r0+2048], {r1, r1};
    fence.proxy.async;
    bar.sync 0;
    mad.wide.u32 d0, tid, 4, out;
    setp.ne.u32 p, r1, r1;
    setp.lt.u32 q, tid, 64;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
";

/// The same, and what follows.
fn half_of_a(rest: &str) -> Case {
    case(&format!("{HALF_OF_A}{rest}"))
}

#[test]
fn rows_that_nobody_wrote_are_stored() {
    half_of_a(
        "-st.global.f32 [d0], f0;    // <-- here
        +@q st.global.f32 [d0], f0;",
    )
    .reports(UninitialisedRegister);
}

#[test]
fn rows_that_nobody_wrote_are_branched_on() {
    half_of_a(
        "-setp.gt.f32 q, f3, f2;
        @q bra DONE;    // <-- here
        mov.u32 r0, 0;
        DONE:
        mov.u32 r0, 1;",
    )
    .reports(UninitialisedRegister);
}

/// As attention does: the scores become an operand in registers, and the sums are accumulated and
/// scaled.
#[test]
fn rows_that_nobody_wrote_reach_the_next_product() {
    half_of_a(
        "cvt.rn.bf16x2.f32 r4, f1, f0;
        cvt.rn.bf16x2.f32 r5, f3, f2;
        mov.b32 f4, 0;
        mov.b32 f5, 0;
        mov.b32 f6, 0;
        mov.b32 f7, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f4, f5, f6, f7}, {r4, r5, r4, r5}, back, 1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mul.f32 f4, f4, 0f40000000;
        mov.b32 r4, 0;
        mov.b32 r5, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f4, f5, f6, f7}, {r4, r5, r4, r5}, back, 1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        -st.global.f32 [d0], f4;    // <-- here
        +@q st.global.f32 [d0], f4;",
    )
    .says("0xffffffff")
    .reports(UninitialisedRegister);
}

/// Rows 4 to 7 of the transpose of B are missing: two lanes of four hold nothing.
#[test]
fn columns_that_nobody_wrote() {
    let text = HALF_OF_A.replace(
        "setp.lt.u32 p, tid, 32;\n    @p",
        "and.b32 r3, tid, 8;
        setp.eq.u32 p, r3, 0;
        setp.lt.and.u32 p, tid, 32, p;
        @p",
    );
    let rest = "and.b32 r3, tid, 2;
        setp.eq.u32 p, r3, 0;
        +and.pred q, p, q;
        @q st.global.f32 [d0], f0;    // <-- here";
    case(&(text + rest)).says("lanes 0xcccccccc").reports(UninitialisedRegister);
}

#[test]
fn accumulators_that_nothing_has_written() {
    half_of_a(
        "+mov.b32 f4, 0;
        +mov.b32 f5, 0;
        +mov.b32 f6, 0;
        +mov.b32 f7, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f4, f5, f6, f7}, front, back, 1, 1, 1, 0, 0;    // <-- here
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    )
    .says("accumulator")
    .reports(UninitialisedRegister);
}
