//! The cells of shadow memory and the decision between two accesses.

use super::{Access, Block, Conflict, Proxy, Race};
use crate::clock::{Actor, ActorKind, Epoch, ProxySpace, Scope};

/// A strong access: exempt against another of exactly the same bytes where both scopes reach.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Strong {
    scope: Scope,
    block: Block,
    offset: u64,
    bytes: u32,
}

/// An access as a cell remembers it; no lanes: none.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    epoch: Epoch,
    /// The proxy stands in the top bit.
    pc: u32,
    strong: Option<Box<Strong>>,
}

const ASYNC_BIT: u32 = 1 << 31;

impl Default for Mark {
    fn default() -> Self {
        let epoch = Epoch { actor: Actor::thread(0), clock: 0, lanes: 0 };
        Self { epoch, pc: 0, strong: None }
    }
}

impl Mark {
    #[inline]
    pub fn new(a: &Access) -> Self {
        let block = Block { cta: a.cta, cluster: a.cluster };
        let proxy = if a.proxy == Proxy::Async { ASYNC_BIT } else { 0 };
        Self {
            epoch: a.epoch,
            pc: a.pc & !ASYNC_BIT | proxy,
            strong: a
                .strong
                .map(|scope| Box::new(Strong { scope, block, offset: a.offset, bytes: a.bytes })),
        }
    }

    #[inline]
    fn is_none(&self) -> bool {
        self.epoch.lanes == 0
    }

    #[inline]
    fn proxy(&self) -> Proxy {
        if self.pc & ASYNC_BIT != 0 { Proxy::Async } else { Proxy::Generic }
    }

    pub fn race(&self, conflict: Conflict, offset: u64) -> Race {
        Race { conflict, offset, other: self.epoch, other_pc: self.pc & !ASYNC_BIT }
    }

    /// Morally strong: both strong, of one proxy and the same bytes, each in the other's scope.
    #[inline]
    fn exempts(&self, other: &Self) -> bool {
        let (Some(a), Some(b)) = (&self.strong, &other.strong) else { return false };
        self.proxy() == other.proxy()
            && (a.offset, a.bytes) == (b.offset, b.bytes)
            && a.scope.includes(a.block, b.block)
            && b.scope.includes(b.block, a.block)
    }

    /// Same instant, differing in lanes only.
    fn is_sibling(&self, other: &Self) -> bool {
        (self.epoch.actor, self.epoch.clock, self.pc)
            == (other.epoch.actor, other.epoch.clock, other.pc)
            && self.strong == other.strong
    }

    /// Takes from `old` the lanes whose accesses this one makes needless: whoever knows this one
    /// knows them too, and whatever they conflict with conflicts with this one. So it is for
    /// earlier accesses of the same lanes. It is for all that this one knows if a thread makes it:
    /// only a thread hands on its knowledge together with its own accesses.
    #[inline]
    fn strip(&self, old: &mut Self, a: &Access) {
        let alike =
            self.proxy() == old.proxy() && (self.strong.is_none() || self.strong == old.strong);
        if !alike {
            return;
        }
        if self.epoch.actor == old.epoch.actor && self.epoch.clock >= old.epoch.clock {
            old.epoch.lanes &= !self.epoch.lanes;
        }
        let thread = self.epoch.actor.kind() == ActorKind::Thread;
        if thread && old.epoch.lanes != 0 && a.clock.knows(a.lane, &old.epoch) {
            old.epoch.lanes = 0;
        }
    }
}

/// Accesses none of which makes another needless: one in place, more behind a pointer.
#[derive(Clone, Debug, Default)]
struct Marks {
    first: Mark,
    #[expect(clippy::box_collection, reason = "a cell stays small")]
    more: Option<Box<Vec<Mark>>>,
}

impl Marks {
    #[inline]
    fn iter(&self) -> impl Iterator<Item = &Mark> {
        let first = (!self.first.is_none()).then_some(&self.first);
        first.into_iter().chain(self.more.as_ref().map_or(&[][..], |more| more.as_slice()))
    }

    /// Puts an access in the place of all; keeps the room of the others.
    #[inline]
    fn replace(&mut self, mark: Mark) {
        self.first = mark;
        if let Some(more) = &mut self.more {
            more.clear();
        }
    }

    /// Adds an access and drops those it covers.
    #[inline]
    fn insert(&mut self, mark: &Mark, a: &Access) {
        let mut joins = self.first.epoch.actor == mark.epoch.actor;
        if let Some(more) = &mut self.more {
            // Of all the blocks that read a buffer, others than this are beyond its knowledge.
            let within = a.clock.within();
            let mut covered = false;
            for old in more.iter_mut().filter(|old| within.contains(&old.epoch.actor)) {
                mark.strip(old, a);
                covered |= old.is_none();
                joins |= old.epoch.actor == mark.epoch.actor;
            }
            if covered {
                more.retain(|old| !old.is_none());
            }
        }
        mark.strip(&mut self.first, a);
        if self.first.is_none() {
            self.first = mark.clone();
            return;
        }
        if joins {
            let more = self.more.iter_mut().flat_map(|more| more.iter_mut());
            let mut all = std::iter::once(&mut self.first).chain(more);
            if let Some(old) = all.find(|old| old.is_sibling(mark)) {
                old.epoch.lanes |= mark.epoch.lanes;
                return;
            }
        }
        self.more.get_or_insert_default().push(mark.clone());
    }
}

/// The latest writes of some bytes, and the reads since; a line of the cache.
#[derive(Clone, Debug, Default)]
#[repr(align(64))]
pub(super) struct Cell {
    writes: Marks,
    reads: Marks,
}

impl Cell {
    /// Checks an access against those before it and records it.
    #[inline]
    pub fn access(
        &mut self,
        a: &Access,
        mark: &Mark,
        space: ProxySpace,
        write: bool,
    ) -> Result<(), (Conflict, Mark)> {
        let mut found = None;
        for old in self.writes.iter() {
            found = found.or_else(|| Some((conflict(old, true, mark, write, a, space)?, old)));
        }
        if write {
            for old in self.reads.iter() {
                found = found.or_else(|| Some((conflict(old, false, mark, true, a, space)?, old)));
            }
        }
        let found = found.map(|(conflict, old)| (conflict, old.clone()));
        if !write {
            self.reads.insert(mark, a);
        } else if mark.strong.is_some() {
            self.writes.insert(mark, a);
        } else {
            self.writes.replace(mark.clone());
            self.reads.replace(Mark::default());
        }
        found.map_or(Ok(()), Err)
    }
}

/// What is wrong between an earlier access and a new one, at least one of which writes.
#[inline]
fn conflict(
    old: &Mark,
    old_write: bool,
    new: &Mark,
    new_write: bool,
    a: &Access,
    space: ProxySpace,
) -> Option<Conflict> {
    if old.exempts(new) {
        return None;
    }
    if !a.clock.knows(a.lane, &old.epoch) {
        let pending = !old.epoch.actor.is_synchronous();
        return Some(match (old_write, new_write) {
            (true, _) if pending => Conflict::PendingWrite,
            (false, _) if pending => Conflict::PendingRead,
            (true, true) => Conflict::WriteAfterWrite,
            (true, false) => Conflict::ReadAfterWrite,
            (false, _) => Conflict::WriteAfterRead,
        });
    }
    let relies = old_write && old.proxy() == Proxy::Generic && new.proxy() == Proxy::Async;
    (relies && !a.clock.knows_async(a.lane, space, &old.epoch))
        .then_some(Conflict::MissingProxyFence)
}

/// 256 bytes, in cells of 16 bytes or finer.
#[derive(Debug)]
pub(super) struct Region {
    shift: u32,
    cells: Vec<Cell>,
}

impl Default for Region {
    fn default() -> Self {
        Self { shift: 4, cells: vec![Cell::default(); 16] }
    }
}

impl Region {
    pub const BYTES: u64 = 256;

    /// The cells of a range, each with its offset, after making them as fine as the range needs.
    #[inline]
    pub fn cells(&mut self, from: u32, to: u32) -> impl Iterator<Item = (&mut Cell, u32)> {
        let need = (from | to).trailing_zeros();
        if need < self.shift {
            let copies = 1 << (self.shift - need);
            self.cells =
                self.cells.iter().flat_map(|c| std::iter::repeat_n(c, copies)).cloned().collect();
            self.shift = need;
        }
        let shift = self.shift;
        let range = (from >> shift) as usize..(to >> shift) as usize;
        let cells = self.cells[range].iter_mut().enumerate();
        cells.map(move |(i, cell)| (cell, from + ((i as u32) << shift)))
    }
}
