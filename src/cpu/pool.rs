//! Scratch buffers that tasks borrow.

use std::sync::{Mutex, PoisonError};

use crate::error::Result;

/// Scratch buffers that tasks borrow, as many as can run at once. They are made before the first task
/// starts, so that memory that is not there leaves state and outputs as they were.
pub(super) struct Pool<S>(Mutex<Vec<S>>);

impl<S> Pool<S> {
    /// Buffers for `tasks` tasks in the caller's rayon pool.
    pub fn new(tasks: usize, make: impl Fn() -> Result<S>) -> Result<Self> {
        let buffers = (0..tasks.min(rayon::current_num_threads())).map(|_| make());
        Ok(Self(Mutex::new(buffers.collect::<Result<_>>()?)))
    }

    /// Runs one of those tasks. `f` must not wait for other tasks.
    pub fn with<R>(&self, f: impl FnOnce(&mut S) -> R) -> R {
        let mut scratch = self.idle().pop().expect("one buffer per task that runs");
        let result = f(&mut scratch);
        self.idle().push(scratch);
        result
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
