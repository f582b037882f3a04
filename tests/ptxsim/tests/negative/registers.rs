//! Registers without a value, and operands that are not allowed.

use ptxsim::diagnostic::Kind::{InvalidOperand, UninitialisedRegister};

use crate::case::Case;

#[test]
fn register_without_a_value_as_an_address() {
    Case::new(
        "+mov.u64 d0, in;
        ld.global.u32 r0, [d0];     // <-- here",
    )
    .says("d0")
    .reports(UninitialisedRegister);
}

#[test]
fn register_without_a_value_is_stored() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, out;
        +mov.u32 r0, 1;
        st.global.u32 [d0], r0;     // <-- here",
    )
    .says("r0")
    .reports(UninitialisedRegister);
}

#[test]
fn what_was_computed_from_a_register_without_a_value_is_stored() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, out;
        +mov.u32 r0, 1;
        add.u32 r1, r0, tid;
        st.global.u32 [d0], r1;     // <-- here",
    )
    .reports(UninitialisedRegister);
}

#[test]
fn half_of_a_pair_without_a_value() {
    // A conversion that reads the lower half alone finds a value there; the upper half has none.
    Case::new(
        "mad.wide.u32 d0, tid, 4, out;
        mov.u32 r0, 1;
        +mov.u32 r1, 0;
        mov.b64 d1, {r0, r1};
        cvt.u64.u32 d2, d1;
        cvt.u32.u64 r2, d2;
        st.global.u32 [d0], r2;
        cvt.u32.u64 r3, d1;
        st.global.u32 [d0], r3;
        shr.u64 d2, d1, 32;
        cvt.u32.u64 r3, d2;
        st.global.u32 [d0], r3;     // <-- here",
    )
    .reports(UninitialisedRegister);
}

#[test]
fn only_some_lanes_have_a_value() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, out;
        setp.lt.u32 p, tid, 5;
        +mov.u32 r0, 0;
        @p mov.u32 r0, 1;
        st.global.u32 [d0], r0;     // <-- here",
    )
    .says("lane 5")
    .reports(UninitialisedRegister);
}

#[test]
fn guard_without_a_value() {
    Case::new(
        "+setp.eq.u32 p, tid, 0;
        @p st.global.u32 [out], 1;     // <-- here",
    )
    .reports(UninitialisedRegister);
}

#[test]
fn branch_on_a_predicate_computed_from_nothing() {
    Case::new(
        "+mov.u32 r0, 3;
        setp.eq.u32 p, r0, 3;
        @p bra DONE;     // <-- here
        mov.u32 r1, 0;
        DONE:",
    )
    .reports(UninitialisedRegister);
}

#[test]
fn moving_a_register_without_a_value_is_no_mistake() {
    Case::new(
        "mov.u32 r1, r0;
        mov.b64 d0, {r1, tid};
        mov.b64 {r2, r3}, d0;
        mad.wide.u32 d1, tid, 4, out;
        setp.lt.u32 p, tid, 16;
        selp.u32 r4, tid, tid, p;
        st.global.u32 [d1], r4;",
    )
    .is_clean();
}

#[test]
fn integer_division_by_zero() {
    Case::new(
        "-mov.u32 r0, tid;
        +add.u32 r0, tid, 1;
        div.u32 r1, 100, r0;     // <-- here",
    )
    .says("lane 0")
    .reports(InvalidOperand);
}

#[test]
fn fragment_without_a_value() {
    Case::new(
        "mov.b32 r0, 0;
        mov.b32 f0, 0;
        mov.b32 f1, 0;
        mov.b32 f2, 0;
        +mov.b32 f3, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {f0, f1, f2, f3}, {r0, r0, r0, r0}, {r0, r0}, {f0, f1, f2, f3};    // <-- here",
    )
    .says("f3")
    .reports(UninitialisedRegister);
}

#[test]
fn shuffle_of_a_register_without_a_value_is_found_at_its_use() {
    Case::new(
        "mad.wide.u32 d0, tid, 4, out;
        setp.lt.u32 p, tid, 16;
        +mov.u32 r0, 0;
        @p mov.u32 r0, tid;
        shfl.sync.bfly.b32 r1, r0, 1, 31, -1;
        st.global.u32 [d0], r1;     // <-- here",
    )
    .says("lane 16")
    .reports(UninitialisedRegister);
}

#[test]
fn vote_on_a_predicate_without_a_value() {
    Case::new(
        "+setp.eq.u32 p, tid, 0;
        vote.sync.ballot.b32 r0, p, -1;     // <-- here",
    )
    .reports(UninitialisedRegister);
}
