//! Kernels with one mistake each, which must be reported at its line, and their corrected twins,
//! about which nothing may be said.
//!
//! Texts begin where every kernel does: `case.rs` says which registers have been set by then.

mod barriers;
mod case;
mod copies;
mod idioms;
mod lanes;
mod launches;
mod memory;
mod products;
mod races;
mod registers;
mod tensor_loads;
mod tensor_stores;
mod transactions;
