//! What a run changes in the counters of a state.

use crate::memory::Counters;

/// What a run changes in the counters.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    /// Nothing: no state is touched.
    None,
    /// Every slot's counters change from what was found when it was planned.
    Set(Vec<(Counters, Counters)>),
    /// Slots are emptied.
    Reset(Vec<usize>),
    /// Open segments are committed. With the counters found when it was planned.
    Flush(Vec<(usize, Counters)>),
    /// Sequences bring new tokens.
    Tokens(Tokens),
}

#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    /// Slot and new tokens of every sequence.
    pub sequences: Vec<(usize, usize)>,
    /// Rows of the rotation tables, and whether positions continue from the state.
    pub rotation: Option<(usize, bool)>,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// Planned for these counters, one per sequence, and no others.
    Once(Vec<Counters>),
    /// Runs from any counters.
    Replay,
    /// The same, with sequences from device memory: at most so many tokens each.
    Table(usize),
}
