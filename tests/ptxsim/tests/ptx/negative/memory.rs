//! Bounds, alignment, memory that nobody has written.

use ptxsim::diagnostic::Kind::{InvalidOperand, Misaligned, OutOfBounds, UninitialisedMemory};

use super::case::Case;

#[test]
fn global_read_one_element_beyond_the_end() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, in;
        -ld.global.u32 r0, [d0+900];    // <-- here
        +ld.global.u32 r0, [d0+896];",
    )
    .says("global in+1024")
    .says("lane 31")
    .reports(OutOfBounds);
}

#[test]
fn global_write_one_element_before_the_start() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, out;
        -st.global.u32 [d0+-4], tid;    // <-- here
        +st.global.u32 [d0+0], tid;",
    )
    .says("global out-4")
    .says("lane 0")
    .reports(OutOfBounds);
}

#[test]
fn the_source_line_is_named() {
    Case::new(
        ".loc 1 41 0
        mad.wide.u32 d0, tid, 4, in;
        .loc 1 42 7
        -ld.global.u32 r0, [d0+900];    // <-- here
        +ld.global.u32 r0, [d0+896];
        .loc 1 43 0
        ret;
        }
        .file 1 \"kernels/example.cu\"
        .visible .entry unused()
        {",
    )
    .says("kernels/example.cu:42 ")
    .reports(OutOfBounds);
}

#[test]
fn vector_that_reaches_beyond_the_end() {
    Case::new(
        "-ld.global.v4.u32 {r0, r1, r2, r3}, [in+1024];  // <-- here
        +ld.global.v4.u32 {r0, r1, r2, r3}, [in+1008];",
    )
    .reports(OutOfBounds);
}

#[test]
fn atomic_beyond_the_end() {
    Case::new(
        "-red.global.add.u32 [out+1024], 1;  // <-- here
        +red.global.add.u32 [out+1020], 1;",
    )
    .reports(OutOfBounds);
}

#[test]
fn shared_access_between_two_variables() {
    Case::new(
        ".shared .align 4 .b8 first[128];
        .shared .align 4 .b8 second[128];
        mov.u32 r0, first;
        mad.lo.u32 r0, tid, 4, r0;
        -st.shared.u32 [r0+4], tid;      // <-- here
        +st.shared.u32 [r0], tid;",
    )
    .says("shared first+128")
    .reports(OutOfBounds);
}

#[test]
fn shared_access_before_the_first_variable() {
    Case::new(
        "-st.shared.u32 [word+-4], tid;     // <-- here
        +st.shared.u32 [word], tid;",
    )
    .says("shared tile-4")
    .reports(OutOfBounds);
}

#[test]
fn generic_address_of_shared_memory_beyond_the_end() {
    Case::new(
        ".shared .align 4 .b8 first[128];
        mov.u64 d0, first;
        cvta.shared.u64 d0, d0;
        mad.wide.u32 d0, tid, 4, d0;
        -st.u32 [d0+4], tid;     // <-- here
        +st.u32 [d0], tid;",
    )
    .reports(OutOfBounds);
}

#[test]
fn local_access_beyond_the_frame() {
    Case::new(
        ".local .align 4 .b8 frame[16];
        mov.u64 d0, frame;
        -st.local.u32 [d0+16], tid;      // <-- here
        +st.local.u32 [d0+12], tid;",
    )
    .reports(OutOfBounds);
}

#[test]
fn local_access_between_two_variables() {
    Case::new(
        ".local .align 4 .b8 first[16];
        .local .align 4 .b8 second[16];
        mov.u64 d0, first;
        -st.local.u32 [d0+16], tid;      // <-- here
        +st.local.u32 [d0+12], tid;
        mov.u64 d0, second;
        st.local.u32 [d0], tid;",
    )
    .reports(OutOfBounds);
}

#[test]
fn pointer_that_nothing_has_allocated() {
    Case::new(
        "-mov.u64 d0, 64;
        +mov.u64 d0, in;
        ld.global.u32 r0, [d0];     // <-- here",
    )
    .says("no allocation")
    .reports(OutOfBounds);
}

#[test]
fn write_to_constant_memory() {
    Case::new(
        "-mov.u64 d0, table;
        +mov.u64 d0, out;
        -cvta.const.u64 d0, d0;
        @leader st.u32 [d0], 7;     // <-- here
        ret;
        }
        .const .align 4 .u32 table[4] = {1, 2, 3, 4};
        .visible .entry unused()
        {",
    )
    .reports(OutOfBounds);
}

#[test]
fn tile_whose_tensor_is_longer_than_its_buffer() {
    let text = "@!leader bra DONE;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 128;
        -mov.u32 r1, 32;
        +mov.u32 r1, 28;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, r1}], [mbar];   // <-- here
        WAIT:
        mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        @!p bra WAIT;
        DONE:";
    Case::new(text).mbarrier(1).rows(40).says("global in+1024").reports(OutOfBounds);
}

#[test]
fn vector_load_at_half_its_alignment() {
    Case::new(
        "-ld.global.v4.u32 {r0, r1, r2, r3}, [in+8];     // <-- here
        +ld.global.v4.u32 {r0, r1, r2, r3}, [in+16];",
    )
    .says("16 bytes")
    .reports(Misaligned);
}

#[test]
fn matrix_row_at_half_its_alignment() {
    Case::new(
        "mad.lo.u32 r4, tid, 32, sh;
        st.shared.v4.u32 [r4], {tid, tid, tid, tid};
        st.shared.v4.u32 [r4+16], {tid, tid, tid, tid};
        bar.warp.sync -1;
        -add.u32 r4, r4, 8;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r0, r1, r2, r3}, [r4];     // <-- here",
    )
    .says("16 bytes")
    .reports(Misaligned);
}

#[test]
fn shared_memory_that_is_aligned_by_chance() {
    Case::new(
        "-.shared .align 8 .b8 quads[512];
        +.shared .align 16 .b8 quads[512];
        mov.u32 r0, quads;
        mad.lo.u32 r0, tid, 16, r0;
        st.shared.v4.u32 [r0], {tid, tid, tid, tid};   // <-- here",
    )
    .weakly_aligned()
    .reports(Misaligned);
}

#[test]
fn asynchronous_copy_to_a_misaligned_destination() {
    Case::new(
        "mad.wide.u32 d0, tid, 16, in;
        -add.u32 quad, quad, 8;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        cp.async.wait_all;",
    )
    .reports(Misaligned);
}

#[test]
fn asynchronous_copy_from_a_misaligned_source() {
    Case::new(
        "mad.wide.u32 d0, tid, 16, in;
        -cp.async.cg.shared.global [quad], [d0+4], 16;    // <-- here
        +cp.async.cg.shared.global [quad], [d0+16], 16;
        cp.async.wait_all;",
    )
    .reports(Misaligned);
}

#[test]
fn mbarrier_at_half_its_alignment() {
    Case::new(
        "@!leader bra DONE;
        -add.u32 mbar, mbar, 4;
        mbarrier.init.shared.b64 [mbar], 1;    // <-- here
        DONE:",
    )
    .reports(Misaligned);
}

#[test]
fn tile_at_half_its_alignment() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 128;
        -add.u32 sh, sh, 64;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in_map, {0, 0}], [mbar];   // <-- here
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        +@!p bra WAIT;
        DONE:",
    )
    .mbarrier(1)
    .reports(Misaligned);
}

#[test]
fn shared_memory_nobody_has_written() {
    Case::new(
        "st.shared.u32 [word], tid;
        bar.warp.sync -1;
        -ld.shared.u32 r1, [word+4];   // <-- here
        +ld.shared.u32 r1, [word];",
    )
    .says("tile+128")
    .reports(UninitialisedMemory);
}

#[test]
fn global_memory_nobody_has_written() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, raw;
        +st.global.u32 [d0], tid;
        ld.global.u32 r1, [d0];   // <-- here",
    )
    .says("global raw+0")
    .reports(UninitialisedMemory);
}

#[test]
fn half_a_word_nobody_has_written() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, raw;
        cvt.u16.u32 h0, tid;
        st.global.u16 [d0], h0;
        +st.global.u16 [d0+2], h0;
        ld.global.u32 r1, [d0];   // <-- here",
    )
    .reports(UninitialisedMemory);
}

#[test]
fn local_memory_nobody_has_written() {
    Case::new(
        ".local .align 4 .b8 frame[16];
        mov.u64 d0, frame;
        st.local.u32 [d0], tid;
        -ld.local.u32 r0, [d0+4];   // <-- here
        +ld.local.u32 r0, [d0];",
    )
    .reports(UninitialisedMemory);
}

#[test]
fn accumulation_onto_memory_nobody_has_written() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, raw;
        +st.global.u32 [d0], 0;
        red.global.add.u32 [d0], 1;   // <-- here",
    )
    .reports(UninitialisedMemory);
}

#[test]
fn matrix_row_beyond_the_end() {
    Case::new(
        ".shared .align 16 .b8 rows[512];
        mov.u32 r4, rows;
        mad.lo.u32 r4, tid, 16, r4;
        st.shared.v4.u32 [r4], {tid, tid, tid, tid};
        bar.warp.sync -1;
        -add.u32 r4, r4, 16;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r0, r1, r2, r3}, [r4];     // <-- here",
    )
    .says("lane 31")
    .reports(OutOfBounds);
}

#[test]
fn bulk_copy_from_a_misaligned_source() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 64;
        -add.u64 in, in, 8;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in], 64, [mbar];   // <-- here
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        +@!p bra WAIT;
        DONE:",
    )
    .mbarrier(1)
    .reports(Misaligned);
}

#[test]
fn bulk_copy_beyond_the_end() {
    Case::new(
        "@!leader bra DONE;
        mbarrier.arrive.expect_tx.shared.b64 _, [mbar], 64;
        -add.u64 in, in, 976;
        +add.u64 in, in, 960;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in], 64, [mbar];   // <-- here
        +WAIT:
        +mbarrier.try_wait.parity.shared.b64 p, [mbar], 0;
        +@!p bra WAIT;
        DONE:",
    )
    .mbarrier(1)
    .says("global in+976")
    .reports(OutOfBounds);
}

#[test]
fn asynchronous_copy_of_memory_nobody_has_written() {
    Case::new(
        "-mad.wide.u32 d0, tid, 16, raw;
        +mad.wide.u32 d0, tid, 16, in;
        cp.async.cg.shared.global [quad], [d0], 16;    // <-- here
        cp.async.wait_all;",
    )
    .reports(UninitialisedMemory);
}

#[test]
fn matrix_load_of_memory_nobody_has_written() {
    Case::new(
        "-st.shared.v2.u32 [quad], {tid, tid};
        +st.shared.v4.u32 [quad], {tid, tid, tid, tid};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r0, r1, r2, r3}, [quad];     // <-- here",
    )
    .reports(UninitialisedMemory);
}

#[test]
fn bulk_store_of_memory_nobody_has_written() {
    Case::new(
        "st.shared.u32 [word], tid;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @!leader bra DONE;
        -cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 144;    // <-- here
        +cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
        DONE:",
    )
    .reports(UninitialisedMemory);
}

/// Each thread has local memory of its own at one address.
#[test]
fn one_value_to_the_local_memory_of_all_lanes() {
    Case::new(
        ".local .align 4 .b8 mine[4];
        mov.u64 d0, mine;
        st.local.u32 [d0], 7;
        ld.local.u32 r0, [d0];
        mad.wide.u32 d1, tid, 4, out;
        st.global.u32 [d1], r0;",
    )
    .leaves(&[7; 32]);
}

/// A null pointer stays one.
#[test]
fn conversion_of_an_address_in_another_space() {
    Case::new(
        "-mov.u64 d0, in;
        +mov.u64 d0, 0;
        cvta.to.shared.u64 d1, d0;      // <-- here
        +st.global.u64 [out], d1;",
    )
    .says("does not lie in the space")
    .reports(InvalidOperand);
}
