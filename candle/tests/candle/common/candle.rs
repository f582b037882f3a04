//! Candle's tensors as a backend: every buffer of a call becomes a tensor of the same strides.

use candle_core::{Device, Tensor, WithDType};
use half::{bf16, f16};
use infini_attn::{DType, Element, Error, Problem, Result};
use infini_attn_candle::{
    Batch, Parts, Rope, Slots, State, infini_attention, infini_attention_parts,
};

use super::backend::Backend;
use super::buffers::{Arrangement, MARGIN, OutputBuffers, Strided, indices};
use super::call::{Call, CallRope, TABLE_ROWS, laid_out};
use super::cases::Case;
use super::model::slot_values;
use super::tolerance::Precision;

/// The operator on a device of candle's, which is one of CUDA or the CPU.
#[derive(Debug)]
pub struct Candle<const CUDA: bool>(pub Device);

impl<const CUDA: bool> Backend for Candle<CUDA> {
    type State = State;
    const PRECISION: Precision = if CUDA { Precision::TensorCore } else { Precision::F32 };
    // Of CUDA's rows, which start at multiples of 16 bytes.
    const MARGIN: usize = if CUDA { 8 } else { MARGIN };

    fn refuses(&self, case: &Case) -> Option<&'static str> {
        let no_channels = case.rope.as_ref().is_some_and(|rope| rope.channels == 0);
        let no_tokens = case.calls.iter().any(|lens| lens.iter().all(|&len| len == 0));
        match case.arrangement {
            Arrangement::Reversed => Some("candle has no negative strides"),
            _ if CUDA && (no_channels || no_tokens) => Some("candle has no empty tensors on CUDA"),
            _ => None,
        }
    }

    fn new_state(&self, case: &Case, slots: usize) -> State {
        State::new(&case.problem, slots, case.rope.is_some(), &self.0).expect("a state")
    }

    fn call<T: Element>(
        &self,
        _: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut State,
        out: &mut OutputBuffers<T>,
    ) -> Result<()> {
        let done = match T::DTYPE {
            DType::F32 => run::<T, f32>(&self.0, call, gate, state, out),
            DType::F16 => run::<T, f16>(&self.0, call, gate, state, out),
            DType::BF16 => run::<T, bf16>(&self.0, call, gate, state, out),
            other => panic!("candle has no {other}"),
        };
        done.map_err(|e| {
            let expected = "a call that candle accepts".into();
            Error::Value { argument: "call".into(), got: e.to_string(), expected }
        })
    }

    fn flush(&self, problem: &Problem, state: &mut State, slots: &[usize]) -> Result<()> {
        match state {
            State::Cpu(state) => infini_attn::flush(problem, state, slots),
            #[cfg(feature = "cuda")]
            State::Cuda(state) => infini_attn::cuda::flush(problem, state, slots),
        }
    }

    fn memory(&self, _: &Problem, state: &State, slot: usize) -> [Vec<f64>; 2] {
        let host = state.to_host().expect("a copy");
        [slot_values(&host.memory(), slot), slot_values(&host.normalizer(), slot)]
    }

    fn counters(&self, state: &State, slot: usize) -> [u64; 3] {
        let (tokens, open) = (state.tokens(slot), state.open_len(slot) as u64);
        let host = state.to_host().expect("a copy");
        assert_eq!((host.tokens(slot), host.open_len(slot) as u64), (tokens, open));
        [tokens, host.committed(slot), open]
    }
}

/// One call. `D` is `T`, as candle knows it.
fn run<T: Element, D: Element + WithDType>(
    device: &Device,
    call: &Call<'_, T>,
    gate: &[f32],
    state: &mut State,
    out: &mut OutputBuffers<T>,
) -> candle_core::Result<()> {
    let [q, k, v] = [&call.q, &call.k, &call.v].map(|x| tensor::<T, D>(x, device));
    let (q, k, v) = (q?, k?, v?);
    let gate = Tensor::new(gate, device)?;
    let rope = call.rope.as_ref().map(|rope| tables(rope, device)).transpose()?;
    let mut batch = laid_out!(Batch::new(), call);
    if let Some(rope) = &rope {
        batch = batch.rope(rope);
    }
    if let Some(positions) = call.rope.as_ref().and_then(|rope| rope.positions.as_ref()) {
        batch = batch.positions(positions);
    }
    if out.lse.is_none() && out.a_dot.is_none() && out.a_mem.is_none() {
        let o = infini_attention(&q, &k, &v, &gate, state, &batch)?;
        return fill::<T, D>(&mut out.o, &o);
    }
    let Parts { o, lse, a_dot, a_mem } = infini_attention_parts(&q, &k, &v, &gate, state, &batch)?;
    fill::<T, D>(&mut out.o, &o)?;
    out.lse.iter_mut().try_for_each(|buffer| fill::<f32, f32>(buffer, &lse))?;
    out.a_dot.iter_mut().try_for_each(|buffer| fill::<T, D>(buffer, &a_dot))?;
    out.a_mem.iter_mut().try_for_each(|buffer| fill::<T, D>(buffer, &a_mem))
}

/// The view onto a buffer, guards and all: candle's tensors of other strides are narrowed and transposed
/// ones.
fn tensor<T: Element, D: Element + WithDType>(
    x: &Strided<T>,
    device: &Device,
) -> candle_core::Result<Tensor> {
    if x.shape().contains(&0) {
        return Tensor::zeros(x.shape(), <D as WithDType>::DTYPE, device);
    }
    let data: &[D] = bytemuck::cast_slice(x.data());
    let mut order: Vec<usize> = (0..x.shape().len()).collect();
    order.sort_by_key(|&d| std::cmp::Reverse((x.strides()[d], x.shape()[d])));
    // Extents in memory, guards of rows included; dimensions that step less go inside.
    let mut extents: Vec<usize> = order.iter().map(|&d| x.shape()[d]).collect();
    for i in 1..order.len() {
        let (outer, inner) = (x.strides()[order[i - 1]], x.strides()[order[i]]);
        if x.shape()[order[i - 1]] > 1 || outer > inner {
            extents[i] = (outer / inner.max(1)) as usize;
        }
    }
    let count: usize = extents.iter().product();
    let whole = Tensor::from_slice(data, data.len(), device)?;
    let mut view =
        whole.narrow(0, x.offset(), count.min(data.len() - x.offset()))?.reshape(extents)?;
    for (i, &d) in order.iter().enumerate() {
        view = view.narrow(i, 0, x.shape()[d])?;
    }
    let mut back = vec![0; order.len()];
    order.iter().enumerate().for_each(|(i, &d)| back[d] = i);
    view.permute(back)
}

fn tables(rope: &CallRope<'_>, device: &Device) -> candle_core::Result<Rope> {
    let shape = (TABLE_ROWS, rope.rotation.channels / 2);
    let table = |data: &[f32]| Tensor::from_slice(data, shape, device);
    Ok(Rope::new(&table(rope.cos)?, &table(rope.sin)?)?.interleaved(rope.rotation.interleaved))
}

/// An output's values, row by row.
fn fill<T: Element, D: Element + WithDType>(
    to: &mut Strided<T>,
    from: &Tensor,
) -> candle_core::Result<()> {
    assert_eq!(to.shape(), from.dims());
    let values = from.flatten_all()?.to_vec1::<D>()?;
    let (lead, width) = to.shape().split_at(to.shape().len() - 1);
    let rows = values.chunks_exact(width[0].max(1));
    for (at, row) in indices(lead).zip(rows) {
        to.set_row(&at, bytemuck::cast_slice(row));
    }
    Ok(())
}
