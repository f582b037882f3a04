//! A small model with random weights.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use infini_attn_candle::{Cache, Model};

use crate::common::random::{config, tokens, values, weights};
use crate::data::close;

/// The same weights whatever the device: what bf16 has of them.
fn model(device: &Device, dtype: DType) -> Result<Model> {
    let mut weights = weights(&config(), device)?;
    for (_, weight) in weights.iter_mut().filter(|(name, _)| !name.ends_with("beta")) {
        *weight = weight.to_dtype(DType::BF16)?;
    }
    Ok(Model::load(&config(), VarBuilder::from_tensors(weights, dtype, device))?)
}

/// Two prompts of other lengths packed, then a token for each: the logits of the CPU in f32.
pub fn as_on_the_cpu(device: &Device) -> Result<()> {
    let run = |device: &Device, dtype| -> Result<[Tensor; 2]> {
        let (model, mut cache) = (model(device, dtype)?, Cache::new(&config(), 2, dtype, device)?);
        let slots = [cache.pool_mut().allocate()?, cache.pool_mut().allocate()?];
        let text = Tensor::new(tokens(50, 3), device)?;
        let prompts = model.forward(&text, &[(slots[0], 37), (slots[1], 13)], &mut cache)?;
        let next = Tensor::new(&[[5u32], [9]], device)?;
        Ok([prompts, model.forward(&next, &[(slots[0], 1), (slots[1], 1)], &mut cache)?])
    };
    let wanted = run(&Device::Cpu, DType::F32)?;
    for dtype in [DType::F16, DType::BF16] {
        for (got, want) in run(device, dtype)?.iter().zip(&wanted) {
            ensure!(got.dims() == [2, config().vocab_size] && got.dtype() == DType::F32);
            close("logits", got, &values(want), if dtype == DType::F16 { 5e-3 } else { 4e-2 })?;
        }
    }
    Ok(())
}

/// Token by token as in one call; forked, and saved and loaded, with the same bits.
pub fn conversations_go_on(device: &Device) -> Result<()> {
    let model = model(device, DType::BF16)?;
    let mut cache = Cache::new(&config(), 4, DType::BF16, device)?;
    let (whole, slot) = (cache.pool_mut().allocate()?, cache.pool_mut().allocate()?);
    let all = tokens(20, 0);
    let want = model.forward(&Tensor::new(&all[..], device)?, &[(whole, 20)], &mut cache)?;
    let prompt = Tensor::new(&all[..14], device)?;
    let mut logits = model.forward(&prompt, &[(slot, 14)], &mut cache)?;
    for token in &all[14..] {
        logits = model.forward(&Tensor::new(&[*token], device)?, &[(slot, 1)], &mut cache)?;
    }
    close("token by token", &logits, &values(&want), 4e-2)?;

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("conversation.safetensors");
    cache.save(slot, &file)?;
    let (forked, loaded) = (cache.pool_mut().fork(slot)?, cache.pool_mut().allocate()?);
    cache.load(loaded, &file)?;
    let next = Tensor::new(&[[3u32], [3], [3]], device)?;
    let steps = [(slot, 1), (forked, 1), (loaded, 1)];
    let logits = values(&model.forward(&next, &steps, &mut cache)?);
    let rows: Vec<_> = logits.chunks(config().vocab_size).collect();
    ensure!(rows[0] == rows[1] && rows[0] == rows[2], "three continuations differ");
    Ok(())
}
