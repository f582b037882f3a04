//! What strong accesses to one address hand from thread to thread.

use std::collections::BTreeMap;

use super::Knowledge;

/// The threads among which an access is strong.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub enum Scope {
    /// The block.
    Cta,
    /// The cluster.
    Cluster,
    /// The device.
    Gpu,
    /// The system; one device is all there is, so it equals `Gpu`.
    Sys,
}

impl Scope {
    /// Whether this scope of a thread includes a thread of another block.
    pub(crate) fn includes(self, own: Block, other: Block) -> bool {
        match self {
            Self::Cta => own.cta == other.cta,
            Self::Cluster => own.cluster == other.cluster,
            Self::Gpu | Self::Sys => true,
        }
    }
}

/// Where a thread belongs: indices in the grid.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(crate) struct Block {
    pub cta: u32,
    pub cluster: u32,
}

#[derive(Debug)]
struct Slot {
    scope: Scope,
    from: Block,
    knowledge: Knowledge,
}

impl Slot {
    /// Releases that exactly the same threads can see share a slot.
    fn same_audience(&self, scope: Scope, from: Block) -> bool {
        self.scope == scope && scope.includes(self.from, from)
    }
}

/// What was released at each address, by scope.
#[derive(Debug, Default)]
pub struct SyncTable {
    slots: BTreeMap<u64, Vec<Slot>>,
}

impl SyncTable {
    /// A strong store or read-modify-write (`rmw`) of a thread, with what it releases. A store
    /// replaces what is there; a read-modify-write continues it.
    pub fn publish(
        &mut self,
        address: u64,
        scope: Scope,
        cta: u32,
        cluster: u32,
        k: Option<Knowledge>,
        rmw: bool,
    ) {
        if !rmw {
            self.slots.remove(&address);
        }
        let Some(k) = k else { return };
        let scope = scope.min(Scope::Gpu);
        let from = Block { cta, cluster };
        let slots = self.slots.entry(address).or_default();
        match slots.iter_mut().find(|slot| slot.same_audience(scope, from)) {
            Some(slot) => slot.knowledge.join(&k),
            None => slots.push(Slot { scope, from, knowledge: k }),
        }
    }

    /// What a strong load or read-modify-write of a thread reads along: all releases whose scope
    /// includes the reader, from threads that the reader's scope includes.
    pub fn observe(&self, address: u64, scope: Scope, cta: u32, cluster: u32) -> Option<Knowledge> {
        let reader = Block { cta, cluster };
        let seen = |slot: &&Slot| {
            slot.scope.includes(slot.from, reader) && scope.includes(reader, slot.from)
        };
        self.slots.get(&address)?.iter().filter(seen).fold(None, |sum, slot| {
            let mut sum = sum.unwrap_or_else(Knowledge::default);
            sum.join(&slot.knowledge);
            Some(sum)
        })
    }

    /// A plain store ends the release sequences in its range.
    pub fn weak_store(&mut self, address: u64, bytes: u32) {
        if self.slots.is_empty() {
            return;
        }
        let end = address.saturating_add(u64::from(bytes));
        while let Some((&hit, _)) = self.slots.range(address..end).next() {
            self.slots.remove(&hit);
        }
    }
}
