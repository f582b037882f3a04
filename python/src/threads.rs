//! The thread pool that calls run in.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error;

/// The process that may use `pool`, and the threads asked for.
struct Pool {
    process: u32,
    threads: Option<usize>,
    /// None: rayon's global pool.
    pool: Option<Arc<ThreadPool>>,
}

// Locked only while attached to Python and never across a call into it, so no thread can hold it
// while another forks the process.
static POOL: Mutex<Pool> = Mutex::new(Pool { process: 0, threads: None, pool: None });

fn build(threads: Option<usize>) -> PyResult<Arc<ThreadPool>> {
    ThreadPoolBuilder::new()
        .num_threads(threads.unwrap_or(0))
        .thread_name(|i| format!("infini-attn-{i}"))
        .build()
        .map(Arc::new)
        .map_err(|e| PyRuntimeError::new_err(format!("thread pool: {e}")))
}

/// The pool for this process, None for rayon's global one.
fn current() -> PyResult<Option<Arc<ThreadPool>>> {
    let mut state = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if state.process == 0 {
        state.process = process;
    }
    if state.process != process {
        // After a fork (multiprocessing, data loaders) no pool of the parent has threads here; a
        // call would wait for them for ever. Dropping the old pool could wait as well.
        let fresh = build(state.threads)?;
        std::mem::forget(state.pool.replace(fresh));
        state.process = process;
    }
    Ok(state.pool.clone())
}

/// Runs `work` in the pool, with the interpreter free for other Python threads: the one way by which
/// anything that computes gets there.
pub fn run<R: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> infini_attn::Result<R> + Send,
) -> PyResult<R> {
    let pool = current()?;
    let result = py.detach(|| match pool {
        Some(pool) => pool.install(work),
        None => work(),
    });
    result.map_err(error::python)
}

/// Sets how many threads the calls that start from now on compute with, in this process.
///
/// Without it, as many as there are cores, or as the environment variable RAYON_NUM_THREADS says.
///
/// Parameters
/// ----------
/// n : int
///     At least 1.
#[pyfunction]
pub fn set_num_threads(n: &Bound<'_, PyAny>) -> PyResult<()> {
    let n: i64 = error::typed("n", n, "an integer")?;
    let Some(threads) = usize::try_from(n).ok().filter(|&n| (1..=1 << 16).contains(&n)) else {
        return Err(error::value("n", n, "1 to 65536"));
    };
    current()?;
    let pool = build(Some(threads))?;
    let mut state = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    state.threads = Some(threads);
    state.pool = Some(pool);
    Ok(())
}

/// How many threads calls compute with.
#[pyfunction]
pub fn get_num_threads() -> PyResult<usize> {
    Ok(current()?.map_or_else(rayon::current_num_threads, |p| p.current_num_threads()))
}

/// The vector instructions of this machine that the CPU backend uses.
#[pyfunction]
pub fn simd_level() -> &'static str {
    infini_attn::simd_level()
}
