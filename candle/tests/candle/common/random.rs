//! Tensors and models of random numbers, by seed.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use infini_attn_candle::{Config, Problem, Settings};

use super::stream::normals;

/// N(0, 1) values of a shape.
pub fn normal(seed: u64, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::from_vec(normals(seed, shape.iter().product()), shape, device)?.to_dtype(dtype)
}

/// Four query and two key/value heads of 32 channels, segments of 16 tokens.
pub fn problem(dtype: DType) -> Problem {
    let b = Problem::builder().heads(4).kv_heads(2).head_dim(32).segment_len(16);
    b.dtype(infini_attn_candle::element_type(dtype).expect("served")).build().expect("valid")
}

/// q, k, v of such a problem, [B, T, H, D].
pub fn qkv(
    seed: u64,
    (batch, tokens): (usize, usize),
    dtype: DType,
    device: &Device,
) -> Result<[Tensor; 3]> {
    let tensor = |i, heads| normal(seed + i, &[batch, tokens, heads, 32], dtype, device);
    Ok([tensor(0, 4)?, tensor(1, 2)?, tensor(2, 2)?])
}

/// A small Llama: heads as above, two layers.
pub fn config() -> Config {
    let settings = Settings { segment_len: 16, gate: 0.5, ..Settings::default() };
    Config {
        model_type: "llama".into(),
        vocab_size: 50,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        head_dim: Some(32),
        rms_norm_eps: 1e-6,
        infini_attention: Some(settings),
        ..Config::default()
    }
}

/// Its weights by name, in the order of their names' seeds.
pub fn weights(config: &Config, device: &Device) -> Result<HashMap<String, Tensor>> {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let (heads, dim) = (config.num_attention_heads, config.channels());
    let (q, kv) = (heads * dim, config.kv_heads() * dim);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, width]),
        ("model.norm.weight".to_owned(), vec![width]),
        ("lm_head.weight".to_owned(), vec![config.vocab_size, width]),
    ];
    for i in 0..config.num_hidden_layers {
        for (name, shape) in [
            ("input_layernorm.weight", vec![width]),
            ("post_attention_layernorm.weight", vec![width]),
            ("self_attn.q_proj.weight", vec![q, width]),
            ("self_attn.k_proj.weight", vec![kv, width]),
            ("self_attn.v_proj.weight", vec![kv, width]),
            ("self_attn.o_proj.weight", vec![width, q]),
            ("self_attn.beta", vec![heads]),
            ("mlp.gate_proj.weight", vec![inner, width]),
            ("mlp.up_proj.weight", vec![inner, width]),
            ("mlp.down_proj.weight", vec![width, inner]),
        ] {
            shapes.push((format!("model.layers.{i}.{name}"), shape));
        }
    }
    let tensor = |(seed, (name, shape)): (usize, (String, Vec<usize>))| {
        // Activations stay about 1.
        let scale = (*shape.last().expect("an extent") as f64).sqrt();
        let values = normal(seed as u64, &shape, DType::F32, device)?;
        let values = if shape.len() > 1 { (values / scale)? } else { values };
        Ok((name, values))
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

/// The same as a model is loaded from.
pub fn builder(config: &Config, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
    Ok(VarBuilder::from_tensors(weights(config, device)?, dtype, device))
}

/// Some token ids.
pub fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 7 + i * 3 + seed * 11) % 50).collect()
}

/// A tensor's values.
pub fn values(t: &Tensor) -> Vec<f64> {
    let on_cpu = t.to_device(&Device::Cpu).and_then(|t| t.to_dtype(DType::F32));
    let flat = on_cpu.and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f32>());
    flat.expect("a tensor of numbers").into_iter().map(f64::from).collect()
}
