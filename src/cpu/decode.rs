//! A few new tokens per sequence, and the commit of open segments. One task per (sequence, KV
//! head) walks through its tokens; attention reads the open segment where it lies.

use rayon::prelude::*;

use super::attention::Scratch as TileScratch;
use super::call::{Call, Extent, advance};
use super::pack::AppendScratch;
use super::pool::{self, Pool};
use super::segment;
use super::segment::Scratch as SegmentScratch;
use crate::call::form::{Piece, Sequence, pieces};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::blocks::KeyBlocks;
use crate::memory::heads::{HeadMut, OpenHeads, OpenRef};
use crate::memory::{Counters, State};
use crate::problem::Problem;

/// Buffers of one running task.
#[derive(Default)]
pub(super) struct Scratch {
    tiles: TileScratch,
    append: AppendScratch,
    /// Without room unless a segment was completed.
    segment: SegmentScratch,
}

impl Scratch {
    /// Makes room for a call's tasks.
    fn fit<T>(&mut self, call: &Call<'_, T>, completes: bool) -> Result<()> {
        self.tiles.fit(call)?;
        self.append.fit(&call.problem)?;
        if completes { self.segment.fit_commits(&call.problem) } else { Ok(()) }
    }

    /// Bytes of its room.
    pub fn bytes(&self) -> usize {
        self.tiles.bytes() + self.append.bytes() + self.segment.bytes()
    }
}

pub(super) fn run<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    state: &mut State,
    (scratch, spare): (&mut Pool<Scratch>, &mut Vec<Scratch>),
) -> Result<()> {
    let p = &call.problem;
    let completes = Extent::of(p, sequences, &state.counters).completes;
    let tasks = sequences.len() * p.kv_heads();
    let tasks = if call.inline { tasks.min(1) } else { tasks };
    scratch.refit(tasks, spare, |x| x.fit(call, completes))?;
    let scratch = &*scratch;
    let appended = !completes && append_shared(call, sequences, state, scratch);
    if completes {
        state.own_memory()?;
    }
    if !appended {
        state.own_open()?;
    }
    for group in sequences.chunks(call.per_check(sequences.len())) {
        call.cancel.go_on(0)?;
        match (completes, appended) {
            (true, _) => complete(call, group, state, scratch)?,
            (false, true) => attend_shared(call, group, state, scratch),
            (false, false) => append_and_attend(call, group, state, scratch),
        }
        advance(call, group, &mut state.counters);
    }
    Ok(())
}

/// Runs `work` on every piece of every sequence and KV head; the pieces of one in order.
fn each_piece<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    counters: &[Counters],
    scratch: &Pool<Scratch>,
    work: impl Fn(&Piece, usize, &mut Scratch) + Sync + Send,
) {
    let p = &call.problem;
    pool::each(sequences.len() * p.kv_heads(), call.inline, |i| {
        let (seq, h) = (sequences[i / p.kv_heads()], i % p.kv_heads());
        scratch.with(|x| {
            pieces(p, seq, counters[seq.slot]).for_each(|piece| work(&piece, h, x));
        });
    });
}

/// Appends and attends every piece, and commits the segments that are full then.
fn complete<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    state: &mut State,
    scratch: &Pool<Scratch>,
) -> Result<()> {
    let (counters, heads) = state.split()?;
    each_piece(call, sequences, counters, scratch, |piece, h, x| {
        // SAFETY: no two sequences have the same slot.
        let mut head = unsafe { heads.head(piece.seq.slot, h) };
        call.append(piece, h, &mut head.open, &mut x.append);
        attend(call, piece, h, (head.open.read(), head.m, head.z), x);
        if piece.full {
            let n = call.problem.segment_len();
            commit(&call.problem, n, piece.empty, &mut head, &mut x.segment);
        }
    });
    Ok(())
}

/// The same where no segment gets full: the memory is only read.
fn append_and_attend<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    state: &mut State,
    scratch: &Pool<Scratch>,
) {
    let State { counters, m, z, open, .. } = state;
    let open = open.alone().expect("made this state's own by `run`");
    let heads = OpenHeads::new(&call.problem, open);
    each_piece(call, sequences, counters, scratch, |piece, h, x| {
        // SAFETY: no two sequences have the same slot.
        let mut head = unsafe { heads.head(piece.seq.slot, h) };
        call.append(piece, h, &mut head, &mut x.append);
        let (m, z) = memory(&call.problem, (m, z), piece.seq.slot, h);
        attend(call, piece, h, (head.read(), m, z), x);
    });
}

/// The same for open segments that copies of the state hold too; their rows are there.
fn attend_shared<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    state: &State,
    scratch: &Pool<Scratch>,
) {
    let (p, open) = (&call.problem, state.open.read());
    each_piece(call, sequences, &state.counters, scratch, |piece, h, x| {
        let (m, z) = memory(p, (&state.m, &state.z), piece.seq.slot, h);
        attend(call, piece, h, (open.head(p, piece.seq.slot, h), m, z), x);
    });
}

/// Appends the rows of all sequences to open segments that copies of the state hold too; false where
/// another of them has appended there, or is about to.
fn append_shared<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    state: &mut State,
    scratch: &Pool<Scratch>,
) -> bool {
    let State { counters, open, .. } = state;
    if open.alone().is_some() {
        return false;
    }
    let Some(mut open) = open.try_write() else { return false };
    let (p, new) = (&call.problem, || sequences.iter().filter(|s| s.len > 0));
    if new().next().is_none() {
        return true;
    }
    if new().any(|s| open.filled[s.slot] != counters[s.slot].open_len) {
        return false;
    }
    new().for_each(|s| open.filled[s.slot] += s.len);
    let heads = OpenHeads::new(p, &mut open);
    // One after another: who holds the lock must not wait for tasks.
    scratch.with(|x| {
        for seq in new() {
            for piece in pieces(p, *seq, counters[seq.slot]) {
                for h in 0..p.kv_heads() {
                    // SAFETY: taken one after another.
                    let mut head = unsafe { heads.head(seq.slot, h) };
                    call.append(&piece, h, &mut head, &mut x.append);
                }
            }
        }
    });
    true
}

/// M and z of a slot's head.
fn memory<'a>(
    p: &Problem,
    (m, z): (&'a [f32], &'a [f32]),
    slot: usize,
    kv_head: usize,
) -> (&'a [f32], &'a [f32]) {
    let (i, dk) = (slot * p.kv_heads() + kv_head, p.key_dim());
    (&m[i * dk * p.value_dim()..][..dk * p.value_dim()], &z[i * dk..][..dk])
}

/// Attends a piece whose rows are in the open segment.
fn attend<T: Element>(
    call: &Call<'_, T>,
    piece: &Piece,
    kv_head: usize,
    (open, m, z): (OpenRef<'_>, &[f32], &[f32]),
    x: &mut Scratch,
) {
    let segment = call.open_segment(open, m, z);
    call.attend(piece, kv_head, piece.start..piece.start + piece.len, segment, &mut x.tiles);
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
    let tokens = OpenTokens { problem, blocks, len, keys: head.open.k, values: head.open.v };
    segment::commit(problem, &tokens, empty, head.m, head.z, scratch);
}

pub(super) fn flush(p: &Problem, state: &mut State, slots: &[usize]) -> Result<()> {
    let tasks = slots.len() * p.kv_heads();
    let scratch = Pool::new(tasks, || SegmentScratch::for_commits(p))?;
    let (counters, heads) = state.split()?;
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
    state.note_filled(slots.iter().copied());
    Ok(())
}
