//! The command line.

use std::io::Read;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use clap::{Parser, ValueEnum};
use infini_attn_candle::Update;

/// Text from a Llama-shaped model with Infini-attention: prompts and answers of any length in constant
/// memory.
///
/// The checkpoint is one of Hugging Face's format: model types llama, mistral, qwen2 and qwen3. One that
/// `infini_attn.hf.convert` of the Python package made has its settings with it; any other is converted
/// as it is loaded, by the options below. Text goes to the model as it is, without a chat template.
///
/// The answer goes to the standard output as it comes, everything else to the standard error.
///
/// Try it without a checkpoint: generate --demo --tokens 10000
#[derive(Clone, Debug, Parser)]
#[command(name = "generate", max_term_width = 100)]
pub struct Cli {
    /// Checkpoint: config.json, tokenizer.json, and model.safetensors or the shards that
    /// model.safetensors.index.json lists
    #[arg(value_name = "FOLDER", required_unless_present = "demo", conflicts_with = "demo")]
    pub folder: Option<PathBuf>,

    /// Instead of a checkpoint a small model with random weights, whose tokens are bytes. Its answers
    /// mean nothing
    #[arg(long)]
    pub demo: bool,

    /// What the model reads. Default: the standard input; of --demo a few words
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file")]
    pub prompt: Option<String>,

    /// The same from a file; - is the standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,

    /// Most tokens of the answer, which a token of the model's may end before
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub tokens: usize,

    /// How freely tokens are drawn; at 0 it is always the likeliest
    #[arg(long, value_name = "T", default_value = "0.8", value_parser = temperature)]
    pub temperature: f64,

    /// Draws among the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value = "1", value_parser = probability)]
    pub top_p: f64,

    /// Draws the tokens; the same seed gives the same answer
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Tokens of the prompt that are read at once
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub chunk: usize,

    /// Type of weights and tensors. Default: f32 on the CPU, bf16 on CUDA
    #[arg(long, value_enum)]
    pub dtype: Option<Element>,

    /// cpu, cuda or cuda:N; CUDA needs a build with --features cuda
    #[arg(long, default_value = "cpu")]
    pub device: Place,

    /// Continues the conversation in this file, if there is one, and writes it back at the end
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,

    /// Tokens of a segment, of a checkpoint that was never converted [default: 2048; --demo: 256]
    #[arg(long, value_name = "N")]
    pub segment_len: Option<usize>,

    /// How a segment is written into the memory, likewise: linear or delta [default: delta]
    #[arg(long, value_name = "RULE")]
    pub update: Option<Update>,

    /// Gate logits, likewise: how much of the output is the memory's [default: -4, 1.8 %; --demo: 0]
    #[arg(long, value_name = "BETA", allow_negative_numbers = true, value_parser = number)]
    pub gate: Option<f64>,
}

/// Types that models compute in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Element {
    F32,
    F16,
    Bf16,
}

/// Where the model lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Cpu,
    Cuda(usize),
}

impl FromStr for Place {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ordinal = |text: &str| text.parse().map_err(|_| "cpu, cuda or cuda:N expected");
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => ordinal(text.strip_prefix("cuda:").unwrap_or_default()).map(Self::Cuda),
        }
    }
}

impl Place {
    pub fn open(self) -> Result<Device> {
        let Self::Cuda(ordinal) = self else { return Ok(Device::Cpu) };
        ensure!(
            candle_core::utils::cuda_is_available(),
            "--device: cuda given, but this was built without CUDA; cargo run --release -p \
             infini-attn-candle --features cuda --example generate -- --device cuda FOLDER"
        );
        Device::new_cuda_with_stream(ordinal).with_context(|| format!("--device cuda:{ordinal}"))
    }
}

impl Cli {
    /// What single options cannot check.
    pub fn check(&self) -> Result<()> {
        ensure!(self.chunk > 0, "--chunk: 0 given, at least 1 expected");
        if let Some(path) = &self.state {
            let folder = std::path::absolute(path)?.parent().map(PathBuf::from);
            let named = folder.as_ref().map_or("/".into(), |folder| folder.display().to_string());
            ensure!(
                folder.is_some_and(|folder| folder.is_dir()),
                "--state: {} given, but there is no folder {named}",
                path.display()
            );
        }
        Ok(())
    }

    pub fn dtype(&self) -> DType {
        match (self.dtype, self.device) {
            (Some(Element::F32), _) | (None, Place::Cpu) => DType::F32,
            (Some(Element::F16), _) => DType::F16,
            (Some(Element::Bf16), _) | (None, Place::Cuda(_)) => DType::BF16,
        }
    }

    /// The text to read.
    pub fn text(&self) -> Result<String> {
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => Ok(text.clone()),
            (None, Some(path)) if path.as_os_str() != "-" => std::fs::read_to_string(path)
                .with_context(|| format!("--prompt-file {}", path.display())),
            (None, None) if self.demo => Ok("Attention over an unbounded stream. ".into()),
            (None, _) => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).context("the standard input")?;
                Ok(text)
            }
        }
    }

    /// The first option given of those for checkpoints that were never converted.
    pub fn conversion(&self) -> Option<&'static str> {
        let given = [
            ("--segment-len", self.segment_len.is_some()),
            ("--update", self.update.is_some()),
            ("--gate", self.gate.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }
}

fn number(text: &str) -> Result<f64, &'static str> {
    text.parse().ok().filter(|x: &f64| !x.is_nan()).ok_or("a number expected")
}

fn temperature(text: &str) -> Result<f64, &'static str> {
    let fits = |x: &f64| *x >= 0.0 && x.is_finite();
    number(text).ok().filter(fits).ok_or("a number >= 0 expected")
}

fn probability(text: &str) -> Result<f64, &'static str> {
    let fits = |x: &f64| *x > 0.0 && *x <= 1.0;
    number(text).ok().filter(fits).ok_or("a number > 0 and <= 1 expected")
}
