//! States of prompts that come again.

use std::fmt;
use std::hash::Hash;

use lru::LruCache;

use super::snapshot::Snapshot;

/// Snapshots by key, of which those that were used least recently give way: prompts that conversations
/// begin with, by a hash of their tokens say. A state has one size however long the prompt is, so a
/// prompt of a million tokens costs what one of ten does.
///
/// ```
/// use infini_attn::{Pool, PrefixCache, Problem, State};
/// let layer = Problem::builder().head_dim(8).segment_len(16).build()?;
/// let mut pool = Pool::<State>::new(&[layer], 4)?;
/// let mut prefixes = PrefixCache::new(1 << 20);
/// let slot = pool.allocate()?; // … and the system prompt goes into it.
/// prefixes.insert("You are", pool.snapshot(&[slot])?);
///
/// // The longest known beginning of a new prompt, longest first; what follows it is still to be read.
/// let beginnings = ["You are a poet", "You are", "You"];
/// if let Some((i, known)) = prefixes.longest(&beginnings) {
///     assert_eq!(beginnings[i], "You are");
///     let other = pool.allocate()?;
///     pool.restore(&[other], known)?;
/// }
/// assert_eq!((prefixes.counters().hits, prefixes.counters().misses), (1, 0));
/// # Ok::<(), infini_attn::Error>(())
/// ```
pub struct PrefixCache<K> {
    entries: LruCache<K, Snapshot>,
    budget: usize,
    bytes: usize,
    counters: PrefixCounters,
}

/// What a [`PrefixCache`] has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixCounters {
    /// Questions that found a snapshot.
    pub hits: u64,
    /// Questions that found none.
    pub misses: u64,
    /// Snapshots that came in.
    pub insertions: u64,
    /// Snapshots that gave way to others.
    pub evictions: u64,
}

impl<K: Hash + Eq> PrefixCache<K> {
    /// For snapshots of `budget` bytes in all.
    pub fn new(budget: usize) -> Self {
        let counters = PrefixCounters::default();
        Self { entries: LruCache::unbounded(), budget, bytes: 0, counters }
    }

    /// Keeps a snapshot, in place of the one under the same key; whether it did: one beyond the whole
    /// budget is dropped at once, and nothing else changes.
    pub fn insert(&mut self, key: K, snapshot: Snapshot) -> bool {
        if snapshot.bytes() > self.budget {
            return false;
        }
        self.remove(&key);
        self.bytes += snapshot.bytes();
        self.counters.insertions += 1;
        self.entries.put(key, snapshot);
        while self.bytes > self.budget
            && let Some((_, oldest)) = self.entries.pop_lru()
        {
            self.bytes -= oldest.bytes();
            self.counters.evictions += 1;
        }
        true
    }

    /// The snapshot under a key, which is the most recently used from here on.
    pub fn get(&mut self, key: &K) -> Option<&Snapshot> {
        self.longest([key]).map(|(_, snapshot)| snapshot)
    }

    /// The first of the keys that is known, with its snapshot: give the longest beginning first. One
    /// question to the counters.
    pub fn longest<'k>(
        &mut self,
        keys: impl IntoIterator<Item = &'k K>,
    ) -> Option<(usize, &Snapshot)>
    where
        K: 'k,
    {
        let found = keys.into_iter().enumerate().find(|(_, key)| self.entries.contains(key));
        match found {
            Some((i, key)) => {
                self.counters.hits += 1;
                self.entries.get(key).map(|snapshot| (i, snapshot))
            }
            None => {
                self.counters.misses += 1;
                None
            }
        }
    }

    /// Takes a snapshot out.
    pub fn remove(&mut self, key: &K) -> Option<Snapshot> {
        let removed = self.entries.pop(key)?;
        self.bytes -= removed.bytes();
        Some(removed)
    }

    /// Number of snapshots.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of all snapshots, at most the budget.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What was asked so far.
    pub fn counters(&self) -> PrefixCounters {
        self.counters
    }
}

impl<K> fmt::Debug for PrefixCache<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { budget, bytes, counters, .. } = self;
        write!(f, "PrefixCache({bytes} of {budget} bytes, {counters:?})")
    }
}
