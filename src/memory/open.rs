//! The open segments of a state, which its copies share until one of them needs rows of its own.
//!
//! A state reads only the rows below its own `open_len`, and no such row changes while several states
//! hold it. So a copy takes nothing, and one of the holders, the first to do so, may append in place:
//! the row after the last that any of them wrote ([`OpenSegments::filled`]). Whoever comes second, and
//! everything but appending, works on a copy of the rows in use (`State::own_open`).
//!
//! Writing never waits for the lock and, having it, waits for nothing: a reader waits for a few rows
//! at most, whichever tasks its thread has taken on below.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use super::blocks::KeyBlocks;
use super::floats::Floats;
use crate::alloc;
use crate::error::Result;
use crate::problem::Problem;

/// Keys and values of the open segments, one chunk per (slot, KV head).
#[derive(Debug)]
pub(crate) struct OpenSegments {
    /// Unrotated keys, one [`KeyBlocks`] per (slot, KV head).
    pub k: Floats,
    /// Rotated keys, laid out alike; empty until a call brings rotation.
    pub k_rotated: Floats,
    /// Values, [slots, Hkv, N, Dv].
    pub v: Floats,
    /// Per slot the rows that some holder, or one that is gone, has written: at least every holder's
    /// `open_len`.
    pub filled: Vec<usize>,
}

/// The rows of a slot that its state reads.
#[derive(Clone, Copy)]
pub(crate) struct InUse {
    pub slot: usize,
    pub rows: usize,
    /// Whether rotated keys belong to them.
    pub rotated: bool,
}

impl OpenSegments {
    /// Room for so many slots, `rotated`: for rotated keys too.
    pub fn new(p: &Problem, slots: usize, rotated: bool) -> Result<Self> {
        let keys = KeyBlocks::new(p).len();
        let floats = |slots, len| alloc::zeroed(&[slots, p.kv_heads(), len], "").map(Floats::from);
        Ok(Self {
            k: floats(slots, keys)?,
            k_rotated: floats(if rotated { slots } else { 0 }, keys)?,
            v: floats(slots, p.segment_len() * p.value_dim())?,
            filled: alloc::zeroed(&[slots], "")?,
        })
    }

    /// Takes over the rows in use of other segments' slots, each into the slot beside it. Where rotated
    /// keys belong to them there must be room.
    pub fn take_over(
        &mut self,
        p: &Problem,
        other: &Self,
        slots: impl Iterator<Item = (InUse, usize)>,
    ) {
        for (in_use, to) in slots {
            let from = [&other.k, &other.k_rotated, &other.v];
            for ((from, into), extent) in
                from.into_iter().zip(self.buffers()).zip(in_use.extents(p))
            {
                for (from_at, to_at, len) in extent.chunks(p, in_use.slot, to) {
                    into[to_at..][..len].copy_from_slice(&from[from_at..][..len]);
                }
            }
            self.filled[to] = in_use.rows;
        }
    }

    /// The same inside these segments; no slot that is read is written.
    pub fn copy_within(&mut self, p: &Problem, slots: impl Iterator<Item = (InUse, usize)>) {
        for (in_use, to) in slots {
            for (all, extent) in self.buffers().into_iter().zip(in_use.extents(p)) {
                for (from_at, to_at, len) in extent.chunks(p, in_use.slot, to) {
                    all.copy_within(from_at..from_at + len, to_at);
                }
            }
            self.filled[to] = in_use.rows;
        }
    }

    /// In the order of [`InUse::extents`].
    fn buffers(&mut self) -> [&mut Floats; 3] {
        [&mut self.k, &mut self.k_rotated, &mut self.v]
    }
}

/// What a (slot, KV head) takes of a buffer.
struct Extent {
    each: usize,
    used: usize,
}

impl InUse {
    /// Of keys, rotated keys and values.
    fn extents(&self, p: &Problem) -> [Extent; 3] {
        let (blocks, dv) = (KeyBlocks::new(p), p.value_dim());
        let keys = blocks.prefix_len(self.rows);
        [
            Extent { each: blocks.len(), used: keys },
            Extent { each: blocks.len(), used: if self.rotated { keys } else { 0 } },
            Extent { each: p.segment_len() * dv, used: self.rows * dv },
        ]
    }
}

impl Extent {
    /// Where a slot's elements in use lie, where those of another do, and how many they are; none,
    /// nothing.
    fn chunks(
        self,
        p: &Problem,
        from: usize,
        to: usize,
    ) -> impl Iterator<Item = (usize, usize, usize)> {
        let heads = if self.used > 0 { p.kv_heads() } else { 0 };
        let [from, to] = [from, to].map(|slot| slot * p.kv_heads());
        (0..heads).map(move |h| ((from + h) * self.each, (to + h) * self.each, self.used))
    }
}

/// What the copies of a state hold together.
#[derive(Clone, Debug)]
pub(crate) struct Open(Arc<RwLock<OpenSegments>>);

impl Open {
    pub fn new(segments: OpenSegments) -> Self {
        Self(Arc::new(RwLock::new(segments)))
    }

    pub fn read(&self) -> RwLockReadGuard<'_, OpenSegments> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For appending rows after those that are filled, if nobody else is at it. The holder of the
    /// guard must not wait for tasks.
    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, OpenSegments>> {
        match self.0.try_write() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The segments, if no other state holds them.
    pub fn alone(&mut self) -> Option<&mut OpenSegments> {
        Arc::get_mut(&mut self.0).map(|o| o.get_mut().unwrap_or_else(PoisonError::into_inner))
    }
}
