//! Configurations of Llama-shaped models, as Hugging Face's checkpoints have them.

use std::path::Path;

use candle_core::{DType, Device, Result};
use infini_attn::{EmptyMemory, Problem, Update};
use serde::{Deserialize, Deserializer};

use crate::batch::Rope;
use crate::error::{refused, wrapped};
use crate::state::element_type;

/// More than any model has, and few enough to be made.
const MOST_LAYERS: usize = 1 << 16;

/// A `config.json` of a model of transformers' types `llama`, `mistral`, `qwen2` or `qwen3`, of version 4 or
/// 5.
#[derive(Clone, Debug, Default, Deserialize)]
#[allow(missing_docs, reason = "the names are those of transformers")]
pub struct Config {
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// As many as heads by default.
    pub num_key_value_heads: Option<usize>,
    /// hidden_size / heads by default, of `qwen3` 128.
    pub head_dim: Option<usize>,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    /// SiLU by default; there is no other.
    pub hidden_act: Option<String>,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Of `llama` and `qwen3`: projections of attention with biases. (`qwen2` has them on q, k and v.)
    #[serde(default)]
    pub attention_bias: bool,
    /// Of `llama`: the other projections with biases.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Of transformers 4.
    pub rope_theta: Option<f64>,
    /// Of transformers 4; comes before `rope_parameters`.
    pub rope_scaling: Option<RopeParameters>,
    pub rope_parameters: Option<RopeParameters>,
    /// Must be absent or, of `qwen2` and `qwen3`, not in use: there are segments instead.
    pub sliding_window: Option<usize>,
    pub use_sliding_window: Option<bool>,
    /// Must be absent: weights are read as they are.
    pub quantization_config: Option<serde_json::Value>,
    pub eos_token_id: Option<EndTokens>,
    /// As `infini_attn.hf.convert` writes it, the Python package's; [`Self::converted`].
    pub infini_attention: Option<Settings>,
    /// Whether gates that the checkpoint lacks begin at `infini_attention.gate`, as [`Self::converted`]
    /// asks for. Without it they are missing. (Of a `VarMap`, which makes what it lacks, variables come only
    /// without it.)
    #[serde(skip)]
    pub new_gates: bool,
}

/// How a model's attention became Infini-attention.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Settings {
    /// Tokens of a segment.
    pub segment_len: usize,
    /// The rule of the memory's update.
    pub update: Update,
    /// What an empty memory contributes.
    pub empty_memory: EmptyMemory,
    /// What gate logits begin with; −∞ is attention inside segments alone.
    #[serde(deserialize_with = "number")]
    pub gate: f64,
}

impl Default for Settings {
    /// Those of `infini_attn.hf.convert`: segments of 2048 tokens, the delta rule, the first segment as the
    /// model computes it without memory, gates that give the memory 1.8 % of the output.
    fn default() -> Self {
        let (update, empty_memory) = (Update::Delta, EmptyMemory::Bypass);
        Self { segment_len: 2048, update, empty_memory, gate: -4.0 }
    }
}

/// Frequencies of the rotation.
#[derive(Clone, Debug, Default, Deserialize)]
#[allow(missing_docs, reason = "the names are those of transformers")]
pub struct RopeParameters {
    /// `default`, `linear` or `llama3`.
    pub rope_type: Option<String>,
    /// The same, of older files.
    pub r#type: Option<String>,
    pub rope_theta: Option<f64>,
    pub factor: Option<f64>,
    pub low_freq_factor: Option<f64>,
    pub high_freq_factor: Option<f64>,
    pub original_max_position_embeddings: Option<f64>,
}

/// Tokens that end a text.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum EndTokens {
    /// One.
    One(u32),
    /// Several.
    Several(Vec<u32>),
}

impl Config {
    /// Reads a `config.json` and refuses what [`Model`](crate::Model) does not compute.
    ///
    /// # Errors
    /// For a file that cannot be read or is none, by its path; for values that are not served, by their
    /// names.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed =
            |e: &dyn std::fmt::Display| candle_core::Error::msg(format!("{}: {e}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| failed(&e))?;
        let config: Self = serde_json::from_str(&text).map_err(|e| failed(&e))?;
        config.check()?;
        Ok(config)
    }

    /// The same for a model that was never converted: with these settings, and gates that begin at
    /// `settings.gate`.
    pub fn converted(self, settings: Settings) -> Self {
        Self { infini_attention: Some(settings), new_gates: true, ..self }
    }

    /// Refuses what the model does not compute.
    ///
    /// # Errors
    /// For the first such value, by its name.
    pub fn check(&self) -> Result<()> {
        let known = ["llama", "mistral", "qwen2", "qwen3"];
        if !known.contains(&self.model_type.as_str()) {
            return Err(refused("model_type", &self.model_type, known.join(", ")));
        }
        for (name, extent, most) in [
            ("vocab_size", self.vocab_size, usize::MAX),
            ("hidden_size", self.hidden_size, usize::MAX),
            ("intermediate_size", self.intermediate_size, usize::MAX),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
        ] {
            if extent == 0 || extent > most {
                let most =
                    if most < usize::MAX { format!("1 to {most}") } else { "1 or more".into() };
                return Err(refused(name, extent, most));
            }
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|act| !["silu", "swish"].contains(act))
        {
            return Err(refused("hidden_act", act, "silu"));
        }
        let in_use = match self.model_type.as_str() {
            "mistral" => true,
            "llama" => false,
            _ => self.use_sliding_window == Some(true),
        };
        if let Some(window) = self.sliding_window.filter(|_| in_use) {
            return Err(refused("sliding_window", window, "null: there are segments instead"));
        }
        if let Some(quantized) = &self.quantization_config {
            return Err(refused(
                "quantization_config",
                quantized,
                "none: weights are read as they are",
            ));
        }
        // Heads and channels are bounded whether or not there are settings.
        let settings = self.infini_attention.unwrap_or_default();
        if settings.gate.is_nan() {
            return Err(refused("infini_attention.gate", "NaN", "a number"));
        }
        self.problem_of(&settings, DType::F32)?;
        self.frequencies().map(drop)
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Channels of a head.
    pub fn channels(&self) -> usize {
        match (self.head_dim, self.model_type.as_str()) {
            (Some(channels), _) => channels,
            (None, "qwen3") => 128,
            (None, _) => self.hidden_size / self.num_attention_heads.max(1),
        }
    }

    /// The tokens that end a text.
    pub fn end_tokens(&self) -> &[u32] {
        match &self.eos_token_id {
            None => &[],
            Some(EndTokens::One(token)) => std::slice::from_ref(token),
            Some(EndTokens::Several(tokens)) => tokens,
        }
    }

    /// What the model's attention computes, for elements of a type.
    ///
    /// # Errors
    /// For a configuration without settings, and for values that the operator does not serve.
    pub fn problem(&self, dtype: DType) -> Result<Problem> {
        self.problem_of(self.settings()?, dtype)
    }

    fn problem_of(&self, settings: &Settings, dtype: DType) -> Result<Problem> {
        Problem::builder()
            .heads(self.num_attention_heads)
            .kv_heads(self.kv_heads())
            .head_dim(self.channels())
            .segment_len(settings.segment_len)
            .update(settings.update)
            .empty_memory(settings.empty_memory)
            .dtype(element_type(dtype)?)
            .build()
            .map_err(wrapped)
    }

    /// The settings.
    ///
    /// # Errors
    /// For a configuration without.
    pub fn settings(&self) -> Result<&Settings> {
        let expected = "the settings of a converted model, or those of Config::converted";
        self.infini_attention.as_ref().ok_or_else(|| refused("infini_attention", "none", expected))
    }

    /// Tables of the model's rotation for its segments: [segment_len, channels / 2].
    ///
    /// # Errors
    /// For a configuration without settings, and rotations of other types.
    pub fn rope(&self, device: &Device) -> Result<Rope> {
        Rope::of_frequencies(&self.frequencies()?, self.settings()?.segment_len, device)
    }

    /// Radians per token, of each pair of channels. (`rope_type` as in transformers.)
    pub(crate) fn frequencies(&self) -> Result<Vec<f64>> {
        let none = RopeParameters::default();
        let given = self.rope_scaling.as_ref().or(self.rope_parameters.as_ref()).unwrap_or(&none);
        let needed = |name: &str, value: Option<f64>| match value {
            Some(value) if value > 0.0 && value.is_finite() => Ok(value),
            other => {
                let got = other.map_or("none".into(), |value| value.to_string());
                Err(refused(format!("rope_parameters.{name}"), got, "a number > 0"))
            }
        };
        let theta = given.rope_theta.or(self.rope_theta).unwrap_or(10_000.0);
        let (theta, channels) = (needed("rope_theta", Some(theta))?, self.channels());
        let plain = (0..channels / 2).map(|i| theta.powf(-2.0 * i as f64 / channels as f64));
        let rope_type = given.rope_type.as_ref().or(given.r#type.as_ref());
        match rope_type.map_or("default", String::as_str) {
            "default" => Ok(plain.collect()),
            "linear" => {
                let factor = needed("factor", given.factor)?;
                Ok(plain.map(|f| f / factor).collect())
            }
            "llama3" => {
                let factor = needed("factor", given.factor)?;
                let low = needed("low_freq_factor", given.low_freq_factor)?;
                let high = needed("high_freq_factor", given.high_freq_factor)?;
                let name = "original_max_position_embeddings";
                let trained = needed(name, given.original_max_position_embeddings)?;
                if high <= low {
                    let expected = format!("more than low_freq_factor = {low}");
                    return Err(refused("rope_parameters.high_freq_factor", high, expected));
                }
                // Waves that fit `high` times into the trained length stay, those that fit less than `low`
                // times are stretched, those between in part.
                let stretched = |f: f64| {
                    let fits = trained * f / std::f64::consts::TAU;
                    let kept = ((fits - low) / (high - low)).clamp(0.0, 1.0);
                    f * (kept + (1.0 - kept) / factor)
                };
                Ok(plain.map(stretched).collect())
            }
            other => Err(refused("rope_parameters.rope_type", other, "default, linear or llama3")),
        }
    }
}

fn default_eps() -> f64 {
    1e-6
}

/// A number, also one that JSON has no word for, as transformers 5 writes it: `{"__float__": "-Infinity"}`.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Plain(f64),
        Named { __float__: String },
    }
    match Number::deserialize(deserializer)? {
        Number::Plain(x) => Ok(x),
        Number::Named { __float__: name } => name.parse().map_err(serde::de::Error::custom),
    }
}
