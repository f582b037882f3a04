//! A passkey in up to a million tokens of real text, found again through the compressive memory
//! alone: `cargo run --release --example passkey`. `--help` says how and what is constructed.

mod cli;
#[cfg(feature = "cuda")]
mod device;
mod experiment;
mod features;
mod haystack;
mod memory;
mod report;

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use infini_attn::{Error, Problem};

use crate::cli::{Cli, Place, show_tokens};
use crate::experiment::{Experiment, KEYS, Kind};
use crate::features::PHRASE;
use crate::haystack::Haystack;
use crate::memory::{Backend, Cpu};

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("error: a passkey was not recalled");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            // Nothing is wrong with the command line where a machine has no device.
            let no_device = matches!(error.downcast_ref(), Some(Error::NoDevice { .. }));
            ExitCode::from(if no_device { 1 } else { 2 })
        }
    }
}

fn run(cli: &Cli) -> Result<bool> {
    cli.check()?;
    match cli.device {
        Place::Cpu => run_on(&Cpu, cli),
        #[cfg(feature = "cuda")]
        Place::Cuda => run_on(&device::Cuda::open()?, cli),
        #[cfg(not(feature = "cuda"))]
        Place::Cuda => anyhow::bail!(
            "--device cuda: built without CUDA; cargo run --release --features cuda --example \
             passkey -- --device cuda"
        ),
    }
}

/// Whether every passkey was recalled in the rows that are not there to fail.
fn run_on(backend: &impl Backend, cli: &Cli) -> Result<bool> {
    let start = Instant::now();
    let mut out = std::io::stdout().lock();
    let mut lengths = cli.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    let problem = Problem::builder()
        .heads(cli.heads)
        .head_dim(cli.dim)
        .segment_len(cli.segment)
        .update(cli.update)
        .dtype(backend.dtype())
        .build()?;
    let longest = lengths.last().copied().unwrap_or_default();
    let needed = longest.next_multiple_of(cli.segment);
    let haystack = Haystack::read(&cli.files, needed, PHRASE)?;
    let title = format!(
        "Passkey in real text: {} rule, heads x channels {} x {}, segments of {} tokens, seed {}",
        cli.update,
        cli.heads,
        cli.dim,
        show_tokens(cli.segment),
        cli.seed
    );
    report::prepare(&cli.plot)?;
    writeln!(out, "{title}")?;
    writeln!(out, "Text: {}", haystack.describe(needed))?;
    writeln!(out, "Memory on {}", backend.describe()?)?;
    writeln!(
        out,
        "Needle: \"{PHRASE}\" and five digits; projections are constructed, not trained"
    )?;

    let progress = bar();
    let experiment =
        Experiment { problem, backend, seed: cli.seed, haystack: &haystack, progress: &progress };
    progress.set_length(experiment.total(&lengths));
    let mut lines = vec![];
    for &length in &lengths {
        lines.extend(experiment.run(length)?);
    }
    progress.finish_and_clear();

    writeln!(
        out,
        "\nDigits recalled (passkeys recalled whole, of {KEYS}) by depth of the needle; chance is \
         10 %.\nState (open segment included) and key-value cache are those of one stream.\n"
    )?;
    write!(out, "{}", report::table(&lines, &problem))?;
    report::plot(&lines, &lengths, &title, &cli.plot)?;
    writeln!(
        out,
        "\nHeat map: {}. {:.1} s in all",
        cli.plot.display(),
        start.elapsed().as_secs_f64()
    )?;
    let must = |kind| matches!(kind, Kind::Constructed | Kind::Decoy);
    let found = |cells: &[experiment::Cell]| cells.iter().all(|c| c.whole == KEYS);
    Ok(lines.iter().filter(|line| must(line.kind)).all(|line| found(&line.cells)))
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:34} {wide_bar} {percent:>3} %, {eta} left")
        .expect("the template is well formed");
    ProgressBar::new(0).with_style(style)
}
