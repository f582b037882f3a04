//! Registers without a value, and operands that are not allowed.

use ptxsim::diagnostic::Kind::{
    Deadlock, Divergence, InvalidOperand, Limit, UninitialisedRegister,
};
use ptxsim::{Launch, LaunchError, Report};

use super::case::Case;
use crate::run::parse;

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

/// A producer gives registers to two consumers: of 3 x 168, 24 + 2 x 240.
const POOL: &str = "setp.lt.u32 p, tid, 128;
    @p bra PRODUCER;
    setmaxnreg.inc.sync.aligned.u32 240;      // <-- here
    bra DONE;
    PRODUCER:
    -setmaxnreg.dec.sync.aligned.u32 32;
    +setmaxnreg.dec.sync.aligned.u32 24;
    DONE:";

#[test]
fn warpgroups_that_want_more_than_the_pool() {
    let case = || Case::new(POOL).threads(384).says("240 registers a thread");
    case().registers(168).reports(Deadlock);
    // The directives tell the same.
    case().directives(".maxntid 384 .minnctapersm 1").reports(Deadlock);
    case().directives(".maxnreg 168").reports(Deadlock);
}

#[test]
fn registers_are_left_before_they_are_taken() {
    Case::new(
        "setp.lt.u32 p, tid, 128;
        @p bra PRODUCER;
        -setmaxnreg.inc.sync.aligned.u32 240;      // <-- here
        bar.sync 1;
        +setmaxnreg.inc.sync.aligned.u32 240;
        bra DONE;
        PRODUCER:
        bar.sync 1;      // <-- here
        setmaxnreg.dec.sync.aligned.u32 24;
        DONE:",
    )
    .threads(384)
    .directives(".maxntid 384 .minnctapersm 1")
    .says("240 registers a thread: 168 are free")
    .reports_at_one(Deadlock);
}

#[test]
fn decrease_from_fewer_registers_than_that() {
    // Two blocks of 384 threads: 80 registers at entry.
    Case::new(
        "-setmaxnreg.dec.sync.aligned.u32 96;      // <-- here
        +setmaxnreg.dec.sync.aligned.u32 40;",
    )
    .threads(384)
    .directives(".maxntid 384 .minnctapersm 2")
    .says("decrease from 80 to 96")
    .reports(Limit);
}

#[test]
fn warps_of_a_warpgroup_set_different_numbers() {
    Case::new(
        "setp.lt.u32 p, tid, 64;
        -@p bra FIRST;
        setmaxnreg.dec.sync.aligned.u32 40;      // <-- here
        -bra DONE;
        -FIRST:
        -setmaxnreg.dec.sync.aligned.u32 32;     // <-- here
        -DONE:
        mov.u32 r0, 0;",
    )
    .threads(128)
    .registers(168)
    .says("another warp of the warpgroup")
    .reports_at_one(Divergence);
}

#[test]
fn one_warp_of_the_four_sets_its_number() {
    Case::new(
        "setp.lt.u32 p, tid, 32;
        -@!p bra DONE;
        setmaxnreg.dec.sync.aligned.u32 40;      // <-- here
        DONE:",
    )
    .threads(128)
    .registers(168)
    .says("not every warp")
    .reports(Divergence);
}

/// A kernel of 384 threads that decreases its registers, launched as the test says.
fn decrease(
    directives: &'static str,
    registers: Option<u32>,
) -> (Result<Report, LaunchError>, u32) {
    let case =
        Case::new("setmaxnreg.dec.sync.aligned.u32 40;      // <-- here").directives(directives);
    let (text, marks) = case.text('-');
    let (mut device, _, args) = case.device();
    let launch = Launch { registers, ..Launch::linear(1, 384) };
    (device.launch(&parse(&text), "k", &launch, &args), marks[0])
}

#[test]
fn setmaxnreg_that_the_assembler_ignores() {
    let warned = |directives, registers| {
        let (report, line) = decrease(directives, registers);
        let report = report.unwrap_or_else(|e| panic!("{e}"));
        assert!(report.is_clean(), "{report}");
        report.warnings().any(|w| w.at.ptx_line == line && w.message.contains("ptxas ignores it"))
    };
    assert!(warned("", None) && warned(".maxntid 384", None));
    assert!(!warned("", Some(168)) && !warned(".maxnreg 168", None));
    assert!(!warned(".maxntid 384 .minnctapersm 1", None));
}

#[test]
fn registers_that_the_directives_allow_and_the_block_does_not_have() {
    match decrease(".maxnreg 176", None).0 {
        Err(error @ LaunchError::Limit { .. }) => {
            assert!(error.to_string().starts_with("registers per block is 67584"), "{error}");
        }
        other => panic!("{:?}", other.map(|report| report.to_string())),
    }
}
