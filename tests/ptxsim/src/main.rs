//! Runs a kernel described by a JSON file.
fn main() {}
