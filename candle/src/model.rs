//! A Llama-shaped model that generates.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Embedding, Linear, RmsNorm, VarBuilder, embedding, linear_b, rms_norm};
use infini_attn::Slot;

use crate::attention::{InfiniAttention, normed};
use crate::batch::Batch;
use crate::cache::{Cache, Kind};
use crate::config::Config;
use crate::error::refused;
use crate::state::State;

/// A Llama, Mistral, Qwen2 or Qwen3 with Infini-attention, with weights of Hugging Face's names.
#[derive(Clone, Debug)]
pub struct Model {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
    /// What a cache must have been made for.
    kind: Kind,
}

impl Model {
    /// Loads the weights: of a checkpoint (`VarBuilder::from_mmaped_safetensors`), or new ones
    /// (`VarBuilder::from_varmap`). They have the builder's type, gates f32.
    ///
    /// # Errors
    /// For a weight that is missing or has another shape; those of [`Config::check`], and for a
    /// configuration without settings.
    pub fn load(config: &Config, vb: VarBuilder<'_>) -> Result<Self> {
        config.check()?;
        let model = vb.pp("model");
        let (vocabulary, width) = (config.vocab_size, config.hidden_size);
        let embed_tokens = embedding(vocabulary, width, model.pp("embed_tokens"))?;
        let lm_head = match config.tie_word_embeddings {
            true => Linear::new(embed_tokens.embeddings().clone(), None),
            false => linear_b(width, vocabulary, false, vb.pp("lm_head"))?,
        };
        let layer = |i| Layer::load(config, model.pp(format!("layers.{i}")));
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let norm = rms_norm(width, config.rms_norm_eps, model.pp("norm"))?;
        Ok(Self { embed_tokens, layers, norm, lm_head, kind: Kind::of(config)? })
    }

    /// Brings new tokens to conversations, so many to each of the slots, prompts and single tokens alike,
    /// and returns the logits behind the last token of each, f32 [sequences, vocabulary]. All layers take
    /// the tokens, or none where one fails.
    ///
    /// `tokens`: u32, packed `[total]` one sequence after the other, or [B, T] with padding on the right, in
    /// the order of `sequences`.
    ///
    /// # Errors
    /// For numbers of tokens that do not fit `tokens`, for a cache of another model, for slots that are not
    /// in use; those of [`infini_attention`](crate::infini_attention).
    pub fn forward(
        &self,
        tokens: &Tensor,
        sequences: &[(Slot, usize)],
        cache: &mut Cache,
    ) -> Result<Tensor> {
        let step = Step::new(tokens, sequences)?;
        cache.kind.check_same(&self.kind)?;
        cache.step(sequences, |states, slots, rope| {
            let batch = step.batch().slots(slots).rope(rope);
            let mut x = self.embed_tokens.forward(tokens)?;
            for (layer, state) in self.layers.iter().zip(states) {
                x = layer.forward(&x, &batch, state)?;
            }
            let last = Tensor::new(&step.last[..], tokens.device())?;
            let x = x.flatten_to(x.rank() - 2)?.index_select(&last, 0)?;
            self.lm_head.forward(&normed(&self.norm, &x)?)?.to_dtype(DType::F32)
        })
    }
}

/// The lengths of a step.
struct Step {
    packed: bool,
    /// `cu_seqlens` or `seq_lens`.
    lengths: Vec<i32>,
    /// Where the last token of each sequence stands.
    last: Vec<u32>,
}

impl Step {
    fn new(tokens: &Tensor, sequences: &[(Slot, usize)]) -> Result<Self> {
        let (rows, columns) = match *tokens.dims() {
            [total] => (None, total),
            [batch, tokens] => (Some(batch), tokens),
            _ => {
                return Err(refused(
                    "tokens",
                    format!("shape {:?}", tokens.dims()),
                    "[total] or [B, T]",
                ));
            }
        };
        if sequences.is_empty() {
            return Err(refused("sequences", "none", "at least one"));
        }
        if let Some(i) = sequences.iter().position(|&(_, count)| count == 0) {
            return Err(refused(format!("sequences[{i}]"), "0 tokens", "at least 1"));
        }
        let expected = |total: usize| match rows {
            Some(rows) => rows == sequences.len() && sequences.iter().all(|s| s.1 <= columns),
            None => total == columns,
        };
        let total = sequences.iter().fold(0usize, |total, s| total.saturating_add(s.1));
        if !expected(total) || i32::try_from(tokens.elem_count()).is_err() {
            let lens: Vec<_> = sequences.iter().map(|s| s.1).collect();
            let expected = format!("those of tokens {:?}, of at most 2^31 - 1", tokens.dims());
            return Err(refused("sequences", format!("lengths {lens:?}"), expected));
        }
        let mut ends = vec![0];
        for (b, &(_, count)) in sequences.iter().enumerate() {
            let first = if rows.is_some() { b * columns } else { ends[b] };
            ends.push(first + count);
        }
        let last = ends[1..].iter().map(|&end| end as u32 - 1).collect();
        let lengths = match rows {
            Some(_) => sequences.iter().map(|s| s.1 as i32).collect(),
            None => ends.iter().map(|&end| end as i32).collect(),
        };
        Ok(Self { packed: rows.is_none(), lengths, last })
    }

    fn batch(&self) -> Batch<'_> {
        match self.packed {
            true => Batch::new().cu_seqlens(&self.lengths),
            false => Batch::new().seq_lens(&self.lengths),
        }
    }
}

/// Attention and a gated feed-forward, each behind a norm and beside a residual.
#[derive(Clone, Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: InfiniAttention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn load(config: &Config, vb: VarBuilder<'_>) -> Result<Self> {
        let norm = |name| rms_norm(config.hidden_size, config.rms_norm_eps, vb.pp(name));
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: InfiniAttention::load(config, vb.pp("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(config, vb.pp("mlp"))?,
        })
    }

    fn forward(&self, x: &Tensor, batch: &Batch<'_>, state: &mut State) -> Result<Tensor> {
        let attended = self.self_attn.forward(&normed(&self.input_layernorm, x)?, batch, state)?;
        let x = (x + attended)?;
        &x + self.mlp.forward(&normed(&self.post_attention_layernorm, &x)?)?
    }
}

#[derive(Clone, Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn load(config: &Config, vb: VarBuilder<'_>) -> Result<Self> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let bias = config.mlp_bias && config.model_type == "llama";
        Ok(Self {
            gate_proj: linear_b(width, inner, bias, vb.pp("gate_proj"))?,
            up_proj: linear_b(width, inner, bias, vb.pp("up_proj"))?,
            down_proj: linear_b(inner, width, bias, vb.pp("down_proj"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inner = (self.gate_proj.forward(x)?.silu()? * self.up_proj.forward(x)?)?;
        self.down_proj.forward(&inner)
    }
}
