//! The keys and values of one segment and KV head, and their gradients.

use super::Backward;
use super::elementwise::{add, key_rows, residual_rows, symmetrise};
use crate::alloc;
use crate::call::form::Piece;
use crate::cpu::matmul::{Into, Mat, matmul, matmul_scaled};
use crate::cpu::segment::{CHUNK, SCRATCH, Tokens, transits};
use crate::cpu::simd;
use crate::cpu::weights;
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::heads::{OpenMut, OpenRef};
use crate::problem::Problem;

/// Contiguous f32, gathered once; and the sums over query rows that belong to it.
pub(super) struct Segment {
    /// Unrotated keys, [tokens, Dk].
    keys: Vec<f32>,
    /// The same rotated; empty without rotation.
    rotated: Vec<f32>,
    /// Values, [tokens, Dv].
    pub values: Vec<f32>,
    /// To the local branch's keys, [tokens, Dk].
    pub d_keys: Vec<f32>,
    /// To the values, [tokens, Dv].
    pub d_values: Vec<f32>,
}

impl Segment {
    /// Room for `tokens` tokens.
    fn new(p: &Problem, tokens: usize, rotation: bool) -> Result<Self> {
        let (dk, dv, what) = (p.key_dim(), p.value_dim(), "the tokens of a segment");
        let rows = |width| alloc::reserved(&[tokens, width], what);
        Ok(Self {
            keys: rows(dk)?,
            rotated: rows(if rotation { dk } else { 0 })?,
            values: rows(dv)?,
            d_keys: rows(dk)?,
            d_values: rows(dv)?,
        })
    }

    /// The keys that the local branch sees.
    pub fn local_keys(&self) -> &[f32] {
        if self.rotated.is_empty() { &self.keys } else { &self.rotated }
    }
}

/// Gradients to tokens that the call left in an open segment, taken out of a state's, row by row.
pub(super) struct Tail {
    k: Vec<f32>,
    k_rotated: Vec<f32>,
    v: Vec<f32>,
}

impl Tail {
    /// Room for `tokens` tokens.
    pub fn new(p: &Problem, tokens: usize) -> Result<Self> {
        let rows = |width| alloc::reserved(&[tokens, width], SCRATCH);
        let (dk, dv) = (p.key_dim(), p.value_dim());
        Ok(Self { k: rows(dk)?, k_rotated: rows(dk)?, v: rows(dv)? })
    }
}

/// Buffers of one running task.
pub(super) struct Scratch {
    pub segment: Segment,
    /// A chunk of keys: σ(k), retrieval weights, and the gradient to σ(k), then k; [CHUNK, Dk].
    s: Vec<f32>,
    w: Vec<f32>,
    y: Vec<f32>,
    denominators: Vec<[f32; 2]>,
    /// X + Xᵀ, X = Λ Mᵀ: [Dk, Dk].
    x: Vec<f32>,
    row: Vec<f32>,
    /// What nobody asks for.
    ignored: Vec<f32>,
}

impl Scratch {
    pub fn new(p: &Problem, tokens: usize, rotation: bool) -> Result<Self> {
        let dk = p.key_dim();
        let rows = |width| alloc::reserved(&[CHUNK.min(p.segment_len()), width], SCRATCH);
        Ok(Self {
            segment: Segment::new(p, tokens, rotation)?,
            s: rows(dk)?,
            w: rows(dk)?,
            y: rows(dk)?,
            denominators: alloc::reserved(&[CHUNK.min(p.segment_len())], SCRATCH)?,
            x: alloc::reserved(&[dk, dk], SCRATCH)?,
            row: alloc::reserved(&[dk], SCRATCH)?,
            ignored: alloc::zeroed(&[dk], SCRATCH)?,
        })
    }

    /// Lengthens the chunks; the task does that, not who made them.
    fn lengthen(&mut self, p: &Problem, tokens: usize) {
        let (rows, dk) = (CHUNK.min(tokens), p.key_dim());
        for x in [&mut self.s, &mut self.w, &mut self.y] {
            x.resize(rows * dk, 0.0);
        }
        self.denominators.resize(rows, [0.0; 2]);
    }
}

/// What a completed segment's write is differentiated by: Λ and λ, dL/dM and dL/dz after it, and the M
/// and z it found.
#[derive(Clone, Copy)]
pub(super) struct Written<'a> {
    pub lambda: (&'a [f32], &'a [f32]),
    pub found: (&'a [f32], &'a [f32]),
}

impl<T: Element> Backward<'_, T> {
    /// Gathers a piece's segment; the gradients begin with 0.
    pub(super) fn gather(&self, (piece, kv_head): (&Piece, usize), x: &mut Segment) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        let n = piece.cached + piece.len;
        x.keys.resize(n * dk, 0.0);
        x.values.resize(n * dv, 0.0);
        let tokens = self.tokens(piece, kv_head);
        // One after the other, as in `Call::pack`.
        x.keys.chunks_exact_mut(dk).enumerate().for_each(|(j, k)| tokens.key(j, k));
        x.values.chunks_exact_mut(dv).enumerate().for_each(|(j, v)| tokens.value(j, v));
        x.rotated.clear();
        if self.batch.rope.is_some() {
            x.rotated.extend_from_slice(&x.keys);
            self.rotate(piece, self.open(piece, kv_head), &mut x.rotated);
        }
        for (gradient, len) in [(&mut x.d_keys, n * dk), (&mut x.d_values, n * dv)] {
            gradient.clear();
            gradient.resize(len, 0.0);
        }
    }

    /// Keys as the local branch sees them: those of earlier calls as they were rotated then.
    fn rotate(&self, piece: &Piece, open: OpenRef<'_>, keys: &mut [f32]) {
        let Some(rope) = &self.batch.rope else { return };
        for (j, k) in keys.chunks_exact_mut(self.problem.key_dim()).enumerate() {
            match j.checked_sub(piece.cached) {
                None => self.blocks.get(open.local(true), j, k),
                Some(t) => rope.rotate(k, self.batch.position(&piece.seq, piece.start + t)),
            }
        }
    }

    /// Takes the gradients to the tokens of a piece that stays open out of the state's; those to tokens of
    /// earlier calls in that segment stay there.
    pub(super) fn take_tail(&self, last: &Piece, open: &mut OpenMut<'_>, tail: &mut Tail) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        let (len, first) = if last.full { (0, 0) } else { (last.len, last.cached) };
        for rows in [&mut tail.k, &mut tail.k_rotated] {
            rows.clear();
            rows.resize(len * dk, 0.0);
        }
        for (j, row) in (first..).zip(tail.k.chunks_exact_mut(dk)) {
            self.blocks.get(open.k, j, row);
        }
        if let (Some(rotated), Some(_)) = (&open.k_rotated, &self.batch.rope) {
            for (j, row) in (first..).zip(tail.k_rotated.chunks_exact_mut(dk)) {
                self.blocks.get(rotated, j, row);
            }
        }
        tail.v.clear();
        tail.v.extend_from_slice(&open.v[first * dv..][..len * dv]);
        if first == 0 {
            open.k.fill(0.0);
            open.v.fill(0.0);
            open.k_rotated.iter_mut().for_each(|keys| keys.fill(0.0));
        }
    }

    /// A completed segment's write to the memory: adds to dL/dv, gives `each` its part of a key's gradient,
    /// and adds to `owed` what the delta rule's denominators owe to λ.
    fn written(
        &self,
        piece: &Piece,
        written: Written<'_>,
        mut owed: Option<&mut [f32]>,
        x: &mut Scratch,
        mut each: impl FnMut(usize, &[f32]),
    ) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        let (lambda, lambda_z) = written.lambda;
        let n = piece.cached + piece.len;
        x.lengthen(&self.problem, n);
        self.cross(piece, written, x);
        let lambda = Mat::rows(lambda, dk, dv, dv);
        for first in (0..n).step_by(CHUNK) {
            let rows = CHUNK.min(n - first);
            self.residuals(written, (first, rows), owed.as_deref_mut(), x);
            let Scratch { segment, s, y, .. } = x;
            let (s, y) = (&s[..rows * dk], &mut y[..rows * dk]);
            let values = Mat::rows(&segment.values[first * dv..], rows, dv, dv);
            matmul(y, Into::Add, values, lambda.t());
            key_rows(y, &segment.keys[first * dk..][..rows * dk], s, lambda_z);
            let d_values = &mut segment.d_values[first * dv..][..rows * dv];
            matmul(d_values, Into::Add, Mat::rows(s, rows, dk, dk), lambda);
            y.chunks_exact(dk).zip(first..).for_each(|(row, j)| each(j, row));
        }
    }

    /// x ← Λ Mᵀ + M Λᵀ under the delta rule; nothing where Λ is 0, whatever M holds.
    fn cross(&self, piece: &Piece, written: Written<'_>, x: &mut Scratch) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        let ((lambda, _), (m, _)) = (written.lambda, written.found);
        x.x.clear();
        if !transits(&self.problem, piece) || lambda.iter().all(|x| *x == 0.0) {
            return;
        }
        x.x.resize(dk * dk, 0.0);
        let (lambda, m) = (Mat::rows(lambda, dk, dv, dv), Mat::rows(m, dk, dv, dv));
        matmul(&mut x.x, Into::Store, lambda, m.t());
        symmetrise(&mut x.x, dk);
    }

    /// σ of a chunk of keys, and what the delta rule's residuals give them (0 otherwise).
    fn residuals(
        &self,
        written: Written<'_>,
        (first, rows): (usize, usize),
        owed: Option<&mut [f32]>,
        x: &mut Scratch,
    ) {
        let (dk, (_, z)) = (self.problem.key_dim(), written.found);
        let keys = &x.segment.keys[first * dk..][..rows * dk];
        let (s, w, y) = (&mut x.s[..rows * dk], &mut x.w[..rows * dk], &mut x.y[..rows * dk]);
        s.copy_from_slice(keys);
        simd::feature_map(s);
        if x.x.is_empty() {
            return y.fill(0.0);
        }
        w.copy_from_slice(keys);
        let denominators = &mut x.denominators[..rows];
        let unit = weights::retrieval_rows(w, z, self.problem.denominator(), denominators);
        let (weights, cross) = (Mat::rows(w, rows, dk, dk), Mat::rows(&x.x, dk, dk, dk));
        matmul_scaled(y, Into::Store, unit, weights, cross);
        let owed = owed.unwrap_or(&mut x.ignored);
        residual_rows(y, (s, w), denominators, (z, unit), owed);
    }

    /// What the delta rule's denominators owe to the gradient of the z that a segment finds, alone.
    pub(super) fn owed(
        &self,
        (piece, kv_head): (&Piece, usize),
        written: Written<'_>,
        owed: &mut [f32],
        x: &mut Scratch,
    ) {
        let (n, dk) = (piece.cached + piece.len, self.problem.key_dim());
        x.lengthen(&self.problem, n);
        self.cross(piece, written, x);
        x.segment.keys.resize(n * dk, 0.0);
        let tokens = self.tokens(piece, kv_head);
        let rows = x.segment.keys.chunks_exact_mut(dk).enumerate();
        rows.for_each(|(j, k)| tokens.key(j, k));
        for first in (0..n).step_by(CHUNK) {
            let rows = CHUNK.min(n - first);
            self.residuals(written, (first, rows), Some(&mut *owed), x);
        }
    }

    /// dL/dk and dL/dv of a piece, whose queries are done; gradients to tokens of earlier calls go to
    /// `open`.
    pub(super) fn keys(
        &self,
        (piece, kv_head): (&Piece, usize),
        written: Option<Written<'_>>,
        (open, tail): (&mut OpenMut<'_>, &Tail),
        owed: Option<&mut [f32]>,
        x: &mut Scratch,
    ) {
        let dk = self.problem.key_dim();
        self.unrotate(piece, open, x);
        if let Some(written) = written {
            let mut d_keys = std::mem::take(&mut x.segment.d_keys);
            let rotated = self.batch.rope.is_some();
            let mut row = std::mem::take(&mut x.row);
            row.resize(dk, 0.0);
            self.written(piece, written, owed, x, |j, y| {
                if j < piece.cached && rotated {
                    self.add_to_open(open.k, j, y, &mut row);
                } else {
                    add(&mut d_keys[j * dk..][..dk], y);
                }
            });
            (x.segment.d_keys, x.row) = (d_keys, row);
        }
        self.put(piece, kv_head, (open, tail), x);
    }

    /// Adds to the gradient of key `j` of an open segment.
    fn add_to_open(&self, keys: &mut [f32], j: usize, y: &[f32], row: &mut [f32]) {
        self.blocks.get(keys, j, row);
        add(row, y);
        self.blocks.put(keys, j, row);
    }

    /// Gradients to rotated keys become those to keys; of earlier calls' tokens they go to `open`.
    fn unrotate(&self, piece: &Piece, open: &mut OpenMut<'_>, x: &mut Scratch) {
        let Some(rope) = &self.batch.rope else { return };
        let dk = self.problem.key_dim();
        x.row.resize(dk, 0.0);
        for (j, row) in x.segment.d_keys.chunks_exact_mut(dk).enumerate() {
            match (j.checked_sub(piece.cached), &mut open.k_rotated) {
                (Some(t), _) => {
                    rope.rotate_back(row, self.batch.position(&piece.seq, piece.start + t));
                }
                (None, Some(keys)) => self.add_to_open(keys, j, row, &mut x.row),
                (None, None) => unreachable!("made room for at the call's beginning"),
            }
        }
    }

    /// Rounds and writes what is complete.
    fn put(
        &self,
        piece: &Piece,
        kv_head: usize,
        (open, tail): (&mut OpenMut<'_>, &Tail),
        x: &mut Scratch,
    ) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        x.row.resize(dk, 0.0);
        let rotated = self.batch.rope.is_some();
        let rows =
            x.segment.d_keys.chunks_exact_mut(dk).zip(x.segment.d_values.chunks_exact_mut(dv));
        for (j, (d_key, d_value)) in rows.enumerate() {
            let Some(t) = j.checked_sub(piece.cached) else {
                if !rotated {
                    self.add_to_open(open.k, j, d_key, &mut x.row);
                }
                add(&mut open.v[j * dv..][..dv], d_value);
                continue;
            };
            let token = piece.start + t;
            if !piece.full {
                if let Some(rope) = &self.batch.rope {
                    x.row.copy_from_slice(&tail.k_rotated[t * dk..][..dk]);
                    rope.rotate_back(&mut x.row, self.batch.position(&piece.seq, token));
                    add(d_key, &x.row);
                }
                add(d_key, &tail.k[t * dk..][..dk]);
                add(d_value, &tail.v[t * dv..][..dv]);
            }
            let (b, token) = (piece.seq.batch, piece.seq.first + token);
            // SAFETY: inside the sequence `resolve` accepted; one task writes a (token, KV head).
            unsafe {
                T::narrow(d_key, self.gradients.k.row(b, token, kv_head));
                T::narrow(d_value, self.gradients.v.row(b, token, kv_head));
            }
        }
    }
}
