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
use crate::alloc;
use crate::error::Result;
use crate::problem::Problem;

/// Keys and values of the open segments, one chunk per (slot, KV head).
#[derive(Debug)]
pub(crate) struct OpenSegments {
    /// Unrotated keys, one [`KeyBlocks`] per (slot, KV head).
    pub k: Vec<f32>,
    /// Rotated keys, laid out alike; empty until a call brings rotation.
    pub k_rotated: Vec<f32>,
    /// Values, [slots, Hkv, N, Dv].
    pub v: Vec<f32>,
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
        let floats = |slots, len| alloc::zeroed(&[slots, p.kv_heads(), len], "");
        Ok(Self {
            k: floats(slots, keys)?,
            k_rotated: floats(if rotated { slots } else { 0 }, keys)?,
            v: floats(slots, p.segment_len() * p.value_dim())?,
            filled: alloc::zeroed(&[slots], "")?,
        })
    }

    /// Takes over the rows in use of other segments' slots into the slots from `first` on. There is
    /// room for rotated keys if there is over there.
    pub fn take_over(
        &mut self,
        p: &Problem,
        other: &Self,
        slots: impl Iterator<Item = InUse>,
        first: usize,
    ) {
        let (blocks, dv) = (KeyBlocks::new(p), p.value_dim());
        for (to, InUse { slot, rows, rotated }) in (first..).zip(slots) {
            let copy = |from: &[f32], into: &mut [f32], each: usize, used: usize| {
                for h in 0..p.kv_heads() {
                    let [from_at, to_at] = [slot, to].map(|slot| (slot * p.kv_heads() + h) * each);
                    into[to_at..][..used].copy_from_slice(&from[from_at..][..used]);
                }
            };
            let keys = blocks.prefix_len(rows);
            copy(&other.k, &mut self.k, blocks.len(), keys);
            if rotated && keys > 0 {
                copy(&other.k_rotated, &mut self.k_rotated, blocks.len(), keys);
            }
            copy(&other.v, &mut self.v, p.segment_len() * dv, rows * dv);
            self.filled[to] = rows;
        }
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
