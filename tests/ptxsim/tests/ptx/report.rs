//! Findings and reports: what is kept, what is counted, how it reads.

use ptxsim::diagnostic::{Diagnostic, Findings, Kind, Location, Place};
use ptxsim::{Arch, Arg, Device, Launch};

use crate::run::{clean, launch, parse};

fn finding(kind: Kind, line: u32) -> Diagnostic {
    let at = |ptx_line, lane| Location {
        ptx_line,
        source: Some(("kernel.cu".into(), 7)),
        block: [1, 2, 3],
        warp: 4,
        lane,
    };
    Diagnostic {
        kind,
        message: "reads what another access wrote".into(),
        at: at(line, 5),
        other: Some(at(99, 6)),
        address: Some(Place { space: "shared".into(), buffer: "tile".into(), offset: -4 }),
        repeated: 1,
    }
}

#[test]
fn findings_are_one_for_each_kind_and_pair_of_instructions() {
    let mut found = Findings::default();
    for _ in 0..3 {
        found.add(10, Some(20), finding(Kind::Race, 1));
    }
    found.add(10, Some(21), finding(Kind::Race, 2));
    found.add(10, Some(20), finding(Kind::OutOfBounds, 3));
    let mut repeated: Vec<_> = found.iter().map(|d| (d.kind, d.repeated)).collect();
    repeated.sort();
    assert_eq!(repeated, [(Kind::OutOfBounds, 1), (Kind::Race, 1), (Kind::Race, 3)]);
    assert_eq!(found.dropped(), 0);
}

#[test]
fn a_flood_is_kept_short_and_counted() {
    let mut found = Findings::default();
    (0..1000).for_each(|pc| found.add(pc, None, finding(Kind::Race, pc)));
    assert_eq!((found.iter().count(), found.dropped()), (100, 900));
    let mut sum = Findings::default();
    sum.merge(found.clone());
    sum.merge(found);
    assert_eq!((sum.iter().count(), sum.dropped()), (100, 1800));
    assert!(sum.iter().all(|d| d.repeated == 2));
}

#[test]
fn a_finding_names_both_sides() {
    let text = finding(Kind::MissingProxyFence, 12).to_string();
    for part in [
        "missing-proxy-fence: reads what another access wrote",
        "kernel.cu:7 (PTX line 12), block (1, 2, 3), warp 4, lane 5",
        "shared tile-4",
        "PTX line 99",
        "lane 6",
    ] {
        assert!(text.contains(part), "{part:?} in {text:?}");
    }
}

#[test]
fn kinds_read_the_same_in_text_and_json() {
    for kind in [Kind::Race, Kind::UninitialisedRegister, Kind::MissingWgmmaFence, Kind::Deadlock] {
        let json = serde_json::to_string(&kind).expect("a string");
        assert_eq!(json, format!("\"{kind}\""));
    }
}

/// Adds 1 to each element of `data`; block i takes 32 of them.
const INCREMENT: &str = "
    .version 8.0 .target sm_80 .address_size 64
    .visible .entry increment(.param .u64 data) {
        .reg .b32 %r<8>; .reg .b64 %x<4>;
        .shared .b32 tile[1024];
        ld.param.u64 %x0, [data];
        mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
        mad.lo.u32 %r2, %r1, 32, %r0;
        mul.wide.u32 %x1, %r2, 4; add.u64 %x0, %x0, %x1;
        ld.global.u32 %r3, [%x0];
        mov.u32 %r5, tile; mul.lo.u32 %r6, %r0, 128; add.u32 %r5, %r5, %r6;
        st.shared.u32 [%r5], %r3;
        ld.shared.u32 %r3, [%r5];
        add.u32 %r4, %r3, 1;
        st.global.u32 [%x0], %r4;
        ret;
    }";

#[test]
fn counts_are_exact() {
    let mut device = Device::new(Arch::Sm80);
    let data = device.buffer("data", &(0..128u32).collect::<Vec<_>>());
    let report = clean(&mut device, INCREMENT, [4, 32], &[data.into()]);
    assert_eq!(device.read::<u32>(data).expect("written"), (1..129).collect::<Vec<_>>());
    assert_eq!(report.instructions(), 4 * 15);
    let b = report.buffer("data").expect("it was touched");
    assert_eq!((b.traffic.read, b.traffic.written), (512, 512));
    assert_eq!((b.traffic.read_sectors, b.traffic.written_sectors), (16, 16));
    assert_eq!((b.distinct_read, b.distinct_written, b.ratio()), (512, 512, 1.0));
    // All 32 lanes in one bank: 32 wavefronts for each store and load, 31 of them excess.
    let shared = report.shared_phases();
    assert_eq!((shared.phases, shared.excess), (4 * 64, 4 * 62));
    let json = serde_json::to_value(&report).expect("it serialises");
    assert_eq!(json["counts"]["warp_instructions"], 60);
    assert_eq!(json["bank_conflicts"]["excess"], 248);
    assert_eq!(json["global_bytes"]["data"]["distinct_read"], 512);
    assert_eq!(json["bound"]["limiter"], report.bound.limiter);
}

/// Lane i copies its 16 bytes, of which (i mod 3) · 8 come from the source.
const FILLING: &str = "
    .version 8.0 .target sm_80 .address_size 64
    .visible .entry fill(.param .u64 from) {
        .reg .b32 %r<6>; .reg .b64 %x<3>;
        .shared .align 16 .b8 tile[512];
        ld.param.u64 %x0, [from];
        mov.u32 %r0, %tid.x; mul.wide.u32 %x1, %r0, 16; add.u64 %x0, %x0, %x1;
        mov.u32 %r1, tile; mul.lo.u32 %r2, %r0, 16; add.u32 %r1, %r1, %r2;
        rem.u32 %r3, %r0, 3; mul.lo.u32 %r3, %r3, 8;
        cp.async.cg.shared.global [%r1], [%x0], 16, %r3;
        cp.async.wait_all;
        ret;
    }";

#[test]
fn bytes_that_are_filled_with_zeros_are_not_read() {
    let mut device = Device::new(Arch::Sm80);
    let from = device.buffer("from", &[1u32; 128]);
    let report = clean(&mut device, FILLING, [1, 32], &[from.into()]);
    let b = report.buffer("from").expect("it was touched");
    // 11 lanes read 8 bytes, 10 read 16: each reads a sector of its own among those of its size.
    assert_eq!((b.traffic.read, b.distinct_read), (11 * 8 + 10 * 16, 11 * 8 + 10 * 16));
    assert_eq!(b.traffic.read_sectors, 21);
}

#[test]
fn several_schedules_count_once() {
    let module = parse(INCREMENT);
    let mut device = Device::new(Arch::Sm80);
    let data = device.buffer("data", &[0u32; 128]);
    let launch = Launch::linear(4, 32);
    let report = device.explore(&module, "increment", &launch, &[data.into()], 4).expect("it runs");
    assert!(report.is_clean(), "{report}");
    assert_eq!((report.schedules.len(), report.instructions()), (4, 60));
    assert_eq!(device.read::<u32>(data).expect("written"), [1; 128]);
}

/// A bulk copy that completes on an mbarrier nobody has fenced.
const UNFENCED: &str = "
    .version 8.0 .target sm_90a .address_size 64
    .visible .entry copy(.param .u64 from) {
        .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %x<2>;
        .shared .align 16 .b8 tile[16];
        .shared .align 8 .b8 full[8];
        ld.param.u64 %x0, [from];
        mov.u32 %r0, tile; mov.u32 %r1, full;
        mbarrier.init.shared::cta.b64 [%r1], 1;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 16;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%x0], 16, [%r1];
    WAIT:
        mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r1], 0;
        @!%p0 bra WAIT;
        ret;
    }";

#[test]
fn what_hardware_forgives_is_a_warning() {
    for strict in [false, true] {
        let mut device = Device::new(Arch::Sm90a);
        device.options.strict_proxies = strict;
        let from = device.buffer("from", &[0u32; 4]);
        let report = launch(&mut device, UNFENCED, [1, 1], &[from.into()]);
        assert_eq!(report.is_clean(), !strict, "{report}");
        assert_eq!(report.has(Kind::MissingProxyFence), strict, "{report}");
        assert_eq!(report.warnings().count(), usize::from(!strict), "{report}");
        let json = serde_json::to_value(&report).expect("it serialises");
        let list = if strict { "races" } else { "warnings" };
        assert_eq!(json[list][0]["kind"], "missing-proxy-fence");
    }
}

#[test]
fn text_for_another_architecture_is_refused() {
    let module = parse(UNFENCED);
    let mut device = Device::new(Arch::Sm80);
    let from = device.buffer("from", &[0u32; 4]);
    let refused = device.launch(&module, "copy", &Launch::linear(1, 1), &[from.into()]);
    let error = refused.expect_err("a refusal").to_string();
    assert!(error.contains("sm_90a") && error.contains("sm_80"), "{error}");
}

#[test]
fn a_failed_assertion_ends_the_launch() {
    let text = "
        .version 8.0 .target sm_80 .address_size 64
        .extern .func __assertfail(.param .b64 message, .param .b32 line) .noreturn;
        .visible .entry asserts(.param .u32 limit) {
            .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %x<2>;
            ld.param.u32 %r0, [limit]; mov.u32 %r1, %tid.x;
            setp.lt.u32 %p0, %r1, %r0; @%p0 bra FINE;
            { .param .b64 message; .param .b32 line;
              mov.u64 %x0, 0; st.param.b64 [message], %x0;
              mov.u32 %r2, 7; st.param.b32 [line], %r2;
              call.uni __assertfail, (message, line);
            }
        FINE:
            ret;
        }";
    for (limit, fails) in [(32, false), (20, true)] {
        let mut device = Device::new(Arch::Sm80);
        let report = launch(&mut device, text, [1, 32], &[Arg::U32(limit)]);
        assert_eq!((report.has(Kind::Trap), report.is_clean()), (fails, !fails), "{report}");
    }
}

/// Counted where it is executed, line by line: not where the guard is false, nor where a poll fails.
#[test]
fn order_among_blocks_is_counted() {
    let text = "
        .version 8.0 .target sm_90a .address_size 64
        .visible .entry orders() {
            .reg .pred p; .reg .pred q; .reg .b32 r<4>;
            .shared .align 8 .b64 bar;
            mov.u32 r0, bar; mov.u32 r1, %tid.x; mov.u32 r2, 0;
            setp.eq.u32 q, r1, 0;
            @q mbarrier.init.shared::cta.b64 [r0], 1;
            bar.sync 0;
            LOOP:
            @q mbarrier.arrive.release.cluster.shared::cta.b64 _, [r0];
            WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [r0], r2;
            @!p bra WAIT;
            bar.sync 0;
            add.u32 r2, r2, 1;
            setp.lt.u32 p, r2, 2;
            @p bra LOOP;
            ret;
        }";
    let report = clean(&mut Device::new(Arch::Sm90a), text, [1, 96], &[]);
    let lines: Vec<_> = report.lines.iter().filter(|l| !l.order.is_none()).collect();
    let costs: Vec<_> =
        lines.iter().map(|l| (l.order.memory_barriers, l.order.invalidations)).collect();
    assert_eq!(costs, [(2, 0), (0, 6)]);
    assert_eq!((report.order().memory_barriers, report.order().invalidations), (2, 6));
    assert!(report.to_string().contains("PTX line 11, mbarrier.arrive.release"), "{report}");
}

/// A printf is known, and prints nothing.
#[test]
fn a_printf_changes_nothing() {
    let text = "
        .version 8.0 .target sm_80 .address_size 64
        .extern .func (.param .b32 result) vprintf (.param .b64 format, .param .b64 values);
        .visible .entry prints(.param .u64 out) {
            .reg .b32 %r<2>; .reg .b64 %x<3>;
            mov.u64 %x0, 0; mov.u32 %r0, 7;
            { .param .b64 format; .param .b64 values; .param .b32 result;
              st.param.b64 [format], %x0; st.param.b64 [values], %x0;
              call.uni (result), vprintf, (format, values);
              ld.param.b32 %r1, [result];
            }
            add.u32 %r0, %r0, %r1;
            ld.param.u64 %x1, [out];
            mov.u32 %r1, %tid.x;
            mad.wide.u32 %x1, %r1, 4, %x1;
            st.global.u32 [%x1], %r0;
            ret;
        }";
    let mut device = Device::new(Arch::Sm80);
    let out = device.uninitialised::<u32>("out", 32);
    clean(&mut device, text, [1, 32], &[out.into()]);
    assert_eq!(device.read::<u32>(out).expect("written"), [7; 32]);
}

/// Lanes that have ended are not waited for, by barriers of the block and of the cluster.
#[test]
fn lanes_that_end_early_hold_nobody_up() {
    let text = |barrier: &str| {
        format!(
            "
        .version 8.0 .target sm_90a .address_size 64
        .visible .entry ends(.param .u64 out) {{
            .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %x<4>;
            ld.param.u64 %x0, [out]; mov.u32 %r0, %tid.x;
            setp.ge.u32 %p0, %r0, 40; @%p0 ret;
            {barrier}
            mul.wide.u32 %x1, %r0, 4; add.u64 %x1, %x0, %x1;
            st.global.u32 [%x1], %r0;
            {barrier}
            ret;
        }}"
        )
    };
    for barrier in ["bar.sync 0;", "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"]
    {
        let mut device = Device::new(Arch::Sm90a);
        let out = device.uninitialised::<u32>("out", 40);
        clean(&mut device, &text(barrier), [1, 96], &[out.into()]);
        assert!(device.read::<u32>(out).expect("written").into_iter().eq(0..40));
    }
}

/// Half of the warp takes a path that lies behind the barrier in the text, and comes back.
#[test]
fn lanes_may_come_to_a_barrier_from_further_on() {
    let text = "
        .version 8.0 .target sm_80 .address_size 64
        .visible .entry out_of_line() {
            .reg .b32 %r<4>; .reg .pred %p;
            mov.u32 %r0, %tid.x;
            setp.lt.u32 %p, %r0, 16;
            @%p bra BEHIND;
            BACK: bar.sync 0;
            ret;
            BEHIND: add.u32 %r1, %r0, 1;
            bra BACK;
        }";
    clean(&mut Device::new(Arch::Sm80), text, [1, 64], &[]);
}
