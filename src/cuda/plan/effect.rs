//! What a run changes in the counters of a state.

use super::params::INFINI_PAD_SLOT;
use crate::memory::Counters;

/// Slot of a sequence that is padding of the batch, in a table of sequences ([`Runs::Table`]): nothing is
/// read for it and no slot changes; its output rows become 0 like those of padding, its log-sum-exp −∞.
/// Any number of sequences may be padding. In device memory −1, all bits set as well.
///
/// [`Runs::Table`]: crate::cuda::Runs::Table
pub const PAD_SLOT: usize = usize::MAX;

const _: () = assert!(PAD_SLOT as i32 == INFINI_PAD_SLOT);

/// What a run changes in the counters.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    /// Nothing: no state is touched.
    None,
    /// Counters of slots change from what was found when it was planned.
    Set(Vec<Change>),
    /// Slots become copies.
    Copy(Vec<Copied>),
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
            Self::Set(slots) => Some(slots.iter().map(|change| change.slot).collect()),
            Self::Copy(slots) => Some(slots.iter().map(|copied| copied.to).collect()),
            Self::Reset(slots) => Some(slots.clone()),
            Self::Flush(slots) => Some(slots.iter().map(|(slot, _)| *slot).collect()),
            Self::Tokens(Tokens { kind: Kind::Table(_), .. }) => None,
            Self::Tokens(tokens) => {
                let touched = tokens.sequences.iter().filter(|(_, len)| *len > 0);
                Some(touched.map(|(slot, _)| *slot).collect())
            }
        }
    }
}

/// What becomes of one slot's counters.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub slot: usize,
    pub found: Counters,
    pub after: Counters,
}

impl Change {
    /// Of every slot of a state, in their order.
    pub fn all(found: &[Counters], after: &[Counters]) -> Vec<Self> {
        let slots = found.iter().zip(after).enumerate();
        slots.map(|(slot, (&found, &after))| Self { slot, found, after }).collect()
    }
}

/// A slot that becomes a copy.
#[derive(Clone, Debug)]
pub(crate) struct Copied {
    /// The slot it is a copy of, where that is of the same state.
    pub from: Option<usize>,
    pub to: usize,
    /// Those of the copied slot when it was planned.
    pub counters: Counters,
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
