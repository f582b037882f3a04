//! Tensors as candle's operations leave them.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use infini_attn_candle::{Batch, State};
use tracing::Level;

use crate::common::random::normal;
use crate::common::spans::{Recorded, recorded};
use crate::data::{
    DTYPES, HEADS, KV_HEADS, Scale, call, close, expected, on, same_bits, tolerance,
};

/// A layout by its name, of the contiguous q, k, v.
type Layout = (&'static str, fn(&[Tensor; 3]) -> Result<[Tensor; 3]>);

const LAYOUTS: [Layout; 3] =
    [("transposed", transposed), ("narrowed", narrowed), ("parts of one projection", fused)];

pub fn every_layout_is_read(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    for dtype in DTYPES {
        let problem = scale.problem(dtype)?;
        let inputs = scale.inputs(2, scale.tokens, dtype)?;
        let contiguous = on(device, &inputs)?;
        let run = |qkv: &[Tensor; 3]| -> Result<(Tensor, Vec<Recorded>)> {
            let mut state = State::new(&problem, 2, false, device)?;
            listening(|| call(qkv, &mut state, &Batch::new()))
        };
        let (plain, _) = run(&contiguous)?;
        close("contiguous", &plain, &expected(&problem, &inputs)?.o, tolerance(dtype))?;
        for (name, layout) in LAYOUTS {
            let qkv = layout(&contiguous)?;
            ensure!(qkv.iter().any(|t| !t.is_contiguous()), "{name}: nothing to see");
            let (o, copied) = run(&qkv)?;
            same_bits(name, &o, &plain)?;
            ensure!(copied.is_empty(), "{name}: {copied:?}");
        }
    }
    Ok(())
}

/// Stored [B, H, T, D].
fn transposed(qkv: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let stored = |t: &Tensor| t.transpose(1, 2)?.contiguous()?.transpose(1, 2);
    Ok([stored(&qkv[0])?, stored(&qkv[1])?, stored(&qkv[2])?])
}

/// The middle of tensors with more tokens and heads.
fn narrowed(qkv: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let within = |t: &Tensor| {
        let wide = t.pad_with_zeros(1, 3, 2)?.pad_with_zeros(2, 1, 2)?;
        wide.narrow(1, 3, t.dims()[1])?.narrow(2, 1, t.dims()[2])
    };
    Ok([within(&qkv[0])?, within(&qkv[1])?, within(&qkv[2])?])
}

/// What a projection to q, k and v at once leaves.
fn fused(qkv: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let all = Tensor::cat(qkv, 2)?;
    let part = |first, heads| all.narrow(2, first, heads);
    Ok([part(0, HEADS)?, part(HEADS, KV_HEADS)?, part(HEADS + KV_HEADS, KV_HEADS)?])
}

pub fn rows_off_16_bytes_are_copied_and_told_of(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    for dtype in DTYPES {
        let problem = scale.problem(dtype)?;
        let [q, k, v] = scale.inputs(1, scale.tokens, dtype)?;
        // Rows of k are 4 elements longer, those of v begin 1 element late; q is as it must be.
        let longer = normal(4, &[1, scale.tokens, KV_HEADS, 4], dtype, &Device::Cpu)?;
        let wide_k = Tensor::cat(&[&k, &longer], 3)?.to_device(device)?;
        let late_v = v.flatten_all()?.pad_with_zeros(0, 1, 0)?.to_device(device)?;
        let late_v = late_v.narrow(0, 1, v.elem_count())?.reshape(v.shape())?;
        let odd = [q.to_device(device)?, wide_k.narrow(3, 0, scale.channels)?, late_v];
        let plain = [q, k, v];

        let mut state = State::new(&problem, 1, false, device)?;
        let (o, copied) = listening(|| call(&odd, &mut state, &Batch::new()))?;
        close("o", &o, &expected(&problem, &plain)?.o, tolerance(dtype))?;
        let of = |name: &str| copied.iter().find(|copy| copy.field("name") == format!("{name:?}"));
        let (k, v) = (of("k"), of("v"));
        ensure!(copied.len() == 2 && k.is_some() && v.is_some(), "{copied:?}");
        ensure!(v.is_some_and(|copy| copy.field("offset") == "1"), "{v:?}");
    }
    Ok(())
}

/// What a call leaves, and the copies that it tells of.
fn listening<T>(call: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Recorded>)> {
    let mut result = None;
    let told = recorded(Level::DEBUG, || result = Some(call()));
    let copies = told.into_iter().filter(|record| record.fields.contains_key("strides"));
    Ok((result.expect("called")?, copies.collect()))
}
