//! Problems, inputs, and what must come of them.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use infini_attn::{Inputs, TensorView, reference};
use infini_attn_candle::{Batch, Problem, State, element_type, infini_attention};

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
        let one = |seed, heads| noise(seed, &[rows, tokens, heads, self.channels], dtype);
        Ok([one(1, HEADS)?, one(2, KV_HEADS)?, one(3, KV_HEADS)?])
    }
}

/// Numbers of mean 0 and variance 1 in a tensor on the CPU.
pub fn noise(seed: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let mut state = seed;
    let number = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = (mixed ^ mixed >> 31) as f64 / u64::MAX as f64;
        ((unit - 0.5) * 12f64.sqrt()) as f32
    };
    let values: Vec<f32> = std::iter::repeat_with(number).take(shape.iter().product()).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
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

/// Every element, exactly.
pub fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// In float64, of new streams of T tokens each.
pub fn expected(problem: &Problem, qkv: &[Tensor; 3]) -> Result<reference::Output> {
    let data = [values(&qkv[0])?, values(&qkv[1])?, values(&qkv[2])?];
    let view = |i: usize| TensorView::new(&data[i], qkv[i].dims());
    let inputs = Inputs::new(view(0)?, view(1)?, view(2)?);
    let mut state = reference::State::new(problem, qkv[0].dims()[0])?;
    Ok(reference::prefill(problem, &inputs, &GATE, &mut state)?)
}

/// Relative RMS error.
pub fn close(what: &str, got: &Tensor, want: &[f64], tolerance: f64) -> Result<()> {
    let got = values(got)?;
    ensure!(got.len() == want.len(), "{what}: {} elements, {} expected", got.len(), want.len());
    let square = |sum: f64, x: f64| sum + x * x;
    let off = got.iter().zip(want).map(|(&got, want)| f64::from(got) - want).fold(0.0, square);
    let error = (off / want.iter().copied().fold(0.0, square)).sqrt();
    // NaN is not at most anything.
    ensure!(error <= tolerance, "{what}: relative RMS error {error:.1e}, at most {tolerance:.0e}");
    Ok(())
}

/// On N(0, 1) inputs without rotation.
pub fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F16 { 1e-3 } else { 4e-3 }
}

pub fn same_bits(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    let bits = |t| -> Result<Vec<u32>> { Ok(values(t)?.into_iter().map(f32::to_bits).collect()) };
    ensure!(got.dims() == want.dims(), "{what}: {:?}, {:?} expected", got.dims(), want.dims());
    let (got, want) = (bits(got)?, bits(want)?);
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
