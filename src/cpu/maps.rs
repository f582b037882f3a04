//! Delta-rule memories of disjoint token runs: they do not add, but they compose as affine maps.
//!
//! A run of segments that finds the normaliser z acts on the memory as M ← A M + B, with A and B
//! independent of M. `key_sums` of every run, a prefix sum over runs, `segment_map` of every run in
//! parallel (on several devices, say), then `compose` in order or `apply` to a state.

use std::sync::atomic::AtomicBool;

use rayon::prelude::*;

use super::cancel::Cancel;
use super::matmul::{Into, Mat, matmul};
use super::pool::{self, Pool};
use super::segment::{CHUNK, SCRATCH, Scratch};
use super::{segment, simd};
use crate::alloc;
use crate::call::maps::{MapTokens, check_batch, check_keys, check_map, check_summed, sum_tokens};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::State;
use crate::memory::parts::check_len;
use crate::problem::{Problem, Update};
use crate::tensor::{Rows, TensorView};
use crate::trace::{Span, span};

const KEY_SUMS: &str = "key sums";
const MAP: &str = "a segment map";

/// Σ σ(k) over a run of tokens, per sequence and KV head, with the number of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct KeySums {
    problem: Problem,
    sums: Vec<f32>,
    tokens: Vec<u64>,
}

impl KeySums {
    /// The sums over no tokens, for `batch` sequences: what the first run of a stream finds.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn zero(problem: &Problem, batch: usize) -> Result<Self> {
        let sums = alloc::zeroed(&[batch, problem.kv_heads(), problem.key_dim()], KEY_SUMS)?;
        Ok(Self { problem: *problem, sums, tokens: alloc::zeroed(&[batch], KEY_SUMS)? })
    }

    /// What a run that continues `state` finds: its z and its committed tokens, slot by slot.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn from_state(state: &State) -> Result<Self> {
        let tokens = state.counters.iter().map(|c| c.committed);
        Ok(Self {
            problem: state.problem,
            sums: alloc::copied(&state.z, KEY_SUMS)?,
            tokens: alloc::collected(tokens, KEY_SUMS)?,
        })
    }

    /// Sums that were taken apart: f32 [B, Hkv, Dk], row-major, over `tokens` `[B]` tokens.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) naming sums; [`Error::Value`](crate::Error::Value) for
    /// more than 2^62 tokens, or for none where the sums are not zero;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn from_parts(problem: &Problem, sums: &[f32], tokens: &[u64]) -> Result<Self> {
        let shape = [tokens.len(), problem.kv_heads(), problem.key_dim()];
        check_len("sums", sums, &shape, "[B, Hkv, Dk]")?;
        check_summed(tokens, sums)?;
        let tokens = alloc::copied(tokens, KEY_SUMS)?;
        Ok(Self { problem: *problem, sums: alloc::copied(sums, KEY_SUMS)?, tokens })
    }

    /// The problem whose keys were summed.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The sums over both runs.
    ///
    /// # Errors
    /// [`Error::Problem`](crate::Error::Problem) or [`Error::Length`](crate::Error::Length) when
    /// they belong to different problems or batches, [`Error::Value`](crate::Error::Value) for more
    /// than 2^62 tokens.
    pub fn add(&self, other: &KeySums) -> Result<KeySums> {
        self.problem.check_same(&other.problem)?;
        check_batch("other", other.tokens.len(), self.tokens.len())?;
        let sums = self.sums.iter().zip(&other.sums).map(|(a, b)| a + b);
        Ok(KeySums {
            problem: self.problem,
            sums: alloc::collected(sums, KEY_SUMS)?,
            tokens: sum_tokens("other", &self.tokens, &other.tokens)?,
        })
    }

    /// A copy.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn try_clone(&self) -> Result<Self> {
        let tokens = alloc::copied(&self.tokens, KEY_SUMS)?;
        Ok(Self { problem: self.problem, sums: alloc::copied(&self.sums, KEY_SUMS)?, tokens })
    }

    /// The sums, f32 [B, Hkv, Dk].
    pub fn sums(&self) -> TensorView<'_, f32> {
        let p = &self.problem;
        TensorView::new(&self.sums, &[self.tokens.len(), p.kv_heads(), p.key_dim()])
            .expect("sums has this shape since it was made")
    }

    /// Tokens summed, per sequence.
    pub fn tokens(&self) -> &[u64] {
        &self.tokens
    }
}

/// The affine map M ← A M + B, z ← z + Δz of a run of segments, per sequence and KV head, f32.
#[derive(Clone, Debug, PartialEq)]
pub struct SegmentMap {
    problem: Problem,
    /// What the run finds.
    before: KeySums,
    a: Vec<f32>,
    b: Vec<f32>,
    /// Δz and tokens of the run.
    sums: KeySums,
}

impl SegmentMap {
    /// Zeros, for runs that find `before`.
    fn zero(problem: &Problem, before: &KeySums) -> Result<Self> {
        let batch = before.tokens.len();
        let (h, dk, dv) = (problem.kv_heads(), problem.key_dim(), problem.value_dim());
        Ok(Self {
            problem: *problem,
            before: before.try_clone()?,
            a: alloc::zeroed(&[batch, h, dk, dk], MAP)?,
            b: alloc::zeroed(&[batch, h, dk, dv], MAP)?,
            sums: KeySums::zero(problem, batch)?,
        })
    }

    /// A map that was taken apart: A [B, Hkv, Dk, Dk] and B [B, Hkv, Dk, Dv], row-major, of runs that
    /// find `before` and whose own sums are `run` (Δz and tokens).
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) naming a or b, or the run of another batch;
    /// [`Error::Problem`](crate::Error::Problem) when the sums belong to different problems;
    /// [`Error::Value`](crate::Error::Value) for more than 2^62 tokens in all;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn from_parts(before: &KeySums, run: &KeySums, a: &[f32], b: &[f32]) -> Result<Self> {
        let problem = before.problem;
        problem.check_same(&run.problem)?;
        check_batch("run", run.tokens.len(), before.tokens.len())?;
        sum_tokens("run", &before.tokens, &run.tokens)?;
        let (h, dk, dv) = (problem.kv_heads(), problem.key_dim(), problem.value_dim());
        let batch = before.tokens.len();
        check_len("a", a, &[batch, h, dk, dk], "[B, Hkv, Dk, Dk]")?;
        check_len("b", b, &[batch, h, dk, dv], "[B, Hkv, Dk, Dv]")?;
        Ok(Self {
            problem,
            before: before.try_clone()?,
            a: alloc::copied(a, MAP)?,
            b: alloc::copied(b, MAP)?,
            sums: run.try_clone()?,
        })
    }

    /// The problem whose segments were mapped.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// What the run finds.
    pub fn before(&self) -> &KeySums {
        &self.before
    }

    /// Δz and tokens of the run.
    pub fn run_sums(&self) -> &KeySums {
        &self.sums
    }

    /// A = Π (I − G), f32 [B, Hkv, Dk, Dk].
    pub fn a(&self) -> TensorView<'_, f32> {
        let dk = self.problem.key_dim();
        self.view(&self.a, dk)
    }

    /// B, f32 [B, Hkv, Dk, Dv].
    pub fn b(&self) -> TensorView<'_, f32> {
        self.view(&self.b, self.problem.value_dim())
    }

    /// Δz, f32 [B, Hkv, Dk].
    pub fn dz(&self) -> TensorView<'_, f32> {
        self.sums.sums()
    }

    /// Tokens of the run, per sequence.
    pub fn tokens(&self) -> &[u64] {
        &self.sums.tokens
    }

    fn run(&self) -> MapTokens<'_> {
        MapTokens { problem: &self.problem, before: &self.before.tokens, tokens: &self.sums.tokens }
    }

    fn view<'a>(&'a self, data: &'a [f32], width: usize) -> TensorView<'a, f32> {
        let p = &self.problem;
        TensorView::new(data, &[self.sums.tokens.len(), p.kv_heads(), p.key_dim(), width])
            .expect("A and B have these shapes since they were made")
    }
}

/// Σ σ(k) over a run of tokens: k [B, T, Hkv, Dk], unrotated.
///
/// # Errors
/// [`Error::DType`](crate::Error::DType), [`Error::Shape`](crate::Error::Shape) or
/// [`Error::Stride`](crate::Error::Stride) naming k, [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn key_sums<T: Element>(problem: &Problem, k: TensorView<'_, T>) -> Result<KeySums> {
    key_sums_until(problem, k, &AtomicBool::new(false))
}

/// [`key_sums`] that ends early once another thread sets the flag.
///
/// # Errors
/// As [`key_sums`], and [`Error::Cancelled`](crate::Error::Cancelled).
pub fn key_sums_until<T: Element>(
    problem: &Problem,
    k: TensorView<'_, T>,
    cancel: &AtomicBool,
) -> Result<KeySums> {
    let span = span!("key_sums", problem.shapes());
    span.run(|| sum_keys(&span, problem, k, &Cancel::within_tasks(Some(cancel))))
}

fn sum_keys<T: Element>(
    span: &Span,
    problem: &Problem,
    k: TensorView<'_, T>,
    cancel: &Cancel<'_>,
) -> Result<KeySums> {
    let dk = problem.key_dim();
    let (batch, tokens) = check_keys(problem, T::DTYPE, &k.layout())?;
    span.batch(batch, tokens);
    pool::start()?;
    let mut out = KeySums::zero(problem, batch)?;
    out.tokens.fill(tokens as u64);
    let rows = k.rows();
    out.sums.par_chunks_exact_mut(dk).enumerate().try_for_each(|(i, sums)| {
        let (b, h) = (i / problem.kv_heads(), i % problem.kv_heads());
        let mut chunk = alloc::zeroed(&[CHUNK.min(tokens), dk], SCRATCH)?;
        for first in (0..tokens).step_by(CHUNK) {
            cancel.go_on(batch)?;
            let chunk = &mut chunk[..CHUNK.min(tokens - first) * dk];
            for (t, row) in (first..).zip(chunk.chunks_exact_mut(dk)) {
                // SAFETY: b, t, h lie inside the shape just checked.
                T::widen(unsafe { rows.row(b, t, h) }, row);
            }
            simd::feature_map(chunk);
            simd::add_rows(chunk, sums);
        }
        Ok(())
    })?;
    Ok(out)
}

/// The affine map of a run of tokens: k [B, T, Hkv, Dk] (unrotated), v [B, T, Hkv, Dv]. The run is
/// cut into segments of N from its first token on; a shorter last one counts as flushed. `before`
/// is what the run finds: the prefix sum of the key sums of everything earlier.
///
/// Under [`Update::Linear`] A is the identity.
///
/// # Errors
/// [`Error::DType`](crate::Error::DType), [`Error::Shape`](crate::Error::Shape) or
/// [`Error::Stride`](crate::Error::Stride) naming k or v, [`Error::Problem`](crate::Error::Problem)
/// or [`Error::Length`](crate::Error::Length) when `before` belongs to another problem or batch,
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn segment_map<T: Element>(
    problem: &Problem,
    k: TensorView<'_, T>,
    v: TensorView<'_, T>,
    before: &KeySums,
) -> Result<SegmentMap> {
    segment_map_until(problem, k, v, before, &AtomicBool::new(false))
}

/// [`segment_map`] that ends early once another thread sets the flag.
///
/// # Errors
/// As [`segment_map`], and [`Error::Cancelled`](crate::Error::Cancelled).
pub fn segment_map_until<T: Element>(
    problem: &Problem,
    k: TensorView<'_, T>,
    v: TensorView<'_, T>,
    before: &KeySums,
    cancel: &AtomicBool,
) -> Result<SegmentMap> {
    let span = span!("segment_map", problem.shapes());
    span.run(|| map_segments(&span, problem, k, v, before, &Cancel::within_tasks(Some(cancel))))
}

fn map_segments<T: Element>(
    span: &Span,
    problem: &Problem,
    k: TensorView<'_, T>,
    v: TensorView<'_, T>,
    before: &KeySums,
    cancel: &Cancel<'_>,
) -> Result<SegmentMap> {
    let (dk, dv) = (problem.key_dim(), problem.value_dim());
    let (k_layout, v_layout) = (k.layout(), v.layout());
    let found = (&before.problem, &before.tokens[..]);
    let (batch, tokens) = check_map(problem, (T::DTYPE, &k_layout), (T::DTYPE, &v_layout), found)?;
    span.batch(batch, tokens);
    pool::start()?;
    let mut map = SegmentMap::zero(problem, before)?;
    map.sums.tokens.fill(tokens as u64);
    let (k, v) = (k.rows(), v.rows());
    (map.a.par_chunks_exact_mut(dk * dk))
        .zip(map.b.par_chunks_exact_mut(dk * dv))
        .zip(map.sums.sums.par_chunks_exact_mut(dk))
        .zip(before.sums.par_chunks_exact(dk))
        .enumerate()
        .try_for_each(|(i, (((a, b), dz), z))| {
            let (seq, h) = (i / problem.kv_heads(), i % problem.kv_heads());
            let run = RunTokens { k, v, seq, kv_head: h, first: 0, len: tokens, cancel };
            run_map(problem, run, before.tokens[seq] == 0, z, (a, b, dz))
        })?;
    cancel.go_on(before.tokens.len())?;
    Ok(map)
}

/// Tokens of one sequence and KV head of checked [B, T, Hkv, D] tensors.
#[derive(Clone, Copy)]
struct RunTokens<'a, T> {
    k: Rows<'a, T>,
    v: Rows<'a, T>,
    seq: usize,
    kv_head: usize,
    first: usize,
    len: usize,
    cancel: &'a Cancel<'a>,
}

impl<T: Element> segment::Tokens for RunTokens<'_, T> {
    fn len(&self) -> usize {
        self.len
    }

    fn key(&self, j: usize, k: &mut [f32]) {
        // SAFETY: inside the shape `segment_map` checked.
        T::widen(unsafe { self.k.row(self.seq, self.first + j, self.kv_head) }, k);
    }

    fn value(&self, j: usize, v: &mut [f32]) {
        // SAFETY: as above.
        T::widen(unsafe { self.v.row(self.seq, self.first + j, self.kv_head) }, v);
    }

    fn cancelled(&self) -> bool {
        self.cancel.abandons()
    }
}

/// Chains the maps of a run's segments: A ← (I − G) A, B ← (I − G) B + B_s, Δz ← Δz + Δz_s.
fn run_map<T: Element>(
    p: &Problem,
    run: RunTokens<'_, T>,
    mut empty: bool,
    z: &[f32],
    (a, b, dz): (&mut [f32], &mut [f32], &mut [f32]),
) -> Result<()> {
    let mut z = alloc::copied(z, SCRATCH)?;
    let (dk, dv) = (p.key_dim(), p.value_dim());
    a.iter_mut().step_by(dk + 1).for_each(|x| *x = 1.0);
    let mut scratch = Scratch::new(p)?;
    let buffer = |rows, cols| alloc::zeroed(&[rows, cols], SCRATCH);
    let (mut own, mut sums) = (buffer(dk, dv)?, buffer(1, dk)?);
    // G, and what it meets: only of segments that find something.
    let transits = p.update() == Update::Delta && (!empty || run.len > p.segment_len());
    let (dk_g, dv_g) = if transits { (dk, dv) } else { (0, 0) };
    let mut g = buffer(dk_g, dk)?;
    let (mut a_before, mut b_before) = (buffer(dk_g, dk)?, buffer(dk, dv_g)?);
    for first in (0..run.len).step_by(p.segment_len()).take_while(|_| !run.cancel.abandons()) {
        let segment = RunTokens { first, len: p.segment_len().min(run.len - first), ..run };
        segment::sums(p, &segment, &mut own, &mut sums, &mut scratch);
        if p.update() == Update::Delta && !empty {
            segment::transition(p, &segment, &z, &mut g, &mut scratch);
            a_before.copy_from_slice(a);
            b_before.copy_from_slice(b);
            let g = Mat::rows(&g, dk, dk, dk);
            matmul(a, Into::Subtract, g, Mat::rows(&a_before, dk, dk, dk));
            matmul(b, Into::Subtract, g, Mat::rows(&b_before, dk, dv, dv));
        }
        simd::add_rows(&own, b);
        simd::add_rows(&sums, &mut z);
        simd::add_rows(&sums, dz);
        empty = false;
    }
    Ok(())
}

/// The map of `first` followed by `second`: A = A₂ A₁, B = A₂ B₁ + B₂.
///
/// # Errors
/// [`Error::Problem`](crate::Error::Problem) or [`Error::Length`](crate::Error::Length) when they
/// belong to different problems or batches, [`Error::Value`](crate::Error::Value) when `second` was
/// not made for the tokens that `first` leaves behind,
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn compose(first: &SegmentMap, second: &SegmentMap) -> Result<SegmentMap> {
    let span = span!("compose", first.problem.shapes());
    span.run(|| composed(&span, first, second))
}

fn composed(span: &Span, first: &SegmentMap, second: &SegmentMap) -> Result<SegmentMap> {
    first.run().check_followed_by(&second.run())?;
    span.lens(first.tokens().iter().zip(second.tokens()).map(|(a, b)| (a + b) as usize));
    pool::start()?;
    let (dk, dv) = (first.problem.key_dim(), first.problem.value_dim());
    let sums = first.sums.add(&second.sums)?;
    let mut map = SegmentMap { sums, ..SegmentMap::zero(&first.problem, &first.before)? };
    map.b.copy_from_slice(&second.b);
    let maps = first.a.par_chunks_exact(dk * dk).zip(first.b.par_chunks_exact(dk * dv));
    (map.a.par_chunks_exact_mut(dk * dk))
        .zip(map.b.par_chunks_exact_mut(dk * dv))
        .zip(second.a.par_chunks_exact(dk * dk).zip(maps))
        .for_each(|((a, b), (a2, (a1, b1)))| {
            let a2 = Mat::rows(a2, dk, dk, dk);
            matmul(a, Into::Store, a2, Mat::rows(a1, dk, dk, dk));
            matmul(b, Into::Add, a2, Mat::rows(b1, dk, dv, dv));
        });
    Ok(map)
}

/// Applies the map of a run of segments to a state, slot by slot: the state stands as if the run's
/// tokens had been prefilled and flushed.
///
/// # Errors
/// [`Error::Problem`](crate::Error::Problem) or [`Error::Length`](crate::Error::Length) for a map
/// of another problem or batch, [`Error::OpenSegment`](crate::Error::OpenSegment) for a slot with
/// an open segment, [`Error::Value`](crate::Error::Value) when the map was made for another number
/// of earlier tokens, [`Error::OutOfMemory`](crate::Error::OutOfMemory). The state is unchanged then.
pub fn apply(map: &SegmentMap, state: &mut State) -> Result<()> {
    let span = span!("apply", map.problem.shapes());
    span.run(|| apply_to(&span, map, state))
}

fn apply_to(span: &Span, map: &SegmentMap, state: &mut State) -> Result<()> {
    let counters = map.run().apply(&state.problem, &state.counters)?;
    span.lens(map.tokens().iter().map(|&tokens| tokens as usize));
    pool::start()?;
    let (dk, dv) = (map.problem.key_dim(), map.problem.value_dim());
    let scratch = Pool::new(state.m.len() / (dk * dv), || alloc::reserved(&[dk, dv], SCRATCH))?;
    let (m, z) = state.own_memory()?;
    (m.par_chunks_exact_mut(dk * dv))
        .zip(map.a.par_chunks_exact(dk * dk).zip(map.b.par_chunks_exact(dk * dv)))
        .for_each(|(m, (a, b))| {
            scratch.with(|found: &mut Vec<f32>| {
                found.clear();
                found.extend_from_slice(m);
                m.copy_from_slice(b);
                matmul(m, Into::Add, Mat::rows(a, dk, dk, dk), Mat::rows(found, dk, dv, dv));
            });
        });
    z.iter_mut().zip(&map.sums.sums).for_each(|(z, dz)| *z += dz);
    state.counters = counters;
    Ok(())
}
