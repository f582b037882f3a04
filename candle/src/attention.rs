//! A module of attention: projections and gate around the operator.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::init::Init;
use candle_nn::{Linear, RmsNorm, VarBuilder, linear_b, rms_norm};

use crate::batch::Batch;
use crate::config::Config;
use crate::operator::infini_attention;
use crate::state::State;

/// Multi-head Infini-attention of a [`Config`], with the weights of Hugging Face's names: `q_proj`,
/// `k_proj`, `v_proj`, `o_proj`, of `qwen3` `q_norm` and `k_norm`, and gate logits `beta`, f32 `[Hq]`, as the
/// Python package has them.
#[derive(Clone, Debug)]
pub struct InfiniAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    /// Of the heads of q and k.
    norms: Option<[RmsNorm; 2]>,
    gate: Tensor,
    channels: usize,
}

impl InfiniAttention {
    /// Loads the weights of one layer, below a prefix such as `model.layers.0.self_attn`.
    ///
    /// # Errors
    /// For a weight that is missing or has another shape; those of [`Config::check`], and for a configuration
    /// without settings.
    pub fn load(config: &Config, vb: VarBuilder<'_>) -> Result<Self> {
        config.check()?;
        config.settings()?;
        let (heads, channels, width) =
            (config.num_attention_heads, config.channels(), config.hidden_size);
        let model = config.model_type.as_str();
        let (all, qkv) =
            (config.attention_bias && ["llama", "qwen3"].contains(&model), model == "qwen2");
        let project = |inside, outside, bias, name| linear_b(inside, outside, bias, vb.pp(name));
        let norm = |name| rms_norm(channels, config.rms_norm_eps, vb.pp(name));
        let norms = match model {
            "qwen3" => Some([norm("q_norm")?, norm("k_norm")?]),
            _ => None,
        };
        Ok(Self {
            q_proj: project(width, heads * channels, all || qkv, "q_proj")?,
            k_proj: project(width, config.kv_heads() * channels, all || qkv, "k_proj")?,
            v_proj: project(width, config.kv_heads() * channels, all || qkv, "v_proj")?,
            o_proj: project(heads * channels, width, all, "o_proj")?,
            norms,
            gate: load_gate(config, &vb)?,
            channels,
        })
    }

    /// Attends to `x`, [B, T, E] or packed [total, E] ([`Batch::cu_seqlens`]), and to what the state's slots
    /// have seen; they are advanced. The output is shaped like `x`.
    ///
    /// # Errors
    /// Those of [`infini_attention`].
    pub fn forward(&self, x: &Tensor, batch: &Batch<'_>, state: &mut State) -> Result<Tensor> {
        if x.elem_count() == 0 {
            return Ok(x.clone()); // No tokens, which candle's products do not take.
        }
        let lead = &x.dims()[..x.rank().saturating_sub(1)];
        let heads = |projection: &Linear| -> Result<Tensor> {
            let y = projection.forward(x)?;
            let count = y.dim(y.rank() - 1)? / self.channels;
            y.reshape([lead, &[count, self.channels]].concat())
        };
        let (mut q, mut k, v) = (heads(&self.q_proj)?, heads(&self.k_proj)?, heads(&self.v_proj)?);
        if let Some([of_q, of_k]) = &self.norms {
            (q, k) = (normed(of_q, &q)?, normed(of_k, &k)?);
        }
        let o = infini_attention(&q, &k, &v, &self.gate, state, batch)?;
        self.o_proj.forward(&o.flatten_from(lead.len())?)
    }

    /// The gate's logits, f32 `[Hq]`.
    pub fn gate(&self) -> &Tensor {
        &self.gate
    }
}

/// The norm, by operations that have gradients where those are tracked: candle's own has none.
pub(crate) fn normed(norm: &RmsNorm, x: &Tensor) -> Result<Tensor> {
    match x.track_op() || norm.weight().track_op() {
        true => norm.forward_diff(x),
        false => norm.forward(x),
    }
}

/// They stay f32 whatever the other weights are: small steps of them matter.
fn load_gate(config: &Config, vb: &VarBuilder<'_>) -> Result<Tensor> {
    let (heads, first) = (config.num_attention_heads, config.settings()?.gate);
    if config.new_gates && !vb.contains_tensor("beta") {
        return Tensor::full(first as f32, heads, vb.device());
    }
    vb.get_with_hints_dtype(heads, "beta", Init::Const(first), DType::F32)
}
