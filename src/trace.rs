//! A span of the crate `tracing` around every call, with the feature `tracing`; without it nothing.
//!
//! Level DEBUG, target `infini_attn`, the function's name. Fields: `shapes`; `sequences`, `tokens` (of
//! all of them) and `slots` once they are checked; on a device `plan`, the title of what it runs, whose
//! table is an event of level TRACE; `error` when the call has failed.

#[cfg(feature = "cuda")]
use std::fmt::Display;

use crate::error::Result;

/// The span of a call of that name on problems of such shapes (which are not asked for in vain).
#[cfg(feature = "tracing")]
macro_rules! span {
    ($name:literal, $shapes:expr) => {
        $crate::trace::Span(tracing::debug_span!(
            target: "infini_attn",
            $name,
            shapes = %$shapes,
            sequences = tracing::field::Empty,
            tokens = tracing::field::Empty,
            slots = tracing::field::Empty,
            plan = tracing::field::Empty,
            error = tracing::field::Empty,
        ))
    };
}
#[cfg(not(feature = "tracing"))]
macro_rules! span {
    ($name:literal, $shapes:expr) => {
        $crate::trace::Span()
    };
}
pub(crate) use span;

/// The span of one call.
pub(crate) struct Span(#[cfg(feature = "tracing")] pub tracing::Span);

#[cfg(feature = "tracing")]
impl Span {
    /// Does the work of the call within the span.
    pub fn run<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let result = self.0.in_scope(work);
        if let Err(error) = &result {
            self.0.record("error", tracing::field::display(error));
        }
        result
    }

    /// Notes the new tokens of every sequence.
    pub fn lens(&self, lens: impl ExactSizeIterator<Item = usize>) {
        if !self.0.is_disabled() {
            self.0.record("sequences", lens.len());
            self.0.record("tokens", lens.fold(0, usize::saturating_add));
        }
    }

    /// The same for sequences of one length.
    pub fn batch(&self, sequences: usize, len: usize) {
        self.0.record("sequences", sequences);
        self.0.record("tokens", sequences.saturating_mul(len));
    }

    /// Notes the slots that the call works on.
    pub fn slots(&self, slots: impl Iterator<Item = usize>) {
        if !self.0.is_disabled() {
            self.0.record("slots", tracing::field::debug(slots.collect::<Vec<_>>()));
        }
    }

    /// Notes what a device will do: a title, and all of it.
    #[cfg(feature = "cuda")]
    pub fn plan(&self, title: &str, table: impl Display) {
        self.0.record("plan", title);
        tracing::trace!(target: "infini_attn", parent: &self.0, plan = %table);
    }
}

#[cfg(not(feature = "tracing"))]
impl Span {
    pub fn run<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        work()
    }

    pub fn lens(&self, _: impl ExactSizeIterator<Item = usize>) {}

    pub fn batch(&self, _: usize, _: usize) {}

    pub fn slots(&self, _: impl Iterator<Item = usize>) {}

    #[cfg(feature = "cuda")]
    pub fn plan(&self, _: &str, _: impl Display) {}
}
