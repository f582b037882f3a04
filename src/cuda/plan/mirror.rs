//! The host's copy of a state's counters.

use std::fmt::Display;

use super::Plan;
use super::effect::{Change, Copied, Effect, Kind, PAD_SLOT, Tokens};
use super::layout::StateLayout;
use super::params::InfiniCounters;
use crate::call::check::check_continued;
use crate::call::form::{Sequence, pieces};
use crate::error::{Error, Result};
use crate::memory::{Counters, add_tokens};
use crate::problem::Problem;

/// The host's copy of a state's counters: what plans are made from. [`Self::advance`] keeps it in
/// step with the device; [`Self::break_off`] notes where that was not possible.
#[derive(Clone, Debug, PartialEq)]
pub struct Mirror {
    layout: StateLayout,
    counters: Vec<Counters>,
    /// Slots in which a run was broken off.
    unfinished: Vec<bool>,
}

impl Mirror {
    /// The mirror of a pool of empty states.
    pub fn new(layout: &StateLayout) -> Self {
        let (counters, unfinished) = (Counters::default(), vec![false; layout.slots()]);
        Self { layout: *layout, counters: vec![counters; layout.slots()], unfinished }
    }

    /// The mirror of a state with these counters, one per slot, as they lie in device memory at
    /// [`InfiniState::counters`](super::params::InfiniState::counters); `taken` and `reserved` are not
    /// looked at.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of slots; [`Error::Value`] for counters that no sequence of
    /// calls leads to, and for an open segment with rotation where the layout has no room for that.
    ///
    /// ```no_run
    /// # use infini_attn::{DType, Problem};
    /// use infini_attn::cuda::{Mirror, StateLayout, params::InfiniCounters};
    /// # let problem = Problem::builder().head_dim(128).segment_len(256).dtype(DType::BF16).build()?;
    /// let layout = StateLayout::new(&problem, 1, false)?;
    /// let seen = InfiniCounters { tokens: 300, committed: 256, open_len: 44, ..Default::default() };
    /// assert_eq!(Mirror::with_counters(&layout, &[seen])?.open_len(0), 44);
    /// # Ok::<(), infini_attn::Error>(())
    /// ```
    pub fn with_counters(layout: &StateLayout, counters: &[InfiniCounters]) -> Result<Self> {
        let counters: Vec<Counters> = counters.iter().map(|&c| c.into()).collect();
        Self::of(layout, counters)
    }

    /// The same, in the host's form.
    pub(crate) fn of(layout: &StateLayout, counters: Vec<Counters>) -> Result<Self> {
        let mut mirror = Self::new(layout);
        mirror.take_over(counters)?;
        Ok(mirror)
    }

    /// Takes over what the device's counters are found to be. Slots in which a run was broken off keep
    /// theirs, and stay refused.
    ///
    /// # Errors
    /// Those of [`Self::with_counters`]; nothing changes then.
    pub fn refresh(&mut self, counters: &[InfiniCounters]) -> Result<()> {
        let kept = |slot| self.unfinished.get(slot) == Some(&true);
        let found = counters.iter().enumerate();
        let found = found.map(|(slot, &c)| if kept(slot) { self.counters[slot] } else { c.into() });
        self.take_over(found.collect())
    }

    fn take_over(&mut self, counters: Vec<Counters>) -> Result<()> {
        if counters.len() != self.layout.slots() {
            let (got, expected) = (counters.len(), format!("{} (slots)", self.layout.slots()));
            return Err(Error::Length { argument: "state", got, expected });
        }
        for (slot, c) in counters.iter().enumerate() {
            c.check(self.problem(), slot)?;
            self.check_room(c, format_args!("rotated[{slot}]"))?;
        }
        self.counters = counters;
        Ok(())
    }

    /// That there is room for the rotated keys of a slot with these counters.
    pub(crate) fn check_room(&self, c: &Counters, argument: impl Display) -> Result<()> {
        if c.open_len > 0 && c.rotated && !self.layout.rotation() {
            let expected = "false: the state has no room for rotated keys";
            return Err(Error::value(argument.to_string(), true, expected));
        }
        Ok(())
    }

    /// The mirror of a larger pool that begins with these slots, those in which a run was broken off
    /// empty and refused; the slots that are to be copied.
    pub(crate) fn resized(&self, layout: &StateLayout) -> (Self, Vec<usize>) {
        let (mut resized, slots) = (Self::new(layout), 0..self.counters.len());
        resized.unfinished[slots.clone()].copy_from_slice(&self.unfinished);
        (resized, slots.filter(|&slot| !self.unfinished[slot]).collect())
    }

    /// The layout of the mirrored state.
    pub fn layout(&self) -> &StateLayout {
        &self.layout
    }

    /// The problem of the mirrored state.
    pub fn problem(&self) -> &Problem {
        self.layout.problem()
    }

    pub(crate) fn counters(&self) -> &[Counters] {
        &self.counters
    }

    /// Tokens the slot has seen; also the default position of its next token.
    ///
    /// # Panics
    /// This and the two accessors below panic for a slot that the state does not have.
    pub fn tokens(&self, slot: usize) -> u64 {
        self.counters[slot].tokens
    }

    /// Tokens the slot has written into its memory.
    pub fn committed(&self, slot: usize) -> u64 {
        self.counters[slot].committed
    }

    /// Tokens in the slot's open segment, 0 to N − 1.
    pub fn open_len(&self, slot: usize) -> usize {
        self.counters[slot].open_len
    }

    /// Whether a run of the plan would be valid now.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn check(&self, plan: &Plan) -> Result<()> {
        self.after(plan, None).map(drop)
    }

    /// Accounts for one run of the plan. Runs are asynchronous: call it before the run, or the
    /// replay of its graph, and skip that if this fails.
    ///
    /// # Errors
    /// Nothing changes then. [`Error::Problem`] or [`Error::Length`] for a plan of another state;
    /// [`Error::Value`] when positions continued from the state leave the rotation tables, when a
    /// stream would pass 2^62 tokens, or when the plan runs once and the state has moved since it was
    /// made; [`Error::RotationChanged`]; [`Error::Unfinished`] after [`Self::break_off`].
    pub fn advance(&mut self, plan: &Plan) -> Result<()> {
        self.counters = self.after(plan, None)?;
        if let (Effect::Reset(_) | Effect::Copy(_), Some(slots)) =
            (&plan.effect, plan.effect.slots())
        {
            slots.into_iter().for_each(|slot| self.unfinished[slot] = false);
        }
        Ok(())
    }

    /// Accounts for a run of which the device has taken some steps and no more, in place of
    /// [`Self::advance`]: until they are reset or become copies, the slots that it works on are refused.
    ///
    /// # Errors
    /// [`Error::Problem`] or [`Error::Length`] for a plan of another state; nothing changes then.
    pub fn break_off(&mut self, plan: &Plan) -> Result<()> {
        self.check_layout(plan)?;
        match plan.effect.slots() {
            Some(slots) => slots.into_iter().for_each(|slot| self.unfinished[slot] = true),
            None => self.unfinished.fill(true),
        }
        Ok(())
    }

    /// That no run was broken off in these slots.
    ///
    /// # Errors
    /// [`Error::Unfinished`].
    pub(crate) fn check_finished(&self, slots: impl IntoIterator<Item = usize>) -> Result<()> {
        match slots.into_iter().find(|&slot| self.unfinished[slot]) {
            Some(slot) => Err(Error::Unfinished { slot }),
            None => Ok(()),
        }
    }

    fn check_layout(&self, plan: &Plan) -> Result<()> {
        let Some(state) = plan.state() else { return Ok(()) };
        self.problem().check_same(state.problem())?;
        if state.slots() != self.counters.len() {
            let (got, expected) = (self.counters.len(), format!("{} (slots)", state.slots()));
            return Err(Error::Length { argument: "state", got, expected });
        }
        Ok(())
    }

    /// [`Self::advance`] for a plan whose sequences lie in device memory: what that table holds in
    /// this run, slot (or [`PAD_SLOT`]) and number of new tokens of every sequence.
    ///
    /// # Errors
    /// As [`Self::advance`], and [`Error::Value`] or [`Error::Length`] for a table that the plan does
    /// not allow.
    pub fn advance_table(&mut self, plan: &Plan, sequences: &[(usize, usize)]) -> Result<()> {
        self.counters = self.after(plan, Some(sequences))?;
        Ok(())
    }

    /// The counters after a run.
    fn after(&self, plan: &Plan, table: Option<&[(usize, usize)]>) -> Result<Vec<Counters>> {
        self.check_layout(plan)?;
        let mut counters = self.counters.clone();
        match &plan.effect {
            Effect::None => {}
            Effect::Set(slots) => {
                self.check_finished(slots.iter().map(|change| change.slot))?;
                for Change { slot, found, after } in slots {
                    self.unmoved(*slot, found)?;
                    counters[*slot] = *after;
                }
            }
            Effect::Copy(slots) => {
                for from in slots.iter().filter_map(|copied| copied.from) {
                    self.check_finished([from])?;
                }
                for Copied { from, to, counters: found } in slots {
                    from.map_or(Ok(()), |from| self.unmoved(from, found))?;
                    counters[*to] = *found;
                }
            }
            Effect::Reset(slots) => slots.iter().for_each(|&s| counters[s] = Counters::default()),
            Effect::Flush(slots) => {
                self.check_finished(slots.iter().map(|(slot, _)| *slot))?;
                for (slot, planned) in slots {
                    self.unmoved(*slot, planned)?;
                    counters[*slot].flush();
                }
            }
            Effect::Tokens(tokens) => self.bring(tokens, table, &mut counters)?,
        }
        Ok(counters)
    }

    /// Moves `counters` past the new tokens of a run.
    fn bring(
        &self,
        tokens: &Tokens,
        table: Option<&[(usize, usize)]>,
        counters: &mut [Counters],
    ) -> Result<()> {
        match (&tokens.kind, table) {
            (Kind::Table(most), Some(table)) => check_table(table, tokens, *most, counters.len())?,
            (_, Some(_)) => {
                let expected = "a plan whose sequences lie in device memory";
                return Err(Error::value("plan", "a plan with its own sequences", expected));
            }
            (Kind::Table(_), None) => {
                let expected = "what the table holds, by advance_table (or refresh afterwards)";
                return Err(Error::value("plan", "a plan with a table in device memory", expected));
            }
            (Kind::Once(planned), None) => {
                for (&(slot, _), planned) in tokens.sequences.iter().zip(planned) {
                    self.unmoved(slot, planned)?;
                }
            }
            _ => {}
        }
        let named = table.unwrap_or(&tokens.sequences).iter().enumerate();
        let named = named.filter(|(_, (slot, _))| *slot != PAD_SLOT);
        let touched = named.clone().filter(|(_, (_, len))| *len > 0);
        self.check_finished(touched.map(|(_, (slot, _))| *slot))?;
        let sequences: Vec<_> = named
            .map(|(b, &(slot, len))| {
                let seen = counters[slot].tokens;
                add_tokens(format_args!("q (sequence {b})"), seen, len as u64)?;
                Ok(Sequence { slot, batch: 0, first: 0, len, position: seen as usize })
            })
            .collect::<Result<_>>()?;
        for s in sequences.iter().filter(|s| s.len > 0) {
            counters[s.slot].check_rotation(s.slot, tokens.rotation.is_some())?;
        }
        if let Some((rows, true)) = tokens.rotation {
            check_continued(rows, &sequences)?;
        }
        for s in sequences {
            for piece in pieces(self.problem(), s, counters[s.slot]) {
                counters[s.slot].advance(&piece, tokens.rotation.is_some());
            }
        }
        Ok(())
    }

    /// A plan that runs once must find the counters it was made for.
    fn unmoved(&self, slot: usize, planned: &Counters) -> Result<()> {
        let now = &self.counters[slot];
        if now == planned {
            return Ok(());
        }
        let show = |c: &Counters| {
            format!("{} tokens seen, {} committed, {} open", c.tokens, c.committed, c.open_len)
        };
        let expected = format!("{}, as when the plan was made", show(planned));
        Err(Error::value(format!("state (slot {slot})"), show(now), expected))
    }
}

fn check_table(table: &[(usize, usize)], tokens: &Tokens, most: usize, slots: usize) -> Result<()> {
    if table.len() != tokens.sequences.len() {
        let expected = format!("{} (the number of sequences)", tokens.sequences.len());
        return Err(Error::Length { argument: "sequences", got: table.len(), expected });
    }
    let mut named = vec![None; slots];
    for (b, &(slot, len)) in table.iter().enumerate().filter(|(_, (slot, _))| *slot != PAD_SLOT) {
        let Some(named) = named.get_mut(slot) else {
            let expected = format!("less than the state's {slots} slots");
            return Err(Error::value(format!("slots[{b}]"), slot, expected));
        };
        if let Some(first) = named.replace(b) {
            let expected = format!("a slot other than slots[{first}]");
            return Err(Error::value(format!("slots[{b}]"), slot, expected));
        }
        if len > most {
            let expected = format!("0 to {most} new tokens");
            return Err(Error::value(format!("q (sequence {b})"), len, expected));
        }
    }
    Ok(())
}
