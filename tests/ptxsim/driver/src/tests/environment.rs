//! Options, reports and findings, each in a process with the variables it is about.

use std::fs;

use serde_json::Value;

use super::*;
use crate::error::{INVALID_VALUE, LAUNCH_FAILED, NOT_INITIALIZED};

/// Lines of a report.
fn lines(file: &std::path::Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_wrong_value_is_told_and_nothing_starts() {
    let name = "tests::environment::a_wrong_value_is_told_and_nothing_starts";
    if let Some(output) = with(name, &[("PTXSIM_TIMING", "late")]) {
        let text = stderr(&output);
        assert!(text.contains("PTXSIM_TIMING=late: unknown variant"), "{text}");
        return;
    }
    unsafe {
        assert_eq!(cuInit(0), INVALID_VALUE);
        assert_eq!(given(|c| cuCtxCreate_v2(c, 0, 0)), Err(NOT_INITIALIZED));
        assert_eq!(given(|a| cuMemAlloc_v2(a, 4)), Err(NOT_INITIALIZED));
    }
    assert_eq!(attribute(16, 0), Err(NOT_INITIALIZED));
}

#[test]
fn options_arrive_and_every_launch_has_a_line() {
    let name = "tests::environment::options_arrive_and_every_launch_has_a_line";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report");
    let variables = [
        ("PTXSIM_SEED", "7"),
        ("PTXSIM_TIMING", "lazy"),
        ("PTXSIM_REPORT", file.to_str().unwrap()),
    ];
    if let Some(output) = with(name, &variables) {
        let lines = lines(&file);
        let kernels: Vec<_> = lines.iter().map(|line| &line["kernel"]).collect();
        assert_eq!(kernels, ["fill", "race", "fill"]);
        let report = &lines[0]["report"];
        assert_eq!((&report["clean"], &report["warnings"]), (&true.into(), &Value::Array(vec![])));
        assert_eq!(report["counts"]["classes"]["global-store"], 1);
        assert_eq!(report["schedules"][0]["seed"], 7);
        assert_eq!(report["schedules"][0]["timing"], "lazy");
        assert_eq!(lines[1]["report"]["races"][0]["kind"], "race");
        assert_eq!(lines[2]["refused"], "the block is [2048, 1, 1], 1024 threads, 64 in z allowed");
        // Only what went wrong is also told in words.
        let text = stderr(&output);
        assert!(text.contains("race, grid [1, 1, 1]") && !text.contains("nothing found"), "{text}");
        return;
    }
    let _context = Context::new();
    let (module, to) = (module(), words(32));
    let fill = function(module, "fill");
    ok(run(fill, to, 5, 0));
    assert_eq!(run(function(module, "race"), to, 0, 0), LAUNCH_FAILED);
    let _other = Context::new();
    let fill = function(self::module(), "fill");
    let args = [(&raw const to).cast::<u8>(), (&raw const to).cast()];
    let block = [2048, 1, 1];
    let config = Config {
        grid: [1; 3],
        block,
        shared_bytes: 0,
        stream: 0,
        attributes: null_mut(),
        count: 0,
    };
    let refused = unsafe { cuLaunchKernelEx(&config, fill, args.as_ptr(), null_mut()) };
    assert_eq!(refused, INVALID_VALUE);
    // A launch that never ran has broken nothing.
    ok(unsafe { cuCtxSynchronize() });
}

#[test]
fn clean_launches_are_summed_up_on_stderr() {
    let name = "tests::environment::clean_launches_are_summed_up_on_stderr";
    if let Some(output) = with(name, &[("PTXSIM_REPORT", "stderr")]) {
        let text = stderr(&output);
        assert!(text.contains("fill, grid [1, 1, 1], block [32, 1, 1]"), "{text}");
        assert!(text.contains("nothing found") && text.contains("warp instructions"), "{text}");
        return;
    }
    let _context = Context::new();
    ok(run(function(module(), "fill"), words(32), 5, 0));
}

#[test]
fn what_a_launch_with_findings_left_can_be_read() {
    let name = "tests::environment::what_a_launch_with_findings_left_can_be_read";
    if let Some(output) = with(name, &[("PTXSIM_FINDINGS", "tell")]) {
        assert!(stderr(&output).contains("race: "), "{}", stderr(&output));
        return;
    }
    let _context = Context::new();
    let to = words(32);
    let module = module();
    ok(run(function(module, "race"), to, 0, 0));
    assert!(first_word(to).unwrap() < 32);
    // A launch that stopped midway is no success.
    assert_eq!(run(function(module, "stop"), to, 0, 0), LAUNCH_FAILED);
    assert_eq!(first_word(to), Err(LAUNCH_FAILED));
}
