//! Launches that are refused, traps, bank conflicts, results that depend on the schedule.

use ptxsim::diagnostic::Kind;
use ptxsim::{Arch, Arg, Device, Launch, LaunchError};

use super::case::Case;
use crate::run::parse;

const SMALL: &str = ".version 8.6
    .target sm_80
    .address_size 64
    .visible .entry k(.param .u64 a, .param .u32 n) .maxntid 256, 1, 1
    { ret; }
    .visible .entry exact() .reqntid 64, 1, 1
    { ret; }
    .visible .entry large(.param .align 4 .b8 a[4100])
    { ret; }
    .visible .entry fixed()
    {
    .shared .align 4 .b8 tile[49152];
    .reg .b32 r;
    mov.u32 r, tile;
    ret;
    }
    .visible .entry too_large()
    {
    .shared .align 4 .b8 tile[49156];
    .reg .b32 r;
    mov.u32 r, tile;
    ret;
    }";

/// Launches a kernel of `SMALL`; clean, or the refusal.
fn launch(arch: Arch, kernel: &str, launch: Launch, args: &[Arg]) -> Result<(), LaunchError> {
    let report = Device::new(arch).launch(&parse(SMALL), kernel, &launch, args)?;
    assert!(report.is_clean(), "{report}");
    Ok(())
}

#[track_caller]
fn refused(result: Result<(), LaunchError>, words: &str) {
    match result {
        Err(e @ LaunchError::Limit { .. }) => {
            assert!(e.to_string().contains(words), "{e} does not say {words}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn shared_memory_of_a_block() {
    for (arch, most) in [(Arch::Sm80, 166_912), (Arch::Sm89, 101_376), (Arch::Sm90a, 232_448)] {
        let of = |bytes| launch(arch, "exact", Launch::linear(1, 64).shared(bytes), &[]);
        assert!(of(most).is_ok(), "{arch}");
        refused(of(most + 1), "shared memory");
    }
    // Static and dynamic memory together.
    let of = |bytes| launch(Arch::Sm80, "fixed", Launch::linear(1, 64).shared(bytes), &[]);
    assert!(of(166_912 - 49_152).is_ok());
    refused(of(166_912 - 49_151), "shared memory");
}

#[test]
fn static_shared_memory() {
    assert!(launch(Arch::Sm90a, "fixed", Launch::linear(1, 32), &[]).is_ok());
    refused(launch(Arch::Sm90a, "too_large", Launch::linear(1, 32), &[]), "static shared memory");
}

#[test]
fn threads_of_a_block() {
    let of = |threads| launch(Arch::Sm80, "fixed", Launch::linear(1, threads), &[]);
    assert!(of(1024).is_ok());
    refused(of(1025), "1024 threads");
    refused(of(0), "0");
    let deep = Launch { block: [1, 1, 65], ..Launch::linear(1, 1) };
    refused(launch(Arch::Sm80, "fixed", deep, &[]), "64 in z");
}

#[test]
fn grid() {
    let of = |grid| launch(Arch::Sm80, "fixed", Launch { grid, ..Launch::linear(1, 32) }, &[]);
    assert!(of([1, 3, 2]).is_ok());
    refused(of([1, 65_536, 1]), "the grid");
    refused(of([1, 0, 1]), "0");
}

#[test]
fn directives_of_the_kernel() {
    let args = [Arg::U64(0), Arg::I32(0)];
    assert!(launch(Arch::Sm80, "k", Launch::linear(1, 256), &args).is_ok());
    refused(launch(Arch::Sm80, "k", Launch::linear(1, 257), &args), ".maxntid");
    assert!(launch(Arch::Sm80, "exact", Launch::linear(1, 64), &[]).is_ok());
    refused(launch(Arch::Sm80, "exact", Launch::linear(1, 32), &[]), ".reqntid");
}

#[test]
fn clusters() {
    let of = |arch, grid, cluster| {
        let cluster = [cluster, 1, 1];
        launch(arch, "fixed", Launch { cluster, ..Launch::linear(grid, 32) }, &[])
    };
    assert!(of(Arch::Sm90a, 16, 16).is_ok());
    refused(of(Arch::Sm90a, 32, 32), "cluster");
    refused(of(Arch::Sm90a, 3, 2), "multiple of the cluster");
    refused(of(Arch::Sm80, 2, 2), "cluster");
}

#[test]
fn registers_of_a_block() {
    let of = |threads, registers| {
        let registers = Some(registers);
        launch(Arch::Sm90a, "fixed", Launch { registers, ..Launch::linear(1, threads) }, &[])
    };
    assert!(of(384, 168).is_ok());
    refused(of(384, 176), "registers");
    // Nine warps take the place of twelve.
    assert!(of(288, 168).is_ok() && of(256, 176).is_ok());
    refused(of(288, 176), "registers");
}

#[test]
fn number_and_size_of_the_arguments() {
    let of = |args: &[Arg]| launch(Arch::Sm80, "k", Launch::linear(1, 32), args);
    assert!(of(&[Arg::U64(0), Arg::I32(0)]).is_ok());
    match of(&[Arg::U64(0)]) {
        Err(LaunchError::ArgumentCount { expected: 2, given: 1, .. }) => {}
        other => panic!("{other:?}"),
    }
    match of(&[Arg::U64(0), Arg::I64(0)]) {
        Err(LaunchError::ArgumentSize { index: 1, expected: 4, given: 8, .. }) => {}
        other => panic!("{other:?}"),
    }
    let large = |arch| launch(arch, "large", Launch::linear(1, 32), &[Arg::Bytes(vec![0; 4100])]);
    assert!(large(Arch::Sm90a).is_ok());
    refused(large(Arch::Sm80), "parameters");
}

#[test]
fn unknown_kernel() {
    match launch(Arch::Sm80, "other", Launch::linear(1, 32), &[]) {
        Err(LaunchError::UnknownKernel { known, .. }) => assert!(known.contains("exact")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn trap() {
    Case::new(
        "setp.gt.u32 p, tid, 31;
        -setp.eq.u32 p, tid, 9;
        @p trap;      // <-- here",
    )
    .says("lane 9")
    .reports(Kind::Trap);
}

/// Lane i reads row i of 32 rows of 128 bytes, 16 bytes at a time, with or without a swizzle.
const ROWS: &str = "mad.lo.u32 r0, tid, 128, sh;
    mov.u32 r1, 0;
    +and.b32 r1, tid, 7;
    +shl.b32 r1, r1, 4;
    add.u32 r0, r0, r1;
    st.shared.v4.u32 [r0], {tid, tid, tid, tid};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r2, r3, r4, r5}, [r0];     // <-- here";

#[test]
fn bank_conflicts_are_counted() {
    let case = Case::new(ROWS);
    let run = |sign| {
        let (text, marks) = case.text(sign);
        let (mut device, _, args) = case.device();
        let report = device.launch(&parse(&text), "k", &Launch::linear(1, 32), &args);
        let report = report.unwrap_or_else(|e| panic!("{e}"));
        assert!(report.is_clean(), "{report}");
        let at = |line: u32| report.lines.iter().find(|l| l.ptx_line == line).map(|l| l.shared);
        (at(marks[0]).expect("executed"), at(marks[0] - 2).expect("executed"))
    };
    // 8 rows of a matrix, or the 8 lanes of a quarter warp, in the same 4 banks: 8 phases for one.
    let (load, store) = run('-');
    assert_eq!((load.phases, load.excess), (32, 28));
    assert_eq!((store.phases, store.excess), (32, 28));
    let (load, store) = run('+');
    assert_eq!((load.phases, load.excess), (4, 0));
    assert_eq!((store.phases, store.excess), (4, 0));
}

/// The last warp to exchange decides, or each keeps its own word.
const EXCHANGE: &str = "setp.ne.u32 p, lane, 0;
    @p bra DONE;
    mov.u64 d0, out;
    +mad.wide.u32 d0, warp, 4, out;
    atom.global.exch.b32 r0, [d0], tid;
    DONE:";

#[test]
fn results_that_depend_on_the_schedule() {
    let case = Case::new(EXCHANGE);
    let explore = |sign| {
        let module = parse(&case.text(sign).0);
        let (mut device, _, args) = case.device();
        let report = device.explore(&module, "k", &Launch::linear(1, 256), &args, 8);
        report.unwrap_or_else(|e| panic!("{e}"))
    };
    let report = explore('-');
    let found = report.diagnostics().find(|d| d.kind == Kind::ScheduleDependent);
    let place = found.and_then(|d| d.address.clone()).map(|a| a.buffer);
    assert_eq!(place.as_deref(), Some("out"), "{report}");
    let report = explore('+');
    assert!(report.is_clean(), "{report}");
}

// ---- launches that begin before the one before has ended

#[test]
fn an_early_launch_touches_nothing_before_it_waits() {
    let case = "+griddepcontrol.wait;
        mad.wide.u32 d0, tid, 4, in;
        ld.global.u32 r0, [d0];   // <-- here
        -griddepcontrol.wait;
        mov.u32 r1, r0;";
    Case::new(case).early().says("touches global memory").reports(Kind::MissingGridWait);
    // A wait of some lanes is none of the others.
    let some = "setp.eq.u32 p, lane, 0;
        +griddepcontrol.wait;
        -@p griddepcontrol.wait;
        st.global.u32 [out], lane;   // <-- here
        mov.u32 r1, 0;";
    let one = some.replace("st.global", "@p st.global").replace("-@p", "-@!p");
    Case::new(&one).early().says("touches global memory").reports(Kind::MissingGridWait);
    // Without the attribute the launch before is complete.
    Case::new(case).both_are_clean();
}

#[test]
fn an_early_launch_waits_before_the_next_may_begin() {
    let case = "+griddepcontrol.wait;
        griddepcontrol.launch_dependents;   // <-- here
        -griddepcontrol.wait;
        mov.u32 r1, 0;";
    Case::new(case).early().says("lets the next launch begin").reports(Kind::MissingGridWait);
}

/// Else the launches behind could take it for the end of all before.
#[test]
fn an_early_launch_does_not_end_before_it_has_waited() {
    let case = "setp.ne.u32 p, block, 0;
        +griddepcontrol.wait;
        @p exit;   // <-- here
        -griddepcontrol.wait;
        mov.u32 r1, 0;";
    Case::new(case).blocks(2).early().says("ends before").reports(Kind::MissingGridWait);
}
