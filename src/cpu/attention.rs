//! One tile of query rows against one segment: blockwise causal softmax, retrieval, gate.
//!
//! A tile is up to [`TILE_ROWS`] rows of one KV head: some tokens of one or more of its query
//! heads. Scores of one key block [rows, 256], the output and the retrieval [rows, Dv] stay in L2.

use std::f32::consts::LN_2;
use std::f64::consts::LOG2_E;
use std::ops::Range;

use super::call::{Call, weights_of};
use super::matmul::{Into, Mat, matmul, matmul_scaled};
use super::segment::SCRATCH;
use super::simd;
use super::simd::Running;
use super::weights;
use crate::alloc;
use crate::call::form::{Piece, Sequence};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::heads::OpenRef;

/// Rows per tile: a multiple of the `gemm` crate's 6-row micro-kernel; see docs/cpu.md.
pub(crate) const TILE_ROWS: usize = 48;

/// What a tile reads besides its queries.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    /// Local keys in [`crate::memory::blocks::KeyBlocks`] layout.
    pub keys: &'a [f32],
    /// Values, [tokens, Dv].
    pub values: &'a [f32],
    /// M and z before the segment.
    pub m: &'a [f32],
    pub z: &'a [f32],
}

/// Buffers of one running task.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Queries as given, later their retrieval weights, [rows, Dk].
    q: Vec<f32>,
    /// Queries of the local branch, rotated and scaled, [rows, Dk].
    q_local: Vec<f32>,
    /// Scores of one key block.
    s: Vec<f32>,
    /// Local branch, [rows, Dv].
    o: Vec<f32>,
    /// Memory branch, [rows, Dv].
    mem: Vec<f32>,
    running: Vec<Running>,
    /// Keys each row may still see, from the current block on.
    visible: Vec<usize>,
}

impl Scratch {
    pub fn new<T>(call: &Call<'_, T>) -> Result<Self> {
        let mut scratch = Self::default();
        scratch.fit(call)?;
        Ok(scratch)
    }

    /// Makes room for the tiles of another call.
    pub fn fit<T>(&mut self, call: &Call<'_, T>) -> Result<()> {
        alloc::room(&mut self.running, &[TILE_ROWS], SCRATCH)?;
        alloc::room(&mut self.visible, &[TILE_ROWS], SCRATCH)?;
        let mut buffers = self.buffers(call).into_iter();
        buffers.try_for_each(|(x, width)| alloc::room(x, &[TILE_ROWS, width], SCRATCH))
    }

    /// Lengthens everything into its room; the task does that, not who made the scratch.
    fn lengthen<T>(&mut self, call: &Call<'_, T>) {
        for (x, width) in self.buffers(call) {
            x.resize(TILE_ROWS * width, 0.0);
        }
    }

    /// Buffers of rows, and the widths of those.
    fn buffers<T>(&mut self, call: &Call<'_, T>) -> [(&mut Vec<f32>, usize); 5] {
        let (dk, dv) = (call.problem.key_dim(), call.problem.value_dim());
        let Self { q, q_local, s, o, mem, .. } = self;
        [(q, dk), (q_local, dk), (s, call.blocks.width), (o, dv), (mem, dv)]
    }

    pub fn bytes(&self) -> usize {
        alloc::bytes(&[&self.q, &self.q_local, &self.s, &self.o, &self.mem])
    }
}

/// Rows (head − heads.start) · tokens.len() + (token − tokens.start).
#[derive(Clone, Debug)]
struct Tile {
    heads: Range<usize>,
    /// Counted within the sequence's call.
    tokens: Range<usize>,
}

impl Tile {
    fn rows(&self) -> usize {
        self.heads.len() * self.tokens.len()
    }

    /// (row, token, head) of every row, in order.
    fn each(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let tokens = self.tokens.clone();
        (self.heads.clone().flat_map(move |h| tokens.clone().map(move |t| (t, h))))
            .enumerate()
            .map(|(row, (t, h))| (row, t, h))
    }
}

impl<T: Element> Call<'_, T> {
    /// Gate weights of a head while reading a memory that may be empty.
    fn weights(&self, head: usize, empty: bool) -> [f32; 2] {
        weights_of(&self.problem, self.gates, head, empty)
    }

    /// Query heads of a KV head.
    fn group(&self, kv_head: usize) -> Range<usize> {
        let g = self.problem.group();
        kv_head * g..(kv_head + 1) * g
    }

    /// Whether any query head of a KV head needs the local branch in this piece.
    pub fn needs_local(&self, piece: &Piece, kv_head: usize) -> bool {
        self.outputs.lse.is_some()
            || self.outputs.a_dot.is_some()
            || self.group(kv_head).any(|h| self.weights(h, piece.empty)[1] != 0.0)
    }

    /// An open segment where it lies, and the memory before it.
    pub fn open_segment<'s>(&self, open: OpenRef<'s>, m: &'s [f32], z: &'s [f32]) -> Segment<'s> {
        Segment { keys: open.local(self.batch.rope.is_some()), values: open.v, m, z }
    }

    /// All query rows of one KV head whose tokens lie in `tokens`.
    pub fn attend(
        &self,
        piece: &Piece,
        kv_head: usize,
        tokens: Range<usize>,
        segment: Segment<'_>,
        scratch: &mut Scratch,
    ) {
        scratch.lengthen(self);
        // From the piece, not the range: how a piece is cut among threads must not change its tiles.
        let span = piece.len.clamp(1, TILE_ROWS);
        let heads = (TILE_ROWS / span).max(1);
        for first in self.group(kv_head).step_by(heads) {
            let heads = first..(first + heads).min(self.group(kv_head).end);
            for start in tokens.clone().step_by(span) {
                let tokens = start..(start + span).min(tokens.end);
                self.attend_tile(piece, &Tile { heads: heads.clone(), tokens }, segment, scratch);
            }
        }
    }

    fn attend_tile(&self, piece: &Piece, tile: &Tile, segment: Segment<'_>, x: &mut Scratch) {
        if self.cancel.abandons() {
            return;
        }
        let weights = |h| self.weights(h, piece.empty);
        let any = |i: usize| tile.heads.clone().any(|h| weights(h)[i] != 0.0);
        let retrieve = !piece.empty && (any(0) || self.outputs.a_mem.is_some());
        let local = any(1) || self.outputs.lse.is_some() || self.outputs.a_dot.is_some();
        x.running.clear();
        x.running.resize(tile.rows(), Running::START);
        self.load_queries(piece, tile, x);
        if local {
            self.local_queries(piece, tile, x);
            self.local(piece, tile, segment, x);
        }
        if retrieve {
            self.retrieve(tile.rows(), segment, x);
        } else {
            x.mem.fill(0.0);
        }
        self.write(piece, tile, x);
    }

    fn load_queries(&self, piece: &Piece, tile: &Tile, x: &mut Scratch) {
        let dk = self.problem.key_dim();
        for ((_, t, h), q) in tile.each().zip(x.q.chunks_exact_mut(dk)) {
            // SAFETY: token and head lie inside the sequence `resolve` accepted.
            T::widen(unsafe { self.inputs.q.row(piece.seq.batch, piece.seq.first + t, h) }, q);
        }
    }

    /// Queries of the local branch: rotated, scaled so that a score is a logarithm to base 2.
    fn local_queries(&self, piece: &Piece, tile: &Tile, x: &mut Scratch) {
        let dk = self.problem.key_dim();
        let (q, local) = (&x.q[..tile.rows() * dk], &mut x.q_local[..tile.rows() * dk]);
        simd::scaled(q, (self.problem.scale() * LOG2_E) as f32, local);
        if let Some(rope) = &self.batch.rope {
            for ((_, t, _), q) in tile.each().zip(local.chunks_exact_mut(dk)) {
                rope.rotate(q, self.batch.position(&piece.seq, t));
            }
        }
    }

    /// o ← Σ 2^(q·k − max) v over the keys each row may see, statistics in `running`.
    fn local(&self, piece: &Piece, tile: &Tile, segment: Segment<'_>, x: &mut Scratch) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        let (rows, width) = (tile.rows(), self.blocks.width);
        // Row i sees the keys up to and including its own token's.
        let seen = |token: usize| piece.cached + token - piece.start + 1;
        x.visible.clear();
        x.visible.extend(tile.each().map(|(_, t, _)| seen(t)));
        let keys = seen(tile.tokens.end - 1);
        for (b, first) in (0..keys).step_by(width).enumerate() {
            if self.cancel.abandons() {
                return;
            }
            let here = width.min(keys - first);
            // Scores in whole vectors: `gemm` would pack the keys otherwise.
            let n = here.next_multiple_of(simd::LANES).min(width);
            let s = &mut x.s[..rows * n];
            let q = Mat::rows(&x.q_local, rows, dk, dk);
            let k = Mat::rows(self.blocks.block(segment.keys, b), dk, n, width);
            matmul(s, Into::Store, q, k);
            let o = &mut x.o[..rows * dv];
            simd::softmax_block(s, n, &x.visible, &mut x.running, o, dv);
            x.visible.iter_mut().for_each(|keys| *keys = keys.saturating_sub(here));
            let v = Mat::rows(&segment.values[first * dv..], here, dv, dv);
            let mode = if b == 0 { Into::Store } else { Into::Add };
            matmul(o, mode, Mat::rows(s, rows, here, n), v);
        }
    }

    /// mem ← σ(q) M / σ(q)·z; turns `q` into its retrieval weights.
    fn retrieve(&self, rows: usize, segment: Segment<'_>, x: &mut Scratch) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        let q = &mut x.q[..rows * dk];
        let unit = weights::retrieval_weights(q, segment.z, self.problem.denominator());
        let (q, m) = (Mat::rows(q, rows, dk, dk), Mat::rows(segment.m, dk, dv, dv));
        matmul_scaled(&mut x.mem[..rows * dv], Into::Store, unit, q, m);
    }

    /// Normalises, gates and writes the rows of a tile.
    fn write(&self, piece: &Piece, tile: &Tile, x: &mut Scratch) {
        let dv = self.problem.value_dim();
        let rows = x.o.chunks_exact_mut(dv).zip(x.mem.chunks_exact(dv));
        for ((row, t, h), (o, mem)) in tile.each().zip(rows) {
            let (b, token) = (piece.seq.batch, piece.seq.first + t);
            let (out, run) = (&self.outputs, x.running[row]);
            // A row sees at least its own key: a sum of 0 is of scores that are −∞, and gives NaN.
            let mut normalise = 1.0 / run.sum;
            // SAFETY: inside the shapes `check_outputs` compared; every (sequence, token, head) is
            // written by exactly one task.
            unsafe {
                if let Some(lse) = &out.lse {
                    let sum = if run.sum == 0.0 { f32::NAN } else { run.sum };
                    lse.part([b, 0, h], token..token + 1)[0] = run.max * LN_2 + sum.ln();
                }
                if let Some(a_dot) = &out.a_dot {
                    simd::scale(o, std::mem::replace(&mut normalise, 1.0));
                    T::narrow(o, a_dot.row(b, token, h));
                }
                if let Some(a_mem) = &out.a_mem {
                    T::narrow(mem, a_mem.row(b, token, h));
                }
                let [wm, wd] = self.weights(h, piece.empty);
                simd::blend(o, if wd == 0.0 { 0.0 } else { wd * normalise }, mem, wm);
                T::narrow(o, out.o.row(b, token, h));
            }
        }
    }

    /// Writes zeros (log-sum-exp −∞) to the padded rows of a sequence.
    pub fn clear_padding(&self, seq: &Sequence, tokens: usize) {
        let (out, after) = (&self.outputs, seq.first + seq.len);
        let heads = 0..self.problem.heads();
        for (h, padding) in heads.flat_map(|h| [(h, 0..seq.first), (h, after..tokens)]) {
            // SAFETY: as in `write`; padded rows belong to no task.
            unsafe {
                if let Some(lse) = &out.lse {
                    lse.part([seq.batch, 0, h], padding.clone()).fill(f32::NEG_INFINITY);
                }
                for t in padding {
                    let rows = [Some(&out.o), out.a_dot.as_ref(), out.a_mem.as_ref()];
                    for rows in rows.into_iter().flatten() {
                        rows.row(seq.batch, t, h).fill(bytemuck::Zeroable::zeroed());
                    }
                }
            }
        }
    }
}
