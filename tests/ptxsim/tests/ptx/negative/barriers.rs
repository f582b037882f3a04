//! Named barriers, the cluster barrier, kernels that never end.

use ptxsim::diagnostic::Kind::{BarrierMismatch, Deadlock, Limit, OutOfBounds};

use super::case::Case;

#[test]
fn warps_that_disagree_on_the_thread_count() {
    Case::new(
        "setp.eq.u32 p, warp, 0;
        -selp.u32 r0, 128, 64, p;
        +mov.u32 r0, 128;
        bar.sync 1, r0;      // <-- here",
    )
    .threads(128)
    .reports(BarrierMismatch);
}

#[test]
fn thread_count_that_is_no_multiple_of_a_warp() {
    Case::new(
        "-bar.sync 1, 48;      // <-- here
        +bar.sync 1, 64;",
    )
    .threads(64)
    .reports(BarrierMismatch);
}

#[test]
fn barrier_that_does_not_exist() {
    Case::new(
        "-bar.sync 16;      // <-- here
        +bar.sync 15;",
    )
    .reports(BarrierMismatch);
}

#[test]
fn half_a_warp_that_arrives_twice() {
    Case::new(
        "setp.ne.u32 p, warp, 0;
        @p bra WAITER;
        setp.ge.u32 p, lane, 16;
        @p bra OTHER;
        barrier.arrive 1, 64;
        -barrier.arrive 1, 64;      // <-- here
        bra DONE;
        OTHER:
        barrier.arrive 1, 64;
        bra DONE;
        WAITER:
        bar.sync 1, 64;
        DONE:",
    )
    .threads(64)
    .reports(BarrierMismatch);
}

#[test]
fn reduction_and_plain_barrier_in_one_round() {
    Case::new(
        "setp.ne.u32 p, warp, 0;
        @p bra OTHER;
        bar.red.popc.u32 r0, 1, 64, p;      // <-- here
        bra DONE;
        OTHER:
        -bar.sync 1, 64;     // <-- here
        +bar.red.popc.u32 r0, 1, 64, p;
        DONE:",
    )
    .threads(64)
    .reports_at_one(BarrierMismatch);
}

#[test]
fn warps_that_wait_for_each_other() {
    Case::new(
        "setp.ne.u32 p, warp, 0;
        @p bra OTHER;
        bar.sync 1, 64;      // <-- here
        bar.sync 2, 64;
        bra DONE;
        OTHER:
        -bar.sync 2, 64;
        bar.sync 1, 64;
        +bar.sync 2, 64;
        DONE:",
    )
    .threads(64)
    .says("barrier 1")
    .says("barrier 2")
    .says("warp 0")
    .says("warp 1")
    .reports(Deadlock);
}

#[test]
fn barrier_for_more_warps_than_come() {
    Case::new(
        "setp.ne.u32 p, warp, 0;
        -@p bra DONE;
        bar.sync 1, 64;      // <-- here
        DONE:
        bar.sync 0;",
    )
    .threads(64)
    .reports(Deadlock);
}

#[test]
fn flag_that_nobody_sets() {
    Case::new(
        "mov.u64 d0, ticket;
        setp.ne.u32 p, warp, 0;
        @p bra WAIT;
        +st.relaxed.gpu.global.u32 [d0], 1;
        bra DONE;
        WAIT:
        nanosleep.u32 100;      // <-- here
        ld.relaxed.gpu.global.u32 r0, [d0];      // <-- here
        setp.eq.u32 p, r0, 0;      // <-- here
        @p bra WAIT;      // <-- here
        DONE:",
    )
    .threads(64)
    .reports_at_one(Deadlock);
}

#[test]
fn endless_loop() {
    Case::new(
        "mov.u32 r0, 100;
        LOOP:
        -add.u32 r0, r0, 2;      // <-- here
        +sub.u32 r0, r0, 1;
        setp.ne.u32 p, r0, 7;      // <-- here
        @p bra LOOP;      // <-- here",
    )
    .at_most(10_000)
    .says("no end after 10000")
    .reports_at_one(Deadlock);
}

#[test]
fn cluster_barrier_waited_for_without_arriving() {
    Case::new(
        "+barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;      // <-- here",
    )
    .cluster(2)
    .reports(BarrierMismatch);
}

#[test]
fn two_arrivals_at_the_cluster_barrier() {
    Case::new(
        "barrier.cluster.arrive.aligned;
        -barrier.cluster.arrive.aligned;      // <-- here
        barrier.cluster.wait.aligned;",
    )
    .cluster(2)
    .reports(BarrierMismatch);
}

#[test]
fn shared_memory_of_a_block_that_may_have_ended() {
    Case::new(
        "mapa.shared::cluster.u32 r2, word, 1;
        st.shared.u32 [word], tid;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        setp.eq.u32 p, rank, 1;
        -@p bra DONE;
        mov.u32 r4, 0;
        LOOP:
        add.u32 r4, r4, 1;
        setp.lt.u32 q, r4, 2000;
        @q bra LOOP;
        @!p ld.shared::cluster.u32 r3, [r2];    // <-- here
        +barrier.cluster.arrive.aligned;
        +barrier.cluster.wait.aligned;
        DONE:",
    )
    .cluster(2)
    .reports(OutOfBounds);
}

#[test]
fn more_registers_than_there_are() {
    Case::new(
        "setp.lt.u32 p, tid, 128;
        @p bra FIRST;
        -setmaxnreg.dec.sync.aligned.u32 160;
        +setmaxnreg.dec.sync.aligned.u32 96;
        bra DONE;
        FIRST:
        setmaxnreg.inc.sync.aligned.u32 232;    // <-- here
        DONE:",
    )
    .threads(256)
    .registers(168)
    .says("registers")
    .reports(Deadlock);
}

#[test]
fn registers_that_do_not_increase() {
    Case::new(
        "-setmaxnreg.inc.sync.aligned.u32 96;     // <-- here
        +setmaxnreg.dec.sync.aligned.u32 96;",
    )
    .threads(128)
    .registers(168)
    .reports(Limit);
}

#[test]
fn thread_count_larger_than_the_block() {
    Case::new(
        "-bar.sync 1, 128;      // <-- here
        +bar.sync 1, 64;",
    )
    .threads(64)
    .reports_one_of(&[BarrierMismatch, Deadlock]);
}

#[test]
fn warps_that_end_early_are_not_waited_for() {
    Case::new(
        "setp.eq.u32 p, warp, 1;
        @p exit;
        bar.sync 0;",
    )
    .threads(96)
    .is_clean();
}

#[test]
fn more_blocks_waited_for_than_there_are() {
    let text = "mov.u64 d0, ticket;
        @!leader bra DONE;
        red.relaxed.gpu.global.add.u32 [d0], 1;
        WAIT:
        nanosleep.u32 20;      // <-- here
        ld.relaxed.gpu.global.u32 r0, [d0];      // <-- here
        -setp.lt.u32 p, r0, 3;      // <-- here
        +setp.lt.u32 p, r0, 2;
        @p bra WAIT;      // <-- here
        DONE:";
    Case::new(text).blocks(2).co_resident().at_most(50_000).reports_at_one(Deadlock);
}

#[test]
fn cluster_barrier_that_one_block_leaves_out() {
    Case::new(
        "setp.eq.u32 p, rank, 1;
        setp.eq.u32 q, warp, 0;
        and.pred p, p, q;
        -@p bra SPIN;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;      // <-- here
        bra DONE;
        SPIN:
        bar.sync 1, 64;      // <-- here
        DONE:",
    )
    .threads(64)
    .cluster(2)
    .says("cluster barrier")
    .reports_at_one(Deadlock);
}
