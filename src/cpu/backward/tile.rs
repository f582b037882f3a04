//! One tile of query rows against one segment: the local branch by recomputed weights, and the retrieval.
//!
//! With G = dL/do and g the gate the local branch gets (1 − g) G, whose products with V are dL/dP. Scores stand
//! transposed, [keys, rows], so that statistics of rows are vectors beside every key and both products that
//! sum over rows read them in order. A_mem, which gets g G, is never formed: with w the retrieval weights
//! c = g G·A_mem = w·(g G Mᵀ), and g G Mᵀ is what dL/dσ(q) needs. Nothing divides by g or 1 − g.

use std::ops::Range;

use super::Backward;
use super::elementwise::{add, query_rows, row_dots, scores, transpose};
use super::segment::Segment;
use crate::alloc;
use crate::call::form::Piece;
use crate::cpu::matmul::{Into, Mat, matmul, matmul_scaled};
use crate::cpu::segment::SCRATCH;
use crate::cpu::simd;
use crate::cpu::weights;
use crate::dtype::{DType, Element};
use crate::error::Result;
use crate::problem::Problem;
use crate::tensor::Rows;

/// Query rows per tile, and keys per block of it (docs/gradients.md).
const TILE_ROWS: usize = 64;
const BLOCK_KEYS: usize = 192;

/// Buffers of one running task.
#[derive(Default)]
pub(super) struct Scratch {
    /// Queries as given, [rows, Dk]; their retrieval weights.
    q: Vec<f32>,
    w: Vec<f32>,
    /// Queries of the local branch, rotated and scaled, and their transpose.
    q_local: Vec<f32>,
    q_local_t: Vec<f32>,
    /// dL/do, [rows, Dv].
    g: Vec<f32>,
    /// Rows of another output, or the gradient that A_mem gets; [rows, Dv].
    other: Vec<f32>,
    /// The gradient that the local branch gets, [rows, Dv], and its transpose.
    local: Vec<f32>,
    local_t: Vec<f32>,
    /// The gradient that A_mem gets, times Mᵀ; then the memory branch's dL/dq, [rows, Dk].
    p: Vec<f32>,
    /// The local branch's dL/dq.
    dq: Vec<f32>,
    /// A block of scores and their gradients, [keys, rows].
    s: Vec<f32>,
    ds: Vec<f32>,
    denominators: Vec<[f32; 2]>,
    /// What nobody asks for, `[Dk]`.
    ignored: Vec<f32>,
    /// By row: g G·A_mem, (1 − g) G·A_dot, what belongs to all gradients, and what dL/ds subtracts.
    c: Vec<f32>,
    sums: Vec<f32>,
    total: Vec<f32>,
    delta: Vec<f32>,
    lse: Vec<f32>,
}

impl Scratch {
    pub fn new(p: &Problem) -> Result<Self> {
        let mut scratch = Self::default();
        let keys = BLOCK_KEYS.min(p.segment_len());
        let rows = TILE_ROWS.min(p.segment_len());
        alloc::room(&mut scratch.denominators, &[rows], SCRATCH)?;
        scratch.ignored = alloc::zeroed(&[p.key_dim()], SCRATCH)?;
        for (x, width) in scratch.buffers(p) {
            alloc::room(x, &[rows, width], SCRATCH)?;
        }
        for x in [&mut scratch.s, &mut scratch.ds] {
            alloc::room(x, &[rows, keys], SCRATCH)?;
        }
        Ok(scratch)
    }

    /// Buffers of rows, and the widths of those.
    fn buffers(&mut self, p: &Problem) -> [(&mut Vec<f32>, usize); 15] {
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let Self { q, w, q_local, q_local_t, g, other, local, local_t, .. } = self;
        let Self { p, dq, c, sums, total, delta, lse, .. } = self;
        [
            (q, dk),
            (w, dk),
            (q_local, dk),
            (q_local_t, dk),
            (p, dk),
            (dq, dk),
            (g, dv),
            (other, dv),
            (local, dv),
            (local_t, dv),
            (c, 1),
            (sums, 1),
            (total, 1),
            (delta, 1),
            (lse, 1),
        ]
    }

    /// Lengthens everything for so many rows.
    fn lengthen(&mut self, p: &Problem, rows: usize) {
        let keys = BLOCK_KEYS.min(p.segment_len());
        for (x, width) in self.buffers(p) {
            x.resize(rows * width, 0.0);
        }
        self.s.resize(rows * keys, 0.0);
        self.ds.resize(rows * keys, 0.0);
        self.denominators.resize(rows, [0.0; 2]);
    }
}

/// Query rows of one head, `tokens` counted within the sequence's call.
struct Tile<'p> {
    piece: &'p Piece,
    head: usize,
    tokens: Range<usize>,
}

impl Tile<'_> {
    fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Keys of the segment before the tile's own tokens.
    fn seen(&self) -> usize {
        self.piece.cached + self.tokens.start - self.piece.start
    }

    /// How many rows on rows begin to see the keys from `first` on.
    fn offset(&self, first: usize) -> isize {
        first as isize - self.seen() as isize
    }

    /// (batch, token, head) of every row, in the tensors' dimensions.
    fn each(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let seq = &self.piece.seq;
        self.tokens.clone().map(move |t| (seq.batch, seq.first + t, self.head))
    }
}

/// What a memory gets from the queries that read it.
pub(super) struct MemoryGradient<'a> {
    /// Gains Σ wᵀ H: [Dk, Dv].
    pub m: &'a mut [f32],
    /// Gains −Σ w c, `[Dk]`.
    pub z: &'a mut [f32],
}

/// Rows of a tensor shaped like o.
fn load_rows<T: Element>(tile: &Tile<'_>, rows: &Rows<'_, T>, x: &mut [f32]) {
    let width = x.len() / tile.rows();
    for ((b, t, h), row) in tile.each().zip(x.chunks_exact_mut(width)) {
        // SAFETY: token and head lie inside the sequence `resolve` accepted.
        T::widen(unsafe { rows.row(b, t, h) }, row);
    }
}

impl<T: Element> Backward<'_, T> {
    /// The tiles of a piece and KV head, head by head.
    fn tiles<'p>(
        &self,
        piece: &'p Piece,
        kv_head: usize,
    ) -> impl Iterator<Item = Tile<'p>> + use<'p, T> {
        let group = self.problem.group();
        let tokens = piece.start..piece.start + piece.len;
        (kv_head * group..(kv_head + 1) * group).flat_map(move |head| {
            let end = tokens.end;
            let starts = tokens.clone().step_by(TILE_ROWS);
            starts.map(move |t| Tile { piece, head, tokens: t..end.min(t + TILE_ROWS) })
        })
    }

    /// dL/dq of a piece's rows, and what they add to the gradients of keys, values, memory and gate (by
    /// query head of the group).
    pub(super) fn queries(
        &self,
        (piece, kv_head): (&Piece, usize),
        segment: &mut Segment,
        memory: (&[f32], &[f32]),
        mut gradient: Option<MemoryGradient<'_>>,
        gates: &mut [f64],
        x: &mut Scratch,
    ) {
        for tile in self.tiles(piece, kv_head) {
            if self.cancel.abandons() {
                return;
            }
            x.lengthen(&self.problem, tile.rows());
            self.load(&tile, x);
            let [wm, wd] = self.weights(tile.head, piece.empty);
            if self.reads(&tile) {
                self.retrieve(&tile, memory, gradient.as_mut(), x);
            } else {
                x.c.fill(0.0);
                x.p.fill(0.0);
            }
            if self.is_local(&tile) {
                self.local(&tile, segment, x);
            } else {
                x.sums.fill(0.0);
                x.dq.fill(0.0);
            }
            // g (1 − g) G·(A_mem − A_dot), each of both terms with the digits it has.
            if wm != 0.0 && wd != 0.0 {
                let [wm, wd] = [wm, wd].map(f64::from);
                let terms = x.c.iter().zip(&x.sums);
                let terms = terms.map(|(c, sum)| wd * f64::from(*c) - wm * f64::from(*sum));
                gates[tile.head % self.problem.group()] += terms.sum::<f64>();
            }
            self.write(&tile, x);
        }
    }

    /// What the rows of a piece add to the gradient of the memory that they read, alone.
    pub(super) fn reading(
        &self,
        (piece, kv_head): (&Piece, usize),
        memory: (&[f32], &[f32]),
        mut gradient: MemoryGradient<'_>,
        x: &mut Scratch,
    ) {
        for tile in self.tiles(piece, kv_head).filter(|tile| self.reads(tile)) {
            if self.cancel.abandons() {
                return;
            }
            x.lengthen(&self.problem, tile.rows());
            self.load(&tile, x);
            self.retrieve(&tile, memory, Some(&mut gradient), x);
        }
    }

    /// Whether a tile's memory branch has gradients.
    fn reads(&self, tile: &Tile<'_>) -> bool {
        let [wm, _] = self.weights(tile.head, tile.piece.empty);
        !tile.piece.empty && (wm != 0.0 || self.outputs.d_a_mem.is_some())
    }

    /// Whether its local branch has.
    fn is_local(&self, tile: &Tile<'_>) -> bool {
        let [_, wd] = self.weights(tile.head, tile.piece.empty);
        wd != 0.0 || self.outputs.a_dot.is_some() || self.outputs.d_lse.is_some()
    }

    fn load(&self, tile: &Tile<'_>, x: &mut Scratch) {
        load_rows(tile, &self.inputs.q, &mut x.q);
        load_rows(tile, &self.outputs.d_o, &mut x.g);
    }

    /// The memory branch: c, its part of dL/dq in `p`, and `gradient`.
    fn retrieve(
        &self,
        tile: &Tile<'_>,
        (m, z): (&[f32], &[f32]),
        gradient: Option<&mut MemoryGradient<'_>>,
        x: &mut Scratch,
    ) {
        let (rows, dk, dv) = (tile.rows(), self.problem.key_dim(), self.problem.value_dim());
        let [wm, _] = self.weights(tile.head, false);
        x.w.copy_from_slice(&x.q);
        let policy = self.problem.denominator();
        let unit = weights::retrieval_rows(&mut x.w, z, policy, &mut x.denominators);
        let m_t = Mat::rows(m, dk, dv, dv).t();
        let w_t = Mat::rows(&x.w, rows, dk, dk).t();
        let (mut dm, dz) = match gradient {
            Some(gradient) => (Some(&mut *gradient.m), &mut *gradient.z),
            None => (None, &mut x.ignored[..]),
        };
        x.p.fill(0.0);
        x.c.fill(0.0);
        // A branch of weight 0 is absent, whatever the memory holds.
        if wm != 0.0 {
            simd::scaled(&x.g, wm, &mut x.other);
            let h = Mat::rows(&x.other, rows, dv, dv);
            matmul(&mut x.p, Into::Store, h, m_t);
            row_dots(&x.w, &x.p, dk, unit, &mut x.c);
            dm.iter_mut().for_each(|dm| matmul_scaled(dm, Into::Add, unit, w_t, h));
        }
        x.total.copy_from_slice(&x.c);
        if let Some(d_a_mem) = &self.outputs.d_a_mem {
            load_rows(tile, d_a_mem, &mut x.other);
            let h = Mat::rows(&x.other, rows, dv, dv);
            matmul(&mut x.p, Into::Add, h, m_t);
            row_dots(&x.w, &x.p, dk, unit, &mut x.total);
            dm.iter_mut().for_each(|dm| matmul_scaled(dm, Into::Add, unit, w_t, h));
        }
        query_rows(&mut x.p, (&x.q, &x.w), (&x.total, &x.denominators), (z, unit), dz);
    }

    /// The local branch: its part of dL/dq in `dq`, `sums`, and what keys and values get.
    fn local(&self, tile: &Tile<'_>, segment: &mut Segment, x: &mut Scratch) {
        let (rows, dk, dv) = (tile.rows(), self.problem.key_dim(), self.problem.value_dim());
        self.local_queries(tile, x);
        self.local_gradients(tile, x);
        transpose(&x.q_local, rows, &mut x.q_local_t);
        transpose(&x.local, rows, &mut x.local_t);
        let (summed, known) = (self.sums_first(tile), self.outputs.a_dot.is_some());
        let blocks = (0..tile.seen() + rows).step_by(BLOCK_KEYS);
        if summed {
            x.total.fill(0.0);
            for first in blocks.clone() {
                let n = self.products(tile, segment, first, x);
                let (s, ds) = (&mut x.s[..n * rows], &mut x.ds[..n * rows]);
                scores(s, ds, tile.offset(first), &x.lse, &x.delta, &mut x.total);
            }
            add(&mut x.delta, &x.total);
            if !known {
                x.sums.copy_from_slice(&x.total);
            }
        }
        for first in blocks {
            let n = self.products(tile, segment, first, x);
            let (s, ds) = (&mut x.s[..n * rows], &mut x.ds[..n * rows]);
            // What is known need not be summed.
            let sums = if summed || known { &mut x.total } else { &mut x.sums };
            scores(s, ds, tile.offset(first), &x.lse, &x.delta, sums);
            let (s, ds) = (Mat::rows(s, n, rows, rows), Mat::rows(ds, n, rows, rows));
            let k = Mat::rows(&segment.local_keys()[first * dk..], n, dk, dk);
            let mode = if first == 0 { Into::Store } else { Into::Add };
            matmul(&mut x.dq, mode, ds.t(), k);
            let d_values = &mut segment.d_values[first * dv..][..n * dv];
            matmul(d_values, Into::Add, s, Mat::rows(&x.local, rows, dv, dv));
            let d_keys = &mut segment.d_keys[first * dk..][..n * dk];
            matmul(d_keys, Into::Add, ds, Mat::rows(&x.q_local, rows, dk, dk));
        }
    }

    /// The scores of a block of keys, and V times the gradient that the local branch gets; how many keys.
    fn products(&self, tile: &Tile<'_>, segment: &Segment, first: usize, x: &mut Scratch) -> usize {
        let (rows, dk, dv) = (tile.rows(), self.problem.key_dim(), self.problem.value_dim());
        let n = BLOCK_KEYS.min(tile.seen() + rows - first);
        let (k, v) = (&segment.local_keys()[first * dk..], &segment.values[first * dv..]);
        let (k, v) = (Mat::rows(k, n, dk, dk), Mat::rows(v, n, dv, dv));
        let (s, ds) = (&mut x.s[..n * rows], &mut x.ds[..n * rows]);
        matmul(s, Into::Store, k, Mat::rows(&x.q_local_t, dk, rows, rows));
        let [_, wd] = self.weights(tile.head, tile.piece.empty);
        if wd == 0.0 && self.outputs.a_dot.is_none() {
            // A branch of weight 0 is absent, whatever its values are.
            ds.fill(0.0);
        } else {
            matmul(ds, Into::Store, v, Mat::rows(&x.local_t, dv, rows, rows));
        }
        n
    }

    /// Whether what dL/dP·P comes to is summed before it is needed. Otherwise it is made of outputs as they
    /// were rounded: of A_dot; or (1 − g) G·A_dot of A, as G·A − g G·A_mem, which is left with few digits
    /// where 1 − g is small.
    fn sums_first(&self, tile: &Tile<'_>) -> bool {
        let (rounded, [_, wd]) =
            (T::DTYPE != DType::F32, self.weights(tile.head, tile.piece.empty));
        match self.outputs.a_dot {
            Some(_) => rounded,
            None => {
                self.reads(tile) && (0.0..if rounded { 0.25 } else { 1.0 / 64.0 }).contains(&wd)
            }
        }
    }

    /// Queries of the local branch: rotated, scaled.
    fn local_queries(&self, tile: &Tile<'_>, x: &mut Scratch) {
        x.q_local.copy_from_slice(&x.q);
        if let Some(rope) = &self.batch.rope {
            let rows = x.q_local.chunks_exact_mut(self.problem.key_dim());
            for (t, q) in tile.tokens.clone().zip(rows) {
                rope.rotate(q, self.batch.position(&tile.piece.seq, t));
            }
        }
        simd::scale(&mut x.q_local, self.problem.scale() as f32);
    }

    /// What the local branch gets, `local` = (1 − g) G + dL/dA_dot, with its `lse` and `delta` by row.
    fn local_gradients(&self, tile: &Tile<'_>, x: &mut Scratch) {
        let dv = self.problem.value_dim();
        let [_, wd] = self.weights(tile.head, tile.piece.empty);
        x.delta.fill(0.0);
        x.local.fill(0.0);
        x.sums.fill(0.0);
        if wd != 0.0 {
            simd::scaled(&x.g, wd, &mut x.local);
        }
        if let Some([a_dot, d_a_dot]) = &self.outputs.a_dot {
            load_rows(tile, a_dot, &mut x.other);
            if wd != 0.0 {
                row_dots(&x.g, &x.other, dv, wd, &mut x.sums);
            }
            // `local_t` is free until the local gradients are complete.
            load_rows(tile, d_a_dot, &mut x.local_t);
            add(&mut x.local, &x.local_t);
            if !self.sums_first(tile) {
                row_dots(&x.local, &x.other, dv, 1.0, &mut x.delta);
            }
        } else if wd != 0.0 && !self.sums_first(tile) {
            // (1 − g) G·A_dot = G·(A − g A_mem).
            load_rows(tile, &self.outputs.o, &mut x.other);
            row_dots(&x.g, &x.other, dv, 1.0, &mut x.delta);
            x.delta.iter_mut().zip(&x.c).for_each(|(delta, c)| *delta -= c);
        }
        for (i, (b, t, h)) in tile.each().enumerate() {
            // SAFETY: token and head lie inside the sequence `resolve` accepted; here and below.
            x.lse[i] = unsafe { self.outputs.lse.row(b, 0, h) }[t];
            if let Some(d_lse) = &self.outputs.d_lse {
                x.delta[i] -= unsafe { d_lse.row(b, 0, h) }[t];
            }
        }
    }

    /// dL/dq = the local branch's, rotated back, and the memory's.
    fn write(&self, tile: &Tile<'_>, x: &mut Scratch) {
        let dk = self.problem.key_dim();
        simd::scale(&mut x.dq, self.problem.scale() as f32);
        let rows = x.dq.chunks_exact_mut(dk).zip(x.p.chunks_exact(dk));
        for ((t, (b, token, h)), (dq, p)) in tile.tokens.clone().zip(tile.each()).zip(rows) {
            if let Some(rope) = &self.batch.rope {
                rope.rotate_back(dq, self.batch.position(&tile.piece.seq, t));
            }
            add(dq, p);
            // SAFETY: every (sequence, token, head) is written by exactly one task.
            T::narrow(dq, unsafe { self.gradients.q.row(b, token, h) });
        }
    }
}
