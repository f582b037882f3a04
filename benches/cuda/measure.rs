//! Single figures for scripts, as JSON lines.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cudarc::driver::CudaSlice;
use half::bf16;
use infini_attn::cuda::{Device, State};
use serde_json::json;

use crate::cases::{Case, Operation, Shape, headline as headline_cases};
use crate::roofline::Roofline;
use crate::stopwatch::median;
use crate::work::Set;

const USAGE: &str = "--card, --headline SECONDS [PREFIX], or --measure prefill --shape HQ,HKV,D,N,T [--inputs FOLDER]";

/// Fewest runs of a headline shape.
const LEAST_RUNS: usize = 3;

pub fn asked() -> bool {
    std::env::args().any(|a| ["--card", "--headline", "--measure"].contains(&a.as_str()))
}

pub fn run(device: &Device) -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|a| a == name)?;
        arguments.get(at + 1).cloned()
    };
    if arguments.iter().any(|a| a == "--card") {
        println!("{}", Roofline::measure(device)?.json());
        return Ok(());
    }
    if let Some(seconds) = value("--headline") {
        let at = arguments.iter().position(|a| a == "--headline").unwrap_or(0);
        let prefix = arguments.get(at + 2).map_or("", String::as_str);
        return headline(device, seconds.parse().context(USAGE)?, prefix);
    }
    ensure!(value("--measure").as_deref() == Some("prefill"), "usage: {USAGE}");
    let case = Case {
        operation: Operation::Prefill,
        shape: shape(&value("--shape").context(USAGE)?).context(USAGE)?,
    };
    match value("--inputs") {
        Some(folder) => once(&case, device, &PathBuf::from(folder)),
        None => {
            let work = case.prepare(device)?;
            let samples = (0..30).map(|_| Ok(work.time(1)?.as_secs_f64()));
            let us = 1e6 * median(samples.collect::<Result<_>>()?);
            println!("{}", json!({ "operation": case.name(), "us": us }));
            Ok(())
        }
    }
}

/// The median of every headline shape whose name begins with `prefix`; `seconds` for all, buffers
/// included.
fn headline(device: &Device, seconds: f64, prefix: &str) -> Result<()> {
    let mut cases = headline_cases(device)?;
    cases.retain(|case| case.name().starts_with(prefix));
    let begin = Instant::now();
    for (i, case) in cases.iter().enumerate() {
        let end = Duration::from_secs_f64(seconds * (i + 1) as f64 / cases.len() as f64);
        let work = case.prepare(device).with_context(|| case.name())?;
        let mut samples = vec![];
        while samples.len() < LEAST_RUNS || begin.elapsed() < end {
            samples.push(work.time(1)?.as_secs_f64());
        }
        let runs = samples.len();
        let figures = work.figures(samples).context("no time was measured")?;
        let (name, us) = (figures.name, 1e6 * figures.seconds);
        println!("{}", json!({ "operation": name, "us": us, "runs": runs }));
    }
    Ok(())
}

fn shape(text: &str) -> Result<Shape> {
    let numbers =
        text.split(',').map(str::parse).collect::<std::result::Result<Vec<usize>, _>>()?;
    let [heads, kv_heads, dim, segment, tokens] = numbers[..] else {
        anyhow::bail!("{} numbers given, 5 expected", numbers.len());
    };
    Ok(Shape { heads, kv_heads, dim, segment, tokens, sequences: 1, open: 0 })
}

/// One run on the tensors in a folder; its output goes there too.
fn once(case: &Case, device: &Device, folder: &Path) -> Result<()> {
    let state = State::new(device, &case.problem()?, 1, false)?;
    let rows = case.shape.tokens * case.shape.dim;
    let read = |name: &str, heads: usize| -> Result<CudaSlice<bf16>> {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        ensure!(bytes.len() == 2 * rows * heads, "{name}: {} B given", bytes.len());
        Ok(device.upload(&bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes))?)
    };
    let tensors = [
        read("q", case.shape.heads)?,
        read("k", case.shape.kv_heads)?,
        read("v", case.shape.kv_heads)?,
    ];
    let gate = std::fs::read(folder.join("gate")).context("gate")?;
    ensure!(gate.len() == 4 * case.shape.heads, "gate: {} B given", gate.len());
    let gate = device.upload(&bytemuck::pod_collect_to_vec::<u8, f32>(&gate))?;
    let o = device.stream().alloc_zeros::<bf16>(rows * case.shape.heads)?;
    let mut set = Set::of(state, tensors, gate, o)?;
    let plan = case.plan(&set.state)?;
    set.run(&plan, device)?;
    let o = device.stream().clone_dtoh(&set.o)?;
    device.synchronize()?;
    std::fs::write(folder.join("o"), bytemuck::cast_slice::<bf16, u8>(&o)).context("o")
}
