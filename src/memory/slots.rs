//! What happens to single slots: copied into others, taken out of a state and put back, cut short.

use std::collections::HashMap;

use super::{Counters, State};
use crate::error::{Error, Result};

impl State {
    /// For every pair (source, target): the slot `target` of this state continues where the slot
    /// `source` of `from` stands. A source may be named several times.
    ///
    /// # Errors
    /// [`Error::Problem`] for states of different problems, [`Error::Value`] for a slot out of range
    /// or a target named twice, [`Error::OutOfMemory`]. Nothing is copied then.
    pub fn copy_slots(&mut self, from: &State, pairs: &[(usize, usize)]) -> Result<()> {
        self.problem.check_same(&from.problem)?;
        check_pairs(pairs, from.sequences(), self.sequences())?;
        let (sources, targets): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        self.make_room(from, &sources)?;
        let problem = self.problem;
        let each = |all: &[f32]| all.len() / from.sequences().max(1);
        let (m, z) = self.own_memory()?;
        for (into, source) in [(m, &from.m), (z, &from.z)] {
            let len = each(source);
            for &(from, to) in pairs {
                into[to * len..][..len].copy_from_slice(&source[from * len..][..len]);
            }
        }
        let rows = from.in_use(sources.into_iter()).zip(targets);
        self.own_open()?.take_over(&problem, &from.open.read(), rows);
        pairs.iter().for_each(|&(from_slot, to)| self.counters[to] = from.counters[from_slot]);
        Ok(())
    }

    /// [`Self::copy_slots`] inside one state. No target is a source too.
    ///
    /// # Errors
    /// As [`Self::copy_slots`], and [`Error::Value`] for a target that is a source.
    pub fn copy_within(&mut self, pairs: &[(usize, usize)]) -> Result<()> {
        check_pairs_within(pairs, self.sequences())?;
        let (sources, targets): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        self.own_open()?;
        let (problem, sequences) = (self.problem, self.sequences());
        let (m, z) = self.own_memory()?;
        for all in [m, z] {
            let len = all.len() / sequences.max(1);
            pairs.iter().for_each(|&(from, to)| {
                all.copy_within(from * len..(from + 1) * len, to * len);
            });
        }
        let rows: Vec<_> = self.in_use(sources.into_iter()).zip(targets).collect();
        self.own_open()?.copy_within(&problem, rows.into_iter());
        pairs.iter().for_each(|&(from, to)| self.counters[to] = self.counters[from]);
        Ok(())
    }

    /// Slot i of `from` takes the place of `slots[i]`: what [`Self::fork`] has taken out, or a file
    /// held, comes back.
    ///
    /// # Errors
    /// [`Error::Length`] unless there is a slot for each of `from`, and those of
    /// [`Self::copy_slots`].
    pub fn restore(&mut self, slots: &[usize], from: &State) -> Result<()> {
        check_restored(slots, from)?;
        let pairs: Vec<_> = (0..).zip(slots.iter().copied()).collect();
        self.copy_slots(from, &pairs)
    }

    /// Takes back the last tokens of a slot, such as drafts that were not accepted: the stream goes on
    /// behind its first `tokens`. That reaches back to where its open segment begins.
    ///
    /// ```
    /// # use infini_attn::{Inputs, Outputs, Problem, State, TensorView, TensorViewMut, prefill};
    /// # let problem = Problem::builder().head_dim(8).segment_len(16).build()?;
    /// # let mut state = State::new(&problem, 1)?;
    /// # let (x, mut o) = ([0.5; 20 * 8], [0.0; 20 * 8]);
    /// # let view = TensorView::new(&x, &[1, 20, 1, 8])?;
    /// # let outputs = Outputs::new(TensorViewMut::new(&mut o, &[1, 20, 1, 8])?);
    /// # prefill(&problem, &Inputs::new(view, view, view), &[0.0], &mut state, outputs)?;
    /// assert_eq!((state.tokens(0), state.open_len(0)), (20, 4));
    /// state.truncate(0, 18)?;
    /// assert_eq!((state.tokens(0), state.open_len(0)), (18, 2));
    /// assert!(state.truncate(0, 15).is_err()); // The first 16 are in the memory.
    /// # Ok::<(), infini_attn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Value`] for a slot out of range or more tokens than it has seen,
    /// [`Error::Committed`]. The state is as it was then.
    pub fn truncate(&mut self, slot: usize, tokens: u64) -> Result<()> {
        let truncated = self.truncated(slot, tokens)?;
        self.counters[slot] = truncated;
        self.note_filled([slot]);
        Ok(())
    }

    /// The counters of a slot after [`Self::truncate`].
    pub(crate) fn truncated(&self, slot: usize, tokens: u64) -> Result<Counters> {
        let Some(counters) = self.counters.get(slot) else {
            let expected = format!("less than the state's {} slots", self.sequences());
            return Err(Error::value("slot", slot, expected));
        };
        counters.truncated(slot, tokens)
    }

    /// A new state of `slots` slots, of which the first are those of this one and the others empty.
    ///
    /// # Errors
    /// [`Error::Value`] for fewer slots than there are, [`Error::OutOfMemory`].
    pub fn resized(&self, slots: usize) -> Result<State> {
        check_resized(self.sequences(), slots)?;
        let mut resized = State::new(&self.problem, slots)?;
        let pairs: Vec<_> = (0..self.sequences()).map(|slot| (slot, slot)).collect();
        resized.copy_slots(self, &pairs)?;
        Ok(resized)
    }

    /// Room of this state's own for copies of other slots.
    fn make_room(&mut self, from: &State, sources: &[usize]) -> Result<()> {
        let rotates =
            |&slot: &usize| from.counters[slot].open_len > 0 && from.counters[slot].rotated;
        if let Some(&slot) = sources.iter().find(|slot| rotates(slot))
            && self.cannot_rotate()
        {
            let expected = "false: the state has no room for rotated keys";
            return Err(Error::value(format!("rotated[{slot}]"), true, expected));
        }
        let first_rotation = sources.iter().any(rotates) && self.ensure_rotated()?;
        let room = self.own_open().map(drop).and_then(|()| self.own_memory().map(drop));
        if room.is_err() && first_rotation {
            self.forget_rotated();
        }
        room
    }
}

impl Counters {
    /// Those of a stream whose last tokens are taken back.
    pub(crate) fn truncated(&self, slot: usize, tokens: u64) -> Result<Self> {
        let least = self.tokens - self.open_len as u64;
        if tokens > self.tokens {
            let expected = format!("at most the {} that slot {slot} has seen", self.tokens);
            return Err(Error::value("tokens", tokens, expected));
        }
        if tokens < least {
            return Err(Error::Committed { slot, tokens, least });
        }
        Ok(Self { tokens, open_len: (tokens - least) as usize, ..*self })
    }
}

/// Pairs (source, target) must lie inside their states, no target twice.
pub(crate) fn check_pairs(pairs: &[(usize, usize)], sources: usize, targets: usize) -> Result<()> {
    let range = |i: usize, role: &str, slot: usize, slots: usize| {
        let expected = format!("less than the state's {slots} slots");
        let wrong = || Error::value(format!("pairs[{i}] ({role})"), slot, expected);
        if slot < slots { Ok(()) } else { Err(wrong()) }
    };
    let mut written = HashMap::new();
    for (i, &(source, target)) in pairs.iter().enumerate() {
        range(i, "source", source, sources)?;
        range(i, "target", target, targets)?;
        if let Some(first) = written.insert(target, i) {
            let expected = format!("a slot other than that of pairs[{first}]");
            return Err(Error::value(format!("pairs[{i}] (target)"), target, expected));
        }
    }
    Ok(())
}

/// The same inside one state, where no target is a source.
pub(crate) fn check_pairs_within(pairs: &[(usize, usize)], slots: usize) -> Result<()> {
    check_pairs(pairs, slots, slots)?;
    let written: HashMap<_, _> = pairs.iter().enumerate().map(|(i, &(_, to))| (to, i)).collect();
    for (i, (from, _)) in pairs.iter().enumerate() {
        if let Some(other) = written.get(from) {
            let expected = format!("a slot other than that which pairs[{other}] writes");
            return Err(Error::value(format!("pairs[{i}] (source)"), from, expected));
        }
    }
    Ok(())
}

/// A slot for each of the state that is put back.
pub(crate) fn check_restored(slots: &[usize], from: &State) -> Result<()> {
    if slots.len() == from.sequences() {
        return Ok(());
    }
    let expected = format!("{} (the slots of the state put back)", from.sequences());
    Err(Error::Length { argument: "slots", got: slots.len(), expected })
}

/// No slot is lost.
pub(crate) fn check_resized(sequences: usize, slots: usize) -> Result<()> {
    if slots >= sequences {
        return Ok(());
    }
    Err(Error::value("slots", slots, format!("at least the {sequences} that there are")))
}
