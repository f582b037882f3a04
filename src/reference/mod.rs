//! Float64 reference: the paper's equations read line by line, one token after another, and their
//! gradients by the chain rule. Slow, and the oracle of every other implementation.
//!
#![doc = include_str!("../../docs/conventions.md")]

mod backward;
mod forward;
mod rows;
mod slots;

pub use backward::{Gradients, OpenGradient, StateGradient, prefill_backward};
pub use forward::{Output, State, prefill};
pub use slots::row_len;
