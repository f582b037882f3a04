//! A server's loop without the server: requests come at random, are batched with those under way, share
//! the beginnings of their prompts, go on in several answers, and leave. `cargo run --release --example
//! serve`. `--help` says what can be set; docs/engines.md follows the loop.

mod engine;
mod model;
mod report;
mod requests;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use engine::Engine;
use model::Model;
use requests::Requests;

/// Continuous batching over constant-size states: what a step costs while conversations come and go.
///
/// The model is random (tables of queries, keys and values instead of projections), so its answers mean
/// nothing; everything else is what an engine does.
#[derive(Clone, Debug, Parser)]
#[command(name = "serve")]
pub struct Cli {
    /// Requests in all.
    #[arg(long, default_value_t = 64)]
    requests: usize,
    /// Slots of the pool: conversations at once.
    #[arg(long, default_value_t = 16)]
    slots: usize,
    /// Requests that arrive per step, on average.
    #[arg(long, default_value_t = 0.5)]
    rate: f64,
    /// Layers of the model.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Query heads of a layer.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Key/value heads of a layer.
    #[arg(long, default_value_t = 2)]
    kv_heads: usize,
    /// Channels of a head.
    #[arg(long, default_value_t = 64)]
    dim: usize,
    /// Tokens of a segment.
    #[arg(long, default_value_t = 512)]
    segment: usize,
    /// Tokens that all prompts of a kind begin with.
    #[arg(long, default_value_t = 1024)]
    prefix: usize,
    /// Most tokens of a prompt behind that; they vary.
    #[arg(long, default_value_t = 1024)]
    prompt: usize,
    /// Most tokens of an answer; they vary.
    #[arg(long, default_value_t = 64)]
    answer: usize,
    /// Most tokens of a prompt that one step reads.
    #[arg(long, default_value_t = 256)]
    chunk: usize,
    /// MiB for the states of known beginnings.
    #[arg(long, default_value_t = 256)]
    prefix_cache: usize,
    /// Seed of the model and the requests.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Answers every request once more, alone, and compares.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse(), &mut std::io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli, out: &mut dyn Write) -> Result<()> {
    let model = Model::new(cli)?;
    let mut requests = Requests::new(cli)?;
    let mut engine = Engine::new(cli, &model)?;
    writeln!(out, "{}", report::title(cli, &model.problem)?)?;
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {pos} of {len} requests, {eta} left");
    let bar = ProgressBar::new(cli.requests as u64).with_style(style?);
    while requests.open() || !engine.is_idle() {
        requests.arrive(&mut engine.waiting);
        engine.step()?;
        bar.set_position(engine.answered() as u64);
        bar.set_message(format!("{} live, {} waiting", engine.live(), engine.waiting.len()));
    }
    bar.finish_and_clear();
    write!(out, "{}", report::table(&engine))?;
    if cli.check {
        let wrong = engine.answers().iter().filter(|a| a.tokens != model.answer_alone(a)).count();
        let all = engine.answers().len();
        ensure!(wrong == 0, "{wrong} of {all} answers differ from those of a stream alone");
        writeln!(out, "All {all} answers are those of a stream alone.")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Few slots for many requests: queues, shared beginnings, several answers to one prompt.
    #[test]
    fn answers_are_those_of_streams_alone() {
        let arguments = "serve --requests 24 --slots 4 --layers 2 --heads 4 --kv-heads 2 --dim 64 \
                         --segment 32 --prefix 70 --prompt 90 --answer 12 --chunk 40 --rate 2 --check";
        let cli = Cli::parse_from(arguments.split_whitespace());
        let mut out = vec![];
        run(&cli, &mut out).expect("a valid run");
        let text = String::from_utf8(out).expect("text");
        for wanted in ["tokens/s", "p50", "p99", "MiB", "are those of a stream alone"] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
    }

    #[test]
    fn what_cannot_be_served_is_said() {
        for (arguments, wanted) in [
            ("serve --slots 1", "--slots: 1 given, at least 2 expected"),
            ("serve --heads 2 --kv-heads 1", "channels given, at least 256 expected"),
            ("serve --heads 256 --dim 1", "--dim: 1 given, an even number expected"),
            ("serve --rate 0", "--rate: 0 given, a positive number expected"),
            ("serve --heads 8 --kv-heads 3", "kv_heads: 3 given, a divisor of heads = 8"),
        ] {
            let cli = Cli::parse_from(arguments.split_whitespace());
            let error = run(&cli, &mut vec![]).expect_err(arguments).to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
