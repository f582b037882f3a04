//! The parser against everything compilers write, and its words for what they do not.
use ptxsim::{
    ast::{
        Base, Directives, Function, Guard, Init, Instr, Item, Module, Operand, Pos, Space, Type,
        Variable,
    },
    parser::parse,
};

use crate::run::HEADER;

fn module(text: &str) -> Module {
    let text = format!("{HEADER}{text}");
    parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The error in `text`, which follows the three lines of the header.
fn refusal(text: &str) -> String {
    match parse(&format!("{HEADER}{text}")) {
        Ok(module) => panic!("accepted: {text}\n{module:#?}"),
        Err(error) => error.to_string(),
    }
}

fn body(text: &str) -> Vec<Item> {
    module(&format!(".entry k()\n{{\n{text}\n}}")).functions.remove(0).body.expect("a body")
}

fn instr(text: &str) -> Instr {
    match body(text).as_slice() {
        [Item::Instr(instr)] => instr.clone(),
        items => panic!("{text}: {items:?}"),
    }
}

fn operands(text: &str) -> Vec<Operand> {
    instr(&format!("op {text};")).operands
}

fn variable(text: &str) -> Variable {
    module(text).variables.remove(0)
}

fn name(name: &str) -> Operand {
    Operand::Name(name.into())
}

fn at(base: &str, offset: i64) -> Operand {
    Operand::Address { base: Base::Name(base.into()), offset, coordinates: None }
}

fn bits(values: &[u64]) -> Vec<Init> {
    values.iter().copied().map(Init::Bits).collect()
}

#[test]
fn the_header_is_read() {
    let text = "// Generated\n//\n\n.version 9.0\n.target sm_80, debug\n.address_size 64\n\0";
    let module = parse(text).expect("a module");
    assert_eq!((module.version, module.address_size), ((9, 0), 64));
    assert_eq!(module.target, "sm_80, debug");
    assert_eq!(parse(".version 8.10 .target sm_90a").expect("a module").version, (8, 10));
    for (text, message) in [
        ("", "1:1: expected `.version`, found the end of the file"),
        ("int main;", "1:1: expected `.version`, found `int`"),
        (".version 8", "1:10: expected a version such as 8.0, found the number 8"),
        (".version 8.0\n.func", "2:1: expected `.target`, found `.func`"),
        (
            ".version 8.0 .target sm_80 .address_size 16",
            "1:42: expected 32 or 64, found the number 16",
        ),
    ] {
        assert_eq!(parse(text).expect_err("an error").to_string(), message);
    }
}

#[test]
fn functions_have_parameters_and_directives() {
    let module = module(
        ".extern .func  (.param .b32 func_retval0) vprintf\n(\n .param .b64 vprintf_param_0,
            .param .b64 vprintf_param_1\n)\n;
         .weak .func twice(.reg .u32 x) .noreturn { ret; }
         .visible .entry k(
            .param .u64 .ptr .global .align 16 k_param_0,
            .param .align 128 .b8 k_param_1[128], .param .f32 k_param_2)
         .maxntid 16, 8
         .reqntid 128, 1, 1
         .minnctapersm 2
         .maxnreg 168 .explicitcluster .reqnctapercluster 2, 1, 1 .maxclusterrank 8
         .pragma \"something\";
         { ret; }",
    );
    let [printf, twice, kernel] = module.functions.as_slice() else { panic!("{module:?}") };
    assert!(printf.external && !printf.entry && printf.body.is_none());
    assert_eq!((printf.returns.len(), printf.params.len()), (1, 2));
    assert_eq!(printf.returns[0].name, "func_retval0");
    assert_eq!(twice.params[0].space, Space::Reg);
    assert!(kernel.entry && !kernel.external);
    let shapes: Vec<_> =
        kernel.params.iter().map(|p| (p.space, p.ty, p.align, p.dims.clone())).collect();
    assert_eq!(
        shapes,
        [
            (Space::Param, Type::U64, None, vec![]),
            (Space::Param, Type::B8, Some(128), vec![Some(128)]),
            (Space::Param, Type::F32, None, vec![]),
        ]
    );
    let expected = Directives {
        max_threads: Some([16, 8, 1]),
        required_threads: Some([128, 1, 1]),
        min_blocks: Some(2),
        max_registers: Some(168),
        cluster: Some([2, 1, 1]),
        max_cluster: Some(8),
        explicit_cluster: true,
    };
    assert_eq!(kernel.directives, expected);
    assert_eq!(kernel.pos, Pos { line: 11, column: 26 });
}

#[test]
fn an_alias_is_the_function_it_stands_for() {
    let module = module(
        ".visible .func other(.param .b32 p);
         .func one(.param .b32 p) { trap; ret; }
         .alias other, one;",
    );
    let find = |name: &str| -> Vec<&Function> {
        module.functions.iter().filter(|f| f.name == name).collect()
    };
    assert_eq!(find("other").len(), 1);
    assert!(find("one")[0].body.is_some());
    assert_eq!(find("other")[0].body, find("one")[0].body);
    let message = "4:8: expected a defined function to alias, found `b`";
    assert_eq!(refusal(".alias a, b;"), message);
}

#[test]
fn declarations_keep_what_they_say() {
    use Space::*;
    let items = body(
        ".reg .pred %p<3>;\n.reg .v4 .f32 a, b;\n.local .align 16 .b8 depot[64];
         .shared .align 8 .b64 bar[2][3], other; .param .b32 param0;",
    );
    let found: Vec<_> = items
        .iter()
        .map(|item| match item {
            Item::Variable(v) => {
                (v.space, v.ty, v.vector, v.name.as_str(), v.range, v.align, v.dims.clone())
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        found,
        [
            (Reg, Type::Pred, 1, "%p", Some(3), None, vec![]),
            (Reg, Type::F32, 4, "a", None, None, vec![]),
            (Reg, Type::F32, 4, "b", None, None, vec![]),
            (Local, Type::B8, 1, "depot", None, Some(16), vec![Some(64)]),
            (Shared, Type::B64, 1, "bar", None, Some(8), vec![Some(2), Some(3)]),
            (Shared, Type::B64, 1, "other", None, Some(8), vec![]),
            (Param, Type::B32, 1, "param0", None, None, vec![]),
        ]
    );
    let dynamic = variable(".extern .shared .align 128 .b8 smem[];");
    assert!(dynamic.external);
    assert_eq!((dynamic.dims, dynamic.align), (vec![None], Some(128)));
    let managed = variable(".visible .global .attribute(.managed, .unified(1, 2)) .s32 g;");
    assert_eq!((managed.space, managed.ty), (Global, Type::S32));
    assert_eq!(managed.pos, Pos { line: 4, column: 60 });
}

#[test]
fn initialisers_hold_the_bits_of_their_type() {
    for (text, expected) in [
        (".global .u32 a = 4294967295;", bits(&[0xFFFF_FFFF])),
        (".global .s32 a = -1;", bits(&[0xFFFF_FFFF])),
        (".global .b8 a[4] = {104, 0xFF, -128, 8+2-3};", bits(&[104, 255, 128, 7])),
        (".const .f32 a[2] = {0f3F800000, 0.5};", bits(&[0x3F80_0000, 0x3F00_0000])),
        (".const .f64 a = -0d3FF0000000000000;", bits(&[0xBFF0_0000_0000_0000])),
        (".global .f64 a = 2;", bits(&[2f64.to_bits()])),
        (".global .u64 a = ~0;", bits(&[u64::MAX])),
        (".global .v2 .b16 a[2] = {{1, 2}, {3}};", bits(&[1, 2, 3])),
        (".global .b32 a[2][2][2] = {{{1}, {2}}, {{3, 4}}};", bits(&[1, 0, 2, 0, 3, 4])),
        (".global .b32 a[2][2] = {{1}, 2, 3};", bits(&[1, 0, 2, 3])),
    ] {
        assert_eq!(variable(text).init, expected, "{text}");
    }
    let counted = variable(".global .b32 a[][2] = {1, 2, 3};");
    assert_eq!(counted.dims, [Some(2), Some(2)]);
    let address = |symbol: &str, offset| Init::Address { symbol: symbol.into(), offset };
    assert_eq!(
        variable(".global .align 8 .u64 a[4] = {generic(x), y, generic(x)+8, y-4+1};").init,
        [address("x", 0), address("y", 0), address("x", 8), address("y", -3)]
    );
}

#[rustfmt::skip] // one case a line
#[test]
fn bad_declarations_are_refused() {
    for (text, message) in [
        (".global .b8 a = 256;", "17: expected a value of type `.b8`, found 256"),
        (".global .b8 a = -129;", "17: expected a value of type `.b8`, found -129"),
        (".global .s32 a = 1.5;", "18: expected a value of type `.s32`, found 1.5"),
        (".global .f16 a = 1;", "18: expected a value of type `.f16`, found 1"),
        (".global .b8 a = x;", "17: expected a value of type `.b8`, found the address of `x`"),
        (".global .b8 a[2] = {1, 2, 3};", "20: expected at most 2 elements, found 3"),
        (".global .b8 a[2][2] = {{1, 2, 3}};", "24: expected at most 2 elements, found 3"),
        (".global .b8 a[2][1000000] = {{1}, {1}};",
            "35: expected at most 65536 elements where inner lists are short, found `{`"),
        (".global .b8 a[2] = 1;", "20: expected `{`, found the number 1"),
        (".global .pred a;", "15: expected a register, `a` of type `.pred` is none"),
        (".global .texref t;", "9: expected a type, found `.texref`"),
        (".global x;", "9: expected a type, found `x`"),
        (".global .b32 .b8 x;", "14: expected a name, found a second type after `.b32`: `.b8`"),
        (".global .align 3 .b32 x;", "16: expected a power of two, found the number 3"),
        (".global .align 0 .b32 x;", "16: expected a power of two, found the number 0"),
        (".global .v4 .f64 x;",
            "18: expected a vector of at most 16 bytes instead of `.v4 .f64`, found `x`"),
        (".global .b64 x[1 .b8", "18: expected `]`, found `.b8`"),
        (".global .b64 x[4294967296][4294967296];",
            "14: expected an array of at most 2^40 bytes, `x` is larger"),
        (".global .b8 x[1][1][1][1][1][1][1][1][1];",
            "38: expected at most 8 dimensions, found `[`"),
        (".shared .b32 x = 1;", "16: expected `,` or `;` after a declaration, found `=`"),
        (".func f() { .reg .b32 %r<4294967295>; }",
            "23: expected at most 16777216 registers, found 4294967295"),
        (".reg .b32 r;", "1: expected a directive of a module, found `.reg`"),
        (".surprise;", "1: expected a directive of a module, found `.surprise`"),
        (".entry k() .surprise { }",
            "12: expected `{`, `;` or a directive of a function, found `.surprise`"),
        (".entry k(.b32 x) { }", "10: expected a parameter, found `.b32`"),
        (".entry k(.param .b32 x .param .b32 y) { }",
            "24: expected `,` or `)` after a parameter, found `.param`"),
        ("ret;", "1: expected a directive, found `ret`"),
    ] {
        assert_eq!(refusal(text), format!("4:{message}"), "{text}");
    }
}

#[test]
fn opcodes_are_cut_at_their_dots() {
    let instr = instr(
        "@!%p1 cp.async.bulk.tensor.2d.shared::cluster.global
            .mbarrier::complete_tx::bytes.L2::128B [%r1], [%rd2, {%r3, 0}], [%r4+-8], %rd5;",
    );
    assert_eq!(instr.guard, Some(Guard { predicate: "%p1".into(), negated: true }));
    assert_eq!((instr.root.as_str(), instr.pos), ("cp", Pos { line: 6, column: 7 }));
    let mods = "async bulk tensor 2d shared::cluster global mbarrier::complete_tx::bytes L2::128B";
    assert_eq!(instr.mods.join(" "), mods);
    let map = Operand::Address {
        base: Base::Name("%rd2".into()),
        offset: 0,
        coordinates: Some(vec![name("%r3"), Operand::Int(0)]),
    };
    assert_eq!(instr.operands, [at("%r1", 0), map, at("%r4", -8), name("%rd5")]);
}

#[test]
fn operands_of_every_kind() {
    use Operand::*;
    let absolute = |a| Address { base: Base::Absolute(a), offset: 0, coordinates: None };
    let pair = |a: &str, b: &str| Pair(a.into(), b.into());
    for (text, expected) in [
        ("%r1, $L__BB0_1, sym", vec![name("%r1"), name("$L__BB0_1"), name("sym")]),
        ("%tid.x, v.w", vec![name("%tid.x"), name("v.w")]),
        ("%r1|%p1, _|p, q|_", vec![pair("%r1", "%p1"), pair("_", "p"), pair("q", "_")]),
        ("_, !%p2", vec![Sink, Not("%p2".into())]),
        (
            "{%f1, _, 0f3F800000, -2}",
            vec![Vector(vec![name("%f1"), Sink, F32(0x3F80_0000), Int(-2i64 as u64)])],
        ),
        ("{a.x, sym+4}", vec![Vector(vec![name("a.x"), Sum("sym".into(), 4)])]),
        ("[%rd+-8], [%r1+16], [sym]", vec![at("%rd", -8), at("%r1", 16), at("sym", 0)]),
        ("[sym-8+2], [%rd1 + 4]", vec![at("sym", -6), at("%rd1", 4)]),
        ("[1024+8], [0x10]", vec![absolute(1032), absolute(16)]),
        (
            "(%r1), f, (%r2, 3), ()",
            vec![List(vec![name("%r1")]), name("f"), List(vec![name("%r2"), Int(3)]), List(vec![])],
        ),
        ("sym+8, sym-8", vec![Sum("sym".into(), 8), Sum("sym".into(), -8)]),
    ] {
        assert_eq!(operands(text), expected, "{text}");
    }
}

#[test]
fn literals_of_every_kind() {
    use Operand::*;
    for (text, value) in [
        ("0", Int(0)),
        ("42", Int(42)),
        ("-42", Int(-42i64 as u64)),
        ("+7", Int(7)),
        ("42U", Int(42)),
        ("0xFFU", Int(255)),
        ("0XfF", Int(255)),
        ("017", Int(15)),
        ("0b101", Int(5)),
        ("18446744073709551615", Int(u64::MAX)),
        ("-9223372036854775808", Int(1 << 63)),
        ("~0xF", Int(!0xF)),
        ("6-8+1", Int(u64::MAX)),
        ("6 - -8", Int(14)),
        ("0f3FB8AA3B", F32(0x3FB8_AA3B)),
        ("0FbF800000", F32(0xBF80_0000)),
        ("-0f3F800000", F32(0xBF80_0000)),
        ("0d3FF0000000000000", F64(0x3FF0_0000_0000_0000)),
        ("+0.5", F64(0.5f64.to_bits())),
        ("-0.5", F64((-0.5f64).to_bits())),
        ("1e3", F64(1e3f64.to_bits())),
        ("1.0e+3", F64(1e3f64.to_bits())),
    ] {
        assert_eq!(operands(text), [value], "{text}");
    }
    for (text, message) in [
        ("0f3F80", "4: expected 8 hexadecimal digits after `0f`, found 4"),
        ("0f3F8000000", "4: expected 8 hexadecimal digits after `0f`, found 9"),
        ("0d3FF0", "4: expected 16 hexadecimal digits after `0d`, found 4"),
        ("0x", "4: expected digits of base 16"),
        ("0b2", "4: expected digits of base 2"),
        ("08", "4: expected digits of base 8"),
        ("0129", "4: expected a number, found `0129`"),
        ("12ab", "4: expected a number, found `12ab`"),
        ("1.5f", "4: expected a number, found `1.5f`"),
        ("18446744073709551616", "4: this number does not fit in 64 bits"),
        ("1e999", "4: this number does not fit in 64 bits"),
        ("-%r1", "5: expected a number, found `%r1`"),
        ("~0.5", "5: expected a number, found the number 0.5"),
    ] {
        let text = format!(".entry k()\n{{\nop {text};\n}}");
        assert_eq!(refusal(&text), format!("6:{message}"), "{text}");
    }
}

#[test]
fn scopes_stay_nested() {
    let items = body(
        "{\n.reg .pred P1;\nLAB_WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P1, [%r1], %r2;
         @P1 bra DONE;\nbra.uni LAB_WAIT;\nDONE: }\n{ .reg .pred P1; DONE: }\nend: ret;",
    );
    let [Item::Block(first), Item::Block(second), Item::Label { name, pos }, Item::Instr(ret)] =
        items.as_slice()
    else {
        panic!("{items:?}")
    };
    let [Item::Variable(p1), _, _, Item::Instr(branch), _, Item::Label { name: done, .. }] =
        first.as_slice()
    else {
        panic!("{first:?}")
    };
    assert_eq!((p1.name.as_str(), done.as_str(), second.len()), ("P1", "DONE", 2));
    assert_eq!(branch.guard, Some(Guard { predicate: "P1".into(), negated: false }));
    assert_eq!((name.as_str(), ret.root.as_str()), ("end", "ret"));
    assert_eq!(*pos, Pos { line: 14, column: 1 });
}

#[test]
fn lines_of_the_source_are_kept() {
    let module = module(
        ".file 1 \"a \\\"b\\\" \\\\ \\303\\251.cu\", 1700000000, 4096
         .entry k() {
         .loc 1 23 5
         .loc 2 7 9, function_name $L__info_string0, inlined_at 1 24 3
         .loc 2 8 1, function_name info+12, inlined_at 1 25 3 // comment
         .pragma \"nounroll\", \"other\";
         ret; }
         .file 2 \"b.cuh\"",
    );
    assert_eq!(module.files[&1], "a \"b\" \\ é.cu");
    assert_eq!(module.files[&2], "b.cuh");
    let items = module.functions[0].body.as_ref().expect("a body");
    let positions = items.iter().filter_map(|item| match item {
        Item::Loc(loc) => Some((loc.file, loc.line, loc.column)),
        _ => None,
    });
    assert_eq!(positions.collect::<Vec<_>>(), [(1, 23, 5), (2, 7, 9), (2, 8, 1)]);
    assert_eq!(items.len(), 4);
}

#[test]
fn debug_sections_are_skipped_and_nothing_else() {
    let after = module(
        ".section .debug_abbrev\n{\n.b8 1 // a comment\n.b8 17,5,0\n$L__tail:\n}
         .section .debug_info { .b32 .debug_abbrev\n.b64 $L__func_begin0
         .b32 $L__end-$L__begin+4 \n.b8 -1 }
         .section .debug_macinfo { }
         .global .b32 g;",
    );
    assert_eq!(after.variables.len(), 1);
    assert_eq!(
        refusal(".section .debug_str { .b8 1\n.entry k() { }"),
        "5:9: expected a line of data, a label or `}`, found `(`"
    );
    assert_eq!(
        refusal(".section .debug_str {"),
        "4:22: expected a line of data, a label or `}`, found the end of the file"
    );
}

#[test]
fn comments_and_line_breaks_are_blanks() {
    let call =
        instr("call.uni /* a\n call */ (retval0), // of\n helper,\n (\n param0,\n param1\n )\n;");
    assert_eq!((call.root.as_str(), call.mods.join(".")), ("call", "uni".into()));
    assert_eq!(call.operands.len(), 3);
    assert_eq!(refusal("/* open"), "4:1: this comment has no end, expected `*/`");
    let message = "4:9: this string has no end, expected `\"` in its line";
    assert_eq!(refusal(".file 1 \"a\n\""), message);
}

#[rustfmt::skip] // one case a line
#[test]
fn errors_in_statements_say_what_was_expected() {
    for (text, message) in [
        ("mov.b32 %r1 %r2;", "6:13: expected `,` or `;` after an operand of `mov`, found `%r2`"),
        ("mov.b32 %r1, ;", "6:14: expected an operand, found `;`"),
        ("mov.b32 %r1, %r2\nret;",
            "7:1: expected `,` or `;` after an operand of `mov`, found `ret`"),
        ("mov.b32 %tid .x;", "6:14: expected `,` or `;` after an operand of `mov`, found `.x`"),
        ("ld.b32 %r1, [%r2;", "6:17: expected `]` after an address, found `;`"),
        ("ld.b32 %r1, [];", "6:14: expected an address, found `]`"),
        ("ld.b32 %r1, [%r2 + %r3];", "6:20: expected a number of bytes, found `%r3`"),
        ("tex.2d {a}, [t, {x}, s];", "6:20: expected `]` after an address, found `,`"),
        ("ld.v2.b32 {%r1 %r2}, [%r3];",
            "6:16: expected `,` or `}` after a vector element, found `%r2`"),
        ("ld.v2.b32 {}, [%r3];", "6:12: expected a vector element, found `}`"),
        ("call f, (a;", "6:11: expected `,` or `)` after a parameter, found `;`"),
        ("@ 3 bra L;", "6:3: expected a predicate register, found the number 3"),
        ("@%p L: ret;", "6:6: expected an operand, found `:`"),
        ("@%p };", "6:5: expected an instruction, found `}`"),
        ("%r1 = 3;", "6:1: expected an instruction, found `%r1`"),
        ("ret;;", "6:5: expected an instruction or `}`, found `;`"),
        ("mov.b32 %r1, 3|p;", "6:15: expected `,` or `;` after a number, found `|`"),
        ("shfl %r1|3;", "6:10: expected a register after `|`, found the number 3"),
        ("p0: .callprototype _ ();", "6:5: `.callprototype`: indirect calls are not supported"),
        ("ts: .branchtargets a, b;", "6:5: `.branchtargets`: indexed branches are not supported"),
        (".surprise;", "6:1: expected a declaration, an instruction or `}`, found `.surprise`"),
        (".loc 1 2", "7:1: expected a column number, found `}`"),
        (".loc 1 2 3, what", "6:13: expected `function_name` or `inlined_at`, found `what`"),
        ("mov.b32 %r1, é;", "6:14: unexpected character 'é'"),
        ("mov.b32 %, 1;", "6:9: expected a name after `%`, found ','"),
        ("mov. %r1;", "6:4: expected a word after `.`, found ' '"),
        ("mov.b32 %r1, #;", "6:14: unexpected character '#'"),
    ] {
        assert_eq!(refusal(&format!(".entry k()\n{{\n{text}\n}}")), message, "{text}");
    }
    assert_eq!(
        refusal(".entry k() { ret;"),
        "4:18: expected an instruction or `}`, found the end of the file"
    );
}

#[test]
fn types_know_their_names_and_sizes() {
    for (name, size) in
        [("pred", 1), ("b8", 1), ("s16", 2), ("bf16", 2), ("f16x2", 4), ("f64", 8), ("b128", 16)]
    {
        let ty: Type = name.parse().expect("a type");
        assert_eq!((ty.to_string().as_str(), ty.size()), (name, size));
    }
    assert_eq!("b31".parse::<Type>().expect_err("no type").to_string(), "unknown type `b31`");
}
