//! Tensors as candle's operations leave them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use infini_attn_candle::{Batch, State};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::data::{
    DTYPES, HEADS, KV_HEADS, Scale, call, close, expected, noise, on, same_bits, tolerance,
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
        let run = |qkv: &[Tensor; 3]| -> Result<(Tensor, Vec<Copied>)> {
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
        let longer = noise(4, &[1, scale.tokens, KV_HEADS, 4], dtype)?;
        let wide_k = Tensor::cat(&[&k, &longer], 3)?.to_device(device)?;
        let late_v = v.flatten_all()?.pad_with_zeros(0, 1, 0)?.to_device(device)?;
        let late_v = late_v.narrow(0, 1, v.elem_count())?.reshape(v.shape())?;
        let odd = [q.to_device(device)?, wide_k.narrow(3, 0, scale.channels)?, late_v];
        let plain = [q, k, v];

        let mut state = State::new(&problem, 1, false, device)?;
        let (o, copied) = listening(|| call(&odd, &mut state, &Batch::new()))?;
        close("o", &o, &expected(&problem, &plain)?.o, tolerance(dtype))?;
        let of = |name: &str| copied.iter().find(|event| event["name"] == format!("{name:?}"));
        let (k, v) = (of("k"), of("v"));
        ensure!(copied.len() == 2 && k.is_some() && v.is_some(), "{copied:?}");
        ensure!(v.is_some_and(|event| event["offset"] == "1"), "{v:?}");
    }
    Ok(())
}

/// The fields of an event.
type Copied = BTreeMap<String, String>;

/// What a call leaves, and the events of this crate.
fn listening<T>(call: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Copied>)> {
    let kept = Kept::default();
    let result = tracing::subscriber::with_default(kept.clone(), call)?;
    let events = kept.0.lock().expect("no panic").clone();
    Ok((result, events))
}

/// A subscriber of `tracing` that keeps events of the crate.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<Copied>>>);

struct Fields(Copied);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

impl Subscriber for Kept {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("infini_attn_candle")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(Copied::new());
        event.record(&mut fields);
        self.0.lock().expect("no panic").push(fields.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
