//! A small model with random weights.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use infini_attn_candle::{Cache, Config, Model, Settings};

use crate::data::{close, noise, values};

const VOCABULARY: usize = 40;

fn config() -> Config {
    Config {
        model_type: "llama".into(),
        vocab_size: VOCABULARY,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        head_dim: Some(32),
        rms_norm_eps: 1e-5,
        infini_attention: Some(Settings { segment_len: 16, gate: 0.5, ..Settings::default() }),
        ..Config::default()
    }
}

/// The same weights whatever the device, near those that training leaves.
fn model(device: &Device, dtype: DType) -> Result<Model> {
    let names = VarMap::new();
    Model::load(&config(), VarBuilder::from_varmap(&names, DType::F32, &Device::Cpu))?;
    let mut weights = HashMap::new();
    for (seed, (name, shape)) in sorted(&names).into_iter().enumerate() {
        let scale = if shape.len() == 1 { 0.1 } else { (shape[1] as f64).powf(-0.5) };
        let centre = if name.contains("norm") { 1.0 } else { 0.0 };
        let weight = noise(seed as u64, &shape, DType::F32)?.affine(scale, centre)?;
        // What both devices hold.
        let weight = if name.ends_with("beta") { weight } else { weight.to_dtype(DType::BF16)? };
        weights.insert(name, weight.to_device(device)?);
    }
    Ok(Model::load(&config(), VarBuilder::from_tensors(weights, dtype, device))?)
}

fn sorted(names: &VarMap) -> Vec<(String, Vec<usize>)> {
    let data = names.data().lock().expect("no panic");
    let mut all: Vec<_> =
        data.iter().map(|(name, var)| (name.clone(), var.dims().to_vec())).collect();
    all.sort();
    all
}

fn text(tokens: usize, from: usize) -> Vec<u32> {
    (from..from + tokens).map(|i| (i * i * 7 + i) as u32 % VOCABULARY as u32).collect()
}

/// Two prompts of other lengths packed, then a token for each: the logits of the CPU in f32.
pub fn as_on_the_cpu(device: &Device) -> Result<()> {
    let run = |device: &Device, dtype| -> Result<[Tensor; 2]> {
        let (model, mut cache) = (model(device, dtype)?, Cache::new(&config(), 2, dtype, device)?);
        let slots = [cache.pool_mut().allocate()?, cache.pool_mut().allocate()?];
        let tokens = Tensor::new(text(50, 3), device)?;
        let prompts = model.forward(&tokens, &[(slots[0], 37), (slots[1], 13)], &mut cache)?;
        let tokens = Tensor::new(&[[5u32], [9]], device)?;
        Ok([prompts, model.forward(&tokens, &[(slots[0], 1), (slots[1], 1)], &mut cache)?])
    };
    let wanted = run(&Device::Cpu, DType::F32)?;
    for dtype in [DType::F16, DType::BF16] {
        for (got, want) in run(device, dtype)?.iter().zip(&wanted) {
            ensure!(got.dims() == [2, VOCABULARY] && got.dtype() == DType::F32);
            let want: Vec<f64> = values(want)?.into_iter().map(f64::from).collect();
            close("logits", got, &want, if dtype == DType::F16 { 5e-3 } else { 4e-2 })?;
        }
    }
    Ok(())
}

/// Token by token as in one call; forked, and saved and loaded, with the same bits.
pub fn conversations_go_on(device: &Device) -> Result<()> {
    let model = model(device, DType::BF16)?;
    let mut cache = Cache::new(&config(), 4, DType::BF16, device)?;
    let (whole, slot) = (cache.pool_mut().allocate()?, cache.pool_mut().allocate()?);
    let all = text(20, 0);
    let tokens = Tensor::new(&all[..], device)?;
    let want = model.forward(&tokens, &[(whole, 20)], &mut cache)?;
    let prompt = Tensor::new(&all[..14], device)?;
    let mut logits = model.forward(&prompt, &[(slot, 14)], &mut cache)?;
    for token in &all[14..] {
        logits = model.forward(&Tensor::new(&[*token], device)?, &[(slot, 1)], &mut cache)?;
    }
    let want: Vec<f64> = values(&want)?.into_iter().map(f64::from).collect();
    close("token by token", &logits, &want, 4e-2)?;

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("conversation.safetensors");
    cache.save(slot, &file)?;
    let (forked, loaded) = (cache.pool_mut().fork(slot)?, cache.pool_mut().allocate()?);
    cache.load(loaded, &file)?;
    let next = Tensor::new(&[[3u32], [3], [3]], device)?;
    let steps = [(slot, 1), (forked, 1), (loaded, 1)];
    let logits = values(&model.forward(&next, &steps, &mut cache)?)?;
    let rows: Vec<_> = logits.chunks(VOCABULARY).collect();
    ensure!(rows[0] == rows[1] && rows[0] == rows[2], "three continuations differ");
    Ok(())
}
