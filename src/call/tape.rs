//! What a call leaves for its gradients.

use crate::alloc;
use crate::call::form::{Piece, Sequence};
use crate::error::{Error, Result};
use crate::memory::heads::Shared;
use crate::memory::{Counters, State};
use crate::problem::Problem;

const TAPE: &str = "a tape";

/// What [`prefill_backward`](crate::prefill_backward) needs of a call besides its arguments and outputs:
/// the state before it (a copy, which takes no memory until the state itself is written to) and, of a
/// [`Self::every`], the M and z that some segments found. Those of the others are computed again from the
/// last before them: in all about as much work as committing the segments was.
///
/// It is made empty, given to a call by [`Outputs::tape`](crate::Outputs::tape), and filled by it.
#[derive(Debug, Default)]
pub struct Tape {
    every: Option<usize>,
    /// What the call that filled it kept of that.
    kept: Option<usize>,
    start: Option<State>,
    /// By slot, of a call's sequences; none, if no call has filled it.
    first: Option<Vec<First>>,
    /// [checkpoints, Hkv, Dk · Dv + Dk]: M and z.
    checkpoints: Vec<f32>,
}

/// A sequence of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct First {
    slot: usize,
    /// Its tokens.
    len: usize,
    /// Its first checkpoint.
    checkpoint: usize,
}

/// Of one call's segments: the `index`-th of a sequence, counted from the one that was open.
fn index(p: &Problem, start: &Counters, piece: &Piece) -> usize {
    (start.open_len + piece.start) / p.segment_len()
}

/// Checkpoints of a call on `tokens` tokens: one per `every` segments, the first of which is the start.
fn count(p: &Problem, start: &Counters, tokens: usize, every: usize) -> usize {
    let segments = start.open_len.saturating_add(tokens).div_ceil(p.segment_len());
    segments.saturating_sub(1) / every
}

/// Floats of a checkpoint, of one KV head.
fn floats(p: &Problem) -> usize {
    p.key_dim() * (p.value_dim() + 1)
}

impl Tape {
    /// A tape of the state before the call alone.
    pub fn new() -> Self {
        Self::default()
    }

    /// A tape with M and z before every `segments`-th segment of a call, too.
    ///
    /// # Errors
    /// [`Error::Value`] for 0.
    pub fn every(segments: usize) -> Result<Self> {
        if segments == 0 {
            return Err(Error::value("segments", 0, "at least 1"));
        }
        Ok(Self { every: Some(segments), ..Self::default() })
    }

    /// The tape of a call on `state`, which stands where that call found it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn of(state: &State) -> Result<Self> {
        Ok(Self { start: Some(state.try_clone()?), ..Self::default() })
    }

    /// Bytes of the checkpoints that a call on `tokens` tokens more in every slot of `state` leaves on this
    /// tape. (The state before the call takes no more than [`State::bytes`].)
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] for more than 64 bits count.
    pub fn bytes_for(&self, state: &State, tokens: usize) -> Result<u64> {
        let p = state.problem();
        let Some(every) = self.every else { return Ok(0) };
        let counts = state.counters.iter().map(|c| count(p, c, tokens, every) as u128);
        let bytes = counts.sum::<u128>().saturating_mul((4 * p.kv_heads() * floats(p)) as u128);
        u64::try_from(bytes).map_err(|_| Error::out_of_memory(TAPE, bytes))
    }

    /// Slots of the state that the call found, if one has filled the tape.
    pub fn slots(&self) -> Option<usize> {
        self.start.as_ref().map(State::sequences)
    }

    /// Bytes of the checkpoints that a call has left.
    pub fn bytes(&self) -> u64 {
        4 * self.checkpoints.len() as u64
    }

    /// Begins the tape of a call, anew if it had one; `notes`: the call notes what segments find.
    pub(crate) fn begin(
        &mut self,
        state: &State,
        sequences: &[Sequence],
        notes: bool,
    ) -> Result<()> {
        let (p, kept) = (state.problem(), self.every.filter(|_| notes));
        let start = state.try_clone()?;
        let mut first = alloc::reserved(&[sequences.len()], TAPE)?;
        let mut checkpoints = 0;
        for seq in sequences {
            first.push(First { slot: seq.slot, len: seq.len, checkpoint: checkpoints });
            let counters = &state.counters[seq.slot];
            checkpoints += kept.map_or(0, |every| count(p, counters, seq.len, every));
        }
        first.sort_unstable();
        let checkpoints = alloc::zeroed(&[checkpoints, p.kv_heads(), floats(p)], TAPE)?;
        (self.start, self.first, self.checkpoints) = (Some(start), Some(first), checkpoints);
        self.kept = kept;
        Ok(())
    }

    /// Forgets the call, which has failed.
    pub(crate) fn clear(&mut self) {
        *self = Self { every: self.every, ..Self::default() };
    }

    /// For tasks that note what segments find.
    pub(crate) fn notes(&mut self) -> Option<Notes<'_>> {
        let Self { kept, start, first, checkpoints, .. } = self;
        let (start, first) = (start.as_ref()?, first.as_ref()?);
        Some(Notes { every: (*kept)?, start, first, rows: Shared::new(checkpoints) })
    }

    /// The state that the call found.
    ///
    /// # Errors
    /// [`Error::Value`] for a tape that no call has filled.
    pub(crate) fn start(&self) -> Result<&State> {
        let empty = || Error::value("tape", "one that no call has filled", "the tape of the call");
        self.start.as_ref().ok_or_else(empty)
    }

    /// Refuses a tape that a call on other sequences has filled.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub(crate) fn check(&self, sequences: &[Sequence]) -> Result<()> {
        let Some(first) = &self.first else { return Ok(()) };
        let known = |s: &Sequence| {
            let at = first.binary_search_by_key(&s.slot, |first| first.slot);
            at.is_ok_and(|at| first[at].len == s.len)
        };
        if first.len() != sequences.len() || !sequences.iter().all(known) {
            let show = |slot: usize, len: usize| format!("{len} in slot {slot}");
            let list = |all: Vec<String>| format!("one of a call on tokens {}", all.join(", "));
            let got = list(first.iter().take(4).map(|f| show(f.slot, f.len)).collect());
            let expected = list(sequences.iter().take(4).map(|s| show(s.slot, s.len)).collect());
            return Err(Error::value("tape", got, expected));
        }
        Ok(())
    }

    /// Segments from one checkpoint to the next.
    pub(crate) fn distance(&self) -> Option<usize> {
        self.kept
    }

    /// M and z that a piece finds, if they are on the tape.
    pub(crate) fn found(&self, piece: &Piece, kv_head: usize) -> Option<(&[f32], &[f32])> {
        let start = self.start.as_ref()?;
        let i = checkpoint(start, self.kept?, self.first.as_ref()?, piece, kv_head)?;
        let p = start.problem();
        let row = &self.checkpoints[i * floats(p)..][..floats(p)];
        Some(row.split_at(p.key_dim() * p.value_dim()))
    }
}

/// The row of a piece and KV head among the checkpoints, if it has one.
fn checkpoint(
    start: &State,
    every: usize,
    first: &[First],
    piece: &Piece,
    kv_head: usize,
) -> Option<usize> {
    let (p, slot) = (start.problem(), piece.seq.slot);
    let index = index(p, &start.counters[slot], piece);
    if index == 0 || !index.is_multiple_of(every) {
        return None;
    }
    let at = first.binary_search_by_key(&slot, |first| first.slot).ok()?;
    Some((first[at].checkpoint + index / every - 1) * p.kv_heads() + kv_head)
}

/// The checkpoints of a tape that a call is filling.
pub(crate) struct Notes<'a> {
    every: usize,
    start: &'a State,
    first: &'a [First],
    rows: Shared<'a>,
}

impl Notes<'_> {
    /// Notes the M and z that a piece finds, where the tape wants them.
    ///
    /// # Safety
    /// Of one task per piece and KV head.
    pub unsafe fn note(&self, piece: &Piece, kv_head: usize, m: &[f32], z: &[f32]) {
        let row = checkpoint(self.start, self.every, self.first, piece, kv_head);
        let Some(i) = row else { return };
        // SAFETY: the caller's promise; pieces and heads have rows of their own.
        let row = unsafe { self.rows.part(i, m.len() + z.len()) };
        let (m_row, z_row) = row.split_at_mut(m.len());
        m_row.copy_from_slice(m);
        z_row.copy_from_slice(z);
    }
}
