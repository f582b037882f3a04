//! Slots with a life cycle: what an engine does with one state per conversation and layer.

pub mod handles;
pub mod prefix;
pub mod slots;
pub mod snapshot;
mod step;

use crate::error::{Error, Result};
use crate::memory::State;
use crate::problem::Problem;
use handles::{Handles, Slot};
use slots::Slots;
use snapshot::Snapshot;

/// The slots of all layers of a model: one state per layer, [`State`] or `cuda::State`, of as many slots
/// each. A conversation takes a slot, which is the same in every layer, and gives it back.
///
/// What a slot costs depends on its problem alone, so all of them are allocated at once, and again only
/// on request ([`Self::reserve`]). Layers may differ in everything else, segment length included.
///
/// ```
/// use infini_attn::{Error, Pool, Problem, State};
/// let layer = Problem::builder().heads(4).kv_heads(2).head_dim(16).segment_len(32).build()?;
/// let mut pool = Pool::<State>::new(&[layer; 3], 2)?;
/// let first = pool.allocate()?;
/// let second = pool.fork(first)?;
/// assert!(matches!(pool.allocate(), Err(Error::PoolFull { slots: 2 })));
/// // A step of the model: layer after layer over the same slots, and all or nothing.
/// pool.step(&[(first, 1), (second, 1)], |layers, slots| {
///     assert_eq!((layers.len(), slots.len()), (3, 2)); // `decode(.., &inputs.slots(slots), ..)`
///     Ok::<(), Error>(())
/// })?;
/// pool.free(first)?;
/// assert!(matches!(pool.index(first), Err(Error::StaleSlot { .. })));
/// # Ok::<(), Error>(())
/// ```
///
/// A change that the layers take one after another, and that one of them refuses after others have taken
/// it (a driver's error, memory that ends), leaves a slot that no call accepts: [`Error::Unfinished`]
/// until [`Self::reset`], [`Self::restore`] or [`Self::free`].
#[derive(Debug)]
pub struct Pool<S> {
    layers: Vec<S>,
    handles: Handles,
}

impl Pool<State> {
    /// A pool on the host, of a layer per problem.
    ///
    /// # Errors
    /// [`Error::Length`] without layers, [`Error::OutOfMemory`].
    pub fn new(layers: &[Problem], slots: usize) -> Result<Self> {
        Self::from_layers(layers.iter().map(|p| State::new(p, slots)).collect::<Result<_>>()?)
    }
}

impl<S: Slots> Pool<S> {
    /// A pool of states that exist, a layer each; all their slots are free.
    ///
    /// # Errors
    /// [`Error::Length`] without layers or when they differ in slots, [`Error::Value`] for a slot that
    /// has seen tokens.
    pub fn from_layers(layers: Vec<S>) -> Result<Self> {
        let Some(slots) = layers.first().map(Slots::sequences) else {
            let expected = "at least one".into();
            return Err(Error::Length { argument: "layers", got: 0, expected });
        };
        for (i, layer) in layers.iter().enumerate() {
            if layer.sequences() != slots {
                let (got, expected) = (layer.sequences(), format!("{slots} slots, as in layer 0"));
                return Err(Error::Length { argument: "layers", got, expected });
            }
            if let Some(slot) = (0..slots).find(|&slot| layer.tokens(slot) > 0) {
                let argument = format!("layers[{i}] (slot {slot})");
                let got = format!("{} tokens seen", layer.tokens(slot));
                return Err(Error::value(argument, got, "an empty slot"));
            }
        }
        Ok(Self { layers, handles: Handles::new(slots)? })
    }

    /// The states, for calls of one layer; slots are named by [`Self::index`].
    pub fn layers(&self) -> &[S] {
        &self.layers
    }

    /// The states, to write to.
    pub fn layers_mut(&mut self) -> &mut [S] {
        &mut self.layers
    }

    /// All slots, free and taken.
    pub fn slots(&self) -> usize {
        self.handles.len()
    }

    /// Slots that [`Self::allocate`] and [`Self::fork`] still find.
    pub fn available(&self) -> usize {
        self.handles.available()
    }

    /// Bytes held, by all layers and slots.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Slots::bytes).sum()
    }

    /// Most slots whose states stay below `budget` bytes, for layers of these problems; `rotation`: with
    /// room for rotated keys.
    ///
    /// ```
    /// # use infini_attn::{Pool, Problem, State};
    /// let layer = Problem::builder().heads(32).kv_heads(8).head_dim(128).segment_len(512).build()?;
    /// let slots = Pool::<State>::slots_in(&[layer; 32], true, 16 << 30)?;
    /// assert_eq!(slots, 78);
    /// # Ok::<(), infini_attn::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Slots::state_bytes`].
    pub fn slots_in(layers: &[Problem], rotation: bool, budget: u64) -> Result<usize> {
        /// Where nothing else ends it, as without layers: what a device can address.
        const MOST: usize = i32::MAX as usize;
        let fits = |slots: usize| -> Result<bool> {
            let mut bytes = 0u64;
            for problem in layers {
                bytes = bytes.saturating_add(S::state_bytes(problem, slots, rotation)?);
            }
            Ok(bytes <= budget)
        };
        // One slot shows whether the problems are served at all.
        let (mut least, mut beyond) = (0, if fits(1)? { MOST + 1 } else { 1 });
        while beyond - least > 1 {
            let middle = least + (beyond - least) / 2;
            // More bytes than can be counted are more than any budget.
            if fits(middle).unwrap_or(false) { least = middle } else { beyond = middle }
        }
        Ok(least)
    }

    /// An empty slot.
    ///
    /// # Errors
    /// [`Error::PoolFull`]; nothing is ever allocated for it.
    pub fn allocate(&mut self) -> Result<Slot> {
        let index = self.handles.first_free()?;
        Ok(self.handles.take(index))
    }

    /// Gives a slot back and forgets what it has seen; the handle and its copies are worthless then.
    ///
    /// # Errors
    /// [`Error::StaleSlot`]; those of resetting a state, after which the slot is still taken.
    pub fn free(&mut self, slot: Slot) -> Result<()> {
        self.reset(slot)?;
        self.handles.give_back(slot.index());
        Ok(())
    }

    /// Forgets what a slot has seen.
    ///
    /// # Errors
    /// As [`Self::free`].
    pub fn reset(&mut self, slot: Slot) -> Result<()> {
        let index = self.handles.owned(slot)?;
        self.in_all_layers(&[index], |layer, _| layer.reset(&[index]))?;
        self.handles.mend(&[index]);
        Ok(())
    }

    /// The slot's place in the state of every layer: what `Inputs::slots` takes.
    ///
    /// # Errors
    /// [`Error::StaleSlot`] for a handle that was freed or belongs to another pool,
    /// [`Error::Unfinished`].
    pub fn index(&self, slot: Slot) -> Result<usize> {
        self.handles.usable(slot)
    }

    /// [`Self::index`] of each.
    ///
    /// # Errors
    /// Those of [`Self::index`], for the first that has one.
    pub fn indices(&self, slots: &[Slot]) -> Result<Vec<usize>> {
        slots.iter().map(|&slot| self.index(slot)).collect()
    }

    /// Tokens the slot has seen, in the first layer. (Between steps it is the same in all.)
    ///
    /// # Errors
    /// Those of [`Self::index`].
    pub fn tokens(&self, slot: Slot) -> Result<u64> {
        Ok(self.layers[0].tokens(self.index(slot)?))
    }

    /// A slot more that continues where this one stands: another continuation of one prompt.
    ///
    /// # Errors
    /// [`Error::PoolFull`], those of [`Self::index`] and of copying; no slot is taken then.
    pub fn fork(&mut self, slot: Slot) -> Result<Slot> {
        let (from, to) = (self.index(slot)?, self.handles.first_free()?);
        // Whoever takes the slot next finds it empty or is told.
        self.in_all_layers(&[to], |layer, _| layer.copy_within(&[(from, to)])).inspect_err(
            |_| {
                if self.layers.iter_mut().try_for_each(|layer| layer.reset(&[to])).is_ok() {
                    self.handles.mend(&[to]);
                }
            },
        )?;
        Ok(self.handles.take(to))
    }

    /// For every pair (source, target): the target continues where the source stands. No target is a
    /// source too.
    ///
    /// # Errors
    /// Those of [`Self::index`] and of `State::copy_within`.
    pub fn copy_slots(&mut self, pairs: &[(Slot, Slot)]) -> Result<()> {
        let pairs: Vec<_> = (pairs.iter())
            .map(|&(from, to)| Ok((self.index(from)?, self.handles.owned(to)?)))
            .collect::<Result<_>>()?;
        let targets: Vec<_> = pairs.iter().map(|&(_, to)| to).collect();
        self.in_all_layers(&targets, |layer, _| layer.copy_within(&pairs))?;
        self.handles.mend(&targets);
        Ok(())
    }

    /// Takes back the last tokens of a slot in every layer: it goes on behind its first `tokens`.
    ///
    /// # Errors
    /// Those of [`Self::index`]; [`Error::Value`] for more tokens than a layer has seen,
    /// [`Error::Committed`] where a layer has committed what is to be taken back. No layer has changed
    /// then.
    pub fn truncate(&mut self, slot: Slot, tokens: u64) -> Result<()> {
        let index = self.index(slot)?;
        self.layers.iter().try_for_each(|layer| layer.check_truncate(index, tokens))?;
        self.in_all_layers(&[index], |layer, _| layer.truncate(index, tokens))
    }

    /// Host copies of slots, of all layers: to be kept ([`PrefixCache`](prefix::PrefixCache)), saved, or
    /// put into another pool.
    ///
    /// # Errors
    /// Those of [`Self::index`], [`Error::OutOfMemory`], the device's.
    pub fn snapshot(&self, slots: &[Slot]) -> Result<Snapshot> {
        let indices = self.indices(slots)?;
        let layers = self.layers.iter().map(|layer| layer.to_host_slots(&indices));
        Snapshot::from_layers(layers.collect::<Result<_>>()?)
    }

    /// Slot i of the snapshot takes the place of `slots[i]`.
    ///
    /// # Errors
    /// [`Error::StaleSlot`]; [`Error::Length`] for another number of layers or slots,
    /// [`Error::Problem`] for layers of other problems: nothing has changed then. Those of
    /// `State::restore`.
    pub fn restore(&mut self, slots: &[Slot], from: &Snapshot) -> Result<()> {
        let indices: Vec<_> =
            slots.iter().map(|&slot| self.handles.owned(slot)).collect::<Result<_>>()?;
        from.check_layers(self.layers.iter().map(Slots::problem))?;
        self.in_all_layers(&indices, |layer, i| layer.restore(&indices, &from.layers()[i]))?;
        self.handles.mend(&indices);
        Ok(())
    }

    /// Room for `slots` in all, in a new allocation; handles stay good. While it runs there are both.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], the device's; the pool is as it was then. Nothing is done for no more
    /// than there are.
    pub fn reserve(&mut self, slots: usize) -> Result<()> {
        if slots <= self.slots() {
            return Ok(());
        }
        let larger = self.layers.iter().map(|layer| layer.resized(slots));
        let larger = larger.collect::<Result<_>>()?;
        self.handles.grow(slots)?;
        self.layers = larger;
        Ok(())
    }

    /// Changes these slots in one layer after another; where one fails after others, they are unusable.
    fn in_all_layers(
        &mut self,
        slots: &[usize],
        mut change: impl FnMut(&mut S, usize) -> Result<()>,
    ) -> Result<()> {
        for (i, layer) in self.layers.iter_mut().enumerate() {
            if let Err(error) = change(layer, i) {
                if i > 0 {
                    self.handles.break_off(slots);
                }
                return Err(error);
            }
        }
        Ok(())
    }
}
