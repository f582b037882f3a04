//! Summaries of launches.

use std::fs::File;
use std::io::Write;

use ptxsim::{Launch, LaunchError, Report};
use serde_json::json;

/// Where launches are summed up.
#[derive(Debug)]
pub enum Summary {
    /// Only those in which something was found, in words on stderr.
    Findings,
    /// All, in words on stderr.
    Words,
    /// All, a line of JSON each; those in which something was found on stderr as well.
    Lines(File),
}

impl Summary {
    /// Sums up a launch.
    pub fn tell(&self, kernel: &str, launch: &Launch, report: &Result<Report, LaunchError>) {
        let clean = report.as_ref().is_ok_and(Report::is_clean);
        if !clean || matches!(self, Self::Words) {
            eprintln!("{}", words(kernel, launch, report));
        }
        if let Self::Lines(file) = self
            && let Err(error) = writeln!(&mut &*file, "{}", line(kernel, launch, report))
        {
            eprintln!("the report of {kernel} cannot be written: {error}");
        }
    }
}

fn words(kernel: &str, launch: &Launch, report: &Result<Report, LaunchError>) -> String {
    let Launch { grid, block, cluster, shared_bytes, .. } = launch;
    let text = match report {
        Ok(report) if report.is_clean() => format!("nothing found\n{report}"),
        Ok(report) => report.to_string(),
        Err(error) => format!("refused: {error}"),
    };
    format!(
        "{kernel}, grid {grid:?}, block {block:?}, cluster {cluster:?}, {shared_bytes} bytes of \
         dynamic shared memory: {text}"
    )
}

fn line(kernel: &str, launch: &Launch, report: &Result<Report, LaunchError>) -> serde_json::Value {
    let Launch { grid, block, cluster, shared_bytes, .. } = launch;
    let mut line = json!({
        "kernel": kernel, "grid": grid, "block": block, "cluster": cluster, "shared": shared_bytes,
    });
    match report {
        Ok(report) => line["report"] = json!(report),
        Err(error) => line["refused"] = json!(error.to_string()),
    }
    line
}
