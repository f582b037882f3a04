//! What a test run must show although the test passes.

use std::fmt::Display;
use std::io::Write;

/// A line on stderr, past the test harness, which shows what is printed only where a test fails.
pub fn say(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
