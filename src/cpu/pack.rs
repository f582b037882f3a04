//! Tokens of one segment and KV head, gathered into contiguous f32: rows of one head lie far apart in
//! the inputs, at strides that evict each other from the caches, so they are read there once.

use rayon::prelude::*;

use super::call::Call;
use super::cancel::Cancel;
use super::segment::{SCRATCH, Tokens};
use crate::alloc;
use crate::call::InputRows;
use crate::call::form::{Piece, Sequence};
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::blocks::KeyBlocks;
use crate::memory::heads::{OpenHeads, OpenMut, OpenRef};
use crate::problem::Problem;

/// Tokens rotated or appended at a time.
const GROUP: usize = 16;

/// The first tokens of a segment.
pub(crate) struct Packed {
    /// Unrotated keys, [len, Dk].
    keys: Vec<f32>,
    /// Keys of the local branch in [`crate::memory::blocks::KeyBlocks`] layout.
    pub local: Vec<f32>,
    /// Values, [len, Dv].
    pub values: Vec<f32>,
    pub append: AppendScratch,
}

impl Packed {
    /// Room for the first `len` tokens.
    pub fn new<T>(call: &Call<'_, T>, len: usize) -> Result<Self> {
        let (p, what) = (&call.problem, "the tokens of a segment");
        Ok(Self {
            keys: alloc::reserved(&[len, p.key_dim()], what)?,
            local: alloc::reserved(&[call.blocks.prefix_len(len)], what)?,
            values: alloc::reserved(&[len, p.value_dim()], what)?,
            append: AppendScratch::new(p)?,
        })
    }

    /// Keys and values, row by row.
    pub fn rows(&mut self) -> (&mut [f32], &[f32]) {
        (&mut self.keys, &self.values)
    }
}

/// Buffers of a task that appends to an open segment.
#[derive(Default)]
pub(crate) struct AppendScratch {
    /// Keys, [GROUP, Dk].
    keys: Vec<f32>,
    /// The same rotated.
    rotated: Vec<f32>,
}

impl AppendScratch {
    pub fn new(p: &Problem) -> Result<Self> {
        let mut scratch = Self::default();
        scratch.fit(p)?;
        Ok(scratch)
    }

    /// Makes room for another problem's tokens.
    pub fn fit(&mut self, p: &Problem) -> Result<()> {
        let rows = [&mut self.keys, &mut self.rotated];
        rows.into_iter().try_for_each(|x| alloc::room(x, &[GROUP, p.key_dim()], SCRATCH))
    }

    pub fn bytes(&self) -> usize {
        alloc::bytes(&[&self.keys, &self.rotated])
    }
}

/// The tokens of a piece's segment where they lie: those of earlier calls in the state, the others
/// in the inputs.
pub(crate) struct PieceTokens<'c, 'a, T> {
    pub inputs: &'c InputRows<'a, T>,
    pub blocks: KeyBlocks,
    pub cancel: &'c Cancel<'a>,
    pub piece: Piece,
    pub kv_head: usize,
    pub open: OpenRef<'c>,
}

impl<T: Element> Tokens for PieceTokens<'_, '_, T> {
    fn len(&self) -> usize {
        self.piece.cached + self.piece.len
    }

    fn key(&self, j: usize, k: &mut [f32]) {
        match j.checked_sub(self.piece.cached) {
            None => self.blocks.get(self.open.k, j, k),
            Some(t) => self.inputs.key(&self.piece, self.kv_head, self.piece.start + t, k),
        }
    }

    fn cancelled(&self) -> bool {
        self.cancel.abandons()
    }

    fn value(&self, j: usize, v: &mut [f32]) {
        match j.checked_sub(self.piece.cached) {
            None => v.copy_from_slice(&self.open.v[j * v.len()..][..v.len()]),
            Some(t) => self.inputs.value(&self.piece, self.kv_head, self.piece.start + t, v),
        }
    }
}

impl<T: Element> InputRows<'_, T> {
    /// Key of token `t` of a sequence's call, unrotated.
    pub fn key(&self, piece: &Piece, kv_head: usize, t: usize, k: &mut [f32]) {
        // SAFETY: inside the sequence `resolve` accepted.
        T::widen(unsafe { self.k.row(piece.seq.batch, piece.seq.first + t, kv_head) }, k);
    }

    /// Value of token `t` of a sequence's call.
    pub fn value(&self, piece: &Piece, kv_head: usize, t: usize, v: &mut [f32]) {
        // SAFETY: as above.
        T::widen(unsafe { self.v.row(piece.seq.batch, piece.seq.first + t, kv_head) }, v);
    }
}

impl<T: Element> Call<'_, T> {
    /// The tokens of a piece's segment, some of which the state may hold.
    pub fn tokens<'c>(
        &'c self,
        piece: Piece,
        kv_head: usize,
        open: OpenRef<'c>,
    ) -> PieceTokens<'c, 'c, T> {
        let (inputs, blocks, cancel) = (&self.inputs, self.blocks, &self.cancel);
        PieceTokens { inputs, blocks, cancel, piece, kv_head, open }
    }

    /// Gathers the first `len` tokens of a piece's segment.
    pub fn pack(
        &self,
        piece: &Piece,
        kv_head: usize,
        open: OpenRef<'_>,
        len: usize,
        x: &mut Packed,
    ) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        x.keys.resize(len * dk, 0.0);
        x.values.resize(len * dv, 0.0);
        let tokens = self.tokens(*piece, kv_head, open);
        // One after the other: rows of two tensors in turns came at two thirds of the rate.
        x.keys.chunks_exact_mut(dk).enumerate().for_each(|(j, k)| tokens.key(j, k));
        x.values.chunks_exact_mut(dv).enumerate().for_each(|(j, v)| tokens.value(j, v));
        if self.needs_local(piece, kv_head) {
            x.local.resize(self.blocks.prefix_len(len), 0.0);
            let cached = self.blocks.prefix_len(piece.cached);
            x.local[..cached].copy_from_slice(&open.local(self.batch.rope.is_some())[..cached]);
            let new = &x.keys[piece.cached * dk..len * dk];
            let to = (piece.cached, &mut x.local[..]);
            self.put_local(&piece.seq, piece.start, new, to, &mut x.append.rotated);
        }
    }

    /// Stores keys of a sequence's tokens, `t` and later, as keys `j` and later of the local branch.
    fn put_local(
        &self,
        seq: &Sequence,
        t: usize,
        keys: &[f32],
        (j, local): (usize, &mut [f32]),
        rotated: &mut Vec<f32>,
    ) {
        let Some(rope) = &self.batch.rope else { return self.blocks.put(local, j, keys) };
        let dk = self.problem.key_dim();
        for (first, keys) in (0..).step_by(GROUP).zip(keys.chunks(GROUP * dk)) {
            rotated.clear();
            rotated.extend_from_slice(keys);
            for (t, k) in (t + first..).zip(rotated.chunks_exact_mut(dk)) {
                rope.rotate(k, self.batch.position(seq, t));
            }
            self.blocks.put(local, j + first, rotated);
        }
    }

    /// Appends a piece's tokens to the open segment.
    pub fn append(
        &self,
        piece: &Piece,
        kv_head: usize,
        open: &mut OpenMut<'_>,
        x: &mut AppendScratch,
    ) {
        let (dk, dv) = (self.problem.key_dim(), self.problem.value_dim());
        for first in (0..piece.len).step_by(GROUP) {
            let (t, j) = (piece.start + first, piece.cached + first);
            x.keys.resize(GROUP.min(piece.len - first) * dk, 0.0);
            let rows = x.keys.chunks_exact_mut(dk).zip(open.v[j * dv..].chunks_exact_mut(dv));
            for (t, (k, v)) in (t..).zip(rows) {
                self.inputs.key(piece, kv_head, t, k);
                self.inputs.value(piece, kv_head, t, v);
            }
            self.blocks.put(open.k, j, &x.keys);
            if let (Some(_), Some(local)) = (&self.batch.rope, &mut open.k_rotated) {
                self.put_local(&piece.seq, t, &x.keys, (j, local), &mut x.rotated);
            }
        }
    }

    /// Appends, in parallel, the tokens of pieces that do not complete their segments. It is not
    /// cancelled: the rows take the place of those that the sequences began with.
    pub fn append_tails(
        &self,
        open: &OpenHeads<'_>,
        tails: &[Piece],
        scratch: impl Fn(&mut dyn FnMut(&mut AppendScratch)) + Sync,
    ) {
        let kv_heads = self.problem.kv_heads();
        (0..tails.len() * kv_heads).into_par_iter().for_each(|i| {
            let (piece, h) = (&tails[i / kv_heads], i % kv_heads);
            // SAFETY: a sequence has one such piece, and no two sequences have the same slot.
            let mut head = unsafe { open.head(piece.seq.slot, h) };
            scratch(&mut |x| self.append(piece, h, &mut head, x));
        });
    }
}
