//! The operator on a CUDA device: `cargo bench --features cuda --bench cuda`.
//!
//! Every operation is captured into CUDA graphs, one per set of buffers (together larger than L2),
//! and timed by events on the stream: no host time is in the figures. Next to criterion's own lines
//! stands a Markdown table: µs, TFLOP/s of the formula, GB/s of the bytes that must move, and the
//! share of the roofline, whose bandwidth is that of a copy measured in the same run.
//!
//! | variable | |
//! |---|---|
//! | `INFINI_BENCH_SECONDS` | time for all measurements together (default 120) |
//! | `INFINI_BENCH_JSON` | file to append one JSON line per operation to |
//! | `INFINI_BENCH_ROWS` | which rows of the table, such as `0..2` or `5..` (what says most comes first) |
//!
//! The variables of tests/common/switches.rs hold here as well: other kernels, other cuts of the work.
//!
//! | arguments | prints JSON lines |
//! |---|---|
//! | `--card` | what the device is, and the bandwidth of a copy |
//! | `--headline SECONDS [PREFIX]` | µs of the shapes that variants are compared by, in that time together |
//! | `--measure prefill --shape HQ,HKV,D,N,T [--inputs FOLDER]` | µs of one bf16 prefill, for `benches/compare.py`; with a folder it reads q, k, v and gate from there and writes o |
//!
//! On the simulator's driver (tests/ptxsim/driver) all shapes are tiny, and no figure means anything.

mod cases;
mod measure;
#[allow(dead_code)] // the tests use more of it
#[path = "../../tests/common/noise.rs"]
mod noise;
mod roofline;
mod stopwatch;
#[path = "../../tests/common/switches.rs"]
mod switches;
mod work;

use std::cell::RefCell;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use criterion::Criterion;
use infini_attn::cuda::Device;

use roofline::Roofline;
use work::Work;

fn main() -> std::process::ExitCode {
    let device = match switches::kernels().and_then(|()| switches::device()) {
        Ok(device) => device,
        Err(error) => {
            println!("cuda benchmarks: {error}; nothing was measured");
            // A call for one figure must not pass for one that gave it.
            return u8::from(measure::asked()).into();
        }
    };
    let done = if measure::asked() { measure::run(&device) } else { all(&device) };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// Every operation through criterion, then the table.
fn all(device: &Device) -> Result<()> {
    let roofline = Roofline::measure(device)?;
    println!("{}\n", roofline.describe());
    let cases = chosen(cases::cases(device)?)?;
    if cases.is_empty() {
        return Ok(());
    }
    let seconds = std::env::var("INFINI_BENCH_SECONDS").ok().and_then(|s| s.parse().ok());
    let each: f64 = seconds.unwrap_or(120.0) / cases.len() as f64;
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs_f64((each / 10.0).max(0.1)))
        .measurement_time(Duration::from_secs_f64((each / 2.0).max(0.2)))
        .configure_from_args();
    let (mut rows, mut failed) = (vec![], vec![]);
    for (row, case) in cases {
        let name = case.name();
        // For whoever finds this program hanging, or gone.
        println!("row {row} {name}");
        // Buffers are made only for what the command line asks for.
        let mut ready: Option<Result<Work>> = None;
        let samples = RefCell::new(vec![]);
        criterion.bench_function(&name, |b| {
            let work = ready.get_or_insert_with(|| case.prepare(device));
            b.iter_custom(|iterations| match work {
                Ok(work) => {
                    let time = work.time(iterations).expect("a replay that was captured");
                    samples.borrow_mut().push(time.as_secs_f64() / iterations as f64);
                    time
                }
                // Criterion wants a time; the error follows the table.
                Err(_) => Duration::from_nanos(iterations),
            });
        });
        match ready {
            None => {}
            Some(Err(error)) => failed.push(format!("{name}: {error:#}")),
            Some(Ok(work)) => {
                let figures = work.figures(samples.into_inner());
                // At once: whoever ends this program early has what it did until then.
                figures.iter().try_for_each(|row| append(&row.json(&roofline)))?;
                rows.extend(figures);
            }
        }
    }
    println!("\n| operation | µs | TFLOP/s | GB/s | of the roofline |\n|---|---|---|---|---|");
    rows.iter().for_each(|row| println!("{}", row.markdown(&roofline)));
    ensure!(failed.is_empty(), "not measured, whatever stands above: {}", failed.join("; "));
    Ok(())
}

/// The rows that are asked for, numbered.
fn chosen(cases: Vec<cases::Case>) -> Result<Vec<(usize, cases::Case)>> {
    let text = std::env::var("INFINI_BENCH_ROWS").unwrap_or("..".into());
    let range = text.split_once("..").and_then(|(first, end)| {
        let number = |text: &str, default| match text {
            "" => Some(default),
            text => text.parse().ok(),
        };
        Some(number(first, 0)?..number(end, usize::MAX)?)
    });
    let range = range.with_context(|| format!("INFINI_BENCH_ROWS: {text} given, 0..2 or such"))?;
    Ok(cases.into_iter().enumerate().filter(|(row, _)| range.contains(row)).collect())
}

/// A line in the file that is named, if any.
fn append(row: &serde_json::Value) -> Result<()> {
    let Some(path) = std::env::var_os("INFINI_BENCH_JSON") else { return Ok(()) };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    let mut file = file.with_context(|| path.to_string_lossy().into_owned())?;
    Ok(writeln!(file, "{row}")?)
}
