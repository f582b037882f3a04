//! The threads that calls compute with.
//!
//! There are two pools of them, so that a token does not wait for a prompt: work of a long call keeps
//! all threads of its pool busy. The system shares the cores between the two.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error;

/// Where a call computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// In the calling thread: less work than it takes to wake others.
    Inline,
    /// In the pool of calls that take a token or a few.
    Decode,
    /// In the pool of all others.
    Long,
}

/// The pools of a process, started by the first calls that need them.
struct Pools {
    process: u32,
    /// Threads asked for.
    threads: Option<usize>,
    decode: Option<Arc<ThreadPool>>,
    long: Option<Arc<ThreadPool>>,
}

// Locked only while attached to Python and never across a call into it, so no thread can hold it
// while another forks the process.
static POOLS: Mutex<Pools> =
    Mutex::new(Pools { process: 0, threads: None, decode: None, long: None });

/// Most threads that can be asked for: far more than cores take minutes to start.
fn most_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| 2 * cores.get()).max(256)
}

/// How many threads a pool gets.
fn count(asked: Option<usize>) -> PyResult<usize> {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    let variable = std::env::var(VARIABLE).ok().and_then(|n| n.parse().ok()).filter(|&n| n > 0);
    match (asked, variable) {
        (Some(n), _) => Ok(n),
        (None, Some(n)) if n > most_threads() => {
            Err(error::value(VARIABLE, n, format_args!("1 to {}", most_threads())))
        }
        (None, Some(n)) => Ok(n),
        (None, None) => Ok(std::thread::available_parallelism().map_or(1, |cores| cores.get())),
    }
}

fn build(threads: usize, name: &'static str) -> PyResult<Arc<ThreadPool>> {
    let builder = ThreadPoolBuilder::new().num_threads(threads);
    builder.thread_name(move |i| format!("{name}-{i}")).build().map(Arc::new).map_err(|e| {
        PyRuntimeError::new_err(format!(
            "threads: {threads} could not be started ({e}); ask for fewer (set_num_threads, \
             RAYON_NUM_THREADS)"
        ))
    })
}

/// The pools as they stand in this process.
fn pools() -> std::sync::MutexGuard<'static, Pools> {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if pools.process != process {
        // After a fork (multiprocessing, data loaders) no pool of the parent has threads here; a
        // call would wait for them for ever. Dropping the old pools could wait as well.
        std::mem::forget((pools.decode.take(), pools.long.take()));
        pools.process = process;
    }
    pools
}

/// The pool of a lane.
fn pool(lane: Lane) -> PyResult<Arc<ThreadPool>> {
    let pools = &mut *pools();
    let threads = count(pools.threads)?;
    let (slot, name) = match lane {
        Lane::Decode => (&mut pools.decode, "infini-attn-decode"),
        _ => (&mut pools.long, "infini-attn"),
    };
    match slot {
        Some(pool) => Ok(Arc::clone(pool)),
        None => Ok(Arc::clone(slot.insert(build(threads, name)?))),
    }
}

/// What came of a call, and the exception of a signal that arrived meanwhile.
pub struct Computed<R> {
    pub result: infini_attn::Result<R>,
    pub interrupt: Option<PyErr>,
}

/// Runs `work`, with the interpreter free for other Python threads: the one way by which anything that
/// computes gets there. In the main thread signals are looked for meanwhile; the exception of one
/// (KeyboardInterrupt) sets `cancel` and comes back beside the result.
pub fn compute<R: Send>(
    py: Python<'_>,
    lane: Lane,
    cancel: &AtomicBool,
    work: impl FnOnce() -> infini_attn::Result<R> + Send,
) -> PyResult<Computed<R>> {
    if lane == Lane::Inline {
        return Ok(Computed { result: py.detach(work), interrupt: None });
    }
    let pool = pool(lane)?;
    if !in_main_thread(py)? {
        return Ok(Computed { result: py.detach(|| pool.install(work)), interrupt: None });
    }
    let (mut result, mut interrupt, done) = (None, None, Done::default());
    py.detach(|| {
        pool.in_place_scope(|scope| {
            scope.spawn(|_| {
                let _done = done.guard();
                result = Some(work());
            });
            while !done.wait() {
                if interrupt.is_none() {
                    interrupt = Python::attach(|py| py.check_signals()).err();
                    cancel.store(interrupt.is_some(), Ordering::Relaxed);
                }
            }
        });
    });
    let result = result.expect("the scope ends after its task, and hands on its panic");
    Ok(Computed { result, interrupt })
}

/// [`compute`] in the pool of long calls, of work that changes nothing when it is cancelled.
pub fn cancellable<R: Send>(
    py: Python<'_>,
    cancel: &AtomicBool,
    work: impl FnOnce() -> infini_attn::Result<R> + Send,
) -> PyResult<R> {
    let Computed { result, interrupt } = compute(py, Lane::Long, cancel, work)?;
    interrupt.map_or_else(|| result.map_err(error::python), Err)
}

/// The same of work that a signal does not end early: its exception is raised when that is done.
pub fn run<R: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> infini_attn::Result<R> + Send,
) -> PyResult<R> {
    cancellable(py, &AtomicBool::new(false), work)
}

/// Only there signals are handled; another thread might be ended by Python when it asks for them.
fn in_main_thread(py: Python<'_>) -> PyResult<bool> {
    let threading = py.import(intern!(py, "threading"))?;
    let main = threading.call_method0(intern!(py, "main_thread"))?.getattr(intern!(py, "ident"))?;
    main.eq(threading.call_method0(intern!(py, "get_ident"))?)
}

/// Whether a task is done.
#[derive(Default)]
struct Done(Mutex<bool>, Condvar);

struct Guard<'a>(&'a Done);

impl Done {
    /// Says so when it is dropped, also by a panic.
    fn guard(&self) -> Guard<'_> {
        Guard(self)
    }

    /// Waits for it, a while.
    fn wait(&self) -> bool {
        let done = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, _) = (self.1.wait_timeout_while(done, Duration::from_millis(50), |done| !*done))
            .unwrap_or_else(PoisonError::into_inner);
        *done
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_one();
    }
}

/// Sets how many threads the calls that start from now on compute with, in this process.
///
/// Without it, as many as there are cores, or as the environment variable RAYON_NUM_THREADS says. Calls
/// of a token or a few have as many of their own: they do not wait for long ones.
///
/// Parameters
/// ----------
/// n : int
///     At least 1, at most 256 or twice the number of cores, whichever is more.
///
/// Raises
/// ------
/// RuntimeError
///     When the system does not start so many.
#[pyfunction]
pub fn set_num_threads(n: &Bound<'_, PyAny>) -> PyResult<()> {
    let n: i64 = error::typed("n", n, "an integer")?;
    let most = most_threads();
    let Some(threads) = usize::try_from(n).ok().filter(|&n| (1..=most).contains(&n)) else {
        return Err(error::value("n", n, format_args!("1 to {most}")));
    };
    let long = build(threads, "infini-attn")?;
    let mut pools = pools();
    pools.threads = Some(threads);
    (pools.long, pools.decode) = (Some(long), None);
    Ok(())
}

/// How many threads calls compute with.
#[pyfunction]
pub fn get_num_threads() -> PyResult<usize> {
    count(pools().threads)
}

/// The vector instructions of this machine that the CPU backend uses.
#[pyfunction]
pub fn simd_level() -> &'static str {
    infini_attn::simd_level()
}
