//! Any number of tokens, under both rules.
//!
//! z does not depend on M, and with G = σ(K)ᵀ D⁻¹ σ(K), B = σ(K)ᵀ V a segment acts on the memory as
//! M ← M − G M + B. Two orders of the same arithmetic, equal to the bit: where sequences and KV
//! heads alone fill the cores, each task walks through one of them and everything stays in its
//! cache ([`chain`]); otherwise segments run in parallel ([`phases`]). Nothing grows with the
//! number of tokens.

use rayon::prelude::*;

use super::attention::{Scratch as TileScratch, Segment};
use super::call::{Call, Extent, advance};
use super::pack::Packed;
use super::pool::Pool;
use super::segment::{SCRATCH, Scratch as SegmentScratch, advance_memory, transits};
use super::{phases, segment};
use crate::alloc;
use crate::call::form::{Piece, Sequence, pieces};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::State;
use crate::memory::heads::HeadMut;

pub(super) fn run<T: Element>(
    call: &Call<'_, T>,
    sequences: &mut [Sequence],
    state: &mut State,
) -> Result<()> {
    // Tasks are given out longest first.
    sequences.sort_unstable_by_key(|s| (std::cmp::Reverse(s.len), s.slot));
    match heads_per_chain(call.problem.kv_heads(), sequences) {
        Some(heads) => chains(call, sequences, state, heads),
        None => phases::run(call, sequences, state),
    }
}

/// The most KV heads one task can take, so that tasks given out longest first waste less than a
/// tenth of the cores; None when even single heads are too few. Many, because the heads of a token
/// lie side by side in memory.
fn heads_per_chain(kv_heads: usize, sequences: &[Sequence]) -> Option<usize> {
    let balanced = |heads: usize| {
        let mut loads = vec![0usize; rayon::current_num_threads()];
        let lens = sequences.iter().flat_map(|s| std::iter::repeat_n(s.len, kv_heads / heads));
        for len in lens {
            if let Some(least) = loads.iter_mut().min() {
                *least += len;
            }
        }
        let (total, longest) = (loads.iter().sum::<usize>(), loads.iter().max().copied());
        10 * total >= 9 * loads.len() * longest.unwrap_or(0)
    };
    (1..=kv_heads).rev().filter(|heads| kv_heads.is_multiple_of(*heads)).find(|&h| balanced(h))
}

fn chains<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    state: &mut State,
    heads_per_chain: usize,
) -> Result<()> {
    let p = &call.problem;
    let (counters, heads) = state.split();
    let extent = Extent::of(p, sequences, counters);
    let per_sequence = p.kv_heads() / heads_per_chain;
    let tasks = sequences.len() * per_sequence;
    let scratch = Pool::new(tasks, || ChainScratch::new(call, extent))?;
    (0..tasks).into_par_iter().with_max_len(1).for_each(|i| {
        let (seq, first) = (sequences[i / per_sequence], i % per_sequence * heads_per_chain);
        scratch.with(|x| {
            for piece in pieces(p, seq, counters[seq.slot]) {
                for h in first..first + heads_per_chain {
                    // SAFETY: no two sequences have the same slot.
                    chain(call, &piece, h, &mut unsafe { heads.head(seq.slot, h) }, x);
                }
            }
        });
    });
    advance(call, sequences, counters);
    Ok(())
}

/// Buffers of one running chain.
struct ChainScratch {
    tiles: TileScratch,
    packed: Packed,
    /// If any segment is completed.
    own: Option<Own>,
}

/// What a segment adds to the memory, and the buffers to compute it.
struct Own {
    segment: SegmentScratch,
    b: Vec<f32>,
    /// Empty if no segment has one.
    g: Vec<f32>,
    dz: Vec<f32>,
}

impl ChainScratch {
    fn new<T>(call: &Call<'_, T>, extent: Extent) -> Result<Self> {
        let p = &call.problem;
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let g = if extent.transits { dk } else { 0 };
        let own = || {
            Ok(Own {
                segment: SegmentScratch::new(p)?,
                b: alloc::zeroed(&[dk, dv], SCRATCH)?,
                g: alloc::zeroed(&[g, g], SCRATCH)?,
                dz: alloc::zeroed(&[dk], SCRATCH)?,
            })
        };
        Ok(Self {
            tiles: TileScratch::new(call)?,
            packed: Packed::new(call, extent.longest)?,
            own: extent.completes.then(own).transpose()?,
        })
    }
}

/// One piece of one chain: attention, then the memory.
fn chain<T: Element>(
    call: &Call<'_, T>,
    piece: &Piece,
    kv_head: usize,
    head: &mut HeadMut<'_>,
    x: &mut ChainScratch,
) {
    let p = &call.problem;
    call.pack(piece, kv_head, head.open(), piece.cached + piece.len, &mut x.packed);
    let segment = Segment { keys: &x.packed.local, values: &x.packed.values, m: head.m, z: head.z };
    call.attend(piece, kv_head, piece.start..piece.start + piece.len, segment, &mut x.tiles);
    let Some(own) = x.own.as_mut().filter(|_| piece.full) else {
        return call.append(piece, kv_head, head, &mut x.packed.append);
    };
    segment::sums(p, &x.packed, &mut own.b, &mut own.dz, &mut own.segment);
    if transits(p, piece) {
        segment::transition(p, &x.packed, head.z, &mut own.g, &mut own.segment);
    }
    advance_memory(p, piece, &mut own.b, &own.g, head.m);
    head.z.iter_mut().zip(&own.dz).for_each(|(z, dz)| *z += dz);
}
