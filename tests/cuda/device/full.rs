//! Full shapes against the CPU backend, on all cores that it may have.
//!
//! Of a long stream the CPU computes the memory over all tokens, and the whole operator for some of
//! its segments; for the others the gate is open (g = 1), and local attention is skipped. So a million
//! tokens take seconds.

use std::ops::Range;

use anyhow::{Result, ensure};
use cudarc::driver::CudaSlice;
use half::bf16;
use infini_attn::cuda::{self, Device, Gate, Inputs, Outputs, TensorView, TensorViewMut};
use infini_attn::{DType, Problem, State, TensorView as HostView, TensorViewMut as HostMut};
use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{RngExt, SeedableRng};

use crate::calls;
use crate::common::metric::{Axes, relative_rms, rows_are_close};
use crate::common::noise::Noise;
use crate::common::stream::{Stream, normals};
use crate::common::switches::is_simulated;
use crate::common::{bits, widen};
use crate::groups::Group;

/// Relative RMS error of outputs, whose operands and results are rounded to bf16.
const OUTPUT_LIMIT: f64 = 8e-3;
/// Of each of their rows.
const ROW_LIMIT: f64 = 5e-2;
/// Of M and z.
const MEMORY_LIMIT: f64 = 4e-3;

/// Multiply-adds of local attention that the CPU may spend on a stream, or those of two segments.
const BUDGET: usize = 600_000_000_000;

/// Slots of the pool that a batch leaves alone.
const SPARE: usize = 3;

pub fn groups() -> Vec<Group> {
    let check =
        |name: &str, f: fn(&Device) -> Result<()>| Group::check(&format!("full::{name}"), f);
    let own = vec![
        check("prefill_million", |d| prefill(d, Shape::of(d, 128, 2048, 1 << 20)?)),
        check("prefill_d128_n2048", |d| prefill(d, Shape::of(d, 128, 2048, 131_072)?)),
        check("prefill_d128_n8192", |d| prefill(d, Shape::of(d, 128, 8192, 131_072)?)),
        check("prefill_d64_n2048", |d| prefill(d, Shape::of(d, 64, 2048, 131_072)?)),
        check("prefill_d64_n8192", |d| prefill(d, Shape::of(d, 64, 8192, 131_072)?)),
        check("prefill_d256_n2048", |d| prefill(d, Shape::of(d, 256, 2048, 131_072)?)),
        check("prefill_d256_n8192", |d| prefill(d, Shape::of(d, 256, 8192, 131_072)?)),
        check("segment_d64", |d| segments(d, Shape::of(d, 64, 2048, 12 * 2048)?)),
        check("segment_d128", |d| segments(d, Shape::of(d, 128, 2048, 12 * 2048)?)),
        check("segment_d256", |d| segments(d, Shape::of(d, 256, 2048, 12 * 2048)?)),
        check("decode_d64", |d| decode(d, Shape::of(d, 64, 2048, 4096)?)),
        check("decode_d128", |d| decode(d, Shape::of(d, 128, 2048, 4096)?)),
        check("decode_d256", |d| decode(d, Shape::of(d, 256, 2048, 4096)?)),
        check("ragged", |d| ragged(d, Shape::of(d, 128, 2048, 4500)?)),
    ];
    own.into_iter().chain(calls::groups()).collect()
}

/// Whether shapes are small: what looks at every access would not get through full ones.
pub fn is_small(device: &Device) -> Result<bool> {
    Ok(std::env::var_os("INFINI_SMALL").is_some() || is_simulated(device)?)
}

/// A stream's problem and its tokens, a few beyond the last segment.
#[derive(Clone, Copy)]
struct Shape {
    p: Problem,
    tokens: usize,
    /// Sequences of a batch.
    sequences: usize,
}

impl Shape {
    /// 32 query heads on 8 KV heads; on the simulator, or if `INFINI_SMALL` is set, 2 on 1, and a few
    /// segments of 64.
    fn of(device: &Device, dim: usize, n: usize, tokens: usize) -> Result<Self> {
        let b = Problem::builder().head_dim(dim).dtype(DType::BF16);
        Ok(match is_small(device)? {
            false => {
                let p = b.heads(32).kv_heads(8).segment_len(n).build()?;
                Self { p, tokens: tokens + 77, sequences: 64 }
            }
            true => {
                let p = b.heads(2).kv_heads(1).segment_len(64).build()?;
                Self { p, tokens: (tokens / n).min(3) * 64 + 13, sequences: 3 }
            }
        })
    }
}

/// Unrotated queries, keys and values of all sequences, one after the other, and room for outputs.
struct Data {
    p: Problem,
    noise: [Noise; 3],
    tensors: [CudaSlice<bf16>; 3],
    o: CudaSlice<bf16>,
    logits: Vec<f32>,
}

impl Data {
    fn new(device: &Device, p: &Problem, tokens: usize, seed: u64) -> Result<Self> {
        let noise = [0, 1, 2].map(|i| Noise::new(3 * seed + i));
        let [q, k, v] = Self::widths(p);
        let upload = |i: usize, width: usize| noise[i].upload(device, tokens * width);
        let tensors = [upload(0, q)?, upload(1, k)?, upload(2, v)?];
        let o = device.stream().alloc_zeros::<bf16>(tokens * p.heads() * p.value_dim())?;
        Ok(Self { p: *p, noise, tensors, o, logits: normals(seed, p.heads()) })
    }

    fn widths(p: &Problem) -> [usize; 3] {
        [p.heads() * p.key_dim(), p.kv_heads() * p.key_dim(), p.kv_heads() * p.value_dim()]
    }

    /// Tokens `range` in packed form.
    fn views(&mut self, range: Range<usize>) -> Result<(Inputs<'_, bf16>, Outputs<'_, bf16>)> {
        let (p, [dk, dv]) = (&self.p, [self.p.key_dim(), self.p.value_dim()]);
        let view = |data, heads: usize, dim: usize| {
            let (shape, strides) =
                ([range.len(), heads, dim], [(heads * dim) as i64, dim as i64, 1]);
            TensorView::strided(data, range.start * heads * dim, &shape, &strides)
        };
        let [q, k, v] = &self.tensors;
        let (q, k, v) =
            (view(q, p.heads(), dk)?, view(k, p.kv_heads(), dk)?, view(v, p.kv_heads(), dv)?);
        let width = p.heads() * dv;
        let (shape, strides) = ([range.len(), p.heads(), dv], [width as i64, dv as i64, 1]);
        let o = TensorViewMut::strided(&mut self.o, range.start * width, &shape, &strides)?;
        Ok((Inputs::new(q, k, v), Outputs::new(o)))
    }

    /// Tokens `range` on the host.
    fn host(&self, range: Range<usize>) -> Stream<bf16> {
        let widths = Self::widths(&self.p);
        let part = |i: usize| self.noise[i].host(range.start * widths[i]..range.end * widths[i]);
        Stream { problem: self.p, tokens: range.len(), q: part(0), k: part(1), v: part(2) }
    }

    /// Outputs of tokens `range`.
    fn output(&self, device: &Device, range: Range<usize>) -> Result<Vec<bf16>> {
        let width = self.p.heads() * self.p.value_dim();
        let part = self.o.slice(range.start * width..range.end * width);
        let o = device.stream().clone_dtoh(&part)?;
        device.synchronize()?;
        Ok(o)
    }

    /// The CPU's outputs of tokens `range`; not `whole`: of the memory alone.
    fn on_cpu(&self, range: Range<usize>, whole: bool, state: &mut State) -> Result<Vec<bf16>> {
        let (p, stream) = (&self.p, self.host(range.clone()));
        let shape = |heads, dim| [1, range.len(), heads, dim];
        let k = HostView::new(&stream.k, &shape(p.kv_heads(), p.key_dim()))?;
        let v = HostView::new(&stream.v, &shape(p.kv_heads(), p.value_dim()))?;
        let q = HostView::new(&stream.q, &shape(p.heads(), p.key_dim()))?;
        let open = vec![f32::INFINITY; p.heads()];
        let gate = if whole { &self.logits } else { &open };
        let mut o = vec![bf16::ZERO; range.len() * p.heads() * p.value_dim()];
        let outputs = HostMut::new(&mut o, &shape(p.heads(), p.value_dim()))?;
        let (inputs, outputs) =
            (infini_attn::Inputs::new(q, k, v), infini_attn::Outputs::new(outputs));
        infini_attn::prefill(p, &inputs, gate, state, outputs)?;
        Ok(o)
    }

    /// Compares outputs of tokens from `first` on, [tokens, Hq, Dv].
    fn compare(&self, what: &str, first: usize, got: &[bf16], want: &[bf16]) -> Result<()> {
        let (heads, width) = (self.p.heads(), self.p.value_dim());
        let shape = [got.len() / heads / width, heads, width];
        let what = format!("o of {what}, tokens from {first} on");
        let (got, want, axes) = (widen(got), widen(want), Axes::tokens(&shape, None));
        let whole = relative_rms(&what, &got, &want, axes, OUTPUT_LIMIT);
        let rows = whole.and_then(|_| rows_are_close(&what, &got, &want, axes, ROW_LIMIT));
        rows.map_err(anyhow::Error::msg)
    }
}

/// M, z and counters of states of one sequence.
fn same_memory(what: &str, got: &State, want: &State) -> Result<()> {
    let p = want.problem();
    let (m, z) = ([p.kv_heads(), p.key_dim(), p.value_dim()], [p.kv_heads(), p.key_dim()]);
    let of = |s: &State| {
        [s.memory(), s.normalizer()].map(|x| x.as_slice().expect("contiguous").to_vec())
    };
    let ([m_got, z_got], [m_want, z_want]) = (of(got), of(want));
    for (name, got, want, shape) in [("M", m_got, m_want, &m[..]), ("z", z_got, z_want, &z)] {
        let (what, axes) = (format!("{name} of {what}"), Axes::memory(shape));
        let compared = relative_rms(&what, &widen(&got), &widen(&want), axes, MEMORY_LIMIT);
        compared.map_err(anyhow::Error::msg)?;
    }
    let counters = |s: &State| (s.tokens(0), s.committed(0), s.open_len(0));
    let (got, want) = (counters(got), counters(want));
    ensure!(got == want, "{what}: counters {got:?}, {want:?} expected");
    Ok(())
}

/// Some of `count` segments: the first that finds a memory, the last two, others as the budget allows.
fn chosen(p: &Problem, count: usize, rng: &mut StdRng) -> Vec<usize> {
    let one = p.segment_len() * p.segment_len() * p.key_dim() * p.heads();
    let mut all = vec![1, count.saturating_sub(2), count - 1];
    all.extend(sample(rng, count, (BUDGET / one).saturating_sub(2).min(count)));
    all.retain(|s| *s < count);
    all.sort_unstable();
    all.dedup();
    all
}

/// One call for the whole stream, twice for equal bits.
fn prefill(device: &Device, Shape { p, tokens, .. }: Shape) -> Result<()> {
    let mut data = Data::new(device, &p, tokens, 5)?;
    let gate = Gate::new(device, &data.logits)?;
    let n = p.segment_len();
    let part = |s: usize| s * n..((s + 1) * n).min(tokens);
    let chosen = chosen(&p, tokens.div_ceil(n), &mut StdRng::seed_from_u64(1));
    let mut run = || -> Result<(Vec<Vec<bf16>>, State)> {
        device.stream().memset_zeros(&mut data.o)?;
        let mut state = cuda::State::new(device, &p, 1, false)?;
        let (inputs, outputs) = data.views(0..tokens)?;
        let cu = [0, tokens as i32];
        cuda::prefill(&p, &inputs.cu_seqlens(&cu), &gate, &mut state, outputs)?;
        state.status()?;
        let outputs = chosen.iter().map(|s| data.output(device, part(*s)));
        Ok((outputs.collect::<Result<_>>()?, state.to_host()?))
    };
    let ((outputs, state), (again, twin)) = (run()?, run()?);
    let mut want = State::new(&p, 1).unwrap();
    for s in 0..tokens.div_ceil(n) {
        let place = chosen.binary_search(&s);
        let o = data.on_cpu(part(s), place.is_ok(), &mut want)?;
        if let Ok(i) = place {
            data.compare(&format!("segment {s}"), s * n, &outputs[i], &o)?;
        }
    }
    same_memory("the stream", &state, &want)?;
    for ((s, a), b) in chosen.iter().zip(&outputs).zip(&again) {
        ensure!(bits(a) == bits(b), "segment {s}: a second run leaves other bits");
    }
    ensure!(state.to_bytes()? == twin.to_bytes()?, "a second run leaves another state");
    Ok(())
}

/// Segment by segment, a launch each.
fn segments(device: &Device, Shape { p, tokens, .. }: Shape) -> Result<()> {
    let mut data = Data::new(device, &p, tokens, 6)?;
    let gate = Gate::new(device, &data.logits)?;
    let (mut state, mut want) =
        (cuda::State::new(device, &p, 1, false)?, State::new(&p, 1).unwrap());
    let parts = (0..tokens).step_by(p.segment_len());
    let parts: Vec<_> = parts.map(|at| at..(at + p.segment_len()).min(tokens)).collect();
    for part in &parts {
        let (inputs, outputs) = data.views(part.clone())?;
        let cu = [0, part.len() as i32];
        cuda::segment(&p, &inputs.cu_seqlens(&cu), &gate, &mut state, outputs)?;
    }
    state.status()?;
    for (s, part) in parts.into_iter().enumerate() {
        let o = data.on_cpu(part.clone(), true, &mut want)?;
        let got = data.output(device, part.clone())?;
        data.compare(&format!("segment {s}"), part.start, &got, &o)?;
    }
    same_memory("the stream", &state.to_host()?, &want)
}

/// Steps of one token for a batch whose open segments are half full and more; some of them fill.
fn decode(device: &Device, Shape { p, sequences, .. }: Shape) -> Result<()> {
    let (n, steps) = (p.segment_len(), p.segment_len().div_ceil(40) + 8);
    let ends = starts((0..sequences).map(|b| n + n / 2 + b * (n / 2) / sequences));
    let (prompt, all) = (ends[sequences], ends[sequences] + steps * sequences);
    let mut data = Data::new(device, &p, all, 7)?;
    let gate = Gate::new(device, &data.logits)?;
    let mut state = cuda::State::new(device, &p, sequences, false)?;
    let (inputs, outputs) = data.views(0..prompt)?;
    let cu: Vec<i32> = ends.iter().map(|end| *end as i32).collect();
    cuda::prefill(&p, &inputs.cu_seqlens(&cu), &gate, &mut state, outputs)?;
    let step = |t: usize| prompt + t * sequences..prompt + (t + 1) * sequences;
    let cu: Vec<i32> = (0..=sequences as i32).collect();
    for t in 0..steps {
        let (inputs, outputs) = data.views(step(t))?;
        cuda::decode(&p, &inputs.cu_seqlens(&cu), &gate, &mut state, outputs)?;
    }
    state.status()?;
    let (state, width) = (state.to_host()?, p.heads() * p.value_dim());
    for b in [0, sequences / 2, sequences - 1] {
        let mut want = State::new(&p, 1).unwrap();
        data.on_cpu(ends[b]..ends[b + 1], false, &mut want)?;
        let (mut got, mut expected) = (vec![], vec![]);
        for t in 0..steps {
            let at = step(t).start + b;
            got.extend(data.output(device, at..at + 1)?);
            expected.extend(data.on_cpu(at..at + 1, true, &mut want)?);
        }
        ensure!(got.len() == steps * width);
        data.compare(&format!("sequence {b}, its steps"), 0, &got, &expected)?;
        same_memory(&format!("sequence {b}"), &state.fork(&[b])?, &want)?;
    }
    Ok(())
}

/// Two calls of packed sequences of all lengths, in some order of the slots of a larger pool.
fn ragged(device: &Device, Shape { p, tokens, sequences }: Shape) -> Result<()> {
    let (n, mut rng) = (p.segment_len(), StdRng::seed_from_u64(2));
    let sequences = sequences.min(16);
    let given = [0, 1, n - 1, n, n + 1, 2 * n];
    let mut length = |i: usize| match given.get(i % 9) {
        Some(len) => *len,
        None => rng.random_range(0..tokens),
    };
    let ends = starts((0..2 * sequences).map(&mut length));
    let mut data = Data::new(device, &p, ends[2 * sequences], 8)?;
    let gate = Gate::new(device, &data.logits)?;
    let pool = sequences + SPARE;
    let slots: Vec<usize> = sample(&mut rng, pool, sequences).into_vec();
    let mut state = cuda::State::new(device, &p, pool, false)?;
    for call in [0, sequences] {
        let ends = &ends[call..=call + sequences];
        let cu: Vec<i32> = ends.iter().map(|end| (end - ends[0]) as i32).collect();
        let (inputs, outputs) = data.views(ends[0]..ends[sequences])?;
        let inputs = inputs.cu_seqlens(&cu).slots(&slots);
        cuda::prefill(&p, &inputs, &gate, &mut state, outputs)?;
    }
    state.status()?;
    let state = state.to_host()?;
    for (b, slot) in slots.iter().enumerate() {
        let mut want = State::new(&p, 1).unwrap();
        for call in [b, sequences + b] {
            let range = ends[call]..ends[call + 1];
            let o = data.on_cpu(range.clone(), true, &mut want)?;
            let got = data.output(device, range)?;
            data.compare(&format!("sequence {b}, call {}", call / sequences), 0, &got, &o)?;
        }
        same_memory(&format!("sequence {b}"), &state.fork(&[*slot])?, &want)?;
    }
    for slot in (0..pool).filter(|slot| !slots.contains(slot)) {
        same_memory(
            &format!("spare slot {slot}"),
            &state.fork(&[slot])?,
            &State::new(&p, 1).unwrap(),
        )?;
    }
    Ok(())
}

/// Where each of some lengths begins when they lie one after the other, and where the last ends.
fn starts(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut starts = vec![0];
    for length in lengths {
        starts.push(starts[starts.len() - 1] + length);
    }
    starts
}
