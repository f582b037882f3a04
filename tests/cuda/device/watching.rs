//! What others are told of calls: spans of the crate `tracing`, ranges of NVTX.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use half::bf16;
use infini_attn::cuda::{self, Device, Gate};
use tracing::Level;

use crate::calls::{Tokens, problem};
use crate::common::say::say;
use crate::common::spans::recorded;
use crate::common::stream::Stream;
use crate::groups::Group;

pub fn groups() -> Vec<Group> {
    vec![
        Group::check("full::spans", calls_have_spans),
        Group::check("full::ranges", calls_and_launches_are_ranges),
    ]
}

fn calls_have_spans(device: &Device) -> Result<()> {
    let p = problem(2, 1, 64, 64);
    let gate = Gate::new(device, &[0.0; 2])?;
    let mut state = cuda::State::new(device, &p, 1, false)?;
    let mut tokens = Tokens::new(device, &Stream::<bf16>::normal(&p, 130, 3));
    let mut refusal = String::new();
    let kept = recorded(Level::TRACE, || {
        tokens.prefill(&mut state, &gate);
        let (inputs, outputs) = tokens.views();
        let refused = cuda::decode(&p, &inputs, &gate, &mut state, outputs);
        refusal = refused.expect_err("130 tokens").to_string();
        cuda::flush(&p, &mut state, &[0]).expect("slot 0");
    });
    let names: Vec<_> = kept.iter().map(|kept| kept.name.as_str()).collect();
    ensure!(names == ["prefill", "TRACE", "decode", "flush", "TRACE"], "{names:?}");
    let [prefill, table, decode, flush, _] = &kept[..] else { unreachable!() };
    let shapes = "bf16, Hq 2, Hkv 1, Dk 64, Dv 64, N 64, delta";
    for (span, tokens) in [(prefill, "130"), (flush, "2")] {
        let plan = span.field("plan");
        ensure!(plan.starts_with(&format!("\"{} {shapes}", span.name)), "{plan}");
        let fields = ["shapes", "sequences", "tokens", "slots"].map(|name| span.field(name));
        ensure!(fields == [shapes, "1", tokens, "[0]"], "{fields:?}");
        ensure!(!span.fields.contains_key("error"), "{span:?}");
    }
    let rows = table.field("plan");
    ensure!(rows.contains("segment_attention") && rows.contains("grid"), "{rows}");
    ensure!(decode.field("error") == refusal && !decode.fields.contains_key("plan"), "{decode:?}");
    Ok(())
}

/// A library in place of NVIDIA's, which writes what it is told into the file `RANGES`.
const LIBRARY: &str = r#"
#include <cstdint>
#include <cstdio>
#include <cstdlib>
static uint64_t last;
static void write(const char* what, uint64_t id, const char* name) {
  if (FILE* file = std::fopen(std::getenv("RANGES"), "a")) {
    std::fprintf(file, "%s %llu %s\n", what, static_cast<unsigned long long>(id), name);
    std::fclose(file);
  }
}
extern "C" uint64_t nvtxRangeStartA(const char* name) {
  write("start", ++last, name);
  return last;
}
extern "C" void nvtxRangeEnd(uint64_t id) { write("end", id, ""); }
"#;

/// In a process of its own, of a group in which one call makes eight launches.
fn calls_and_launches_are_ranges(_: &Device) -> Result<()> {
    if Command::new("g++").arg("--version").output().is_err() {
        say(format_args!("skipped full::ranges: no g++"));
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let (source, file) = (folder.path().join("ranges.cpp"), folder.path().join("ranges"));
    std::fs::write(&source, LIBRARY)?;
    let library = folder.path().join("libnvToolsExt.so.1");
    compile(&source, &library)?;
    let told = ranges_told(folder.path(), &file)?;
    let lines: Vec<&str> = told.lines().collect();
    let at = lines.iter().position(|line| line.contains("prefill bf16, Hq 2"));
    let lines = &lines[at.context("no range of the call")?..];
    let id = |line: &str| line.split(' ').nth(1).map(String::from).unwrap_or_default();
    let launches = "table table segment_state normaliser_scan segment_transition memory_scan \
                    segment_attention append";
    let mut rest = lines[1..].chunks(2);
    for operation in launches.split(' ') {
        let pair = rest.next().context("a launch")?;
        ensure!(pair[0].contains(&format!("infini_{operation}")), "{operation}: {pair:?}");
        ensure!(
            pair[0].starts_with("start") && pair[1] == format!("end {} ", id(pair[0])),
            "{pair:?}"
        );
    }
    let last = rest.next().context("the call's end")?[0];
    ensure!(last == format!("end {} ", id(lines[0])), "{last}");
    // Something that is not the library: nobody calls it, and calls go on.
    std::fs::write(&source, "")?;
    compile(&source, &library)?;
    std::fs::remove_file(&file)?;
    ensure!(ranges_told(folder.path(), &file).is_err_and(|e| e.is::<std::io::Error>()), "of what?");
    Ok(())
}

fn compile(source: &Path, library: &Path) -> Result<()> {
    let mut compiler = Command::new("g++");
    let done = compiler.args(["-shared", "-fPIC", "-o"]).args([library, source]).status();
    ensure!(done.context("g++")?.success(), "g++ has failed");
    Ok(())
}

/// What is written into `file` while a group runs that finds the library in `folder`.
fn ranges_told(folder: &Path, file: &Path) -> Result<String> {
    let before = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let done = Command::new(std::env::current_exe()?)
        .args(["--exact", "full::observers"])
        .env("LD_LIBRARY_PATH", format!("{}:{before}", folder.display()))
        .env("RANGES", file)
        .output()?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
    Ok(std::fs::read_to_string(file)?)
}
