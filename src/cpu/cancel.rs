//! Ending a call early.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// A call's flag, as far as its tasks have looked at it.
pub(super) struct Cancel<'a> {
    flag: Option<&'a AtomicBool>,
    /// Whether one has seen it set: it might be taken back.
    seen: AtomicBool,
    /// Whether a task may leave its work undone then; otherwise only what comes after it is left.
    within_tasks: bool,
}

impl<'a> Cancel<'a> {
    /// For a call that checks after its tasks whether they were done.
    pub fn within_tasks(flag: Option<&'a AtomicBool>) -> Self {
        Self { flag, seen: AtomicBool::new(false), within_tasks: true }
    }

    /// For a call that takes in what its tasks have begun.
    pub fn between_tasks(flag: Option<&'a AtomicBool>) -> Self {
        Self { within_tasks: false, ..Self::within_tasks(flag) }
    }

    /// Whether anybody can ask the call to end.
    pub fn is_possible(&self) -> bool {
        self.flag.is_some()
    }

    /// Whether a task leaves its work undone. The call then never counts it.
    pub fn abandons(&self) -> bool {
        self.within_tasks && self.requested()
    }

    fn requested(&self) -> bool {
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
