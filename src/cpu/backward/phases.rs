//! One sequence after another, the segments of a run of it in parallel: what they found; what their
//! queries read, E; Λ from the last to the first, one small product each; what the delta rule's
//! denominators owe; λ; then all gradients, each by its own Λ and λ.

use std::ops::Range;

use rayon::prelude::*;

use super::records::Record;
use super::segment::{Scratch as SegmentScratch, Tail, Written};
use super::tile::{MemoryGradient, Scratch as TileScratch};
use super::{Backward, WORKSPACE};
use crate::alloc;
use crate::call::form::Piece;
use crate::cpu::pool::Pool;
use crate::cpu::segment::{self, Scratch as CommitScratch, advance_memory, transits};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::heads::OpenMut;
use crate::problem::Problem;

/// Most bytes of a run's records, if not many more pieces ask for more.
const RUN_BYTES: usize = 32 << 20;

/// Gradients to the gates' logits of every (sequence, head), into `d_gates`.
pub(super) fn run<T: Element>(call: &Backward<'_, T>, mut d_gates: Vec<f64>) -> Result<Vec<f64>> {
    let mut runner = Runner::new(call)?;
    for (i, d_gates) in d_gates.chunks_exact_mut(call.problem.heads()).enumerate() {
        runner.sequence(i, d_gates);
    }
    Ok(d_gates)
}

/// What the pieces of a run have.
struct Work {
    record: Record,
    /// By KV head, then by piece: its record; then, shaped like M and z, what it adds to them, E and what
    /// is owed to λ, Λ and λ after it, one in the place of the other.
    parts: Vec<f32>,
    /// The same order: gradients to the gates' logits, `[group]`.
    d_gates: Vec<f64>,
    /// By KV head: M and z where the run has come to.
    stand: Vec<f32>,
}

/// A piece and KV head of a run.
struct Part<'p> {
    j: usize,
    piece: Piece,
    kv_head: usize,
    m: &'p mut [f32],
    z: &'p mut [f32],
    g: &'p mut [f32],
    sums: (&'p mut [f32], &'p mut [f32]),
    d_gates: &'p mut [f64],
}

impl Work {
    /// Floats of M and z, and of a part.
    fn len(&self, p: &Problem) -> [usize; 2] {
        let memory = p.key_dim() * (p.value_dim() + 1);
        [memory, self.record.len() + memory]
    }

    /// Runs `work` on every part of sequence `i`'s pieces `run`, in parallel.
    fn each<T: Element>(
        &mut self,
        call: &Backward<'_, T>,
        (i, run): (usize, &Range<usize>),
        work: impl Fn(Part<'_>) + Sync,
    ) {
        let [_, len] = self.len(&call.problem);
        let (record, group) = (self.record, call.problem.group());
        let parts = self.parts.par_chunks_exact_mut(len);
        parts.zip(self.d_gates.par_chunks_exact_mut(group)).enumerate().for_each(
            |(at, buffers)| {
                let (h, j) = (at / run.len(), run.start + at % run.len());
                work(Part::new(call, record, (i, j, h), buffers));
            },
        );
    }

    /// Runs `step(part, (M, z) where its KV head stands)` on the parts of every KV head, one after another, the
    /// KV heads in parallel.
    fn scan<T: Element>(
        &mut self,
        call: &Backward<'_, T>,
        (i, run): (usize, &Range<usize>),
        direction: Direction,
        step: impl Fn(Part<'_>, (&mut [f32], &mut [f32])) + Sync,
    ) {
        let p = &call.problem;
        let [memory, len] = self.len(p);
        let (record, group) = (self.record, p.group());
        (self.parts.par_chunks_exact_mut(len * run.len()))
            .zip(self.d_gates.par_chunks_exact_mut(group * run.len()))
            .zip(self.stand.par_chunks_exact_mut(memory))
            .enumerate()
            .for_each(|(h, ((parts, d_gates), stand))| {
                for at in 0..run.len() {
                    let at = match direction {
                        Direction::Forward => at,
                        Direction::Backward => run.len() - 1 - at,
                    };
                    let part = &mut parts[at * len..][..len];
                    let d_gates = &mut d_gates[at * group..][..group];
                    let part = Part::new(call, record, (i, run.start + at, h), (part, d_gates));
                    step(part, stand.split_at_mut(p.key_dim() * p.value_dim()));
                }
            });
    }
}

/// The order of pieces.
#[derive(Clone, Copy)]
enum Direction {
    Forward,
    Backward,
}

impl<'p> Part<'p> {
    fn new<T: Element>(
        call: &Backward<'_, T>,
        record: Record,
        (i, j, kv_head): (usize, usize, usize),
        (part, d_gates): (&'p mut [f32], &'p mut [f64]),
    ) -> Self {
        let (own, sums) = part.split_at_mut(record.len());
        let (m, z, g) = record.split_mut(own);
        let sums = sums.split_at_mut(m.len());
        Self { j, piece: call.piece(i, j), kv_head, m, z, g, sums, d_gates }
    }
}

struct Runner<'c, 'a, T> {
    call: &'c Backward<'a, T>,
    /// Pieces of a run.
    run: usize,
    work: Work,
    /// M and z of every KV head before every run but the first, where they are not on the tape.
    starts: Vec<f32>,
    tails: Vec<Tail>,
    commits: Pool<CommitScratch>,
    tiles: Pool<(SegmentScratch, TileScratch)>,
}

impl<'c, 'a, T: Element> Runner<'c, 'a, T> {
    fn new(call: &'c Backward<'a, T>) -> Result<Self> {
        let (p, record) = (&call.problem, Record::new(&call.problem));
        let (kv_heads, memory) = (p.kv_heads(), p.key_dim() * (p.value_dim() + 1));
        let pieces = (0..call.sequences.len()).map(|i| call.count(i)).max().unwrap_or(0);
        let wanted = (8 * rayon::current_num_threads()).div_ceil(kv_heads);
        let bytes = 4 * kv_heads * (record.len() + memory);
        let run = call.run_len(pieces, wanted.min(RUN_BYTES / bytes));
        let parts = run.min(pieces) * kv_heads;
        let (longest, rotation) = (call.longest_segment(), call.batch.rope.is_some());
        let tails = (0..kv_heads).map(|_| Tail::new(p, call.longest_tail()));
        let work = Work {
            record,
            parts: alloc::reserved(&[parts, record.len() + memory], WORKSPACE)?,
            d_gates: alloc::reserved(&[parts, p.group()], WORKSPACE)?,
            stand: alloc::zeroed(&[kv_heads, memory], WORKSPACE)?,
        };
        Ok(Self {
            call,
            run,
            work,
            starts: alloc::reserved(&[call.starts_of(pieces, run), kv_heads, memory], WORKSPACE)?,
            tails: tails.collect::<Result<_>>()?,
            commits: Pool::new(parts, || CommitScratch::new(p))?,
            tiles: Pool::new(parts, || {
                Ok((SegmentScratch::new(p, longest, rotation)?, TileScratch::new(p)?))
            })?,
        })
    }

    fn sequence(&mut self, i: usize, d_gates: &mut [f64]) {
        let (call, count) = (self.call, self.call.count(i));
        let Some(last) = count.checked_sub(1) else { return };
        let (slot, last) = (call.sequences[i].slot, call.piece(i, last));
        self.tails.par_iter_mut().enumerate().for_each(|(h, tail)| {
            // SAFETY: one task per KV head; here and below.
            call.take_tail(&last, &mut unsafe { call.heads.head(slot, h) }.open, tail);
        });
        let runs = count.div_ceil(self.run);
        self.starts(i, runs);
        for r in (0..runs).rev() {
            let run = &(r * self.run..count.min((r + 1) * self.run));
            if call.cancel.abandons() {
                return;
            }
            self.begin(i, (r, run));
            self.found((i, run));
            self.read((i, run));
            self.lambda((i, run));
            self.owed((i, run));
            self.lambda_z((i, run));
            self.gradients((i, run));
            let group = call.problem.group();
            for (h, d_gates) in d_gates.chunks_exact_mut(group).enumerate() {
                let of_head = &self.work.d_gates[h * run.len() * group..][..run.len() * group];
                for own in of_head.chunks_exact(group).rev() {
                    d_gates.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
                }
            }
        }
    }

    /// What every run but the first finds, where it is not on the tape.
    fn starts(&mut self, i: usize, runs: usize) {
        self.starts.clear();
        if self.call.tape.distance().is_some() {
            return;
        }
        for r in 0..runs - 1 {
            let run = &(r * self.run..(r + 1) * self.run);
            self.begin(i, (r, run));
            self.found((i, run));
            self.starts.extend_from_slice(&self.work.stand);
        }
    }

    /// Stands before run `r`.
    fn begin(&mut self, i: usize, (r, run): (usize, &Range<usize>)) {
        let Self { call, work, starts, .. } = self;
        let (slot, piece, len) =
            (call.sequences[i].slot, call.piece(i, run.start), work.stand.len());
        let [memory, _] = work.len(&call.problem);
        for (h, stand) in work.stand.chunks_exact_mut(memory).enumerate() {
            let (m, z) = stand.split_at_mut(call.problem.key_dim() * call.problem.value_dim());
            let found = match r {
                0 => Some(call.found(slot, h)),
                _ => call.tape.found(&piece, h),
            };
            let found = found.unwrap_or_else(|| {
                starts[(r - 1) * len..][..len][h * memory..][..memory].split_at(m.len())
            });
            m.copy_from_slice(found.0);
            z.copy_from_slice(found.1);
        }
    }

    /// M, z and G of a run's pieces; where the memory stands moves past it.
    fn found(&mut self, run: (usize, &Range<usize>)) {
        let Self { call, work, commits, .. } = self;
        let p = call.problem;
        let ([_, len], parts) = (work.len(&p), run.1.len() * p.kv_heads());
        work.parts.resize(parts * len, 0.0);
        work.d_gates.resize(parts * p.group(), 0.0);
        work.each(call, run, |part| {
            let tokens = call.tokens(&part.piece, part.kv_head);
            if part.piece.full {
                let (b, dz) = part.sums;
                commits.with(|x| segment::sums(&p, &tokens, b, dz, x));
            }
        });
        work.scan(call, run, Direction::Forward, |part, (_, z)| {
            part.z.copy_from_slice(z);
            if part.piece.full {
                z.iter_mut().zip(part.sums.1).for_each(|(z, dz)| *z += *dz);
            }
        });
        work.each(call, run, |part| {
            if transits(&p, &part.piece) {
                let tokens = call.tokens(&part.piece, part.kv_head);
                commits.with(|x| segment::transition(&p, &tokens, part.z, part.g, x));
            }
        });
        work.scan(call, run, Direction::Forward, |part, (m, _)| {
            part.m.copy_from_slice(m);
            if part.piece.full {
                advance_memory(&p, &part.piece, part.sums.0, part.g, m);
            }
        });
    }

    /// E, and what the queries' denominators owe, of a run's pieces.
    fn read(&mut self, run: (usize, &Range<usize>)) {
        let Self { call, work, tiles, .. } = self;
        work.each(call, run, |part| {
            let (m, z) = part.sums;
            m.fill(0.0);
            z.fill(0.0);
            if !call.is_cut(part.j) {
                let (read, piece) = (MemoryGradient { m, z }, (&part.piece, part.kv_head));
                tiles.with(|(_, x)| call.reading(piece, (part.m, part.z), read, x));
            }
        });
    }

    /// E becomes Λ after the piece; that of the sequence moves before the run.
    fn lambda(&mut self, run: (usize, &Range<usize>)) {
        let Self { call, work, .. } = self;
        work.scan(call, run, Direction::Backward, |part, _| {
            // SAFETY: as above.
            let lambda = unsafe { call.heads.head(part.piece.seq.slot, part.kv_head) }.m;
            advance_memory(&call.problem, &part.piece, part.sums.0, part.g, lambda);
            if call.is_cut(part.j) {
                lambda.fill(0.0);
            }
        });
    }

    /// What the delta rule's denominators owe is added to that of the queries'.
    fn owed(&mut self, run: (usize, &Range<usize>)) {
        let Self { call, work, tiles, .. } = self;
        work.each(call, run, |part| {
            if transits(&call.problem, &part.piece) && !call.is_cut(part.j) {
                let (lambda, owed) = part.sums;
                let written = Written { lambda: (lambda, &[]), found: (part.m, part.z) };
                let piece = (&part.piece, part.kv_head);
                tiles.with(|(x, _)| call.owed(piece, written, owed, x));
            }
        });
    }

    /// What is owed becomes λ after the piece.
    fn lambda_z(&mut self, run: (usize, &Range<usize>)) {
        let Self { call, work, .. } = self;
        work.scan(call, run, Direction::Backward, |part, _| {
            // SAFETY: as above.
            let lambda = unsafe { call.heads.head(part.piece.seq.slot, part.kv_head) }.z;
            for (owed, lambda) in part.sums.1.iter_mut().zip(&mut *lambda) {
                let after = *lambda;
                *lambda += *owed;
                *owed = after;
            }
            if call.is_cut(part.j) {
                lambda.fill(0.0);
            }
        });
    }

    /// Everything else, of every piece alone.
    fn gradients(&mut self, run: (usize, &Range<usize>)) {
        let Self { call, work, tiles, tails, .. } = self;
        work.each(call, run, |part| {
            let (piece, found) = ((&part.piece, part.kv_head), (&*part.m, &*part.z));
            let written = Written { lambda: (part.sums.0, part.sums.1), found };
            let written = part.piece.full.then_some(written);
            let mut open = match part.piece.cached {
                0 => OpenMut { k: &mut [], k_rotated: None, v: &mut [] },
                // SAFETY: only the first piece has tokens of earlier calls.
                _ => unsafe { call.heads.head(part.piece.seq.slot, part.kv_head) }.open,
            };
            part.d_gates.fill(0.0);
            tiles.with(|(x, tiles)| {
                call.gather(piece, &mut x.segment);
                call.queries(piece, &mut x.segment, found, None, part.d_gates, tiles);
                call.keys(piece, written, (&mut open, &tails[part.kv_head]), None, x);
            });
        });
    }
}
