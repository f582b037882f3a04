//! Arguments that do not fit, by their names.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use infini_attn_candle::{Batch, Slots, State, infini_attention};

use crate::data::{Scale, call, close, expected, gate, on, refused, tolerance};

pub fn f32_is_refused(device: &Device) -> Result<()> {
    let problem = Scale::of(device)?.problem(DType::F32)?;
    refused(State::new(&problem, 1, false, device).map_err(Into::into), "f32")
}

pub fn the_per_thread_stream_is_refused(device: &Device) -> Result<()> {
    let problem = Scale::of(device)?.problem(DType::F16)?;
    let state = State::new(&problem, 1, false, &Device::new_cuda(0)?);
    refused(state.map_err(Into::into), "per-thread default stream")?;
    ensure!(State::new(&problem, 1, false, &Device::new_cuda_with_stream(0)?)?.tokens(0) == 0);
    Ok(())
}

/// The CPU's, and those of another device of candle's for the same GPU, whose events order nothing here.
pub fn tensors_of_other_devices_are_refused(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::F16)?;
    let on_cpu = scale.inputs(1, 3, DType::F16)?;
    let here = on(device, &on_cpu)?;
    let other = Device::new_cuda_with_stream(0)?;
    let elsewhere = on(&other, &on_cpu)?;
    let mut state = State::new(&problem, 1, false, device)?;
    let mut try_with = |qkv: [&Tensor; 3], gate: &Tensor, words: &str| {
        let [q, k, v] = qkv;
        let o = infini_attention(q, k, v, gate, &mut state, &Batch::new());
        refused(o.map_err(Into::into), words)
    };
    let (beta, cpu) = (gate(device)?, gate(&Device::Cpu)?);
    let [q, k, v] = [&here[0], &here[1], &here[2]];
    try_with([&on_cpu[0], k, v], &beta, "q: device Cpu given, Cuda { gpu_id: 0 } (the state's)")?;
    try_with([q, k, &on_cpu[2]], &beta, "v: device Cpu given")?;
    try_with([q, k, v], &cpu, "gate: device Cpu given")?;
    try_with([q, k, v], &gate(&other)?, "of another CudaContext object")?;
    try_with(
        [&elsewhere[0], &elsewhere[1], &elsewhere[2]],
        &beta,
        "of another CudaContext object",
    )?;
    try_with([q, &elsewhere[1], v], &beta, "device")?;

    let mut host = State::new(&problem, 1, false, &Device::Cpu)?;
    let words = "q: device Cuda { gpu_id: 0 } given, Cpu (the state's) expected";
    refused(call(&here, &mut host, &Batch::new()), words)?;
    ensure!((state.tokens(0), host.tokens(0)) == (0, 0));
    Ok(())
}

/// What the core refuses, and the call after it is as if nothing had been.
pub fn what_is_refused_leaves_the_state(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::BF16)?;
    let inputs = scale.inputs(1, scale.tokens, DType::BF16)?;
    let qkv = on(device, &inputs)?;
    let [q, k, v] = &qkv;
    let mut state = State::new(&problem, 1, false, device)?;
    let short = [q.clone(), k.narrow(1, 1, scale.tokens - 1)?, v.clone()];
    refused(call(&short, &mut state, &Batch::new()), "k: shape")?;
    refused(call(&qkv, &mut state, &Batch::new().slots(&[1])), "slots[0]")?;
    refused(call(&qkv, &mut state, &Batch::new().seq_lens(&[-1])), "seq_lens[0]")?;
    let f16 = v.to_dtype(DType::F16)?;
    refused(call(&[q.clone(), k.clone(), f16], &mut state, &Batch::new()), "v: dtype f16")?;
    ensure!((state.tokens(0), state.open_len(0)) == (0, 0));
    let o = call(&qkv, &mut state, &Batch::new())?;
    close("o", &o, &expected(&problem, &inputs)?.o, tolerance(DType::BF16))
}
