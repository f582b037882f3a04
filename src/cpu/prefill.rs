//! Any number of tokens, under both rules.
//!
//! z does not depend on M, and with G = σ(K)ᵀ D⁻¹ σ(K), B = σ(K)ᵀ V a segment acts on the memory as
//! M ← M − G M + B. Two orders of the same arithmetic, equal to the bit: where sequences and KV
//! heads alone fill the cores, each task walks through one of them and everything stays in its
//! cache ([`chain`]); otherwise segments run in parallel ([`phases`]). Nothing grows with the
//! number of tokens.

use rayon::prelude::*;

use super::attention::{Scratch as TileScratch, Segment};
use super::call::{Call, advance};
use super::pack::Packed;
use super::pool::Pool;
use super::segment::{Scratch as SegmentScratch, advance_memory, transits};
use super::{phases, segment};
use crate::call::form::{Piece, Sequence, pieces};
use crate::dtype::Element;
use crate::memory::{HeadMut, State};

pub(super) fn run<T: Element>(call: &Call<'_, T>, sequences: &[Sequence], state: &mut State) {
    match heads_per_chain(call.problem.kv_heads(), sequences) {
        Some(heads) => chains(call, sequences, state, heads),
        None => phases::run(call, sequences, state),
    }
}

/// The most KV heads one task can take, so that tasks given out longest first waste less than a
/// tenth of the cores; None when even single heads are too few. Many, because the heads of a token
/// lie side by side in memory.
fn heads_per_chain(kv_heads: usize, sequences: &[Sequence]) -> Option<usize> {
    let mut lens: Vec<usize> = sequences.iter().map(|s| s.len).collect();
    lens.sort_unstable_by(|a, b| b.cmp(a));
    let balanced = |heads: usize| {
        let mut loads = vec![0usize; rayon::current_num_threads()];
        for len in lens.iter().flat_map(|&len| std::iter::repeat_n(len, kv_heads / heads)) {
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
) {
    let p = &call.problem;
    let counters = state.counters.clone();
    let mut heads = state.heads_mut();
    let mut slots: Vec<_> = heads.chunks_mut(p.kv_heads()).map(Some).collect();
    let mut tasks: Vec<_> = (sequences.iter())
        .filter_map(|seq| Some((seq, slots[seq.slot].take()?)))
        .flat_map(|(seq, heads)| {
            let chains = heads.chunks_mut(heads_per_chain).enumerate();
            chains.map(move |(i, heads)| (seq, i * heads_per_chain, heads))
        })
        .collect();
    tasks.sort_by_key(|(seq, ..)| std::cmp::Reverse(seq.len));
    let scratch = Pool::default();
    tasks.into_par_iter().with_max_len(1).for_each(|(seq, first, heads)| {
        scratch.with(
            || ChainScratch::new(call),
            |x| {
                for piece in pieces(p, *seq, counters[seq.slot]) {
                    for (h, head) in (first..).zip(heads.iter_mut().flatten()) {
                        chain(call, &piece, h, head, x);
                    }
                }
            },
        );
    });
    advance(call, sequences, state);
}

/// Buffers of one running chain.
struct ChainScratch {
    tiles: TileScratch,
    packed: Packed,
    segment: SegmentScratch,
    b: Vec<f32>,
    g: Vec<f32>,
    dz: Vec<f32>,
}

impl ChainScratch {
    fn new<T>(call: &Call<'_, T>) -> Self {
        let p = &call.problem;
        Self {
            tiles: TileScratch::new(call),
            packed: Packed::new(),
            segment: SegmentScratch::new(p),
            b: vec![0.0; p.key_dim() * p.value_dim()],
            g: vec![0.0; p.key_dim() * p.key_dim()],
            dz: vec![0.0; p.key_dim()],
        }
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
    if !piece.full {
        call.append(piece, kv_head, head);
        return;
    }
    segment::sums(p, &x.packed, &mut x.b, &mut x.dz, &mut x.segment);
    if transits(p, piece) {
        segment::transition(p, &x.packed, head.z, &mut x.g, &mut x.segment);
    }
    advance_memory(p, piece, &mut x.b, &x.g, head.m);
    head.z.iter_mut().zip(&x.dz).for_each(|(z, dz)| *z += dz);
}
