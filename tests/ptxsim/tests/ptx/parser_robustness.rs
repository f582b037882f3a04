//! No text makes the parser panic, hang or overflow its stack.
use ptxsim::{
    ast::{Module, ParseError},
    parser::parse,
};
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

/// One of everything.
const SAMPLE: &str = r#"//
// Generated
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 128 .b8 smem[];
.global .align 8 .u64 table[2][2] = {{generic(smem)+8, -1}, {0x10U, 7-3}};
.const .f32 half = 0f3F000000; /* a é
comment */
.func (.param .b32 r) twice(.param .b32 x) .noreturn;
.visible .entry k(
	.param .u64 .ptr .global .align 16 k_param_0,
	.param .align 64 .b8 k_param_1[128]
)
.maxntid 128, 1, 1
.minnctapersm 2
{
	.reg .pred %p<3>;
	.reg .v4 .b32 quad;
	.loc	1 12 3, function_name $L__info_string0, inlined_at 1 20 5
	.pragma "nounroll";
	ld.param.b64 %rd1, [k_param_0+-8];
	@!%p1 bra $L__BB0_2;
	{ .reg .pred P1; LAB: mbarrier.try_wait.parity.shared::cta.b64 P1, [%r1], 0;
	@P1 bra LAB; }
	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd2, {%r3, _}], [%r4];
	elect.sync _|%p2, 0b11;
	call.uni (r), twice, (%r1);
	fma.rn.f64 %fd1, 1.5e2, 0d3FF0000000000000, quad.x;
$L__BB0_2:
	ret;
}
	.file	1 "dir/\"a\".cu", 17, 4
	.section	.debug_info
	{
.b32 .debug_abbrev // offset
.b64 $L__end-$L__begin
$L__end:
	}
"#;

/// Parses; an error must name a place in the text and say something.
fn check(text: &str) -> Result<Module, ParseError> {
    let result = parse(text);
    if let Err(error) = &result {
        let mut lines = text.split('\n');
        let line = lines.nth(error.pos.line as usize - 1);
        let columns = line.unwrap_or_else(|| panic!("no such line: {error}\n{text}")).chars();
        let column = error.pos.column as usize;
        assert!((1..=columns.count() + 1).contains(&column), "no such column: {error}\n{text}");
        assert!(!error.message.is_empty());
    }
    result
}

#[test]
fn every_prefix_is_an_error_or_a_shorter_module() {
    let whole = check(SAMPLE).expect("a module");
    let (mut modules, mut errors) = (0, 0);
    for (end, _) in SAMPLE.char_indices() {
        match check(&SAMPLE[..end]) {
            Ok(part) => {
                assert!(whole.functions.starts_with(&part.functions));
                assert!(whole.variables.starts_with(&part.variables));
                modules += 1;
            }
            Err(_) => errors += 1,
        }
    }
    assert!(modules > 10 && errors > 1000, "{modules} modules, {errors} errors");
}

#[test]
fn mutated_texts_never_panic() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut errors = 0;
    for _ in 0..40_000 {
        let mut bytes = SAMPLE.as_bytes().to_vec();
        for _ in 0..rng.random_range(1..4) {
            let (at, other) = (rng.random_range(0..bytes.len()), rng.random_range(0..bytes.len()));
            let length = rng.random_range(1..24usize);
            match rng.random_range(0..4) {
                0 => bytes[at] = rng.random(),
                1 => bytes[at] = rng.random_range(b' '..=b'~'),
                2 => drop(bytes.drain(at..(at + length).min(bytes.len()))),
                _ => {
                    let copy = bytes[other..(other + length).min(bytes.len())].to_vec();
                    bytes.splice(at..at, copy);
                }
            }
        }
        errors += usize::from(check(&String::from_utf8_lossy(&bytes)).is_err());
    }
    assert!((10_000..40_000).contains(&errors), "{errors} errors");
}

#[test]
fn random_tokens_never_panic() {
    const TOKENS: [&str; 64] = [
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "<",
        ">",
        ",",
        ";",
        ":",
        "|",
        "!",
        "@",
        "+",
        "-",
        "~",
        "=",
        "_",
        "%",
        ".",
        "$",
        "\"",
        "\\",
        "/*",
        "*/",
        "//",
        "\n",
        " ",
        "é",
        "\0",
        "a",
        "%r1",
        "%p",
        "%tid.x",
        ".reg",
        ".b32",
        ".v4",
        ".b128",
        ".f16",
        ".align",
        ".global",
        ".shared",
        ".param",
        ".entry k()",
        ".func f",
        ".loc 1 2 3",
        ".file 1",
        ".section .d",
        ".alias a, b;",
        ".attribute(",
        "generic(",
        "mov.b32",
        "ret;",
        "0x",
        "0f3F800000",
        "0d",
        "1.5",
        "1e999",
        "18446744073709551615",
        "0",
        "8",
        "inlined_at",
        ".global .b8 x[2][3] = {{",
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut modules = 0;
    for round in 0..60_000 {
        let mut text = String::from(".version 8.0 .target sm_80\n");
        // Half of the texts start in a body, where most of the grammar is.
        if round % 2 == 0 {
            text.push_str(".entry k() { ");
        }
        for _ in 0..rng.random_range(1..24) {
            text.push_str(TOKENS.choose(&mut rng).expect("a token"));
            if rng.random() {
                text.push(' ');
            }
        }
        modules += usize::from(check(&text).is_ok());
    }
    assert!(modules > 10, "{modules} modules");
}

#[test]
fn deep_nesting_is_refused() {
    let nested = |depth: usize| {
        let text = ".version 8.0 .target sm_80 .entry k() ".to_owned();
        text + &"{".repeat(depth) + &"}".repeat(depth)
    };
    assert!(check(&nested(64)).is_ok());
    let message = check(&nested(65)).expect_err("an error").to_string();
    assert_eq!(message, "1:103: expected at most 64 nested scopes, found more");
    for (start, opening) in [
        (".entry k() {", "{"),
        (".entry k() { op ", "{"),
        (".entry k() { op ", "("),
        (".entry k() { op ", "["),
        (".entry k() { op [a, ", "{"),
        (".entry k() { op ", "- "),
        (".entry k() { op ", "~"),
        (".entry k() { ", "@"),
        (".entry k() { op ", "!"),
        (".entry k", "("),
        (".global .b8 a[1][1][1][1][1][1][1][1] = ", "{"),
        (".global .b8 a", "["),
        (".global .attribute", "("),
        (".global .u64 a = ", "generic("),
        ("", ".section .s {"),
    ] {
        let text = format!(".version 8.0 .target sm_80 {start}{}", opening.repeat(100_000));
        assert!(check(&text).is_err(), "{start}{opening}");
    }
}
