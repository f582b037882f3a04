//! Accesses without an order between them.

use ptxsim::diagnostic::Kind::Race;

use super::case::Case;

#[test]
fn read_of_what_another_warp_writes() {
    Case::new(
        "xor.b32 r1, tid, 32;
        mad.lo.u32 r1, r1, 4, sh;
        st.shared.u32 [word], 0;
        bar.sync 0;
        st.shared.u32 [word], tid;    // <-- here
        +bar.sync 0;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .threads(128)
    .reports(Race);
}

#[test]
fn write_of_what_another_warp_still_reads() {
    Case::new(
        "xor.b32 r1, tid, 32;
        mad.lo.u32 r1, r1, 4, sh;
        st.shared.u32 [word], tid;
        bar.sync 0;
        ld.shared.u32 r2, [r1];    // <-- here
        +bar.sync 0;
        st.shared.u32 [word], 7;    // <-- here",
    )
    .threads(128)
    .reports(Race);
}

#[test]
fn writes_of_two_warps_to_the_same_words() {
    Case::new(
        "mad.lo.u32 r0, lane, 4, sh;
        setp.eq.u32 p, warp, 0;
        @p st.shared.u32 [r0], 1;    // <-- here
        +bar.sync 0;
        @!p st.shared.u32 [r0], 2;    // <-- here",
    )
    .threads(64)
    .says("tile")
    .reports(Race);
}

#[test]
fn only_arriving_at_a_barrier_orders_nothing_after_it() {
    Case::new(
        "mad.lo.u32 r0, lane, 4, sh;
        setp.eq.u32 p, warp, 0;
        @p bra PRODUCER;
        -bar.arrive 1, 64;
        +bar.sync 1, 64;
        ld.shared.u32 r1, [r0];    // <-- here
        bra DONE;
        PRODUCER:
        st.shared.u32 [r0], 1;    // <-- here
        -bar.sync 1, 64;
        +bar.arrive 1, 64;
        DONE:
        bar.sync 0;",
    )
    .threads(64)
    .reports(Race);
}

#[test]
fn exchange_between_lanes_without_a_barrier() {
    Case::new(
        "xor.b32 r1, tid, 1;
        mad.lo.u32 r1, r1, 4, sh;
        st.shared.u32 [word], tid;    // <-- here
        +bar.warp.sync -1;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .reports(Race);
}

#[test]
fn barrier_of_the_wrong_lanes() {
    Case::new(
        "xor.b32 r1, tid, 16;
        mad.lo.u32 r1, r1, 4, sh;
        st.shared.u32 [word], tid;    // <-- here
        setp.lt.u32 p, tid, 16;
        -@!p bra UPPER;
        -bar.warp.sync 0xffff;
        -bra JOIN;
        -UPPER:
        -bar.warp.sync 0xffff0000;
        -JOIN:
        +bar.warp.sync -1;
        ld.shared.u32 r2, [r1];    // <-- here",
    )
    .reports(Race);
}

#[test]
fn lanes_of_one_store_to_the_same_word() {
    Case::new(
        "-st.global.u32 [out], tid;    // <-- here
        +@leader st.global.u32 [out], tid;",
    )
    .reports(Race);
}

#[test]
fn one_value_by_all_lanes() {
    Case::new(
        "-st.global.u32 [out], lane;    // <-- here
        +st.global.u32 [out], 7;",
    )
    .reports(Race);
}

#[test]
fn two_blocks_that_write_the_same_word() {
    Case::new(
        "-mov.u64 d0, out;
        +mad.wide.u32 d0, block, 4, out;
        @leader st.global.u32 [d0], block;    // <-- here",
    )
    .blocks(3)
    .says("global out+0")
    .reports(Race);
}

#[test]
fn two_blocks_that_add_without_atomics() {
    Case::new(
        "@!leader bra DONE;
        -ld.global.u32 r0, [out];    // <-- here
        -add.u32 r0, r0, 1;
        -st.global.u32 [out], r0;    // <-- here
        +red.global.add.u32 [out], 1;
        DONE:",
    )
    .blocks(2)
    .reports(Race);
}

#[test]
fn plain_store_against_an_atomic() {
    Case::new(
        "setp.eq.u32 p, block, 0;
        and.pred p, p, leader;
        red.global.add.u32 [out], 1;    // <-- here
        -@p st.global.u32 [out], 5;    // <-- here
        +@p st.relaxed.gpu.global.u32 [out], 5;",
    )
    .blocks(2)
    .reports(Race);
}

#[test]
fn atomics_of_a_block_against_those_of_another() {
    Case::new(
        "-red.cta.global.add.u32 [out], 1;    // <-- here
        +red.gpu.global.add.u32 [out], 1;",
    )
    .blocks(2)
    .reports(Race);
}

/// The block that takes the last ticket, by `atom`, reads what the other has left; `fence` stands
/// before and behind.
fn last_block(fence: &str, atom: &str) -> Case {
    Case::new(&format!(
        "@!leader bra DONE;
        mov.u64 d1, ticket;
        mad.wide.u32 d0, block, 4, raw;
        st.global.u32 [d0], block;    // <-- here
        {fence}
        {atom}
        {fence}
        setp.ne.u32 p, r0, 1;
        @p bra DONE;
        xor.b32 r1, block, 1;
        mad.wide.u32 d0, r1, 4, raw;
        ld.global.u32 r2, [d0];    // <-- here
        DONE:"
    ))
    .blocks(2)
}

#[test]
fn ticket_without_fences() {
    let case = || last_block("+membar.gl;", "atom.global.add.u32 r0, [d1], 1;");
    case().reports(Race);
    case().co_resident().reports(Race);
}

#[test]
fn ticket_with_fences_of_the_block_only() {
    let fence = "-fence.acq_rel.cta;
        +fence.acq_rel.gpu;";
    last_block(fence, "atom.global.add.u32 r0, [d1], 1;").reports(Race);
}

#[test]
fn ticket_that_acquires_and_releases() {
    let atom = "-atom.relaxed.gpu.global.add.u32 r0, [d1], 1;
        +atom.acq_rel.gpu.global.add.u32 r0, [d1], 1;";
    last_block("", atom).reports(Race);
}

#[test]
fn flag_between_blocks_that_run_together() {
    Case::new(
        "@!leader bra DONE;
        setp.ne.u32 p, block, 0;
        @p bra READER;
        st.global.u32 [raw], 42;    // <-- here
        -st.relaxed.gpu.global.u32 [out], 1;
        +st.release.gpu.global.u32 [out], 1;
        bra DONE;
        READER:
        -ld.relaxed.gpu.global.u32 r0, [out];
        +ld.acquire.gpu.global.u32 r0, [out];
        setp.eq.u32 p, r0, 0;
        @p bra READER;
        ld.global.u32 r1, [raw];    // <-- here
        DONE:",
    )
    .blocks(2)
    .co_resident()
    .reports(Race);
}

#[test]
fn flag_that_is_an_ordinary_variable() {
    Case::new(
        "@!leader bra DONE;
        setp.ne.u32 p, block, 0;
        @p bra READER;
        -st.global.u32 [out], 1;    // <-- here
        +st.relaxed.gpu.global.u32 [out], 1;
        bra DONE;
        READER:
        -ld.global.u32 r0, [out];    // <-- here
        +ld.relaxed.gpu.global.u32 r0, [out];
        setp.eq.u32 p, r0, 0;
        @p bra READER;
        DONE:",
    )
    .blocks(2)
    .co_resident()
    .reports(Race);
}

#[test]
fn shared_memory_of_another_block_without_the_cluster_barrier() {
    Case::new(
        "xor.b32 r1, rank, 1;
        mapa.shared::cluster.u32 r2, word, r1;
        st.shared.u32 [word], 0;
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;
        st.shared.u32 [word], tid;    // <-- here
        +barrier.cluster.arrive.aligned;
        +barrier.cluster.wait.aligned;
        ld.shared::cluster.u32 r3, [r2];    // <-- here
        barrier.cluster.arrive.aligned;
        barrier.cluster.wait.aligned;",
    )
    .cluster(2)
    .reports(Race);
}

/// One thread of each block takes part for all of them, between two barriers of the block.
const GRID_BARRIER: &str = "mov.u64 d1, ticket;
    mad.lo.u32 r0, block, 64, tid;
    mad.wide.u32 d0, r0, 4, raw;
    st.global.u32 [d0], tid;    // <-- here
    bar.sync 0;
    @!leader bra ALL;
    +fence.acq_rel.gpu;
    red.relaxed.gpu.global.add.u32 [d1], 1;
    WAIT:
    ld.relaxed.gpu.global.u32 r1, [d1];
    setp.lt.u32 p, r1, 2;
    @p bra WAIT;
    +fence.acq_rel.gpu;
    ALL:
    bar.sync 0;
    xor.b32 r0, r0, 64;
    mad.wide.u32 d0, r0, 4, raw;
    ld.global.u32 r1, [d0];    // <-- here";

#[test]
fn grid_barrier_without_fences() {
    Case::new(GRID_BARRIER).threads(64).blocks(2).co_resident().reports(Race);
}

#[test]
fn atomics_and_relaxed_accesses_of_one_word() {
    Case::new(
        "atom.global.add.u32 r0, [out], 1;
        ld.relaxed.gpu.global.u32 r1, [out];
        st.volatile.global.u32 [out], r1;
        red.global.max.u32 [out], 7;",
    )
    .threads(64)
    .blocks(2)
    .is_clean();
}

#[test]
fn blocks_that_read_the_same_words() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, in;
        ld.global.nc.u32 r0, [d0];
        ld.global.u32 r1, [in];
        mad.lo.u32 r2, block, 32, tid;
        mad.wide.u32 d1, r2, 4, raw;
        st.global.u32 [d1], r0;
        ld.global.u32 r3, [d1];",
    )
    .blocks(3)
    .is_clean();
}

#[test]
fn elements_of_a_vector_that_overlap_another_lanes() {
    Case::new(
        "-mad.lo.u32 r0, tid, 8, sh;
        +mad.lo.u32 r0, tid, 16, sh;
        and.b32 r0, r0, -16;
        st.shared.v4.u32 [r0], {tid, tid, tid, tid};      // <-- here",
    )
    .reports(Race);
}

#[test]
fn neighbouring_bytes_are_no_race() {
    Case::new(
        "add.u32 r0, sh, tid;
        st.shared.u8 [r0], tid;
        bar.sync 0;
        xor.b32 r1, tid, 33;
        add.u32 r1, sh, r1;
        ld.shared.u8 r2, [r1];",
    )
    .threads(64)
    .is_clean();
}

#[test]
fn atomics_in_shared_memory_of_different_sizes() {
    Case::new(
        "@leader st.shared.u64 [sh], 0;
        bar.sync 0;
        setp.eq.u32 p, warp, 0;
        mov.u64 d0, 1;
        @p red.shared.add.u32 [sh], 1;      // <-- here
        -@!p red.shared.add.u64 [sh], d0;      // <-- here
        +@!p red.shared.add.u32 [sh], 1;",
    )
    .threads(64)
    .reports(Race);
}

#[test]
fn volatile_accesses_do_not_order_others() {
    Case::new(
        ".shared .align 4 .b8 flag[4];
        mov.u32 r0, flag;
        @leader st.shared.u32 [r0], 0;
        bar.sync 0;
        setp.ne.u32 q, lane, 0;
        @q bra DONE;
        @!leader bra READER;
        st.shared.u32 [sh], 1;      // <-- here
        +membar.cta;
        st.volatile.shared.u32 [r0], 1;
        bra DONE;
        READER:
        ld.volatile.shared.u32 r1, [r0];
        setp.eq.u32 q, r1, 0;
        @q bra READER;
        +membar.cta;
        ld.shared.u32 r2, [sh];      // <-- here
        DONE:",
    )
    .threads(64)
    .reports(Race);
}
