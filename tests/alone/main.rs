//! What the whole process has to be watched for: every allocation, every thread. One test at a time.

#[path = "../common/mod.rs"]
mod common;

mod allocations;
mod files;
mod gradients;
mod memory;
#[cfg(target_os = "linux")]
mod out_of_memory;
mod pool;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Held by a test as long as it runs.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
