//! Contexts: the primary one and those that programs create, and which is current in a thread.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::error::{Code, INVALID_CONTEXT, Result};

thread_local! {
    /// Contexts of this thread, the current one last.
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug, Default)]
struct Context {
    /// A kernel has failed: so does everything from then on.
    failed: Option<Code>,
}

/// The contexts there are.
#[derive(Debug, Default)]
pub struct Contexts {
    alive: HashMap<usize, Context>,
    /// The handle of the primary context, always the same, and how often it is retained.
    primary: Option<usize>,
    retained: u32,
}

impl Contexts {
    /// A context that is destroyed explicitly.
    pub fn create(&mut self, handle: usize) {
        self.alive.insert(handle, Context::default());
        push(handle);
    }

    /// The primary context, which gets `new` for a handle when there is none yet.
    pub fn retain(&mut self, new: usize) -> usize {
        let handle = *self.primary.get_or_insert(new);
        self.alive.entry(handle).or_default();
        self.retained += 1;
        handle
    }

    /// Gives it up once; the handle when that was the last time.
    pub fn release(&mut self) -> Result<Option<usize>> {
        self.retained = self.retained.checked_sub(1).ok_or(INVALID_CONTEXT)?;
        Ok(self.primary.filter(|_| self.retained == 0))
    }

    /// Forgets a failure of the primary context, which stays retained; its handle.
    pub fn reset_primary(&mut self) -> Option<usize> {
        let context = self.alive.get_mut(&self.primary?)?;
        context.failed = None;
        self.primary
    }

    /// Ends a context that a program has created.
    pub fn destroy(&mut self, handle: usize) -> Result {
        if self.primary == Some(handle) || !self.alive.contains_key(&handle) {
            return Err(INVALID_CONTEXT);
        }
        self.end(handle);
        if current() == handle {
            pop()?;
        }
        Ok(())
    }

    pub fn end(&mut self, handle: usize) {
        self.alive.remove(&handle);
    }

    /// Makes a context current in place of the one that is; 0: the one before that.
    pub fn set_current(&self, handle: usize) -> Result {
        if handle != 0 && !self.alive.contains_key(&handle) {
            return Err(INVALID_CONTEXT);
        }
        _ = pop();
        if handle != 0 {
            push(handle);
        }
        Ok(())
    }

    /// Makes a context current and keeps the one before.
    pub fn push_current(&self, handle: usize) -> Result {
        if !self.alive.contains_key(&handle) {
            return Err(INVALID_CONTEXT);
        }
        push(handle);
        Ok(())
    }

    /// The context that is current.
    pub fn current(&self) -> Result<usize> {
        Some(current()).filter(|handle| self.alive.contains_key(handle)).ok_or(INVALID_CONTEXT)
    }

    pub fn fail(&mut self, handle: usize, code: Code) {
        if let Some(context) = self.alive.get_mut(&handle) {
            context.failed = Some(code);
        }
    }

    /// Whether everything goes on in a context.
    pub fn status(&self, handle: usize) -> Result {
        let context = self.alive.get(&handle).ok_or(INVALID_CONTEXT)?;
        context.failed.map_or(Ok(()), Err)
    }
}

/// The contexts of this thread, none while it ends.
fn stack<T>(work: impl FnOnce(&mut Vec<usize>) -> T) -> Option<T> {
    CURRENT.try_with(|current| work(&mut current.borrow_mut())).ok()
}

fn push(handle: usize) {
    stack(|current| current.push(handle));
}

/// The handle that is current in this thread, 0 without one.
pub fn current() -> usize {
    stack(|current| current.last().copied()).flatten().unwrap_or(0)
}

/// Takes the current context off.
pub fn pop() -> Result<usize> {
    stack(Vec::pop).flatten().ok_or(INVALID_CONTEXT)
}
