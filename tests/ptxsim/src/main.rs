//! Runs a kernel described by a JSON file.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use ptxsim::cli::{self, Command};

fn main() -> ExitCode {
    match run(&Command::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether the report is clean.
fn run(command: &Command) -> Result<bool> {
    let outcome = cli::run(command)?;
    eprint!("{}", outcome.report);
    outcome.notes.iter().for_each(|note| eprintln!("note: {note}"));
    let json = match command.pretty {
        true => serde_json::to_string_pretty(&outcome.report)?,
        false => serde_json::to_string(&outcome.report)?,
    };
    writeln!(std::io::stdout(), "{json}").context("cannot write the report")?;
    Ok(outcome.report.is_clean())
}
