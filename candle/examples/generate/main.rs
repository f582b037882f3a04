//! Text from a Llama-shaped model with Infini-attention: `cargo run --release -p infini-attn-candle
//! --example generate -- --demo`. `--help` says what can be set.

mod checkpoint;
mod cli;
mod conversation;
mod demo;
mod sampler;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Result, anyhow, bail, ensure};
use candle_nn::VarBuilder;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use infini_attn_candle::{Cache, Config, Model, Settings};
use tokenizers::Tokenizer;

use crate::checkpoint::Checkpoint;
use crate::cli::Cli;
use crate::conversation::{Conversation, Count, Text};
use crate::sampler::Sampler;

fn main() -> ExitCode {
    match run(&Cli::parse(), &mut std::io::stdout().lock(), &mut std::io::stderr()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // candle's errors may end in a backtrace.
            eprintln!("error: {}", format!("{error:#}").lines().next().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

/// The answer goes to `out`, what is to be said of it to `notes`.
fn run(cli: &Cli, out: &mut dyn Write, notes: &mut dyn Write) -> Result<()> {
    cli.check()?;
    let (device, dtype) = (cli.device.open()?, cli.dtype());
    let Checkpoint { config, tokenizer, weights, ends } = match &cli.folder {
        Some(folder) => Checkpoint::open(folder)?,
        None => demo::checkpoint(),
    };
    let config = with_settings(config, cli, notes)?;
    let model = Model::load(&config, VarBuilder::from_backend(weights, dtype, device.clone()))?;
    let cache = Cache::new(&config, 1, dtype, &device)?;
    let mut conversation = Conversation::new(&model, cache, &device)?;
    if let Some(path) = cli.state.as_ref().filter(|path| path.exists()) {
        conversation.load(path)?;
        writeln!(notes, "{}: {} tokens", path.display(), conversation.tokens()?)?;
    }

    let fresh = conversation.tokens()? == 0;
    let prompt = tokens(&tokenizer, &cli.text()?, fresh, config.vocab_size)?;
    let style =
        ProgressStyle::with_template("reading {wide_bar} {pos} of {len} tokens, {eta} left")?;
    let bar = ProgressBar::new(prompt.len() as u64).with_style(style);
    let (logits, read) = conversation.read_in(&prompt, cli.chunk, |n| bar.inc(n as u64))?;
    bar.finish_and_clear();

    let mut draw = Sampler::new(cli.seed, cli.temperature, cli.top_p);
    let mut text = Text::new(&tokenizer, &prompt);
    let answered = conversation.answer(logits, cli.tokens, &mut draw, &ends, &mut text, out)?;
    if let Some(path) = &cli.state {
        conversation.save(path)?;
    }
    writeln!(notes, "{}\n{}", rate("prompt", read), rate("answer", answered))?;
    let mib = conversation.bytes() as f64 / (1 << 20) as f64;
    writeln!(notes, "state   {mib:.2} MiB after {} tokens", conversation.tokens()?)?;
    Ok(())
}

/// The configuration as the checkpoint has it or, where that says nothing of Infini-attention, as the
/// options do.
fn with_settings(config: Config, cli: &Cli, notes: &mut dyn Write) -> Result<Config> {
    let base = match (config.infini_attention, cli.conversion()) {
        (Some(base), _) if cli.demo => base,
        (Some(_), Some(option)) => {
            bail!("{option}: given, but config.json has the settings of a converted model")
        }
        (Some(_), None) => return Ok(config),
        (None, _) => Settings::default(),
    };
    let settings = Settings {
        segment_len: cli.segment_len.unwrap_or(base.segment_len),
        update: cli.update.unwrap_or(base.update),
        gate: cli.gate.unwrap_or(base.gate),
        ..base
    };
    if !cli.demo {
        let Settings { segment_len, update, gate, .. } = settings;
        writeln!(
            notes,
            "note: a model that was never converted, nor trained with a memory: segments of \
             {segment_len} tokens, {update} rule, gates of {gate}"
        )?;
    }
    Ok(config.converted(settings))
}

/// The prompt's tokens; at the beginning of a conversation those that begin a text come first.
fn tokens(tokenizer: &Tokenizer, text: &str, fresh: bool, vocabulary: usize) -> Result<Vec<u32>> {
    let encoded = tokenizer.encode_fast(text, fresh).map_err(|e| anyhow!("tokenizer.json: {e}"))?;
    let tokens = encoded.get_ids().to_vec();
    let most = tokens.iter().copied().max().unwrap_or(0);
    ensure!(
        (most as usize) < vocabulary,
        "tokenizer.json: token {most} given, less than {vocabulary} expected (vocab_size of config.json)"
    );
    Ok(tokens)
}

fn rate(name: &str, Count { tokens, time }: Count) -> String {
    let seconds = time.as_secs_f64();
    let per_second = tokens as f64 / seconds.max(1e-9);
    format!("{name}  {tokens} tokens in {seconds:.2} s, {per_second:.0} tokens/s")
}
