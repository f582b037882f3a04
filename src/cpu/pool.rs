//! Scratch buffers that tasks borrow.

use std::sync::Mutex;

/// Scratch buffers that tasks borrow: never more than run at once.
pub(super) struct Pool<S>(Mutex<Vec<S>>);

impl<S> Default for Pool<S> {
    fn default() -> Self {
        Self(Mutex::new(Vec::new()))
    }
}

impl<S> Pool<S> {
    pub fn with<R>(&self, new: impl FnOnce() -> S, f: impl FnOnce(&mut S) -> R) -> R {
        let idle = self.0.lock().unwrap_or_else(|e| e.into_inner()).pop();
        let mut scratch = idle.unwrap_or_else(new);
        let result = f(&mut scratch);
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push(scratch);
        result
    }
}
