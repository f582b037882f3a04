//! A few new tokens per sequence, and the commit of open segments. One task per (sequence, KV
//! head) walks through its tokens; attention reads the open segment where it lies.

use rayon::prelude::*;

use super::attention::{Scratch as TileScratch, Segment};
use super::call::{Call, Extent, advance};
use super::pack::AppendScratch;
use super::pool::Pool;
use super::segment;
use super::segment::Scratch as SegmentScratch;
use crate::call::form::{Piece, Sequence, pieces};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::State;
use crate::memory::blocks::KeyBlocks;
use crate::memory::heads::HeadMut;
use crate::problem::Problem;

/// Buffers of one running task.
struct Scratch {
    tiles: TileScratch,
    append: AppendScratch,
    /// If any segment is completed.
    segment: Option<SegmentScratch>,
}

pub(super) fn run<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    state: &mut State,
) -> Result<()> {
    let p = &call.problem;
    let (counters, heads) = state.split();
    let completes = Extent::of(p, sequences, counters).completes;
    let tasks = sequences.len() * p.kv_heads();
    let scratch = Pool::new(tasks, || {
        Ok(Scratch {
            tiles: TileScratch::new(call)?,
            append: AppendScratch::new(p)?,
            segment: completes.then(|| SegmentScratch::for_commits(p)).transpose()?,
        })
    })?;
    (0..tasks).into_par_iter().for_each(|i| {
        let (seq, h) = (sequences[i / p.kv_heads()], i % p.kv_heads());
        // SAFETY: no two sequences have the same slot.
        let mut head = unsafe { heads.head(seq.slot, h) };
        scratch.with(|x| {
            pieces(p, seq, counters[seq.slot])
                .for_each(|piece| step(call, &piece, h, &mut head, x));
        });
    });
    advance(call, sequences, counters);
    Ok(())
}

/// Appends a piece, attends it, and commits the segment if that filled it.
fn step<T: Element>(
    call: &Call<'_, T>,
    piece: &Piece,
    kv_head: usize,
    head: &mut HeadMut<'_>,
    x: &mut Scratch,
) {
    call.append(piece, kv_head, head, &mut x.append);
    let open = head.open();
    let keys = open.local(call.batch.rope.is_some());
    let segment = Segment { keys, values: open.v, m: head.m, z: head.z };
    call.attend(piece, kv_head, piece.start..piece.start + piece.len, segment, &mut x.tiles);
    if piece.full
        && let Some(scratch) = &mut x.segment
    {
        commit(&call.problem, call.problem.segment_len(), piece.empty, head, scratch);
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

pub(super) fn flush(p: &Problem, state: &mut State, slots: &[usize]) -> Result<()> {
    let (counters, heads) = state.split();
    let tasks = slots.len() * p.kv_heads();
    let scratch = Pool::new(tasks, || SegmentScratch::for_commits(p))?;
    (0..tasks).into_par_iter().for_each(|i| {
        let slot = slots[i / p.kv_heads()];
        let c = counters[slot];
        if c.open_len > 0 {
            // SAFETY: `check_slots` refuses a slot that is named twice.
            let mut head = unsafe { heads.head(slot, i % p.kv_heads()) };
            scratch.with(|x| commit(p, c.open_len, c.committed == 0, &mut head, x));
        }
    });
    slots.iter().for_each(|&slot| counters[slot].flush());
    Ok(())
}
