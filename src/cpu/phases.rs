//! Prefill, phase by phase: for a run of segments, column sums and B of all segments in parallel; z
//! by a prefix sum; G of all segments in parallel; M segment by segment, one small product each;
//! then the attention of all segments in parallel, each reading the M and z it found. A run is long
//! enough to keep the cores busy and short enough for its inputs to stay in cache.

use rayon::prelude::*;

use super::attention::{Scratch as TileScratch, Segment, TILE_ROWS};
use super::call::Call;
use super::pack::{Packed, PieceTokens};
use super::pool::Pool;
use super::segment;
use super::segment::{Scratch as SegmentScratch, advance_memory, transits};
use crate::call::form::{Piece, Sequence, pieces};
use crate::dtype::Element;
use crate::memory::State;
use crate::problem::{Problem, Update};

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
    fn new(p: &Problem) -> Self {
        let (dk, dv) = (p.key_dim(), p.value_dim());
        Self { m: dk * dv, z: dk, g: if p.update() == Update::Delta { dk * dk } else { 0 } }
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

pub(super) fn run<T: Element>(call: &Call<'_, T>, sequences: &[Sequence], state: &mut State) {
    let p = &call.problem;
    let record = Record::new(p);
    let wanted = (8 * rayon::current_num_threads()).div_ceil(p.kv_heads());
    let fits = WORKSPACE_BYTES / (4 * record.len() * p.kv_heads());
    let per_run = wanted.min(fits).max(1);
    let counters = state.counters.clone();
    let mut all = sequences.iter().flat_map(|s| pieces(p, *s, counters[s.slot]));
    let mut runner = Runner {
        call,
        record,
        work: Vec::new(),
        index: Vec::new(),
        segments: Pool::default(),
        tiles: Pool::default(),
    };
    loop {
        let run: Vec<Piece> = all.by_ref().take(per_run).collect();
        if run.is_empty() {
            return;
        }
        runner.run(&run, state);
    }
}

struct Runner<'c, 'a, T> {
    call: &'c Call<'a, T>,
    record: Record,
    /// Records: chain by chain, KV head by KV head, piece by piece.
    work: Vec<f32>,
    /// (piece, KV head) of every record.
    index: Vec<(usize, usize)>,
    segments: Pool<SegmentScratch>,
    tiles: Pool<(TileScratch, Packed)>,
}

impl<T: Element> Runner<'_, '_, T> {
    fn run(&mut self, run: &[Piece], state: &mut State) {
        let chains = chains(run);
        let heads = 0..self.call.problem.kv_heads();
        self.index.clear();
        for chain in &chains {
            let pieces = &chain.pieces;
            self.index.extend(heads.clone().flat_map(|h| pieces.clone().map(move |i| (i, h))));
        }
        self.work.resize(self.index.len() * self.record.len(), 0.0);
        self.sums(run, state);
        self.scan_z(&chains, run, state);
        if self.call.problem.update() == Update::Delta {
            self.transitions(run, state);
        }
        self.scan_m(&chains, run, state);
        self.attention(run, state);
        self.append(run, state);
    }

    /// B and Δz of every completed segment.
    fn sums(&mut self, run: &[Piece], state: &State) {
        self.each_segment(run, state, |p, tokens, (m, z, _), x| segment::sums(p, tokens, m, z, x));
    }

    /// G of every completed segment, by the z it finds.
    fn transitions(&mut self, run: &[Piece], state: &State) {
        self.each_segment(run, state, |p, tokens, (_, z, g), x| {
            if transits(p, &tokens.piece) {
                segment::transition(p, tokens, z, g, x);
            }
        });
    }

    /// Runs `work` on the record of every completed segment, in parallel.
    fn each_segment<F>(&mut self, run: &[Piece], state: &State, work: F)
    where
        F: Fn(&Problem, &PieceTokens<'_, '_, T>, RecordMut<'_>, &mut SegmentScratch) + Sync,
    {
        let (call, record, segments) = (self.call, self.record, &self.segments);
        let records = self.work.par_chunks_exact_mut(record.len()).zip(&self.index);
        records.filter(|(_, (i, _))| run[*i].full).for_each(|(chunk, &(i, h))| {
            let open = state.open(run[i].seq.slot, h);
            let tokens = PieceTokens { call, piece: run[i], kv_head: h, open };
            segments.with(
                || SegmentScratch::new(&call.problem),
                |x| work(&call.problem, &tokens, record.split(chunk), x),
            );
        });
    }

    /// Every record's Δz becomes the z its segment finds; the state's z moves past the run.
    fn scan_z(&mut self, chains: &[Chain], run: &[Piece], state: &mut State) {
        let record = self.record;
        self.each_chain(chains, state, |pieces, work, _, z| {
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
    fn scan_m(&mut self, chains: &[Chain], run: &[Piece], state: &mut State) {
        let (record, p) = (self.record, self.call.problem);
        self.each_chain(chains, state, |pieces, work, m, _| {
            for (chunk, piece) in work.chunks_exact_mut(record.len()).zip(&run[pieces]) {
                let (b, _, g) = record.split(chunk);
                if !piece.full {
                    b.copy_from_slice(m);
                    continue;
                }
                advance_memory(&p, piece, b, g, m);
            }
        });
    }

    /// Tokens after the last full segment go into the open segment; the counters move.
    fn append(&self, run: &[Piece], state: &mut State) {
        let call = self.call;
        let kv_heads = call.problem.kv_heads();
        for piece in run {
            state.counters[piece.seq.slot].advance(piece, call.batch.rope.is_some());
        }
        let mut heads = state.heads_mut();
        let tasks: Vec<_> = (run.iter().filter(|piece| !piece.full))
            .flat_map(|piece| (0..kv_heads).map(move |h| (piece, h)))
            .filter_map(|(piece, h)| Some((piece, h, heads[piece.seq.slot * kv_heads + h].take()?)))
            .collect();
        tasks.into_par_iter().for_each(|(piece, h, mut head)| call.append(piece, h, &mut head));
    }

    /// Runs `scan(pieces, records, M, z)` for every (chain, KV head), in parallel.
    fn each_chain<F>(&mut self, chains: &[Chain], state: &mut State, scan: F)
    where
        F: Fn(std::ops::Range<usize>, &mut [f32], &mut [f32], &mut [f32]) + Sync,
    {
        let kv_heads = self.call.problem.kv_heads();
        let mut heads = state.heads_mut();
        let mut rest = self.work.as_mut_slice();
        let mut tasks = Vec::with_capacity(chains.len() * kv_heads);
        for chain in chains {
            for h in 0..kv_heads {
                let (work, tail) = rest.split_at_mut(chain.pieces.len() * self.record.len());
                rest = tail;
                if let Some(head) = heads[chain.slot * kv_heads + h].take() {
                    tasks.push((chain.pieces.clone(), work, head));
                }
            }
        }
        tasks.into_par_iter().for_each(|(pieces, work, head)| scan(pieces, work, head.m, head.z));
    }

    /// Attention of every piece. A task packs the keys its query rows may see, so a piece is cut
    /// only as far as the cores need it.
    fn attention(&self, run: &[Piece], state: &State) {
        let call = self.call;
        let cuts = (4 * rayon::current_num_threads()).div_ceil(self.index.len());
        let tasks: Vec<_> = (self.work.chunks_exact(self.record.len()).zip(&self.index))
            .flat_map(|(record, &(i, h))| {
                let piece = run[i];
                let step = piece.len.div_ceil(cuts).next_multiple_of(TILE_ROWS);
                let end = piece.start + piece.len;
                let starts = (piece.start..end).step_by(step);
                starts.map(move |t| (piece, h, t..(t + step).min(end), record))
            })
            .collect();
        tasks.into_par_iter().for_each(|(piece, h, tokens, record)| {
            self.tiles.with(
                || (TileScratch::new(call), Packed::new()),
                |(x, packed)| {
                    let (m, z) =
                        (&record[..self.record.m], &record[self.record.m..][..self.record.z]);
                    let open = state.open(piece.seq.slot, h);
                    let seen = piece.cached + tokens.end - piece.start;
                    if call.needs_local(&piece, h) {
                        call.pack(&piece, h, open, seen, packed);
                    }
                    let segment = Segment { keys: &packed.local, values: &packed.values, m, z };
                    call.attend(&piece, h, tokens, segment, x);
                },
            );
        });
    }
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
