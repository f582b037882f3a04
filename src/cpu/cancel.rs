//! Ending a call early.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// A call's flag, as far as its tasks have looked at it.
pub(super) struct Cancel<'a> {
    flag: Option<&'a AtomicBool>,
    /// Whether one has seen it set: it might be taken back.
    seen: AtomicBool,
}

impl<'a> Cancel<'a> {
    pub fn new(flag: Option<&'a AtomicBool>) -> Self {
        Self { flag, seen: AtomicBool::new(false) }
    }

    /// Whether anybody can ask the call to end.
    pub fn is_possible(&self) -> bool {
        self.flag.is_some()
    }

    /// Whether the call was asked to end. What a task leaves undone then never counts.
    pub fn requested(&self) -> bool {
        let Some(flag) = self.flag else { return false };
        if flag.load(Ordering::Relaxed) {
            self.seen.store(true, Ordering::Relaxed);
        }
        self.seen.load(Ordering::Relaxed)
    }

    /// # Errors
    /// [`Error::Cancelled`] with no token taken in, of so many sequences.
    pub fn go_on(&self, sequences: usize) -> Result<()> {
        match self.requested() {
            true => Err(Error::Cancelled { taken: vec![0; sequences] }),
            false => Ok(()),
        }
    }
}
