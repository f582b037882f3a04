//! Looking up the same few actors in a clock again and again.

use std::cell::Cell;

use super::{Actor, Clock};

/// Actors that are remembered: those of a block, mostly.
const SLOTS: usize = 16;

/// What a clock has of an actor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    /// The time up to which all of its lanes are known.
    pub all: u32,
    /// Whether nothing is known of single lanes beyond that.
    pub exactly: bool,
}

/// Answers of one clock; to be cleared when it changes.
#[derive(Clone, Debug, Default)]
pub(super) struct Memo([Cell<Option<(Actor, Known)>>; SLOTS]);

impl Memo {
    #[inline]
    pub fn known(&self, clock: &Clock, actor: Actor) -> Known {
        let slot = &self.0[(actor.index() as usize + 5 * actor.kind() as usize) % SLOTS];
        match slot.get() {
            Some((found, known)) if found == actor => known,
            _ => {
                let known = clock.known(actor);
                slot.set(Some((actor, known)));
                known
            }
        }
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
