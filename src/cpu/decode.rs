//! A few new tokens per sequence, and the commit of open segments. One task per (sequence, KV
//! head) walks through its tokens; attention reads the open segment where it lies.

use rayon::prelude::*;

use super::attention::{Scratch as TileScratch, Segment};
use super::call::{Call, advance};
use super::pool::Pool;
use super::segment;
use super::segment::Scratch as SegmentScratch;
use crate::call::form::{Piece, Sequence, pieces};
use crate::dtype::Element;
use crate::memory::blocks::KeyBlocks;
use crate::memory::{HeadMut, State};
use crate::problem::Problem;

pub(super) fn run<T: Element>(call: &Call<'_, T>, sequences: &[Sequence], state: &mut State) {
    let p = &call.problem;
    let counters = state.counters.clone();
    let mut heads = state.heads_mut();
    let tasks: Vec<_> = (sequences.iter())
        .flat_map(|seq| (0..p.kv_heads()).map(move |h| (seq, h)))
        .filter_map(|(seq, h)| Some((seq, h, heads[seq.slot * p.kv_heads() + h].take()?)))
        .collect();
    let scratch = Pool::default();
    tasks.into_par_iter().for_each(|(seq, h, mut head)| {
        scratch.with(
            || TileScratch::new(call),
            |scratch| {
                for piece in pieces(p, *seq, counters[seq.slot]) {
                    step(call, &piece, h, &mut head, scratch);
                }
            },
        );
    });
    advance(call, sequences, state);
}

/// Appends a piece, attends it, and commits the segment if that filled it.
fn step<T: Element>(
    call: &Call<'_, T>,
    piece: &Piece,
    kv_head: usize,
    head: &mut HeadMut<'_>,
    scratch: &mut TileScratch,
) {
    call.append(piece, kv_head, head);
    let open = head.open();
    let keys = open.local(call.batch.rope.is_some());
    let segment = Segment { keys, values: open.v, m: head.m, z: head.z };
    call.attend(piece, kv_head, piece.start..piece.start + piece.len, segment, scratch);
    if piece.full {
        let mut scratch = SegmentScratch::new(&call.problem);
        commit(&call.problem, call.problem.segment_len(), piece.empty, head, &mut scratch);
    }
}

/// The first `len` tokens of an open segment.
struct OpenTokens<'a> {
    problem: &'a Problem,
    blocks: KeyBlocks,
    len: usize,
    keys: &'a [f32],
    values: &'a [f32],
}

impl segment::Tokens for OpenTokens<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn key(&self, j: usize, k: &mut [f32]) {
        self.blocks.get(self.keys, j, k);
    }

    fn value(&self, j: usize, v: &mut [f32]) {
        v.copy_from_slice(&self.values[j * self.problem.value_dim()..][..v.len()]);
    }
}

fn commit(
    problem: &Problem,
    len: usize,
    empty: bool,
    head: &mut HeadMut<'_>,
    scratch: &mut SegmentScratch,
) {
    let blocks = KeyBlocks::new(problem);
    let tokens = OpenTokens { problem, blocks, len, keys: head.k, values: head.v };
    segment::commit(problem, &tokens, empty, head.m, head.z, scratch);
}

pub(super) fn flush(p: &Problem, state: &mut State, slots: &[usize]) {
    let counters = state.counters.clone();
    let mut heads = state.heads_mut();
    let tasks: Vec<_> = (slots.iter().filter(|&&slot| counters[slot].open_len > 0))
        .flat_map(|&slot| (0..p.kv_heads()).map(move |h| (slot, h)))
        .filter_map(|(slot, h)| Some((slot, heads[slot * p.kv_heads() + h].take()?)))
        .collect();
    let scratch = Pool::default();
    tasks.into_par_iter().for_each(|(slot, mut head)| {
        let c = &counters[slot];
        let new = || SegmentScratch::new(p);
        scratch.with(new, |scratch| commit(p, c.open_len, c.committed == 0, &mut head, scratch));
    });
    for &slot in slots {
        state.counters[slot].flush();
    }
}
