//! The parts of a state by slot and KV head, for tasks that run at once and each write their own.

use std::marker::PhantomData;
use std::ops::Range;

use super::blocks::KeyBlocks;
use super::{Counters, State};
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

/// All heads of a state.
pub(crate) struct Heads<'a> {
    problem: Problem,
    m: Shared<'a>,
    z: Shared<'a>,
    k: Shared<'a>,
    k_rotated: Option<Shared<'a>>,
    v: Shared<'a>,
}

/// What belongs to one slot and KV head.
pub(crate) struct HeadMut<'a> {
    pub m: &'a mut [f32],
    pub z: &'a mut [f32],
    /// Open segment: unrotated keys.
    pub k: &'a mut [f32],
    /// Open segment: rotated keys, once any call has rotated.
    pub k_rotated: Option<&'a mut [f32]>,
    /// Open segment: values.
    pub v: &'a mut [f32],
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

impl OpenRef<'_> {
    /// The keys the local branch sees.
    pub fn local(&self, rotated: bool) -> &[f32] {
        if rotated { self.k_rotated.unwrap_or(self.k) } else { self.k }
    }
}

impl HeadMut<'_> {
    pub fn open(&self) -> OpenRef<'_> {
        OpenRef { k: self.k, k_rotated: self.k_rotated.as_deref(), v: self.v }
    }
}

impl<'a> Heads<'a> {
    /// # Safety
    /// No other borrow of this slot's head may live.
    pub unsafe fn head(&self, slot: usize, kv_head: usize) -> HeadMut<'a> {
        let p = &self.problem;
        let (i, dk, dv) = (slot * p.kv_heads() + kv_head, p.key_dim(), p.value_dim());
        let keys = KeyBlocks::new(p).len();
        // SAFETY: the caller's promise.
        unsafe {
            HeadMut {
                m: self.m.part(i, dk * dv),
                z: self.z.part(i, dk),
                k: self.k.part(i, keys),
                k_rotated: self.k_rotated.as_ref().map(|k| k.part(i, keys)),
                v: self.v.part(i, p.segment_len() * dv),
            }
        }
    }

    /// The open segment of a slot's head.
    ///
    /// # Safety
    /// No mutable borrow of this slot's head may live.
    pub unsafe fn open(&self, slot: usize, kv_head: usize) -> OpenRef<'a> {
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
    /// The counters, and the heads for tasks to take.
    pub(crate) fn split(&mut self) -> (&mut [Counters], Heads<'_>) {
        let rotated = &mut self.open.k_rotated;
        let heads = Heads {
            problem: self.problem,
            m: Shared::new(&mut self.m),
            z: Shared::new(&mut self.z),
            k: Shared::new(&mut self.open.k),
            k_rotated: (!rotated.is_empty()).then(|| Shared::new(rotated)),
            v: Shared::new(&mut self.open.v),
        };
        (&mut self.counters, heads)
    }
}
