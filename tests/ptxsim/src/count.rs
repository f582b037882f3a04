//! What was executed and moved, instruction by instruction.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::bank::Phases;
use crate::order::OrderCost;

/// Kinds of instructions.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // the names say it
pub enum Class {
    Integer,
    Float,
    Half,
    Convert,
    /// ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh: the special function unit.
    Special,
    Move,
    Predicate,
    Control,
    SharedLoad,
    SharedStore,
    GlobalLoad,
    GlobalStore,
    Local,
    Param,
    Atomic,
    Tensor,
    Async,
    Barrier,
    Shuffle,
    Other,
}

/// Bytes and sectors one instruction moves to and from one buffer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Traffic {
    /// Bytes read.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
    /// 32-byte sectors of the reads.
    pub read_sectors: u64,
    /// 32-byte sectors of the writes.
    pub written_sectors: u64,
}

impl Traffic {
    /// Sectors read and written.
    pub fn sectors(&self) -> u64 {
        self.read_sectors + self.written_sectors
    }
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.read += other.read;
        self.written += other.written;
        self.read_sectors += other.read_sectors;
        self.written_sectors += other.written_sectors;
    }
}

/// A set of bytes, by pages of 4096.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ByteSet {
    pages: BTreeMap<u64, Box<[u64; 64]>>,
}

impl ByteSet {
    /// Adds a range.
    pub fn insert(&mut self, offset: u64, bytes: u32) {
        let (mut from, end) = (offset, offset.saturating_add(bytes.into()));
        while from < end {
            let to = end.min((from / 64 + 1) * 64);
            let page = self.pages.entry(from / 4096).or_insert_with(|| Box::new([0; 64]));
            let bits = to - from;
            let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << (from % 64) };
            page[(from / 64 % 64) as usize] |= mask;
            from = to;
        }
    }

    /// Adds all of another set.
    pub fn union(&mut self, other: Self) {
        for (number, bits) in other.pages {
            let page = self.pages.entry(number).or_insert_with(|| Box::new([0; 64]));
            page.iter_mut().zip(bits.iter()).for_each(|(mine, theirs)| *mine |= theirs);
        }
    }

    /// How many bytes.
    pub fn len(&self) -> u64 {
        self.pages.values().flat_map(|p| p.iter()).map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The bytes of one buffer that were touched.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Touched {
    /// By reads.
    pub read: ByteSet,
    /// By writes.
    pub written: ByteSet,
}

/// Counts of one gang, or of a whole launch.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// Warp instructions executed, by program counter.
    pub executed: Vec<u64>,
    /// Shared-memory wavefronts, by program counter.
    pub shared: BTreeMap<u32, SharedPhases>,
    /// Tensor-core flop, by program counter.
    pub flops: BTreeMap<u32, u64>,
    /// What order among blocks costs, by program counter.
    pub order: BTreeMap<u32, OrderCost>,
    /// Global traffic, by program counter and buffer.
    pub traffic: BTreeMap<(u32, usize), Traffic>,
    /// Bytes touched, by buffer.
    pub touched: BTreeMap<usize, Touched>,
}

/// Wavefronts summed over a launch.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct SharedPhases {
    /// Wavefronts.
    pub phases: u64,
    /// Those that conflicts have added.
    pub excess: u64,
}

impl std::ops::AddAssign for SharedPhases {
    fn add_assign(&mut self, other: Self) {
        self.phases += other.phases;
        self.excess += other.excess;
    }
}

impl Counters {
    /// Counters of a program of `instrs` instructions.
    pub fn new(instrs: usize) -> Self {
        Self { executed: vec![0; instrs], ..Self::default() }
    }

    /// Adds shared-memory wavefronts.
    pub fn add_phases(&mut self, pc: u32, p: Phases) {
        let sum = self.shared.entry(pc).or_default();
        *sum += SharedPhases { phases: p.phases.into(), excess: p.excess.into() };
    }

    /// Adds tensor-core flop.
    pub fn add_flops(&mut self, pc: u32, flops: u64) {
        *self.flops.entry(pc).or_default() += flops;
    }

    /// Adds global traffic.
    pub fn add_traffic(&mut self, pc: u32, buffer: usize, traffic: Traffic) {
        *self.traffic.entry((pc, buffer)).or_default() += traffic;
    }

    /// Notes bytes of a buffer that are read or written.
    pub fn touch(&mut self, buffer: usize, offset: u64, bytes: u32, read: bool, written: bool) {
        let touched = self.touched.entry(buffer).or_default();
        if read {
            touched.read.insert(offset, bytes);
        }
        if written {
            touched.written.insert(offset, bytes);
        }
    }

    /// Adds the counts of another part of the launch.
    pub fn merge(&mut self, other: Self) {
        self.executed.resize(self.executed.len().max(other.executed.len()), 0);
        self.executed.iter_mut().zip(&other.executed).for_each(|(mine, theirs)| *mine += theirs);
        for (pc, p) in other.shared {
            *self.shared.entry(pc).or_default() += p;
        }
        for (pc, flops) in other.flops {
            self.add_flops(pc, flops);
        }
        for (pc, cost) in other.order {
            *self.order.entry(pc).or_default() += cost;
        }
        for ((pc, buffer), traffic) in other.traffic {
            self.add_traffic(pc, buffer, traffic);
        }
        for (buffer, touched) in other.touched {
            let mine = self.touched.entry(buffer).or_default();
            mine.read.union(touched.read);
            mine.written.union(touched.written);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_byte_set_is_a_set(
            ranges in proptest::collection::vec((0u64..9000, 0u32..300), 0..40),
            cut in 0usize..40,
        ) {
            let mut expected = std::collections::BTreeSet::new();
            let (mut first, mut second) = (ByteSet::default(), ByteSet::default());
            for (i, (offset, bytes)) in ranges.iter().enumerate() {
                expected.extend(*offset..offset + u64::from(*bytes));
                if i < cut { &mut first } else { &mut second }.insert(*offset, *bytes);
            }
            first.union(second);
            prop_assert_eq!(first.len(), expected.len() as u64);
        }

        #[test]
        fn merging_is_associative(parts in proptest::collection::vec(
            proptest::collection::vec((0u32..4, 0usize..3, 0u64..500, 1u32..64), 0..8), 3)) {
            let counters = |part: &Vec<(u32, usize, u64, u32)>| {
                let mut c = Counters::new(4);
                for (pc, buffer, offset, bytes) in part {
                    c.executed[*pc as usize] += 1;
                    c.add_flops(*pc, u64::from(*bytes));
                    let cost = OrderCost { memory_barriers: 1, invalidations: (*bytes).into() };
                    *c.order.entry(*pc).or_default() += cost;
                    c.add_phases(*pc, Phases { phases: *bytes, excess: 1 });
                    c.touch(*buffer, *offset, *bytes, true, *pc == 0);
                    let traffic = Traffic { read: u64::from(*bytes), ..Traffic::default() };
                    c.add_traffic(*pc, *buffer, traffic);
                }
                c
            };
            let [a, b, c] = [0, 1, 2].map(|i| counters(&parts[i]));
            let mut left = a.clone();
            left.merge(b.clone());
            left.merge(c.clone());
            let mut bc = b;
            bc.merge(c);
            let mut right = a;
            right.merge(bc);
            prop_assert_eq!(left, right);
        }
    }
}
