//! Lanes apart where they must be together, and exchanges with lanes that are not there.

use ptxsim::diagnostic::Kind::{Deadlock, Divergence, InvalidOperand};

use super::case::Case;

#[test]
fn product_by_half_a_warp() {
    Case::new(
        "mov.b32 r0, 0;
        mov.b32 f0, 0;
        setp.ge.u32 p, tid, 16;
        -@p bra DONE;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {f1, f2, f3, f4}, {r0, r0, r0, r0}, {r0, r0}, {f0, f0, f0, f0};    // <-- here
        DONE:",
    )
    .reports(Divergence);
}

#[test]
fn guarded_product() {
    Case::new(
        "mov.b32 r0, 0;
        mov.b32 f0, 0;
        -setp.lt.u32 p, tid, 31;
        +setp.lt.u32 p, tid, 32;
        @p mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {f1, f2, f3, f4}, {r0, r0, r0, r0}, {r0, r0}, {f0, f0, f0, f0};    // <-- here",
    )
    .reports(Divergence);
}

#[test]
fn matrix_load_by_half_a_warp() {
    Case::new(
        "st.shared.v4.u32 [quad], {tid, tid, tid, tid};
        bar.warp.sync -1;
        -setp.lt.u32 p, tid, 16;
        +setp.lt.u32 p, tid, 32;
        @p ldmatrix.sync.aligned.m8n8.x2.shared.b16 {r1, r2}, [quad];    // <-- here",
    )
    .reports(Divergence);
}

#[test]
fn block_barrier_by_the_elected_lane() {
    Case::new(
        "elect.sync _|p, -1;
        -@p bar.sync 0;      // <-- here
        +bar.sync 0;",
    )
    .threads(64)
    .reports(Divergence);
}

#[test]
fn arrival_at_a_barrier_by_the_elected_lane() {
    Case::new(
        "setp.eq.u32 q, warp, 0;
        elect.sync _|p, -1;
        @q bra WAITER;
        -@p bar.arrive 1, 64;      // <-- here
        +bar.arrive 1, 64;
        bra DONE;
        WAITER:
        bar.sync 1, 64;
        DONE:",
    )
    .threads(64)
    .reports(Divergence);
}

#[test]
fn cluster_barrier_by_one_lane() {
    Case::new(
        "-@leader barrier.cluster.arrive.aligned;      // <-- here
        +barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;",
    )
    .cluster(2)
    .reports(Divergence);
}

#[test]
fn register_reallocation_by_one_lane() {
    Case::new(
        "-@leader setmaxnreg.dec.sync.aligned.u32 40;      // <-- here
        +setmaxnreg.dec.sync.aligned.u32 40;",
    )
    .threads(128)
    .reports(Divergence);
}

#[test]
fn shuffle_from_a_lane_outside_the_mask() {
    Case::new(
        "setp.ge.u32 p, tid, 16;
        @p bra DONE;
        -shfl.sync.idx.b32 r0, tid, 20, 31, 0xffff;     // <-- here
        +shfl.sync.idx.b32 r0, tid, 12, 31, 0xffff;
        DONE:",
    )
    .says("lane 20")
    .reports(InvalidOperand);
}

#[test]
fn mask_that_names_a_lane_that_has_ended() {
    Case::new(
        "setp.ge.u32 p, tid, 16;
        @p exit;
        -shfl.sync.bfly.b32 r0, tid, 1, 31, -1;     // <-- here
        +shfl.sync.bfly.b32 r0, tid, 1, 31, 0xffff;",
    )
    .reports(Divergence);
}

#[test]
fn mask_without_the_executing_lane() {
    Case::new(
        "-vote.sync.ballot.b32 r0, 1, 0xffff;     // <-- here
        +vote.sync.ballot.b32 r0, 1, -1;",
    )
    .reports(Divergence);
}

#[test]
fn warp_barrier_whose_mask_leaves_out_the_executing_lane() {
    Case::new(
        "-bar.warp.sync 0x7fffffff;     // <-- here
        +bar.warp.sync 0xffffffff;",
    )
    .reports(Divergence);
}

#[test]
fn mask_that_names_lanes_that_went_elsewhere() {
    Case::new(
        "setp.ge.u32 p, tid, 16;
        @p bra UPPER;
        -vote.sync.ballot.b32 r0, 1, -1;     // <-- here
        +vote.sync.ballot.b32 r0, 1, 0xffff;
        bra DONE;
        UPPER:
        -vote.sync.ballot.b32 r0, 1, -1;
        +vote.sync.ballot.b32 r0, 1, 0xffff0000;
        DONE:",
    )
    .says("waits for lanes 0xffff0000")
    .reports(Deadlock);
}

#[test]
fn mask_that_differs_between_lanes() {
    Case::new(
        "setp.lt.u32 p, lane, 16;
        -selp.b32 r0, 0xffff, -1, p;
        +selp.b32 r0, 0xffff, 0xffff0000, p;
        vote.sync.ballot.b32 r2, 1, r0;     // <-- here",
    )
    .says("give another mask")
    .reports(Divergence);
}
