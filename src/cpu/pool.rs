//! Where tasks run, and the scratch buffers that they borrow.

use std::error::Error as _;
use std::sync::{Mutex, OnceLock, PoisonError};

use rayon::ThreadPoolBuilder;
use rayon::prelude::*;

use super::segment::SCRATCH;
use crate::alloc;
use crate::error::{Error, Result};

/// The work, in flop, up to which waking other threads costs more than it saves (docs/cpu.md).
const INLINE_FLOPS: f64 = 500_000.0;

/// Whether the calling thread does so much work alone.
pub(super) fn inline(flops: f64) -> bool {
    flops <= INLINE_FLOPS
}

/// Starts the threads of rayon's global pool, if the caller is in none; rayon itself would panic.
///
/// # Errors
/// [`Error::Threads`].
pub(super) fn start() -> Result<()> {
    static GLOBAL: OnceLock<Option<String>> = OnceLock::new();
    if rayon::current_thread_index().is_some() {
        return Ok(());
    }
    let failure = GLOBAL.get_or_init(|| {
        // Without a source it says that the pool has been started already.
        let result = ThreadPoolBuilder::new().build_global();
        result.err().and_then(|e| e.source().map(|_| e.to_string()))
    });
    match failure {
        None => Ok(()),
        Some(reason) => Err(Error::Threads { reason: reason.clone() }),
    }
}

/// Runs tasks 0 to `count` − 1, `inline` or in the caller's rayon pool.
pub(super) fn each(count: usize, inline: bool, task: impl Fn(usize) + Sync + Send) {
    if inline {
        (0..count).for_each(task);
    } else {
        (0..count).into_par_iter().for_each(task);
    }
}

/// Scratch buffers that tasks borrow, as many as can run at once. They are made before the first task
/// starts, so that memory that is not there leaves state and outputs as they were.
pub(super) struct Pool<S>(Mutex<Vec<S>>);

impl<S> Default for Pool<S> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

/// How many of so many tasks run at once in the caller's rayon pool.
fn at_once(tasks: usize) -> usize {
    if tasks > 1 { tasks.min(rayon::current_num_threads()) } else { tasks }
}

impl<S> Pool<S> {
    /// Buffers for `tasks` tasks.
    pub fn new(tasks: usize, make: impl Fn() -> Result<S>) -> Result<Self> {
        let buffers = (0..at_once(tasks)).map(|_| make());
        Ok(Self(Mutex::new(buffers.collect::<Result<_>>()?)))
    }

    /// The same from buffers of earlier calls, which `fit` makes large enough; those that are not needed
    /// go to `spare`.
    pub fn refit(
        &mut self,
        tasks: usize,
        spare: &mut Vec<S>,
        mut fit: impl FnMut(&mut S) -> Result<()>,
    ) -> Result<()>
    where
        S: Default,
    {
        let (buffers, count) = (self.all(), at_once(tasks));
        alloc::room(buffers, &[count], SCRATCH)?;
        alloc::room(spare, &[spare.len() + buffers.len()], SCRATCH)?;
        spare.extend(buffers.drain(count.min(buffers.len())..));
        buffers.resize_with(count, || spare.pop().unwrap_or_default());
        buffers.iter_mut().try_for_each(&mut fit)
    }

    /// All buffers, while no task has one.
    pub fn all(&mut self) -> &mut Vec<S> {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
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
