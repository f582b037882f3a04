//! Calls by function, and one that is refused: for tests of programs that must bear it. Each thread
//! counts and refuses its own.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::fmt::Write;

use crate::error::{LOST, OUT_OF_MEMORY, Result};

thread_local! {
    static CALLS: RefCell<Calls> = RefCell::default();
}

#[derive(Default)]
struct Calls {
    /// Since the last `ptxsim_refuse`.
    counts: BTreeMap<&'static str, u64>,
    /// A function, and which of its calls; `*`: every function from that call on.
    refused: Option<(String, u64)>,
}

/// Counts a call of a function; an error if it is the one to refuse.
pub fn admit(function: &'static str) -> Result {
    // None while the thread ends.
    let admitted = CALLS.try_with(|calls| {
        let Calls { counts, refused } = &mut *calls.borrow_mut();
        let count = counts.entry(function).or_default();
        *count += 1;
        let (count, all_calls) = (*count, counts.values().sum::<u64>());
        match refused {
            Some((refused, nth)) if refused == function && *nth == count => Err(OUT_OF_MEMORY),
            Some((all, nth)) if all == "*" && all_calls >= *nth => Err(LOST),
            _ => Ok(()),
        }
    });
    admitted.unwrap_or(Ok(()))
}

/// Begins to count this thread's calls anew, and refuses call number `nth` of a function, the first
/// being 1, as if there were no memory for it; none for null. For `*` all calls from number `nth` on,
/// whatever the function, as if the device were lost.
///
/// # Safety
/// `function` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ptxsim_refuse(function: *const c_char, nth: u64) {
    // SAFETY: the caller's promise.
    let name = (!function.is_null()).then(|| unsafe { CStr::from_ptr(function) });
    let refused = name.map(|name| (name.to_string_lossy().into_owned(), nth));
    CALLS.set(Calls { counts: BTreeMap::new(), refused });
}

/// Writes a line `function count` for every function that this thread has called since, as far as `len`
/// bytes go, and a 0.
///
/// # Safety
/// `text` points to `len` bytes, at least one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ptxsim_calls(text: *mut c_char, len: usize) {
    let mut lines = String::new();
    CALLS.with_borrow(|calls| {
        for (function, count) in &calls.counts {
            _ = writeln!(lines, "{function} {count}");
        }
    });
    lines.truncate(len.saturating_sub(1));
    // SAFETY: the caller's promise; the text is ASCII.
    unsafe {
        text.copy_from_nonoverlapping(lines.as_ptr().cast(), lines.len());
        text.add(lines.len()).write(0);
    }
}
