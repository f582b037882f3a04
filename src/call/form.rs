//! A call without its data: shapes, strides, lengths, slots, positions. Two backends that resolve the
//! same form get the same sequences, or the same error.

use std::ops::Range;

use crate::memory::Counters;
use crate::problem::Problem;
use crate::tensor::Layout;

/// How the tokens of a batch are laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lengths<'a> {
    /// [B, T, H, D], every sequence T tokens long.
    Full,
    /// [B, T, H, D], sequence b is `lens[b]` tokens long, the rest is padding.
    Padded(&'a [i32]),
    /// [B, T, H, D], sequence b is the tokens `ranges[b]` of its row, the others are padding.
    Ranges(&'a [Range<i32>]),
    /// [total, H, D], sequence b is tokens `cu[b]..cu[b + 1]`.
    Packed(&'a [i32]),
}

/// Rows of the rotation tables that tokens take.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Positions<'a> {
    /// Absolute positions, continued from the state.
    Continued,
    /// Given and checked: T (shared) or B·T of them, packed: total.
    Given(&'a [i64]),
    /// As many as that, in memory that the host does not read.
    #[allow(dead_code, reason = "only devices have it")]
    Device(usize),
}

/// Rotation tables and positions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RopeForm<'a> {
    pub cos: Layout,
    pub sin: Layout,
    pub positions: Positions<'a>,
}

/// The gate's logits, one per query head.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gate<'a> {
    /// Their values are checked as well.
    Given(&'a [f32]),
    /// As many as that, in memory that the host does not read.
    #[allow(dead_code, reason = "only devices have it")]
    Device(usize),
}

/// Everything of a call but its data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form<'a> {
    pub q: Layout,
    pub k: Layout,
    pub v: Layout,
    pub gate: Gate<'a>,
    pub lengths: Lengths<'a>,
    pub slots: Option<&'a [usize]>,
    pub rope: Option<RopeForm<'a>>,
}

/// The outputs of a call without their data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutputForm {
    pub o: Layout,
    pub lse: Option<Layout>,
    pub a_dot: Option<Layout>,
    pub a_mem: Option<Layout>,
}

impl Form<'_> {
    /// Whether sequences follow each other without padding.
    pub fn packed(&self) -> bool {
        matches!(self.lengths, Lengths::Packed(_))
    }

    /// Padded length of the token dimension: T, or total when packed. Only after `resolve`.
    pub fn tokens(&self) -> usize {
        self.q.shape()[self.q.shape().len() - 3]
    }

    /// Table row for token `t` of a sequence, where the host knows it.
    pub fn position(&self, seq: &Sequence, t: usize) -> usize {
        match self.rope.map(|r| r.positions) {
            Some(Positions::Given(p)) if self.shared(p.len()) => p[seq.first + t] as usize,
            Some(Positions::Given(p)) => p[seq.batch * self.tokens() + seq.first + t] as usize,
            _ => seq.position + t,
        }
    }

    /// Whether that many positions serve every sequence.
    pub fn shared(&self, positions: usize) -> bool {
        self.packed() || positions == self.tokens()
    }
}

/// One sequence of a call: where its tokens lie and which slot holds its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// Slot of the state.
    pub slot: usize,
    /// Index into the batch dimension (0 when packed).
    pub batch: usize,
    /// Index of its first token in the token dimension.
    pub first: usize,
    /// Number of tokens.
    pub len: usize,
    /// Position of its first token when none are given: tokens seen before.
    pub position: usize,
}

/// The part of one sequence's call that falls into one segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub seq: Sequence,
    /// First token of the piece, counted within the sequence's call.
    pub start: usize,
    /// Tokens of the piece.
    pub len: usize,
    /// Tokens of the segment that earlier calls brought.
    pub cached: usize,
    /// Whether the piece completes its segment.
    pub full: bool,
    /// Whether the memory is still empty when the piece reads it.
    pub empty: bool,
}

impl Piece {
    /// Whether its tokens go into the open segment behind those that the call found there, in nobody's
    /// place: it can be attended where it lies, and be taken back by forgetting it.
    pub fn continues(&self) -> bool {
        self.start == 0 && !self.full
    }
}

/// Cuts one sequence's call at segment ends.
pub(crate) fn pieces(
    p: &Problem,
    seq: Sequence,
    counters: Counters,
) -> impl Iterator<Item = Piece> + use<> {
    let p = *p;
    (0..piece_count(&p, seq, counters)).map(move |i| piece(&p, seq, counters, i))
}

/// Pieces of one sequence's call.
pub(crate) fn piece_count(p: &Problem, seq: Sequence, counters: Counters) -> usize {
    match seq.len {
        0 => 0,
        len => (counters.open_len + len).div_ceil(p.segment_len()),
    }
}

/// The `i`-th of them: 0 to [`piece_count`] − 1.
pub(crate) fn piece(p: &Problem, seq: Sequence, counters: Counters, i: usize) -> Piece {
    let n = p.segment_len();
    let cached = if i == 0 { counters.open_len } else { 0 };
    let start = (i * n).saturating_sub(counters.open_len);
    let len = (seq.len - start).min(n - cached);
    let (full, empty) = (cached + len == n, i == 0 && counters.committed == 0);
    Piece { seq, start, len, cached, full, empty }
}

impl Counters {
    /// Accounts for a piece.
    pub fn advance(&mut self, piece: &Piece, rotated: bool) {
        self.tokens += piece.len as u64;
        self.open_len = piece.cached + piece.len;
        self.rotated = rotated;
        if piece.full {
            self.committed += self.open_len as u64;
            self.open_len = 0;
        }
    }

    /// Accounts for a flush.
    pub fn flush(&mut self) {
        self.committed += self.open_len as u64;
        self.open_len = 0;
    }
}
