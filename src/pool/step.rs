//! A step of all layers, taken whole or not at all.

use super::Pool;
use super::handles::Slot;
use super::slots::Slots;
use crate::error::{Error, Result};
use crate::memory::check_slots;

impl<S: Slots> Pool<S> {
    /// Runs `run`, which brings so many new tokens to each of the sequences in every layer, with the
    /// layers and the sequences' indices, in order. If it fails, all layers stand where they stood:
    /// tokens are taken back, and of slots that complete a segment with them a copy is kept while it
    /// runs (a slot per segment and layer, so next to nothing per token).
    ///
    /// `run` brings tokens and does nothing else to the slots: that drafts were taken back and others
    /// brought in their place cannot be seen. A panic is no failure in this sense.
    ///
    /// # Errors
    /// Those of `run`. Before it runs: those of [`Pool::index`], [`Error::Value`] for a slot named twice,
    /// of copying. Slots that cannot be put back, because a driver refuses that too or `run` brought more
    /// tokens than it was said to, are [`Error::Unfinished`] from then on.
    pub fn step<T, E: From<Error>>(
        &mut self,
        sequences: &[(Slot, usize)],
        run: impl FnOnce(&mut [S], &[usize]) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let slots: Vec<_> =
            sequences.iter().map(|&(slot, _)| self.index(slot)).collect::<Result<_>>()?;
        let before: Vec<_> = (self.layers.iter())
            .map(|layer| Before::of(layer, &slots, sequences))
            .collect::<Result<_>>()?;
        let result = run(&mut self.layers, &slots);
        if result.is_err() {
            let layers = self.layers.iter_mut().zip(&before);
            let put_back: Vec<_> = layers.map(|(layer, before)| before.put_back(layer)).collect();
            put_back.iter().for_each(|left| self.handles.break_off(left));
        }
        result
    }
}

/// How to come back to where the slots of one layer stand.
struct Before<S> {
    /// Slots that stay inside their segments, with the tokens they have seen and those of them that are
    /// open.
    seen: Vec<(usize, u64, usize)>,
    /// The others.
    copied: Vec<usize>,
    copies: Option<S>,
}

impl<S: Slots> Before<S> {
    fn of(layer: &S, slots: &[usize], sequences: &[(Slot, usize)]) -> Result<Self> {
        check_slots(slots, layer.sequences())?;
        let n = layer.problem().segment_len();
        let (mut seen, mut copied) = (Vec::new(), Vec::new());
        for (&slot, &(_, new)) in slots.iter().zip(sequences) {
            match layer.open_len(slot).saturating_add(new) >= n {
                true => copied.push(slot),
                false => seen.push((slot, layer.tokens(slot), layer.open_len(slot))),
            }
        }
        let copies = (!copied.is_empty()).then(|| layer.fork(&copied)).transpose()?;
        Ok(Self { seen, copied, copies })
    }

    /// The slots for which there is no way back.
    fn put_back(&self, layer: &mut S) -> Vec<usize> {
        let mut left = Vec::new();
        for &(slot, tokens, open_len) in &self.seen {
            let put_back = match layer.check_truncate(slot, tokens) {
                Ok(()) if layer.tokens(slot) == tokens => Ok(()),
                Ok(()) => layer.truncate(slot, tokens),
                Err(error) => Err(error),
            };
            let same = put_back.is_ok() && layer.open_len(slot) == open_len;
            left.extend((!same).then_some(slot));
        }
        let pairs: Vec<_> = (0..).zip(self.copied.iter().copied()).collect();
        if let Some(copies) = &self.copies
            && layer.copy_slots(copies, &pairs).is_err()
        {
            left.extend(&self.copied);
        }
        left
    }
}
