//! The parts of a state by slot and KV head, for tasks that run at once and each write their own.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use super::blocks::KeyBlocks;
use super::open::OpenSegments;
use super::{Counters, State};
use crate::error::Result;
use crate::problem::Problem;

/// A mutable slice of which tasks take disjoint parts.
pub(crate) struct Shared<'a> {
    ptr: *mut f32,
    len: usize,
    data: PhantomData<&'a mut [f32]>,
}

// SAFETY: a unique borrow, of which `part` is unsafe to take twice.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(slice: &'a mut [f32]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), data: PhantomData }
    }

    /// # Safety
    /// No other borrow of these elements may live.
    pub unsafe fn range(&self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: inside the slice, and unshared by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }

    /// Part `i` of parts of `len` elements.
    ///
    /// # Safety
    /// As [`Self::range`].
    pub unsafe fn part(&self, i: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.range(i * len..(i + 1) * len) }
    }

    /// Part `i` for reading.
    ///
    /// # Safety
    /// No mutable borrow of these elements may live.
    pub unsafe fn read(&self, i: usize, len: usize) -> &'a [f32] {
        assert!((i + 1) * len <= self.len, "part {i} of {len} elements, of {}", self.len);
        // SAFETY: inside the slice, and not written by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr.add(i * len), len) }
    }
}

/// All heads of a state's memory, and of its open segments.
pub(crate) struct Heads<'a> {
    problem: Problem,
    m: Shared<'a>,
    z: Shared<'a>,
    pub open: OpenHeads<'a>,
}

/// All heads of a state's open segments.
pub(crate) struct OpenHeads<'a> {
    problem: Problem,
    k: Shared<'a>,
    k_rotated: Option<Shared<'a>>,
    v: Shared<'a>,
}

/// What belongs to one slot and KV head.
pub(crate) struct HeadMut<'a> {
    pub m: &'a mut [f32],
    pub z: &'a mut [f32],
    pub open: OpenMut<'a>,
}

/// The open segment of one slot and KV head.
#[derive(Clone, Copy)]
pub(crate) struct OpenRef<'a> {
    /// Unrotated keys, in [`KeyBlocks`] layout.
    pub k: &'a [f32],
    /// Rotated keys, once any call has rotated.
    pub k_rotated: Option<&'a [f32]>,
    /// Values, [N, Dv].
    pub v: &'a [f32],
}

/// The same, to append to.
pub(crate) struct OpenMut<'a> {
    pub k: &'a mut [f32],
    pub k_rotated: Option<&'a mut [f32]>,
    pub v: &'a mut [f32],
}

impl<'a> OpenRef<'a> {
    /// The keys the local branch sees.
    pub fn local(&self, rotated: bool) -> &'a [f32] {
        if rotated { self.k_rotated.unwrap_or(self.k) } else { self.k }
    }
}

impl OpenMut<'_> {
    pub fn read(&self) -> OpenRef<'_> {
        OpenRef { k: self.k, k_rotated: self.k_rotated.as_deref(), v: self.v }
    }
}

impl OpenSegments {
    /// The open segment of a slot's head.
    pub fn head(&self, p: &Problem, slot: usize, kv_head: usize) -> OpenRef<'_> {
        let (i, keys) = (slot * p.kv_heads() + kv_head, KeyBlocks::new(p).len());
        let values = p.segment_len() * p.value_dim();
        let rotated = !self.k_rotated.is_empty();
        OpenRef {
            k: &self.k[i * keys..][..keys],
            k_rotated: rotated.then(|| &self.k_rotated[i * keys..][..keys]),
            v: &self.v[i * values..][..values],
        }
    }
}

impl<'a> Heads<'a> {
    /// # Safety
    /// No other borrow of this slot's head may live.
    pub unsafe fn head(&self, slot: usize, kv_head: usize) -> HeadMut<'a> {
        let p = &self.problem;
        let (i, dk, dv) = (slot * p.kv_heads() + kv_head, p.key_dim(), p.value_dim());
        // SAFETY: the caller's promise.
        unsafe {
            HeadMut {
                m: self.m.part(i, dk * dv),
                z: self.z.part(i, dk),
                open: self.open.head(slot, kv_head),
            }
        }
    }
}

impl<'a> OpenHeads<'a> {
    pub fn new(problem: &Problem, open: &'a mut OpenSegments) -> Self {
        let rotated = &mut open.k_rotated;
        Self {
            problem: *problem,
            k: Shared::new(&mut open.k),
            k_rotated: (!rotated.is_empty()).then(|| Shared::new(rotated)),
            v: Shared::new(&mut open.v),
        }
    }

    /// # Safety
    /// No other borrow of this slot's head may live.
    pub unsafe fn head(&self, slot: usize, kv_head: usize) -> OpenMut<'a> {
        let p = &self.problem;
        let (i, keys) = (slot * p.kv_heads() + kv_head, KeyBlocks::new(p).len());
        // SAFETY: the caller's promise.
        unsafe {
            OpenMut {
                k: self.k.part(i, keys),
                k_rotated: self.k_rotated.as_ref().map(|k| k.part(i, keys)),
                v: self.v.part(i, p.segment_len() * p.value_dim()),
            }
        }
    }

    /// # Safety
    /// No mutable borrow of this slot's head may live.
    pub unsafe fn read(&self, slot: usize, kv_head: usize) -> OpenRef<'a> {
        let p = &self.problem;
        let (i, keys) = (slot * p.kv_heads() + kv_head, KeyBlocks::new(p).len());
        // SAFETY: the caller's promise.
        unsafe {
            OpenRef {
                k: self.k.read(i, keys),
                k_rotated: self.k_rotated.as_ref().map(|k| k.read(i, keys)),
                v: self.v.read(i, p.segment_len() * p.value_dim()),
            }
        }
    }
}

impl State {
    /// The counters, and the heads for tasks to take: all of it is this state's own from here on.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] where copies of the state hold the same; nothing has changed then.
    pub(crate) fn split(&mut self) -> Result<(&mut [Counters], Heads<'_>)> {
        self.own_open()?;
        self.own_memory()?;
        let Self { problem, counters, m, z, open } = self;
        let (m, z, open) = (Arc::get_mut(m), Arc::get_mut(z), open.alone());
        let (Some(m), Some(z), Some(open)) = (m, z, open) else {
            unreachable!("made this state's own above");
        };
        let heads = Heads {
            problem: *problem,
            m: Shared::new(m),
            z: Shared::new(z),
            open: OpenHeads::new(problem, open),
        };
        Ok((counters, heads))
    }
}
