//! Who holds which slot of a pool.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::alloc;
use crate::error::{Error, Result};

/// A slot of a [`Pool`](super::Pool), from [`allocate`](super::Pool::allocate) to
/// [`free`](super::Pool::free). A copy that outlives that names nothing any more, although the slot may
/// have another holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    pool: u64,
    index: usize,
    generation: u64,
}

impl Slot {
    /// Its place in the states of the pool. [`Pool::index`](super::Pool::index) asks whether it still
    /// holds that.
    pub fn index(&self) -> usize {
        self.index
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// How often the slot was taken and given back: odd while it is taken.
    generation: u64,
    /// Some layers have changed and others have not.
    unfinished: bool,
}

/// The holders of a pool's slots.
#[derive(Debug)]
pub(super) struct Handles {
    pool: u64,
    entries: Vec<Entry>,
    /// The last is the next that is taken.
    free: Vec<usize>,
}

impl Handles {
    pub fn new(slots: usize) -> Result<Self> {
        static POOLS: AtomicU64 = AtomicU64::new(0);
        let pool = POOLS.fetch_add(1, Ordering::Relaxed);
        let mut handles = Self { pool, entries: Vec::new(), free: Vec::new() };
        handles.grow(slots)?;
        Ok(handles)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Makes it so many slots, the new ones free.
    pub fn grow(&mut self, slots: usize) -> Result<()> {
        let new = Entry { generation: 0, unfinished: false };
        let mut entries = alloc::reserved(&[slots], "the holders of a pool's slots")?;
        entries.extend_from_slice(&self.entries);
        let mut free = alloc::reserved(&[slots], "the free slots of a pool")?;
        free.extend((self.entries.len()..slots).rev());
        free.extend_from_slice(&self.free);
        entries.resize(slots, new);
        (self.entries, self.free) = (entries, free);
        Ok(())
    }

    pub fn first_free(&self) -> Result<usize> {
        self.free.last().copied().ok_or(Error::PoolFull { slots: self.len() })
    }

    /// Takes the slot that [`Self::first_free`] named.
    pub fn take(&mut self, index: usize) -> Slot {
        self.free.pop();
        let entry = &mut self.entries[index];
        entry.generation += 1;
        Slot { pool: self.pool, index, generation: entry.generation }
    }

    /// Room for all slots is there.
    pub fn give_back(&mut self, index: usize) {
        self.entries[index].generation += 1;
        self.free.push(index);
    }

    /// The index of a slot that this handle holds, usable or not.
    pub fn owned(&self, slot: Slot) -> Result<usize> {
        let Slot { pool, index, generation } = slot;
        let stale = |expected| Err(Error::StaleSlot { slot: index, generation, expected });
        match self.entries.get(index) {
            _ if pool != self.pool => stale("a handle of this pool".into()),
            Some(entry) if entry.generation == generation => Ok(index),
            Some(entry) if entry.generation % 2 == 1 => stale(entry.generation.to_string()),
            _ => stale("a slot that is taken".into()),
        }
    }

    /// The index of a slot that calls may go on with.
    pub fn usable(&self, slot: Slot) -> Result<usize> {
        let index = self.owned(slot)?;
        match self.entries[index].unfinished {
            true => Err(Error::Unfinished { slot: index }),
            false => Ok(index),
        }
    }

    pub fn break_off(&mut self, slots: &[usize]) {
        slots.iter().for_each(|&slot| self.entries[slot].unfinished = true);
    }

    pub fn mend(&mut self, slots: &[usize]) {
        slots.iter().for_each(|&slot| self.entries[slot].unfinished = false);
    }
}
