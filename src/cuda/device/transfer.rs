//! A state's parts the way device memory holds them: packed from a state of the host, and back.

use half::{bf16, f16};

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::memory::blocks::KeyBlocks;
use crate::memory::{Counters, State};
use crate::problem::Problem;

/// Host copies of what lies in device memory, row-major, T as bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Parts {
    /// f32 `[slots][Hkv][Dk][Dv]`.
    pub memory: Vec<f32>,
    /// f32 `[slots][Hkv][Dk]`.
    pub normalizer: Vec<f32>,
    /// `[slots]`.
    pub counters: Vec<Counters>,
    /// T `[slots][Hkv][N][Dk]`; empty when no segment is open.
    pub open_k: Vec<u8>,
    /// T `[slots][Hkv][N][Dk]`; empty when no open segment came with rotation.
    pub open_k_rotated: Vec<u8>,
    /// T `[slots][Hkv][N][Dv]`; empty when no segment is open.
    pub open_v: Vec<u8>,
}

impl Parts {
    /// Which of the open segments' arrays a state with these counters fills: keys and values, and
    /// rotated keys.
    pub fn filled(counters: &[Counters]) -> [bool; 2] {
        let open = |rotated: bool| counters.iter().any(|c| c.open_len > 0 && c.rotated >= rotated);
        [open(false), open(true)]
    }

    /// A state's parts. Open keys and values came as T and go back to the same T. Rotated keys are
    /// rounded: the CPU keeps them in f32, the kernels in T.
    ///
    /// # Errors
    /// [`Error::Value`] when an open key or value is not a number of T, which no call can have
    /// brought; [`Error::Unsupported`] for f32.
    pub fn pack(state: &State) -> Result<Self> {
        match state.problem.dtype() {
            DType::F16 => pack::<f16>(state),
            DType::BF16 => pack::<bf16>(state),
            other => Err(unsupported(other)),
        }
    }

    /// The state that these are the parts of.
    ///
    /// # Errors
    /// [`Error::Value`] naming a counter that no sequence of calls leads to, [`Error::Unsupported`]
    /// for f32.
    pub fn unpack(self, problem: &Problem) -> Result<State> {
        match problem.dtype() {
            DType::F16 => unpack::<f16>(self, problem),
            DType::BF16 => unpack::<bf16>(self, problem),
            other => Err(unsupported(other)),
        }
    }
}

fn unsupported(dtype: DType) -> Error {
    Error::Unsupported { argument: "dtype", got: dtype.to_string(), accepted: "bf16, f16".into() }
}

/// Every token of the open segments: its counters, its (slot, head) chunk and its index in it.
fn for_open(
    counters: &[Counters],
    kv_heads: usize,
    mut visit: impl FnMut(&Counters, usize, usize) -> Result<()>,
) -> Result<()> {
    for (slot, c) in counters.iter().enumerate() {
        for chunk in slot * kv_heads..(slot + 1) * kv_heads {
            (0..c.open_len).try_for_each(|t| visit(c, chunk, t))?;
        }
    }
    Ok(())
}

fn pack<T: Element>(state: &State) -> Result<Parts> {
    let (p, counters) = (&state.problem, &state.counters);
    let blocks = KeyBlocks::new(p);
    let [open, rotated] = Parts::filled(counters);
    let rows = counters.len() * p.kv_heads() * p.segment_len();
    let room = |wanted: bool, dim: usize| vec![T::zeroed(); if wanted { rows * dim } else { 0 }];
    let (dk, dv) = (p.key_dim(), p.value_dim());
    let (mut k, mut k_rotated, mut v) = (room(open, dk), room(rotated, dk), room(open, dv));
    let (mut key, host) = (vec![0.0; dk], state.open.read());
    for_open(counters, p.kv_heads(), |c, chunk, t| {
        let (row, at) = (chunk * p.segment_len() + t, chunk * blocks.len());
        blocks.get(&host.k[at..][..blocks.len()], t, &mut key);
        narrow_exactly(&key, &mut k[row * dk..][..dk], "open_keys", chunk, t)?;
        if c.rotated {
            blocks.get(&host.k_rotated[at..][..blocks.len()], t, &mut key);
            T::narrow(&key, &mut k_rotated[row * dk..][..dk]);
        }
        let value = &host.v[row * dv..][..dv];
        narrow_exactly(value, &mut v[row * dv..][..dv], "open_values", chunk, t)
    })?;
    let bytes = |values: Vec<T>| bytemuck::cast_slice(&values).to_vec();
    Ok(Parts {
        memory: state.m.to_vec(),
        normalizer: state.z.to_vec(),
        counters: counters.clone(),
        open_k: bytes(k),
        open_k_rotated: bytes(k_rotated),
        open_v: bytes(v),
    })
}

fn narrow_exactly<T: Element>(
    row: &[f32],
    out: &mut [T],
    name: &str,
    chunk: usize,
    t: usize,
) -> Result<()> {
    T::narrow(row, out);
    for (&given, &kept) in row.iter().zip(out.iter()) {
        let kept: f64 = kept.into();
        if kept != f64::from(given) && !given.is_nan() {
            let argument = format!("{name} (slot and KV head {chunk}, token {t})");
            return Err(Error::value(argument, given, format!("a number of {}", T::DTYPE)));
        }
    }
    Ok(())
}

fn unpack<T: Element>(parts: Parts, p: &Problem) -> Result<State> {
    let Parts { memory, normalizer, counters, open_k, open_k_rotated, open_v } = parts;
    let mut state = State::assemble(p, memory, normalizer, counters)?;
    let typed = |bytes: &[u8]| bytemuck::pod_collect_to_vec::<u8, T>(bytes);
    let (k, k_rotated, v) = (typed(&open_k), typed(&open_k_rotated), typed(&open_v));
    let (blocks, dk, dv) = (KeyBlocks::new(p), p.key_dim(), p.value_dim());
    let mut key = vec![0.0; dk];
    let (counters, open) = state.assembled();
    for_open(counters, p.kv_heads(), |c, chunk, t| {
        let (row, at) = (chunk * p.segment_len() + t, chunk * blocks.len());
        T::widen(&k[row * dk..][..dk], &mut key);
        blocks.put(&mut open.k[at..][..blocks.len()], t, &key);
        if c.rotated {
            T::widen(&k_rotated[row * dk..][..dk], &mut key);
            blocks.put(&mut open.k_rotated[at..][..blocks.len()], t, &key);
        }
        T::widen(&v[row * dv..][..dv], &mut open.v[row * dv..][..dv]);
        Ok(())
    })?;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Inputs, Outputs, Rope, TensorView, TensorViewMut, prefill};

    fn problem(dtype: DType) -> Problem {
        let b = Problem::builder().heads(4).kv_heads(2).key_dim(16).value_dim(8);
        b.segment_len(12).dtype(dtype).build().unwrap()
    }

    /// Slots with 0, 5 and 14 tokens, the last two open.
    fn filled<T: Element>(rotated: bool) -> State {
        let p = problem(T::DTYPE);
        let mut state = State::new(&p, 3).unwrap();
        let data = |n: usize, step: usize| {
            let x: Vec<f32> = (0..n).map(|i| ((i * step % 97) as f32 - 48.0) / 31.0).collect();
            let mut out = vec![T::zeroed(); n];
            T::narrow(&x, &mut out);
            out
        };
        let (q, k, v) = (data(3 * 14 * 4 * 16, 7), data(3 * 14 * 2 * 16, 5), data(3 * 14 * 16, 3));
        let mut o = vec![T::zeroed(); 3 * 14 * 4 * 8];
        let angles: Vec<f32> = (0..32 * 4).map(|i| i as f32).collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let mut inputs = Inputs::new(
            TensorView::new(&q, &[3, 14, 4, 16]).unwrap(),
            TensorView::new(&k, &[3, 14, 2, 16]).unwrap(),
            TensorView::new(&v, &[3, 14, 2, 8]).unwrap(),
        )
        .seq_lens(&[0, 5, 14]);
        if rotated {
            let table = |x| TensorView::new(x, &[32, 4]).unwrap();
            inputs = inputs.rope(Rope::new(table(&cos), table(&sin)));
        }
        let outputs = Outputs::new(TensorViewMut::new(&mut o, &[3, 14, 4, 8]).unwrap());
        prefill(&p, &inputs, &[0.5; 4], &mut state, outputs).unwrap();
        state
    }

    #[test]
    fn packing_and_unpacking_give_the_state_back() {
        for state in [filled::<bf16>(false), filled::<f16>(false)] {
            let p = *state.problem();
            assert_eq!([0, 1, 2].map(|s| state.open_len(s)), [0, 5, 2]);
            let parts = Parts::pack(&state).unwrap();
            assert_eq!(parts.open_k.len(), 2 * 3 * 2 * 12 * 16);
            assert!(parts.open_k_rotated.is_empty());
            let back = parts.unpack(&p).unwrap();
            assert_eq!(back.to_bytes().unwrap(), state.to_bytes().unwrap());
        }
    }

    #[test]
    fn rotated_keys_are_rounded_and_nothing_else_is() {
        let state = filled::<bf16>(true);
        let parts = Parts::pack(&state).unwrap();
        let once = parts.clone().unpack(state.problem()).unwrap();
        let (got, want) = (once.open.read(), state.open.read());
        assert_eq!((&got.k[..], &got.v[..]), (&want.k[..], &want.v[..]));
        assert_ne!(got.k_rotated[..], want.k_rotated[..]);
        for (got, want) in got.k_rotated.iter().zip(&want.k_rotated[..]) {
            assert!((got - want).abs() <= want.abs() / 256.0, "{got} {want}");
        }
        assert_eq!(Parts::pack(&once).unwrap(), parts);
    }

    #[test]
    fn rows_lie_where_the_kernels_look() {
        let state = filled::<f16>(false);
        let parts = Parts::pack(&state).unwrap();
        let k: Vec<f16> = bytemuck::pod_collect_to_vec(&parts.open_k);
        // Slot 2, head 1, second token of its open segment: token 13 of the call.
        let row = ((2 * 2 + 1) * 12 + 1) * 16;
        let want = ((((2 * 14 + 13) * 2 + 1) * 16) * 5 % 97) as f32;
        assert_eq!(k[row], f16::from_f32((want - 48.0) / 31.0));
    }

    #[test]
    fn what_no_call_brings_is_refused() {
        let mut state = filled::<bf16>(false);
        let at = 2 * 12 * 8;
        state.own_open().unwrap().v[at] = 1.0 + f32::EPSILON;
        let text = Parts::pack(&state).unwrap_err().to_string();
        assert!(text.contains("open_values (slot and KV head 2, token 0)"), "{text}");
        state.own_open().unwrap().v[at] = f32::NAN;
        assert!(Parts::pack(&state).is_ok());
        let text =
            Parts::pack(&State::new(&problem(DType::F32), 1).unwrap()).unwrap_err().to_string();
        assert!(text.contains("f32 given"), "{text}");
        let mut parts = Parts::pack(&state).unwrap();
        parts.counters[1].open_len = 12;
        let text = parts.unpack(state.problem()).unwrap_err().to_string();
        assert!(text.contains("open_len[1]: 12 given, less than segment_len = 12"), "{text}");
    }
}
