//! Any number of tokens, under both rules.
//!
//! z does not depend on M, and with G = σ(K)ᵀ D⁻¹ σ(K), B = σ(K)ᵀ V a segment acts on the memory as
//! M ← M − G M + B. Two orders of the same arithmetic, equal to the bit: where sequences and KV
//! heads alone fill the cores, each task walks through one of them and everything stays in its
//! cache ([`chain`]); otherwise segments run in parallel ([`phases`]). Nothing grows with the
//! number of tokens. Both go through a call in parts, at whose ends it may be cancelled; what a part
//! has changed by then is put back.

use rayon::prelude::*;

use super::attention::{Scratch as TileScratch, Segment};
use super::call::{Call, Extent};
use super::pack::Packed;
use super::pool::Pool;
use super::segment::{CHUNK, SCRATCH, advance_memory, transits};
use super::{phases, segment};
use crate::alloc;
use crate::call::form::{Piece, Sequence, pieces};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::heads::{HeadMut, Heads, Shared};
use crate::memory::{Counters, State};
use crate::problem::Problem;

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
pub(super) fn heads_per_chain(kv_heads: usize, sequences: &[Sequence]) -> Option<usize> {
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

/// Fewest tokens of the longest sequence per part of a call that can be cancelled.
const PART_TOKENS: usize = 16384;

const WORKSPACE: &str = "the workspace of a prefill";

/// In parts, each of which is taken in as a whole or not at all; in one if nobody can cancel.
fn chains<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    state: &mut State,
    heads_per_chain: usize,
) -> Result<()> {
    let p = &call.problem;
    let extent = Extent::of(p, sequences, &state.counters);
    let tasks = sequences.len() * (p.kv_heads() / heads_per_chain);
    let scratch = Pool::new(tasks, || ChainScratch::new(call, extent))?;
    let longest = sequences.first().map_or(0, |s| s.len);
    let parts = match call.cancel.is_possible() {
        true => longest / PART_TOKENS.max(16 * p.segment_len()) + 1,
        false => 1,
    };
    let saved_len = if call.cancel.is_possible() { heads_per_chain * found_len(p) } else { 0 };
    let found = alloc::reserved(&[tasks, saved_len], WORKSPACE)?;
    let (counters, heads) = state.split()?;
    let at_start = sequences.iter().map(|s| counters[s.slot]);
    let at_start = alloc::collected(at_start, WORKSPACE)?;
    let mut chains =
        Chains { call, sequences, at_start, heads_per_chain, heads, scratch, found, saved_len };
    for part in 0..parts {
        chains.run((part, parts))?;
        chains.advance((part, parts), counters);
    }
    Ok(())
}

struct Chains<'c, 'a, T> {
    call: &'c Call<'a, T>,
    sequences: &'c [Sequence],
    /// The sequences' counters before the call.
    at_start: Vec<Counters>,
    heads_per_chain: usize,
    heads: Heads<'c>,
    scratch: Pool<ChainScratch>,
    /// M and z of all (sequence, KV head) as the part found them, if it may be cancelled; so many
    /// floats per task.
    found: Vec<f32>,
    saved_len: usize,
}

impl<T: Element> Chains<'_, '_, T> {
    /// The pieces of sequence `i` in part `part` of `parts`.
    fn pieces(&self, i: usize, (part, parts): (usize, usize)) -> impl Iterator<Item = Piece> {
        let (p, seq, at_start) = (&self.call.problem, self.sequences[i], self.at_start[i]);
        let count = (at_start.open_len + seq.len).div_ceil(p.segment_len());
        let [first, end] = [part, part + 1].map(|part| count * part / parts);
        pieces(p, seq, at_start).skip(first).take(end - first)
    }

    /// Attention and memory of all pieces of a part, then their open rows.
    fn run(&mut self, part: (usize, usize)) -> Result<()> {
        let (call, kv_heads, heads) =
            (self.call, self.call.problem.kv_heads(), self.heads_per_chain);
        let per_sequence = kv_heads / heads;
        call.cancel.go_on(0)?;
        let mut found = std::mem::take(&mut self.found);
        let tasks = self.sequences.len() * per_sequence;
        found.resize(tasks * self.saved_len, 0.0);
        let saved = Shared::new(&mut found);
        (0..tasks).into_par_iter().with_max_len(1).for_each(|i| {
            // SAFETY: one task for each of them.
            let saved = unsafe { saved.part(i, self.saved_len) };
            self.chain(i / per_sequence, i % per_sequence * heads, part, saved);
        });
        let result = call.cancel.go_on(0);
        match &result {
            Ok(()) => self.append(part),
            Err(_) => self.restore(&found),
        }
        self.found = found;
        result
    }

    /// One sequence and some of its KV heads; their M and z go to `saved` before, if it has room.
    fn chain(&self, i: usize, first: usize, part: (usize, usize), saved: &mut [f32]) {
        let (call, slot) = (self.call, self.sequences[i].slot);
        let heads = first..first + self.heads_per_chain;
        for (h, saved) in heads.clone().zip(saved.chunks_exact_mut(found_len(&call.problem))) {
            // SAFETY: no two sequences have the same slot; here and below.
            let head = unsafe { self.heads.head(slot, h) };
            let (m, z) = saved.split_at_mut(head.m.len());
            m.copy_from_slice(head.m);
            z.copy_from_slice(head.z);
        }
        self.scratch.with(|x| {
            for piece in self.pieces(i, part).take_while(|_| !call.cancel.abandons()) {
                for h in heads.clone() {
                    // SAFETY: as above.
                    chain(call, &piece, h, &mut unsafe { self.heads.head(slot, h) }, x);
                }
            }
        });
    }

    /// Puts back what a part that was cancelled found.
    fn restore(&self, found: &[f32]) {
        let kv_heads = self.call.problem.kv_heads();
        for (i, found) in found.chunks_exact(found_len(&self.call.problem)).enumerate() {
            // SAFETY: taken one after another.
            let head = unsafe { self.heads.head(self.sequences[i / kv_heads].slot, i % kv_heads) };
            let (m, z) = found.split_at(head.m.len());
            head.m.copy_from_slice(m);
            head.z.copy_from_slice(z);
        }
    }

    fn append(&self, part: (usize, usize)) {
        let tails: Vec<Piece> = (0..self.sequences.len())
            .filter_map(|i| self.pieces(i, part).last())
            .filter(|piece| !piece.full && !piece.continues())
            .collect();
        self.call.append_tails(&self.heads.open, &tails, |append| {
            self.scratch.with(|x| append(&mut x.packed.append));
        });
    }

    fn advance(&self, part: (usize, usize), counters: &mut [Counters]) {
        for i in 0..self.sequences.len() {
            let rotated = self.call.batch.rope.is_some();
            self.pieces(i, part).for_each(|p| counters[p.seq.slot].advance(&p, rotated));
        }
    }
}

/// Floats of M and z of a head.
fn found_len(p: &Problem) -> usize {
    p.key_dim() * (p.value_dim() + 1)
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
    /// Retrieval weights of a chunk of keys.
    w: Vec<f32>,
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
                w: alloc::reserved(&[CHUNK.min(p.segment_len()), g], SCRATCH)?,
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
    let (p, tokens) = (&call.problem, piece.start..piece.start + piece.len);
    // SAFETY: one task walks through the pieces of a sequence and KV head.
    unsafe { call.note(piece, kv_head, head.m, head.z) };
    if piece.continues() {
        call.append(piece, kv_head, &mut head.open, &mut x.packed.append);
        let segment = call.open_segment(head.open.read(), head.m, head.z);
        return call.attend(piece, kv_head, tokens, segment, &mut x.tiles);
    }
    call.pack(piece, kv_head, head.open.read(), piece.cached + piece.len, &mut x.packed);
    let segment = Segment { keys: &x.packed.local, values: &x.packed.values, m: head.m, z: head.z };
    call.attend(piece, kv_head, tokens, segment, &mut x.tiles);
    let Some(own) = x.own.as_mut().filter(|_| piece.full) else { return };
    let found = transits(p, piece).then_some(&*head.z);
    segment::additions(
        p,
        x.packed.rows(),
        found,
        (&mut own.b, &mut own.dz, &mut own.g),
        &mut own.w,
    );
    advance_memory(p, piece, &mut own.b, &own.g, head.m);
    head.z.iter_mut().zip(&own.dz).for_each(|(z, dz)| *z += dz);
}
