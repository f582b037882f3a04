//! The command line, as a user runs it.

use std::fs;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::run::HEADER;

/// Adds `add` to `n` 32-bit integers, out of place.
const ADD: &str = "
.visible .entry add(.param .u64 from, .param .u64 to, .param .u32 n, .param .s32 add) {
    .reg .pred %p;
    .reg .b32 %r<5>;
    .reg .b64 %rd<5>;
    mov.u32 %r0, %tid.x;
    ld.param.u32 %r1, [n];
    setp.ge.u32 %p, %r0, %r1;
    @%p ret;
    ld.param.u64 %rd0, [from];
    ld.param.u64 %rd1, [to];
    ld.param.s32 %r2, [add];
    mul.wide.u32 %rd2, %r0, 4;
    add.s64 %rd3, %rd0, %rd2;
    ld.global.u32 %r3, [%rd3];
    add.s32 %r3, %r3, %r2;
    add.s64 %rd4, %rd1, %rd2;
    st.global.u32 [%rd4], %r3;
    ret;
}
.visible .entry race(.param .u64 to) {
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    mov.u32 %r0, %tid.x;
    ld.param.u64 %rd0, [to];
    st.global.u32 [%rd0], %r0;
    ret;
}
";

/// Parameters of 64 bits, 32 bits, a float and a structure, stored one after the other.
const PARAMS: &str = "
.visible .entry params(.param .u64 to, .param .s64 a, .param .u64 b, .param .f32 c,
                       .param .align 4 .b8 d[8]) {
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd0, [to];
    ld.param.s64 %rd1, [a];
    ld.param.u64 %rd2, [b];
    ld.param.b32 %r0, [c];
    ld.param.b32 %r1, [d];
    ld.param.b32 %r2, [d+4];
    st.global.u64 [%rd0], %rd1;
    st.global.u64 [%rd0+8], %rd2;
    st.global.u32 [%rd0+16], %r0;
    st.global.u32 [%rd0+20], %r1;
    st.global.u32 [%rd0+24], %r2;
    ret;
}
";

/// Copies a box of a tensor through shared memory.
const TENSOR_COPY: &str = "
.visible .entry tensor_copy(.param .align 64 .b8 map[128], .param .u64 to) {
    .shared .align 128 .b8 tile[64];
    .shared .align 8 .b64 bar;
    .reg .pred %p;
    .reg .b32 %r<8>;
    .reg .b64 %rd<6>;
    mov.u32 %r0, tile;
    mov.u32 %r1, bar;
    mov.u32 %r2, 2;
    mov.u32 %r3, 1;
    mov.b64 %rd0, map;
    cvta.param.u64 %rd1, %rd0;
    mov.u32 %r4, %tid.x;
    setp.ne.u32 %p, %r4, 0;
    @%p bra SYNC;
    mbarrier.init.shared::cta.b64 [%r1], 1;
    fence.proxy.async.shared::cta;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r0], [%rd1, {%r2, %r3}], [%r1];
SYNC:
    bar.sync 0;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p, [%r1], 0;
    @!%p bra WAIT;
    shl.b32 %r5, %r4, 2;
    add.s32 %r6, %r0, %r5;
    ld.shared.u32 %r7, [%r6];
    ld.param.u64 %rd2, [to];
    cvt.u64.u32 %rd3, %r5;
    add.s64 %rd4, %rd2, %rd3;
    st.global.u32 [%rd4], %r7;
    ret;
}
";

/// A folder with a PTX file and whatever a test adds.
struct Case {
    dir: TempDir,
}

impl Case {
    fn new(ptx: &str) -> Self {
        let case = Self { dir: tempfile::tempdir().unwrap() };
        case.write("k.ptx", format!("{HEADER}{ptx}"));
        case
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.dir.path().join(name), contents).unwrap();
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        let bytes = fs::read(self.dir.path().join(name)).unwrap();
        bytemuck::allocation::pod_collect_to_vec(&bytes)
    }

    /// Runs the text of `launch.json`.
    fn run_text(&self, text: &str, options: &[&str]) -> Output {
        self.write("launch.json", text);
        let mut command = Command::new(env!("CARGO_BIN_EXE_ptxsim"));
        // From elsewhere: paths are relative to the file.
        command.current_dir(std::env::temp_dir()).args(options);
        command.arg(self.dir.path().join("launch.json")).output().unwrap()
    }

    fn run(&self, launch: &Value) -> Output {
        self.run_text(&launch.to_string(), &[])
    }

    /// Runs a launch that must be refused with a message that contains `expected`.
    #[track_caller]
    fn refused(&self, launch: &Value, expected: &str) {
        refused(&self.run(launch), expected);
    }
}

#[track_caller]
fn refused(output: &Output, expected: &str) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.starts_with("error: ") && message.contains(expected), "{message}");
    assert!(output.stdout.is_empty());
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The report of a run with this exit status.
#[track_caller]
fn report(output: &Output, status: i32) -> Value {
    assert_eq!(output.status.code(), Some(status), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn ints(values: &[i32]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

fn launch(kernel: &str, args: Value) -> Value {
    json!({
        "ptx": "k.ptx", "kernel": kernel, "arch": "sm_90a",
        "grid": [1, 1, 1], "block": [32, 1, 1], "cluster": [1, 1, 1], "shared": 0, "args": args,
    })
}

/// A launch with this value at a place such as `/args/0/file`.
fn with(mut launch: Value, place: &str, value: Value) -> Value {
    let (parent, field) = place.rsplit_once('/').unwrap();
    match launch.pointer_mut(parent).unwrap() {
        Value::Array(list) => list[field.parse::<usize>().unwrap()] = value,
        object => object[field] = value,
    }
    launch
}

/// The kernel `add` over four elements.
fn add() -> Value {
    launch(
        "add",
        json!([{"buffer": "a", "file": "a.bin"}, {"buffer": "c", "bytes": 16, "out": "c.bin"},
               {"u32": 4}, {"i32": -1}]),
    )
}

fn add_case() -> Case {
    let case = Case::new(ADD);
    case.write("a.bin", ints(&[1, 2, 3, 4]));
    case
}

#[test]
fn a_clean_run_writes_its_output_and_a_report() {
    let case = add_case();
    let output = case.run(&add());
    let report = report(&output, 0);
    assert_eq!(case.ints("c.bin"), [0, 1, 2, 3]);
    assert_eq!((&report["errors"], &report["races"]), (&json!([]), &json!([])));
    let bytes = &report["global_bytes"];
    assert_eq!((&bytes["a"]["read"], &bytes["a"]["ratio"]), (&json!(16), &json!(1.0)));
    assert_eq!(bytes["c"]["written"], 16);
    assert_eq!(report["counts"]["classes"]["global-store"], 1);
    assert_eq!(report["bank_conflicts"]["excess"], 0);
    assert!(report["bound"].is_object());
    assert!(stderr(&output).contains("warp instructions"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("note:"), "{}", stderr(&output));
}

#[test]
fn schedules_are_counted_and_start_from_the_same_contents() {
    let case = add_case();
    let mut in_place = add();
    in_place["args"][0] = json!({"buffer": "c", "file": "a.bin", "bytes": 16});
    in_place["args"][1] = json!({"buffer": "c", "out": "c.bin"});
    in_place["schedules"] = json!(3);
    in_place["seed"] = json!(7);
    in_place["timing"] = json!("lazy");
    let report = report(&case.run(&in_place), 0);
    assert_eq!(case.ints("c.bin"), [0, 1, 2, 3]);
    let expected = json!([{"seed": 7, "timing": "lazy"}, {"seed": 8, "timing": "eager"},
                          {"seed": 9, "timing": "lazy"}]);
    assert_eq!(report["schedules"], expected);
}

#[test]
fn every_option_is_taken() {
    let case = add_case();
    let mut options = add();
    for (name, value) in [
        ("residency", json!("co-resident")),
        ("early", json!(false)),
        ("checks", json!(true)),
        ("strict_proxies", json!(false)),
        ("perturb", json!(3)),
        ("accumulation", json!("chain")),
        ("weak_alignment", json!(true)),
        ("max_instructions", json!(1000)),
        ("registers", json!(32)),
    ] {
        options[name] = value;
    }
    let output = case.run_text(&options.to_string(), &["--pretty"]);
    report(&output, 0);
    assert!(output.stdout.split(|c| *c == b'\n').count() > 20);
}

#[test]
fn arguments_arrive_as_they_are_written() {
    let case = Case::new(PARAMS);
    let mut params = launch(
        "params",
        json!([{"buffer": "to", "bytes": 28, "out": "to.bin"}, {"i64": -2},
               {"u64": 0xffff_ffff_0000_0001_u64}, {"f32": 0.5},
               {"bytes_hex": "01000000FeFfffff"}]),
    );
    params["block"] = json!([1, 1, 1]);
    report(&case.run(&params), 0);
    assert_eq!(case.ints("to.bin"), [-2, -1, 1, -1, 0x3f00_0000, 1, -2]);
}

#[test]
fn a_race_is_reported_with_status_1() {
    let case = add_case();
    let race = launch("race", json!([{"buffer": "c", "bytes": 4, "out": "c.bin"}]));
    let output = case.run(&race);
    let report = report(&output, 1);
    let found = &report["races"][0];
    assert_eq!((&found["kind"], &found["address"]["buffer"]), (&json!("race"), &json!("c")));
    let line = format!("{HEADER}{ADD}").lines().position(|l| l.contains("[%rd0], %r0")).unwrap();
    assert_eq!(found["at"]["ptx_line"], line + 1);
    assert!(stderr(&output).contains("race: "), "{}", stderr(&output));
    // Without checks nobody looks.
    let output = case.run_text(&race.to_string(), &["--no-checks"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn uninitialised_bytes_are_reported_when_read_and_noted_when_written_out() {
    let case = add_case();
    let unwritten = with(add(), "/args/0", json!({"buffer": "a", "bytes": 16}));
    let found = &report(&case.run(&unwritten), 1)["errors"][0];
    assert_eq!(found["kind"], "uninitialised-memory");

    let output = case.run(&with(add(), "/args/1/bytes", json!(24)));
    report(&output, 0);
    assert_eq!(case.ints("c.bin"), [0, 1, 2, 3, 0, 0]);
    let note = "note: 8 bytes of buffer c were never written";
    assert!(stderr(&output).contains(note), "{}", stderr(&output));
}

#[test]
fn an_access_outside_is_reported_with_its_buffer() {
    let case = add_case();
    let found = &report(&case.run(&with(add(), "/args/1/bytes", json!(12))), 1)["errors"][0];
    assert_eq!(found["kind"], "out-of-bounds");
    assert_eq!(found["address"]["buffer"], "c");
}

/// The tensor map of an 8 × 4 matrix of integers, and a box of 4 × 4 at column 2, row 1.
fn tensor_copy(declared: bool) -> Value {
    let map = json!({"buffer": "m", "dtype": "s32", "dims": [8, 4], "strides": [32],
                     "box": [4, 4], "element_strides": [1, 1], "swizzle": 0, "oob": "zero"});
    let mut launch = launch(
        "tensor_copy",
        json!([{"tensor_map": map}, {"buffer": "to", "bytes": 64, "out": "to.bin"}]),
    );
    launch["block"] = json!([16, 1, 1]);
    launch["schedules"] = json!(3);
    if declared {
        launch["buffers"] = json!([{"buffer": "m", "file": "m.bin"}]);
    }
    launch
}

/// The box.
const COPIED: [i32; 16] = [10, 11, 12, 13, 18, 19, 20, 21, 26, 27, 28, 29, 0, 0, 0, 0];

fn tensor_case(text: &str) -> Case {
    let case = Case::new(text);
    case.write("m.bin", ints(&Vec::from_iter(0..32)));
    case
}

#[test]
fn a_tensor_map_reads_a_declared_buffer() {
    let case = tensor_case(TENSOR_COPY);
    report(&case.run(&tensor_copy(true)), 0);
    assert_eq!(case.ints("to.bin"), COPIED);
}

/// The tensor map and the address of the output in one structure.
fn struct_copy() -> Value {
    let mut launch = tensor_copy(true);
    let map = launch["args"][0]["tensor_map"].take();
    let patches = json!([{"offset": 136, "buffer": "to"}, {"offset": 0, "tensor_map": map}]);
    launch["kernel"] = json!("struct_copy");
    launch["args"] = json!([{"bytes_hex": format!("{:0288}", 0), "patches": patches}]);
    let to = json!({"buffer": "to", "bytes": 64, "out": "to.bin"});
    launch["buffers"].as_array_mut().unwrap().push(to);
    launch
}

/// The same kernel with its parameters in one structure.
fn struct_case() -> Case {
    let text = TENSOR_COPY
        .replace(
            "tensor_copy(.param .align 64 .b8 map[128], .param .u64 to)",
            "struct_copy(.param .align 64 .b8 map[144])",
        )
        .replace("[to]", "[map+136]");
    assert!(text.contains("struct_copy") && text.contains("map+136"));
    tensor_case(&text)
}

#[test]
fn a_structure_holds_addresses_and_tensor_maps() {
    let case = struct_case();
    report(&case.run(&struct_copy()), 0);
    assert_eq!(case.ints("to.bin"), COPIED);
}

#[test]
fn bad_patches_are_refused() {
    let case = struct_case();
    let with = |place: &str, value| with(struct_copy(), &format!("/args/0/patches/{place}"), value);
    let message = "argument 0: patch at 137: its 8 bytes leave the 144";
    case.refused(&with("0/offset", json!(137)), message);
    case.refused(&with("0/offset", json!(u64::MAX)), "leave the 144");
    case.refused(&with("0/offset", json!(127)), "patches at 0 and 127 overlap");
    let message = "patch at 136: no argument and no entry of buffers is x";
    case.refused(&with("0/buffer", json!("x")), message);
    case.refused(&with("0/buffer", Value::Null), "exactly one of buffer and tensor_map");
    case.refused(&with("0/value", json!(1)), "unknown field `value`");
    case.refused(&with("1/offset", json!(8)), "patch at 8: a tensor map needs a multiple of 64");
    case.refused(&with("1/tensor_map", json!({})), "patch at 0: tensor_map: the name of a buffer");
    case.refused(&with("1/tensor_map/strides", json!([24])), "argument 0: patch at 0: ");
    let mut launch = struct_copy();
    launch["args"][0].as_object_mut().unwrap().remove("bytes_hex");
    case.refused(&launch, "argument 0: patches need bytes_hex");
}

#[test]
fn bad_tensor_maps_are_refused() {
    let case = tensor_case(TENSOR_COPY);
    case.refused(&tensor_copy(false), "no argument and no entry of buffers is m");
    let with =
        |field, value| with(tensor_copy(true), &format!("/args/0/tensor_map/{field}"), value);
    case.refused(&with("strides", json!([24])), "multiple of 16");
    case.refused(&with("colour", json!(1)), "unknown field `colour`");
    case.refused(&with("dtype", json!("f12")), "argument 0: tensor_map: unknown variant `f12`");
    case.refused(&with("buffer", json!(0)), "the name of a buffer is needed");
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let case = add_case();
    case.refused(&with(add(), "/args/0/file", json!("b.bin")), "b.bin (buffer a)");
    case.refused(&with(add(), "/ptx", json!("none.ptx")), "none.ptx");
    case.refused(&with(add(), "/args/1/out", json!("nowhere/c.bin")), "nowhere");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ptxsim"));
    refused(&command.arg("/none/launch.json").output().unwrap(), "/none/launch.json");
}

#[test]
fn bad_json_is_placed() {
    let case = add_case();
    refused(&case.run_text("{\n  \"ptx\": ,\n}", &[]), "line 2 column 10");
    refused(&case.run_text("{\n  \"prx\": 1\n}", &[]), "unknown field `prx`");
    refused(&case.run_text("{\"ptx\": \"k.ptx\"}", &[]), "missing field `kernel`");
    let with = |value| with(add(), "/args/2", value);
    let message = "invalid value: integer `-1`, expected u32 at line 1 column";
    case.refused(&with(json!({"u32": -1})), message);
    case.refused(&with(json!({"u33": 1})), "unknown field `u33`");
}

#[test]
fn wrong_arguments_are_refused() {
    let case = add_case();
    let with = |i: usize, value| with(add(), &format!("/args/{i}"), value);
    case.refused(&with(2, json!({})), "argument 2: exactly one of");
    case.refused(&with(2, json!({"u32": 1, "f32": 1.0})), "argument 2: exactly one of");
    case.refused(&with(2, json!({"u32": 1, "out": "x"})), "argument 2: file, bytes and out");
    case.refused(&with(2, json!({"bytes_hex": "012"})), "pairs of hexadecimal digits");
    case.refused(&with(2, json!({"bytes_hex": "0é"})), "pairs of hexadecimal digits");
    case.refused(&with(2, json!({"u64": 4})), "has 8 bytes, 4 expected");
    case.refused(&with(0, json!({"buffer": "a"})), "buffer a needs file or bytes");
    let short = json!({"buffer": "a", "file": "a.bin", "bytes": 8});
    case.refused(&with(0, short), "a.bin has 16 bytes, not 8");
    let twice = json!({"buffer": "c", "bytes": 8});
    case.refused(&with(0, twice), "buffer c is described twice");
    let huge = json!({"buffer": "a", "bytes": u64::MAX});
    case.refused(&with(0, huge), "buffer a: the buffers have more than");
    let mut fewer = add();
    fewer["args"].as_array_mut().unwrap().pop();
    case.refused(&fewer, "kernel add takes 4 arguments, 3 given");
}

#[test]
fn wrong_launches_are_refused() {
    let case = add_case();
    let with = |field, value| with(add(), &format!("/{field}"), value);
    case.refused(&with("kernel", json!("sub")), "no kernel sub in the module; it has: add, race");
    case.refused(&with("arch", json!("sm_70")), "sm_70");
    case.refused(&with("block", json!([2048, 1, 1])), "1024 threads");
    case.refused(&with("grid", json!(vec![u32::MAX; 3])), "the grid is [4294967295");
    case.refused(&with("grid", json!([i32::MAX, 65535, 65535])), "the number of warps");
    case.refused(&with("cluster", json!(vec![u32::MAX; 3])), "blocks in a cluster");
    case.refused(&with("registers", json!(u32::MAX)), "registers per block");
    case.refused(&with("shared", json!(1 << 20)), "allowed");
    case.refused(&with("schedules", json!(0)), "schedules is 0");
    case.refused(&with("timing", json!("late")), "unknown variant `late`");
}

#[test]
fn bad_ptx_is_placed() {
    let case = Case::new(".visible .entry k() {\n    ret\n}\n");
    case.refused(&launch("k", json!([])), "k.ptx:6:1: ");
    let case = Case::new(".visible .entry k() {\n    frobnicate.u32 1;\n    ret;\n}\n");
    case.refused(&launch("k", json!([])), "k.ptx:5:5: frobnicate.u32");
}

#[test]
fn help_names_the_file_and_the_status() {
    let output = Command::new(env!("CARGO_BIN_EXE_ptxsim")).arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("LAUNCH.JSON") && text.contains("exit status"), "{text}");
    let options = serde_json::to_value(ptxsim::Options::default()).unwrap();
    let unnamed = options.as_object().unwrap().keys().find(|name| !text.contains(*name));
    assert_eq!(unnamed, None, "{text}");
    let output = Command::new(env!("CARGO_BIN_EXE_ptxsim")).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
