//! Arithmetic, logic, comparisons and conversions against known values.

use ptxsim::diagnostic::Kind;
use ptxsim::{Arch, Arg, Device, Launch, LaunchError, Report};

use crate::run::parse;

/// Runs `body` on one warp: it finds its operands in %a, %b, %c (of 64 bits; lane l has row l of
/// `rows`, the last row repeated) and leaves its result in %d.
fn run(body: &str, rows: &[[u64; 3]]) -> Result<(Report, Vec<u64>), LaunchError> {
    let text = format!(
        ".version 8.8
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 in, .param .u64 out) {{
.reg .b64 %in, %out, %o, %a, %b, %c, %d, %x<4>;
.reg .b32 %t, %r<10>;
.reg .f32 %f<10>;
.reg .f64 %fd<4>;
.reg .b16 %h<10>;
.reg .pred %p, %q, %s, %n;
ld.param.u64 %in, [in];
ld.param.u64 %out, [out];
mov.u32 %t, %tid.x;
mul.wide.u32 %o, %t, 24;
add.s64 %in, %in, %o;
mul.wide.u32 %o, %t, 8;
add.s64 %out, %out, %o;
ld.global.u64 %a, [%in];
ld.global.u64 %b, [%in+8];
ld.global.u64 %c, [%in+16];
cvt.u32.u64 %r0, %a; cvt.u32.u64 %r1, %b; cvt.u32.u64 %r2, %c;
mov.b32 %f0, %r0; mov.b32 %f1, %r1; mov.b32 %f2, %r2;
cvt.u16.u64 %h0, %a; cvt.u16.u64 %h1, %b; cvt.u16.u64 %h2, %c;
mov.u64 %d, 0;
{body}
st.global.u64 [%out], %d;
ret;
}}
"
    );
    let mut device = Device::new(Arch::Sm90a);
    let all: Vec<[u64; 3]> = (0..32).map(|l| rows[l.min(rows.len() - 1)]).collect();
    let input = device.buffer("in", all.as_flattened());
    let output = device.uninitialised::<u64>("out", 32);
    let args = [Arg::Buffer(input), Arg::Buffer(output)];
    let report = device.launch(&parse(&text), "k", &Launch::linear(1, 32), &args)?;
    let result = device.read::<u64>(output).expect("all lanes have stored");
    Ok((report, result))
}

/// Each row: three operands and the result.
fn check(body: &str, rows: &[([u64; 3], u64)]) {
    let operands: Vec<_> = rows.iter().map(|r| r.0).collect();
    let (report, result) = run(body, &operands).expect(body);
    assert!(report.is_clean(), "{body}: {report}");
    for ((operands, expected), got) in rows.iter().zip(result) {
        assert_eq!(got, *expected, "{body} of {operands:x?}: {got:#x}, not {expected:#x}");
    }
}

/// A 32-bit instruction `op %r3, …` whose result is widened.
fn check32(instruction: &str, rows: &[([u64; 3], u64)]) {
    check(&format!("{instruction}\ncvt.u64.u32 %d, %r3;"), rows);
}

fn check_f32(instruction: &str, rows: &[([f32; 3], f32)]) {
    let bits = |x: f32| u64::from(x.to_bits());
    let rows: Vec<_> = rows.iter().map(|(o, d)| (o.map(bits), bits(*d))).collect();
    check(&format!("{instruction}\nmov.b32 %r3, %f3;\ncvt.u64.u32 %d, %r3;"), &rows);
}

fn check_predicate(instruction: &str, rows: &[([u64; 3], bool)]) {
    let rows: Vec<_> = rows.iter().map(|(o, d)| (*o, u64::from(*d))).collect();
    check(&format!("{instruction}\nselp.b64 %d, 1, 0, %p;"), &rows);
}

const MIN: u64 = 0x8000_0000;
const ONES: u64 = 0xFFFF_FFFF;
const NAN: f32 = f32::from_bits(0x7FFF_FFFF);
const TINY: f32 = f32::from_bits(1);

#[test]
fn integers() {
    check32("add.s32 %r3, %r0, %r1;", &[([0x7FFF_FFFF, 1, 0], MIN), ([ONES, 1, 0], 0)]);
    check32(
        "add.sat.s32 %r3, %r0, %r1;",
        &[([0x7FFF_FFFF, 1, 0], 0x7FFF_FFFF), ([MIN, ONES, 0], MIN)],
    );
    check32("sub.s32 %r3, %r0, %r1;", &[([0, 1, 0], ONES)]);
    check32("mul.lo.s32 %r3, %r0, %r1;", &[([ONES, ONES, 0], 1)]);
    check32("mul.hi.s32 %r3, %r0, %r1;", &[([ONES, 2, 0], ONES), ([MIN, MIN, 0], 0x4000_0000)]);
    check32("mul.hi.u32 %r3, %r0, %r1;", &[([ONES, ONES, 0], ONES - 1)]);
    check("mul.wide.s32 %d, %r0, %r1;", &[([ONES, 3, 0], -3i64 as u64), ([MIN, MIN, 0], 1 << 62)]);
    check("mul.wide.u32 %d, %r0, %r1;", &[([ONES, ONES, 0], ONES * ONES)]);
    check32("mad.lo.s32 %r3, %r0, %r1, %r2;", &[([7, ONES, 3], 0xFFFF_FFFC)]);
    check("mad.wide.s32 %d, %r0, %r1, %c;", &[([ONES, 2, 1], u64::MAX)]);
    check("mul.hi.u64 %d, %a, %b;", &[([u64::MAX, u64::MAX, 0], u64::MAX - 1)]);
    check32(
        "div.s32 %r3, %r0, %r1;",
        &[([-7i32 as u32 as u64, 2, 0], -3i32 as u32 as u64), ([MIN, ONES, 0], MIN)],
    );
    check32("rem.s32 %r3, %r0, %r1;", &[([-7i32 as u32 as u64, 2, 0], ONES), ([MIN, ONES, 0], 0)]);
    check32("div.u32 %r3, %r0, %r1;", &[([ONES, 2, 0], 0x7FFF_FFFF)]);
    check32("abs.s32 %r3, %r0;", &[([ONES, 0, 0], 1), ([MIN, 0, 0], MIN)]);
    check32("min.s32 %r3, %r0, %r1;", &[([ONES, 1, 0], ONES), ([MIN, 0, 0], MIN)]);
    check32("max.u32 %r3, %r0, %r1;", &[([ONES, 1, 0], ONES)]);
    check32("sad.s32 %r3, %r0, %r1, %r2;", &[([ONES, 1, 5], 7)]);
    check32("dp4a.s32.s32 %r3, %r0, %r1, %r2;", &[([0xFF01_0203, 0x0201_0101, 10], 14)]);
}

#[test]
fn carries_cross_words() {
    let add = "add.cc.u32 %r3, %r0, %r1;\naddc.u32 %r4, %r2, 0;\nmov.b64 %d, {%r3, %r4};";
    check(add, &[([ONES, 1, 5], 6 << 32), ([1, 1, 5], 5 << 32 | 2)]);
    let sub = "sub.cc.u32 %r3, %r0, %r1;\nsubc.u32 %r4, %r2, 0;\nmov.b64 %d, {%r3, %r4};";
    check(sub, &[([0, 1, 5], 4 << 32 | ONES), ([1, 1, 5], 5 << 32)]);
}

#[test]
fn bits() {
    check32("popc.b32 %r3, %r0;", &[([ONES, 0, 0], 32), ([0, 0, 0], 0)]);
    check32("clz.b32 %r3, %r0;", &[([1, 0, 0], 31), ([0, 0, 0], 32)]);
    check32("brev.b32 %r3, %r0;", &[([1, 0, 0], MIN)]);
    check32("bfind.s32 %r3, %r0;", &[([ONES, 0, 0], ONES), ([0x10, 0, 0], 4)]);
    check32("bfe.s32 %r3, %r0, %r1, %r2;", &[([0xF0, 4, 4], ONES), ([0xF0, 4, 0], 0)]);
    check32("bfe.u32 %r3, %r0, 28, 8;", &[([0xF000_0000, 0, 0], 15)]);
    check32("bfi.b32 %r3, %r0, %r1, 8, 4;", &[([0xFFF, 0, 0], 0xF00)]);
    check32("prmt.b32 %r3, %r0, %r1, 0x5410;", &[([0xAAAA_1111, 0xBBBB_2222, 0], 0x2222_1111)]);
    check32("shf.l.wrap.b32 %r3, %r0, %r1, %r2;", &[([MIN, 1, 33], 3)]);
    check32("shf.r.clamp.b32 %r3, %r0, %r1, %r2;", &[([MIN, 7, 40], 7)]);
    check32("shl.b32 %r3, %r0, %r1;", &[([1, 31, 0], MIN), ([1, 32, 0], 0), ([1, ONES, 0], 0)]);
    check32("shr.s32 %r3, %r0, %r1;", &[([MIN, 31, 0], ONES), ([MIN, 99, 0], ONES)]);
    check32("shr.u32 %r3, %r0, %r1;", &[([MIN, 31, 0], 1), ([MIN, 32, 0], 0)]);
    check32("lop3.b32 %r3, %r0, %r1, %r2, 0x96;", &[([0xF0, 0xCC, 0xAA], 0xF0 ^ 0xCC ^ 0xAA)]);
    check32("cnot.b32 %r3, %r0;", &[([0, 0, 0], 1), ([9, 0, 0], 0)]);
    let lop = "setp.ne.s32 %q, %r2, 0;\nlop3.or.b32 %r3|%p, %r0, %r1, 0, 0xC0, %q;";
    check_predicate(lop, &[([1, 2, 0], false), ([3, 1, 0], true), ([1, 2, 1], true)]);
}

#[test]
fn comparisons() {
    check_predicate("setp.lt.s32 %p, %r0, %r1;", &[([ONES, 0, 0], true), ([0, 0, 0], false)]);
    check_predicate("setp.lt.u32 %p, %r0, %r1;", &[([ONES, 0, 0], false)]);
    let nan = u64::from(NAN.to_bits());
    for (name, holds) in [("eq", false), ("ne", false), ("neu", true), ("geu", true), ("nan", true)]
    {
        check_predicate(&format!("setp.{name}.f32 %p, %f0, %f1;"), &[([nan, 0, 0], holds)]);
    }
    check_predicate("setp.eq.f32 %p, %f0, %f1;", &[([MIN, 0, 0], true), ([1, 0, 0], false)]);
    check_predicate("setp.eq.ftz.f32 %p, %f0, %f1;", &[([1, 0, 0], true)]);
    let third = "setp.ne.s32 %n, %r2, 0;\nsetp.lt.and.s32 %q|%p, %r0, %r1, !%n;";
    check_predicate(third, &[([2, 1, 0], true), ([1, 2, 0], false), ([2, 1, 1], false)]);
    check32("set.le.u32.f16x2 %r3, %r0, %r1;", &[([0x3C00_4000, 0x3C00_3C00, 0], 0xFFFF_0000)]);
    check32("slct.b32.s32 %r3, %r0, %r1, %r2;", &[([1, 2, MIN], 2), ([1, 2, 0], 1)]);
    check_predicate("testp.normal.f32 %p, %f0;", &[([0, 0, 0], true), ([1, 0, 0], false)]);
    check_predicate("testp.subnormal.f32 %p, %f0;", &[([0, 0, 0], false), ([1, 0, 0], true)]);
}

#[test]
fn floats() {
    let ulp = f32::EPSILON;
    check_f32(
        "add.f32 %f3, %f0, %f1;",
        &[([f32::INFINITY, f32::NEG_INFINITY, 0.0], NAN), ([TINY, TINY, 0.0], 2.0 * TINY)],
    );
    check_f32(
        "add.ftz.f32 %f3, %f0, %f1;",
        &[([TINY, TINY, 0.0], 0.0), ([-TINY, -TINY, 0.0], -0.0)],
    );
    check_f32("add.rp.f32 %f3, %f0, %f1;", &[([1.0, TINY, 0.0], 1.0 + ulp)]);
    check_f32("mul.sat.f32 %f3, %f0, %f1;", &[([3.0, 2.0, 0.0], 1.0), ([NAN, 2.0, 0.0], 0.0)]);
    let (x, y) = (1.0 + ulp, 1.0 - ulp);
    check_f32("fma.rn.f32 %f3, %f0, %f1, %f2;", &[([x, y, -1.0], x.mul_add(y, -1.0))]);
    check_f32("fma.rm.f32 %f3, %f0, %f1, %f2;", &[([1.0, 1.0, -TINY], 1.0 - ulp / 2.0)]);
    check_f32(
        "div.rn.f32 %f3, %f0, %f1;",
        &[([1.0, 3.0, 0.0], 1.0 / 3.0), ([1.0, -0.0, 0.0], f32::NEG_INFINITY)],
    );
    check_f32("div.approx.f32 %f3, %f0, %f1;", &[([1.0, f32::MAX, 0.0], 0.0)]);
    check_f32("min.f32 %f3, %f0, %f1;", &[([NAN, 1.0, 0.0], 1.0), ([0.0, -0.0, 0.0], -0.0)]);
    check_f32("max.NaN.f32 %f3, %f0, %f1;", &[([NAN, 1.0, 0.0], NAN)]);
    check_f32("copysign.f32 %f3, %f0, %f1;", &[([-1.0, 2.0, 0.0], -2.0)]);
    check_f32(
        "ex2.approx.f32 %f3, %f0;",
        &[([f32::NEG_INFINITY, 0.0, 0.0], 0.0), ([3.0, 0.0, 0.0], 8.0)],
    );
    check_f32(
        "lg2.approx.f32 %f3, %f0;",
        &[([0.0, 0.0, 0.0], f32::NEG_INFINITY), ([-1.0, 0.0, 0.0], NAN)],
    );
    check_f32("sqrt.rn.f32 %f3, %f0;", &[([2.0, 0.0, 0.0], 2f32.sqrt()), ([-0.0, 0.0, 0.0], -0.0)]);
    check_f32("rcp.approx.ftz.f32 %f3, %f0;", &[([TINY, 0.0, 0.0], f32::INFINITY)]);
}

#[test]
fn halves() {
    // 1 + 2^-8 is a tie in bf16 and goes to even; the upper halves are added apart.
    check32("add.rn.bf16x2 %r3, %r0, %r1;", &[([0x4000_3F80, 0x4000_3B80, 0], 0x4080_3F80)]);
    check32(
        "fma.rn.relu.f16x2 %r3, %r0, %r1, %r2;",
        &[([0x3C00_BC00, 0x4000_4000, 0], 0x4000_0000)],
    );
    check32("max.NaN.bf16x2 %r3, %r0, %r1;", &[([0x7FC0_3F80, 0x3F80_4000, 0], 0x7FFF_4000)]);
    check32(
        "min.xorsign.abs.f16x2 %r3, %r0, %r1;",
        &[([0xBC00_3C00, 0x4000_C000, 0], 0xBC00_BC00)],
    );
    check32("neg.f16x2 %r3, %r0;", &[([0x3C00_8000, 0, 0], 0xBC00_0000)]);
}

#[test]
fn conversions() {
    let f = |x: f32| u64::from(x.to_bits());
    check32(
        "cvt.rn.bf16x2.f32 %r3, %f0, %f1;",
        &[([f(1.0), f(2.0), 0], 0x3F80_4000), ([f(NAN), f(f32::MAX), 0], 0x7FFF_7F80)],
    );
    check32(
        "cvt.rzi.s32.f32 %r3, %f0;",
        &[([f(-1.9), 0, 0], ONES), ([f(NAN), 0, 0], 0), ([f(1e20), 0, 0], 0x7FFF_FFFF)],
    );
    check("cvt.rzi.s64.f32 %d, %f0;", &[([f(NAN), 0, 0], 1 << 63)]);
    check32("cvt.rni.u32.f32 %r3, %f0;", &[([f(2.5), 0, 0], 2), ([f(-3.0), 0, 0], 0)]);
    check("cvt.s64.s32 %d, %r0;", &[([MIN, 0, 0], 0xFFFF_FFFF_8000_0000)]);
    check32("cvt.s8.s32 %r3, %r0;", &[([0x180, 0, 0], 0xFFFF_FF80)]);
    check32("cvt.sat.u8.s32 %r3, %r0;", &[([0x180, 0, 0], 0xFF), ([ONES, 0, 0], 0)]);
    check32("cvt.pack.sat.s16.s32 %r3, %r0, %r1;", &[([0x1_0000, 5, 0], 0x7FFF_0005)]);
    check32("cvt.rna.tf32.f32 %r3, %f0;", &[([0x3F80_1000, 0, 0], 0x3F80_2000)]);
    check_f32("cvt.sat.f32.f32 %f3, %f0;", &[([NAN, 0.0, 0.0], 0.0), ([7.0, 0.0, 0.0], 1.0)]);
    check(
        "cvt.f64.f32 %fd0, %f0;\ncvt.sat.f64.f64 %fd0, %fd0;\nmov.b64 %d, %fd0;",
        &[([f(NAN), 0, 0], 0)],
    );
}

#[test]
fn a_zero_divisor_is_reported() {
    let (report, _) = run("div.s32 %r3, %r0, %r1;", &[[1, 0, 0]]).expect("it launches");
    assert!(report.has(Kind::InvalidOperand), "{report}");
}

#[test]
fn an_unwritten_register_is_named() {
    let (report, _) = run("div.s32 %r3, %r0, %r7;", &[[1; 3]]).expect("it launches");
    let found = |d: &ptxsim::diagnostic::Diagnostic| {
        d.kind == Kind::UninitialisedRegister && d.message.contains("%r7")
    };
    assert!(report.diagnostics().any(found), "{report}");
}

#[test]
fn a_result_of_an_unwritten_register_is_found_where_it_is_used() {
    let (report, _) = run("add.u64 %d, %x3, 1;", &[[0; 3]]).expect("it launches");
    assert!(report.has(Kind::UninitialisedRegister), "{report}");
}

#[test]
fn an_unknown_modifier_is_an_error_with_its_line() {
    let error = run("add.fancy.s32 %r3, %r0, %r1;", &[[0; 3]]).expect_err("an error").to_string();
    assert!(error.contains(".fancy") && error.contains("32:"), "{error}");
}

#[test]
fn what_the_assembler_refuses_is_refused() {
    for (text, what) in [
        ("cvt.s32.f32 %r3, %r0;", ".rzi"),
        ("cvt.rn.s32.f32 %r3, %r0;", ".rzi"),
        ("cvt.f32.s32 %r3, %r0;", ".rn"),
        ("cvt.rn.u32.s32 %r3, %r0;", "nothing is rounded"),
        ("fma.f32 %r3, %r0, %r1, %r2;", "rounding"),
        ("rcp.f32 %r3, %r0;", ".approx"),
        ("mul.s32 %r3, %r0, %r1;", ".lo"),
        ("setp.s32 %p1, %r0, %r1;", "comparison"),
        ("shl.b32 %r3, %r0;", "operands"),
        ("frobnicate.b32 %r3, %r0;", "frobnicate"),
    ] {
        let error = run(text, &[[0; 3]]).expect_err(text).to_string();
        assert!(error.contains(what), "{text}: {error}");
    }
}
