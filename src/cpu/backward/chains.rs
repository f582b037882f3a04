//! One task per (sequence, KV head), which walks from its last piece to its first.

use rayon::prelude::*;

use super::records::{Record, Scratch as RecordScratch};
use super::segment::{Scratch as SegmentScratch, Tail, Written};
use super::tile::{MemoryGradient, Scratch as TileScratch};
use super::{Backward, WORKSPACE};
use crate::alloc;
use crate::cpu::pool::Pool;
use crate::cpu::segment::advance_memory;
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::heads::HeadMut;

/// Bytes of a task's records, if not many more pieces ask for more.
const RUN_BYTES: usize = 4 << 20;

/// Gradients to the gates' logits of every (sequence, head), into `d_gates`.
pub(super) fn run<T: Element>(call: &Backward<'_, T>, mut d_gates: Vec<f64>) -> Result<Vec<f64>> {
    let kv_heads = call.problem.kv_heads();
    let tasks = call.sequences.len() * kv_heads;
    let scratch = Pool::new(tasks, || Scratch::new(call))?;
    d_gates.par_chunks_exact_mut(call.problem.group()).enumerate().with_max_len(1).for_each(
        |(task, d_gates)| {
            scratch.with(|x| call.chain(task / kv_heads, task % kv_heads, d_gates, x))
        },
    );
    Ok(d_gates)
}

/// Buffers of one running task.
struct Scratch {
    records: RecordScratch,
    segment: SegmentScratch,
    tiles: TileScratch,
    tail: Tail,
    /// Pieces of a run, and what those of a run have.
    run: usize,
    record: Vec<f32>,
    /// M and z before every run but the first.
    starts: Vec<f32>,
    /// What a piece adds to Λ and λ.
    read: Vec<f32>,
    owed: Vec<f32>,
    d_gates: Vec<f64>,
}

impl Scratch {
    fn new<T: Element>(call: &Backward<'_, T>) -> Result<Self> {
        let p = &call.problem;
        let (dk, dv, record) = (p.key_dim(), p.value_dim(), Record::new(p));
        let pieces = (0..call.sequences.len()).map(|i| call.count(i)).max().unwrap_or(0);
        let run = call.run_len(pieces, RUN_BYTES / (4 * record.len()));
        let longest = call.longest_segment();
        let floats = |shape: &[usize]| alloc::reserved(shape, WORKSPACE);
        Ok(Self {
            records: RecordScratch::new(p)?,
            segment: SegmentScratch::new(p, longest, call.batch.rope.is_some())?,
            tiles: TileScratch::new(p)?,
            tail: Tail::new(p, call.longest_tail())?,
            run,
            record: floats(&[run.min(pieces), record.len()])?,
            starts: floats(&[call.starts_of(pieces, run), dk, dv + 1])?,
            read: floats(&[dk, dv])?,
            owed: floats(&[dk])?,
            d_gates: alloc::reserved(&[p.group()], WORKSPACE)?,
        })
    }
}

impl<T: Element> Backward<'_, T> {
    /// Pieces of a run, `wanted` or as many as it takes for runs to begin where the tape has M and z, or
    /// for the starts of runs to be about as few as their pieces.
    pub(super) fn run_len(&self, pieces: usize, wanted: usize) -> usize {
        match self.tape.distance() {
            Some(distance) => wanted.max(1).next_multiple_of(distance),
            None => wanted.max(pieces.isqrt()).max(1),
        }
    }

    /// Runs before which M and z have to be kept.
    pub(super) fn starts_of(&self, pieces: usize, run: usize) -> usize {
        match self.tape.distance() {
            Some(_) => 0,
            None => pieces.saturating_sub(1) / run,
        }
    }

    /// Tokens of the longest segment, as far as it gets.
    pub(super) fn longest_segment(&self) -> usize {
        let tokens = |s: &crate::call::form::Sequence| self.start.counters[s.slot].open_len + s.len;
        let longest = self.sequences.iter().map(tokens).max().unwrap_or(0);
        longest.min(self.problem.segment_len())
    }

    /// Most tokens that a sequence brings to a segment that stays open.
    pub(super) fn longest_tail(&self) -> usize {
        let last = (0..self.sequences.len())
            .filter_map(|i| Some(self.piece(i, self.count(i).checked_sub(1)?)));
        last.filter(|piece| !piece.full).map(|piece| piece.len).max().unwrap_or(0)
    }

    fn chain(&self, i: usize, kv_head: usize, d_gates: &mut [f64], x: &mut Scratch) {
        let (slot, count) = (self.sequences[i].slot, self.count(i));
        if count == 0 {
            return;
        }
        // SAFETY: no two sequences have the same slot.
        let mut head = unsafe { self.heads.head(slot, kv_head) };
        self.take_tail(&self.piece(i, count - 1), &mut head.open, &mut x.tail);
        let runs = count.div_ceil(x.run);
        self.starts((i, kv_head), runs, x);
        for r in (0..runs).rev() {
            let run = r * x.run..count.min((r + 1) * x.run);
            self.begin((i, kv_head), r, x);
            x.record.resize(run.len() * Record::new(&self.problem).len(), 0.0);
            self.record((i, kv_head), (run.clone(), run.end), &mut x.record, &mut x.records);
            for j in run.clone().rev() {
                if self.cancel.abandons() {
                    return;
                }
                self.step((i, kv_head), (j, j - run.start), &mut head, d_gates, x);
            }
        }
    }

    /// What every run but the first finds, where it is not on the tape.
    fn starts(&self, (i, kv_head): (usize, usize), runs: usize, x: &mut Scratch) {
        x.starts.clear();
        if runs < 2 || self.tape.distance().is_some() {
            return;
        }
        x.records.begin(self.found(self.sequences[i].slot, kv_head));
        x.record.resize(x.run * Record::new(&self.problem).len(), 0.0);
        for r in 0..runs - 1 {
            let run = r * x.run..(r + 1) * x.run;
            self.record((i, kv_head), (run, usize::MAX), &mut x.record, &mut x.records);
            let (m, z) = x.records.memory();
            x.starts.extend_from_slice(m);
            x.starts.extend_from_slice(z);
        }
    }

    /// Stands before run `r`.
    fn begin(&self, (i, kv_head): (usize, usize), r: usize, x: &mut Scratch) {
        if r == 0 {
            return x.records.begin(self.found(self.sequences[i].slot, kv_head));
        }
        if let Some(found) = self.tape.found(&self.piece(i, r * x.run), kv_head) {
            return x.records.begin(found);
        }
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        let start = &x.starts[(r - 1) * dk * (dv + 1)..][..dk * (dv + 1)];
        x.records.begin(start.split_at(dk * dv));
    }

    /// Piece `j`, whose record is the `at`-th; Λ and λ move before it.
    fn step(
        &self,
        (i, kv_head): (usize, usize),
        (j, at): (usize, usize),
        head: &mut HeadMut<'_>,
        d_gates: &mut [f64],
        x: &mut Scratch,
    ) {
        let (p, piece) = (&self.problem, self.piece(i, j));
        let record = Record::new(p);
        let (m, z, g) = record.split(&x.record[at * record.len()..][..record.len()]);
        for (sums, len) in [(&mut x.read, m.len()), (&mut x.owed, z.len())] {
            sums.clear();
            sums.resize(len, 0.0);
        }
        x.d_gates.clear();
        x.d_gates.resize(p.group(), 0.0);
        let cut = self.is_cut(j);
        self.gather((&piece, kv_head), &mut x.segment.segment);
        let read = (!cut).then_some(MemoryGradient { m: &mut x.read, z: &mut x.owed });
        let segment = &mut x.segment.segment;
        self.queries((&piece, kv_head), segment, (m, z), read, &mut x.d_gates, &mut x.tiles);
        d_gates.iter_mut().zip(&x.d_gates).for_each(|(sum, own)| *sum += own);
        let written = Written { lambda: (head.m, head.z), found: (m, z) };
        let written = piece.full.then_some(written);
        let open = (&mut head.open, &x.tail);
        self.keys((&piece, kv_head), written, open, Some(&mut x.owed), &mut x.segment);
        if cut {
            head.m.fill(0.0);
            return head.z.fill(0.0);
        }
        advance_memory(p, &piece, &mut x.read, g, head.m);
        head.z.iter_mut().zip(&x.owed).for_each(|(lambda, owed)| *lambda += owed);
    }
}
