//! Prefill, phase by phase: for a run of segments, column sums and B of all segments in parallel; z
//! by a prefix sum; G of all segments in parallel; M segment by segment, one small product each;
//! then the attention of all segments in parallel, each reading the M and z it found. A run is long
//! enough to keep the cores busy and short enough for its inputs to stay in cache.

use rayon::prelude::*;

use super::attention::{Scratch as TileScratch, Segment, TILE_ROWS};
use super::call::{Call, Extent};
use super::pack::{Packed, PieceTokens};
use super::pool::Pool;
use super::segment;
use super::segment::{Scratch as SegmentScratch, advance_memory, transits};
use crate::alloc;
use crate::call::form::{Piece, Sequence, pieces};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::State;
use crate::memory::heads::{Heads, Shared};
use crate::problem::{Problem, Update};

/// What it is called in errors.
const WORKSPACE: &str = "the workspace of a prefill";

/// Most workspace of a run.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Consecutive pieces of one sequence within a run.
struct Chain {
    slot: usize,
    pieces: std::ops::Range<usize>,
}

/// One record per (piece, KV head): B, later the M the piece found; the z it found; under the delta
/// rule G.
#[derive(Clone, Copy)]
struct Record {
    m: usize,
    z: usize,
    g: usize,
}

type RecordMut<'a> = (&'a mut [f32], &'a mut [f32], &'a mut [f32]);

impl Record {
    fn new(p: &Problem, transits: bool) -> Self {
        let (dk, dv) = (p.key_dim(), p.value_dim());
        Self { m: dk * dv, z: dk, g: if transits { dk * dk } else { 0 } }
    }

    fn len(&self) -> usize {
        self.m + self.z + self.g
    }

    /// (m, z, g) of a record.
    fn split<'a>(&self, record: &'a mut [f32]) -> RecordMut<'a> {
        let (m, rest) = record.split_at_mut(self.m);
        let (z, g) = rest.split_at_mut(self.z);
        (m, z, g)
    }
}

pub(super) fn run<T: Element>(
    call: &Call<'_, T>,
    sequences: &[Sequence],
    state: &mut State,
) -> Result<()> {
    let p = &call.problem;
    let extent = Extent::of(p, sequences, &state.counters);
    let record = Record::new(p, extent.transits);
    let wanted = (8 * rayon::current_num_threads()).div_ceil(p.kv_heads());
    let record_bytes = record.len().saturating_mul(4 * p.kv_heads());
    let per_run = wanted.min(WORKSPACE_BYTES / record_bytes).max(1);
    let (counters, heads) = state.split()?;
    let at_start = sequences.iter().map(|s| (*s, counters[s.slot]));
    let at_start = alloc::collected(at_start, WORKSPACE)?;
    let all = || at_start.iter().flat_map(|(seq, counters)| pieces(p, *seq, *counters));
    // No later run is longer than the first.
    let mut runner = Runner::new(call, record, extent, &heads, all().take(per_run).count())?;
    let mut rest = all();
    loop {
        let run: Vec<Piece> = rest.by_ref().take(per_run).collect();
        if run.is_empty() {
            return Ok(());
        }
        runner.run(&run)?;
        for piece in run {
            counters[piece.seq.slot].advance(&piece, call.batch.rope.is_some());
        }
    }
}

struct Runner<'c, 'a, T> {
    call: &'c Call<'a, T>,
    record: Record,
    heads: &'c Heads<'c>,
    /// Records: chain by chain, KV head by KV head, piece by piece.
    work: Vec<f32>,
    /// (piece, KV head) of every record.
    index: Vec<(usize, usize)>,
    segments: Pool<SegmentScratch>,
    tiles: Pool<(TileScratch, Packed)>,
}

impl<'c, 'a, T: Element> Runner<'c, 'a, T> {
    /// Room for runs of `pieces` pieces.
    fn new(
        call: &'c Call<'a, T>,
        record: Record,
        extent: Extent,
        heads: &'c Heads<'c>,
        pieces: usize,
    ) -> Result<Self> {
        let (p, what) = (&call.problem, WORKSPACE);
        let records = pieces * p.kv_heads();
        let segments = if extent.completes { records } else { 0 };
        Ok(Self {
            call,
            record,
            heads,
            work: alloc::reserved(&[records, record.len()], what)?,
            index: alloc::reserved(&[records], what)?,
            segments: Pool::new(segments, || SegmentScratch::new(p))?,
            tiles: Pool::new(records * cuts(records), || {
                Ok((TileScratch::new(call)?, Packed::new(call, extent.longest)?))
            })?,
        })
    }

    fn run(&mut self, run: &[Piece]) -> Result<()> {
        let chains = chains(run);
        let heads = 0..self.call.problem.kv_heads();
        self.index.clear();
        for chain in &chains {
            let pieces = &chain.pieces;
            self.index.extend(heads.clone().flat_map(|h| pieces.clone().map(move |i| (i, h))));
        }
        self.work.resize(self.index.len() * self.record.len(), 0.0);
        self.sums(run);
        self.call.cancel.go_on(0)?;
        self.scan_z(&chains, run);
        if self.call.problem.update() == Update::Delta {
            self.transitions(run);
        }
        self.scan_m(&chains, run);
        self.append(run, Piece::continues);
        self.attention(run);
        let result = self.call.cancel.go_on(0);
        match &result {
            Ok(()) => self.append(run, |piece| !piece.continues()),
            Err(_) => self.restore(&chains),
        }
        result
    }

    /// B and Δz of every completed segment.
    fn sums(&mut self, run: &[Piece]) {
        self.each_segment(run, |p, tokens, (m, z, _), x| segment::sums(p, tokens, m, z, x));
    }

    /// G of every completed segment, by the z it finds.
    fn transitions(&mut self, run: &[Piece]) {
        self.each_segment(run, |p, tokens, (_, z, g), x| {
            if transits(p, &tokens.piece) {
                segment::transition(p, tokens, z, g, x);
            }
        });
    }

    /// Runs `work` on the record of every completed segment, in parallel.
    fn each_segment<F>(&mut self, run: &[Piece], work: F)
    where
        F: Fn(&Problem, &PieceTokens<'_, '_, T>, RecordMut<'_>, &mut SegmentScratch) + Sync,
    {
        let (call, record, heads, segments) = (self.call, self.record, self.heads, &self.segments);
        let records = self.work.par_chunks_exact_mut(record.len()).zip(&self.index);
        records.filter(|(_, (i, _))| run[*i].full).for_each(|(chunk, &(i, h))| {
            // SAFETY: only records are written meanwhile.
            let open = unsafe { heads.open.read(run[i].seq.slot, h) };
            let tokens = call.tokens(run[i], h, open);
            segments.with(|x| work(&call.problem, &tokens, record.split(chunk), x));
        });
    }

    /// Every record's Δz becomes the z its segment finds; the state's z moves past the run.
    fn scan_z(&mut self, chains: &[Chain], run: &[Piece]) {
        let record = self.record;
        self.each_chain(chains, |_, pieces, work, _, z| {
            for (chunk, piece) in work.chunks_exact_mut(record.len()).zip(&run[pieces]) {
                let (_, own, _) = record.split(chunk);
                for (own, z) in own.iter_mut().zip(z.iter_mut()) {
                    let sum = if piece.full { *own } else { 0.0 };
                    *own = *z;
                    *z += sum;
                }
            }
        });
    }

    /// Every record's B becomes the M its segment finds; the state's M moves past the run.
    fn scan_m(&mut self, chains: &[Chain], run: &[Piece]) {
        let (record, call) = (self.record, self.call);
        let p = call.problem;
        self.each_chain(chains, |h, pieces, work, m, _| {
            for (chunk, piece) in work.chunks_exact_mut(record.len()).zip(&run[pieces]) {
                let (b, z, g) = record.split(chunk);
                // SAFETY: one task walks through the pieces of a sequence and KV head.
                unsafe { call.note(piece, h, m, z) };
                if !piece.full {
                    b.copy_from_slice(m);
                    continue;
                }
                advance_memory(&p, piece, b, g, m);
            }
        });
    }

    /// Runs `scan(KV head, pieces, records, M, z)` for every (chain, KV head), in parallel.
    fn each_chain<F>(&mut self, chains: &[Chain], scan: F)
    where
        F: Fn(usize, std::ops::Range<usize>, &mut [f32], &mut [f32], &mut [f32]) + Sync,
    {
        let (heads, record, kv_heads) = (self.heads, self.record, self.call.problem.kv_heads());
        let work = Shared::new(&mut self.work);
        (0..chains.len() * kv_heads).into_par_iter().for_each(|i| {
            let (chain, h) = (&chains[i / kv_heads], i % kv_heads);
            let pieces = chain.pieces.clone();
            let first = pieces.start * kv_heads + h * pieces.len();
            // SAFETY: chains have records and slots of their own, and KV heads theirs of those.
            let (records, head) = unsafe {
                let records = first * record.len()..(first + pieces.len()) * record.len();
                (work.range(records), heads.head(chain.slot, h))
            };
            scan(h, pieces, records, head.m, head.z);
        });
    }

    /// Attention of every piece. A task packs the keys its query rows may see, so a piece is cut
    /// only as far as the cores need it.
    fn attention(&self, run: &[Piece]) {
        let cuts = cuts(self.index.len());
        (0..self.index.len() * cuts).into_par_iter().for_each(|task| {
            let (i, h) = self.index[task / cuts];
            let piece = &run[i];
            let step = piece.len.div_ceil(cuts).next_multiple_of(TILE_ROWS);
            let (start, end) = (task % cuts * step, piece.len);
            if start < end {
                let tokens = piece.start + start..piece.start + end.min(start + step);
                self.attend(piece, h, tokens, task / cuts);
            }
        });
    }

    /// Attention of some tokens of a piece, whose record says what M and z it finds.
    fn attend(&self, piece: &Piece, h: usize, tokens: std::ops::Range<usize>, record: usize) {
        let (call, len) = (self.call, self.record.len());
        let (m, rest) = self.work[record * len..][..len].split_at(self.record.m);
        let z = &rest[..self.record.z];
        // SAFETY: only outputs are written meanwhile.
        let open = unsafe { self.heads.open.read(piece.seq.slot, h) };
        self.tiles.with(|(x, packed)| {
            if piece.continues() {
                return call.attend(piece, h, tokens, call.open_segment(open, m, z), x);
            }
            let seen = piece.cached + tokens.end - piece.start;
            if call.needs_local(piece, h) {
                call.pack(piece, h, open, seen, packed);
            }
            let segment = Segment { keys: &packed.local, values: &packed.values, m, z };
            call.attend(piece, h, tokens, segment, x);
        });
    }

    /// Tokens after the last full segment go into the open segment, of such pieces.
    fn append(&self, run: &[Piece], of: impl Fn(&Piece) -> bool) {
        let tails = run.iter().filter(|piece| !piece.full && of(piece));
        let tails: Vec<Piece> = tails.copied().collect();
        self.call.append_tails(&self.heads.open, &tails, |append| {
            self.tiles.with(|(_, x)| append(&mut x.append));
        });
    }

    /// Puts back what a run found that was cancelled: it stands in the first records of its chains.
    fn restore(&mut self, chains: &[Chain]) {
        let record = self.record;
        self.each_chain(chains, |_, _, work, m, z| {
            let (m_found, z_found, _) = record.split(&mut work[..record.len()]);
            m.copy_from_slice(m_found);
            z.copy_from_slice(z_found);
        });
    }
}

/// Into how many tasks the attention of each of so many records is cut.
fn cuts(records: usize) -> usize {
    (4 * rayon::current_num_threads()).div_ceil(records.max(1))
}

/// Groups the pieces of a run by sequence.
fn chains(run: &[Piece]) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    for (i, piece) in run.iter().enumerate() {
        match chains.last_mut() {
            Some(chain) if chain.slot == piece.seq.slot => chain.pieces.end = i + 1,
            _ => chains.push(Chain { slot: piece.seq.slot, pieces: i..i + 1 }),
        }
    }
    chains
}
