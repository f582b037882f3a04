//! The floats of a state.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Floats that a state owns, or that lie in memory which a caller lends to it ([`super::lent`]).
#[derive(Debug)]
pub(crate) struct Floats(Memory);

#[derive(Debug)]
enum Memory {
    Own(Vec<f32>),
    Lent(NonNull<f32>, usize),
}

// SAFETY: a vector, or a unique borrow ([`Floats::lent`]).
unsafe impl Send for Floats {}
// SAFETY: as above.
unsafe impl Sync for Floats {}

impl Floats {
    /// The elements of a slice, to work on in place.
    ///
    /// # Safety
    /// The slice must outlive what is returned, and nothing else may use it meanwhile.
    pub unsafe fn lent(floats: &mut [f32]) -> Self {
        Self(Memory::Lent(NonNull::from(&mut *floats).cast(), floats.len()))
    }

    pub fn is_lent(&self) -> bool {
        matches!(self.0, Memory::Lent(..))
    }
}

impl From<Vec<f32>> for Floats {
    fn from(floats: Vec<f32>) -> Self {
        Self(Memory::Own(floats))
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Memory::Own(floats) => floats,
            // SAFETY: a slice of this length, lent for as long as `self` lives.
            Memory::Lent(ptr, len) => unsafe { std::slice::from_raw_parts(ptr.as_ptr(), *len) },
        }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            Memory::Own(floats) => floats,
            // SAFETY: as above, and lent to `self` alone.
            Memory::Lent(ptr, len) => unsafe { std::slice::from_raw_parts_mut(ptr.as_ptr(), *len) },
        }
    }
}
