//! Problems, inputs, and what must come of them.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use infini_attn::{Inputs, TensorView, reference};
use infini_attn_candle::{Batch, Problem, State, element_type, infini_attention};

use crate::common::metric::relative_rms;
use crate::common::random::{normal, values};

pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const GATE: [f32; HEADS] = [0.4, -0.7, 2.0, 0.0];
pub const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

/// Whether the driver is the simulator's (tests/ptxsim/driver).
pub fn is_simulated(device: &Device) -> Result<bool> {
    let stream = device.as_cuda_device()?.cuda_stream();
    Ok(infini_attn::cuda::Device::from_stream(stream)?.name()? == "PTX simulator")
}

/// Segments of 16 tokens where the device is the simulator, longer ones on a GPU.
#[derive(Clone, Copy)]
pub struct Scale {
    pub channels: usize,
    pub segment: usize,
    /// Tokens of two segments and a part of a third.
    pub tokens: usize,
}

impl Scale {
    pub fn of(device: &Device) -> Result<Self> {
        Ok(match is_simulated(device)? {
            true => Self { channels: 32, segment: 16, tokens: 45 },
            false => Self { channels: 128, segment: 256, tokens: 700 },
        })
    }

    pub fn problem(&self, dtype: DType) -> Result<Problem> {
        let builder = Problem::builder().heads(HEADS).kv_heads(KV_HEADS).head_dim(self.channels);
        Ok(builder.segment_len(self.segment).dtype(element_type(dtype)?).build()?)
    }

    /// q, k, v of `rows` sequences on the CPU.
    pub fn inputs(&self, rows: usize, tokens: usize, dtype: DType) -> Result<[Tensor; 3]> {
        let one =
            |seed, heads| normal(seed, &[rows, tokens, heads, self.channels], dtype, &Device::Cpu);
        Ok([one(1, HEADS)?, one(2, KV_HEADS)?, one(3, KV_HEADS)?])
    }
}

pub fn gate(device: &Device) -> Result<Tensor> {
    Ok(Tensor::new(&GATE, device)?)
}

/// The same tensors on a device.
pub fn on(device: &Device, tensors: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let [q, k, v] = tensors;
    Ok([q.to_device(device)?, k.to_device(device)?, v.to_device(device)?])
}

pub fn call(qkv: &[Tensor; 3], state: &mut State, batch: &Batch<'_>) -> Result<Tensor> {
    let [q, k, v] = qkv;
    Ok(infini_attention(q, k, v, &gate(q.device())?, state, batch)?)
}

/// In float64, of new streams of T tokens each.
pub fn expected(problem: &Problem, qkv: &[Tensor; 3]) -> Result<reference::Output> {
    let data = qkv.each_ref().map(values);
    let view = |i: usize| TensorView::new(&data[i], qkv[i].dims());
    let inputs = Inputs::new(view(0)?, view(1)?, view(2)?);
    let mut state = reference::State::new(problem, qkv[0].dims()[0])?;
    Ok(reference::prefill(problem, &inputs, &GATE, &mut state)?)
}

/// By their relative RMS error.
pub fn close(what: &str, got: &Tensor, want: &[f64], tolerance: f64) -> Result<()> {
    let error = relative_rms(what, &values(got), want, got.dims(), tolerance);
    error.map(drop).map_err(anyhow::Error::msg)
}

/// On N(0, 1) inputs without rotation.
pub fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F16 { 1e-3 } else { 4e-3 }
}

pub fn same_bits(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    let bits = |t| -> Vec<u64> { values(t).into_iter().map(f64::to_bits).collect() };
    ensure!(got.dims() == want.dims(), "{what}: {:?}, {:?} expected", got.dims(), want.dims());
    let (got, want) = (bits(got), bits(want));
    let different = got.iter().zip(&want).filter(|(a, b)| a != b).count();
    ensure!(different == 0, "{what}: {different} of {} elements have other bits", got.len());
    Ok(())
}

/// That a call is refused, with these words.
pub fn refused<T>(result: Result<T>, words: &str) -> Result<()> {
    match result {
        Ok(_) => anyhow::bail!("not refused: {words}"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(text.contains(words), "{text:?}, but {words:?} expected");
            Ok(())
        }
    }
}
