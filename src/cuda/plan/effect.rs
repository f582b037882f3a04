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

impl Effect {
    /// The slots that a run works on; none: those that a table in device memory names.
    pub fn slots(&self) -> Option<Vec<usize>> {
        match self {
            Self::None => Some(Vec::new()),
            Self::Set(slots) => Some((0..slots.len()).collect()),
            Self::Reset(slots) => Some(slots.clone()),
            Self::Flush(slots) => Some(slots.iter().map(|(slot, _)| *slot).collect()),
            Self::Tokens(Tokens { kind: Kind::Table(_), .. }) => None,
            Self::Tokens(tokens) => Some(tokens.sequences.iter().map(|(slot, _)| *slot).collect()),
        }
    }
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
