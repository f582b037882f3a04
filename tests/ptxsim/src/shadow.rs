//! Shadow memory: who accessed each byte last, and whether it was ever written.
//!
//! Every cell keeps the latest writes and the reads since; an access that is not ordered after
//! them by what its lane knows is a race. A cell holds 16 bytes until an access needs it finer,
//! so the answer is exact for every byte.

use crate::clock::{ActorKind, Block, Epoch, ProxySpace, Scope, WarpClock};

mod cell;

use cell::{Mark, Region};

/// One side of an access, to name it in a report.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Hash)]
pub struct Site {
    /// The instruction.
    pub pc: u32,
    /// The warp in the grid.
    pub warp: u32,
    /// The (lowest) lane.
    pub lane: u32,
}

/// The path on which an access reaches memory.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum Proxy {
    /// Ordinary accesses, `cp.async` among them.
    Generic,
    /// Bulk and tensor copies, `wgmma`.
    Async,
}

/// An access to contiguous bytes.
#[derive(Copy, Clone, Debug)]
pub struct Access<'a> {
    /// First byte within the allocation.
    pub offset: u64,
    /// How many.
    pub bytes: u32,
    /// Who makes it, and when.
    pub epoch: Epoch,
    /// The instruction (31 bits).
    pub pc: u32,
    /// The path it takes.
    pub proxy: Proxy,
    /// The scope of an atomic or otherwise strong access.
    pub strong: Option<Scope>,
    /// The block in the grid.
    pub cta: u32,
    /// The cluster in the grid.
    pub cluster: u32,
    /// What the warp knows that makes the access or issues it.
    pub clock: &'a WarpClock,
    /// Whose knowledge in that warp decides.
    pub lane: u32,
}

/// What is wrong between two accesses.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Hash)]
pub enum Conflict {
    /// A read not ordered after a write.
    ReadAfterWrite,
    /// A write not ordered after a read.
    WriteAfterRead,
    /// A write not ordered after a write.
    WriteAfterWrite,
    /// Ordered, but an asynchronous access relies on an ordinary write without a proxy fence.
    MissingProxyFence,
    /// An asynchronous operation's write has not been waited for.
    PendingWrite,
    /// An asynchronous operation's read has not been waited for.
    PendingRead,
}

/// An access that conflicts with an earlier one.
#[derive(Copy, Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{conflict:?} at offset {offset} with the access of {other:?} at instruction {other_pc}")]
pub struct Race {
    /// What is wrong.
    pub conflict: Conflict,
    /// The first byte of the access that shows it.
    pub offset: u64,
    /// Who made the earlier access.
    pub other: Epoch,
    /// The instruction of the earlier access.
    pub other_pc: u32,
}

impl Race {
    /// Where the other side stands; copies that complete at an mbarrier belong to no warp.
    pub fn other_site(&self) -> Option<Site> {
        let warp = self.other.actor.index();
        let lane = self.other.lanes.trailing_zeros() & 31;
        (self.other.actor.kind() != ActorKind::Barrier).then_some(Site {
            pc: self.other_pc,
            warp,
            lane,
        })
    }
}

/// The shadow of one allocation.
#[derive(Debug)]
pub struct Shadow {
    bytes: u64,
    regions: Vec<Option<Box<Region>>>,
    initialised: Vec<u64>,
}

impl Shadow {
    /// Of an allocation of that many bytes, none of them initialised.
    pub fn new(bytes: u64) -> Self {
        let regions = bytes.div_ceil(Region::BYTES) as usize;
        Self {
            bytes,
            regions: std::iter::repeat_with(|| None).take(regions).collect(),
            initialised: vec![0; bytes.div_ceil(64) as usize],
        }
    }

    /// Records a read; `space` is that of the allocation. Bytes outside it are ignored.
    #[inline]
    pub fn read(&mut self, a: &Access, space: ProxySpace) -> Result<(), Race> {
        self.access(a, space, false)
    }

    /// Records a write, or a read-modify-write.
    #[inline]
    pub fn write(&mut self, a: &Access, space: ProxySpace) -> Result<(), Race> {
        self.access(a, space, true)
    }

    #[inline]
    fn access(&mut self, a: &Access, space: ProxySpace, write: bool) -> Result<(), Race> {
        let mark = Mark::new(a);
        let mut first = Ok(());
        let end = a.offset.saturating_add(u64::from(a.bytes)).min(self.bytes);
        let mut at = a.offset;
        while at < end {
            let index = at / Region::BYTES;
            let base = index * Region::BYTES;
            let stop = end.min(base + Region::BYTES);
            let region = self.regions[index as usize].get_or_insert_default();
            let (from, to) = ((at - base) as u32, (stop - base) as u32);
            for (cell, offset) in region.cells(from, to) {
                let found = cell.access(a, &mark, space, write);
                if let (Err((conflict, other)), Ok(())) = (found, &first) {
                    let offset = base + u64::from(offset);
                    first = Err(other.race(conflict, offset));
                }
            }
            at = stop;
        }
        first
    }

    /// Whether all these bytes were written.
    #[inline]
    pub fn is_initialised(&self, offset: u64, bytes: u32) -> bool {
        let end = offset.saturating_add(u64::from(bytes));
        end <= self.bytes
            && words(offset, end).all(|(word, mask)| self.initialised[word] & mask == mask)
    }

    /// These bytes have been written.
    #[inline]
    pub fn mark_initialised(&mut self, offset: u64, bytes: u32) {
        let end = offset.saturating_add(u64::from(bytes)).min(self.bytes);
        words(offset, end).for_each(|(word, mask)| self.initialised[word] |= mask);
    }

    /// Forgets all accesses, for a new launch; what is initialised stays so.
    pub fn reset_accesses(&mut self) {
        self.regions.fill_with(|| None);
    }
}

/// The words of a bit set that a range touches, each with the bits touched.
#[inline]
fn words(start: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let last = if start < end { end.div_ceil(64) } else { start / 64 };
    (start / 64..last).map(move |word| {
        let low = start.saturating_sub(word * 64);
        let high = (end - word * 64).min(64);
        (word as usize, (u64::MAX >> (64 - (high - low))) << low)
    })
}

#[cfg(test)]
mod tests;
