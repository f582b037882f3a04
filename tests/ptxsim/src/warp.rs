//! One warp: registers, groups of lanes that stand at the same instruction, local memory.

use std::cell::RefCell;

use bytemuck::Zeroable;
use bytemuck::allocation::zeroed_vec;

use crate::clock::WarpClock;
use crate::program::{Kernel, Lanes, Waiting};

/// Lanes that stand at the same instruction.
#[derive(Clone, Debug)]
pub struct Group {
    /// Program counter.
    pub pc: u32,
    /// Which lanes.
    pub lanes: u32,
    /// Why the group cannot go on at the moment.
    pub waiting: Option<Waiting>,
    /// What a waiting instruction remembers of its first attempt.
    pub note: Option<u64>,
}

impl Group {
    fn at(pc: u32, lanes: u32) -> Self {
        Self { pc, lanes, waiting: None, note: None }
    }
}

/// State of a register beside its value.
#[derive(Clone, Copy, Default, Zeroable)]
struct Meta {
    /// Lanes that have been written, and those of which at least the low part was: a pair packed
    /// into one register, whose upper half is never used, may have been given no value.
    written: u32,
    low_written: u32,
    /// `Warp::fence_stamp` at the last write by an ordinary instruction; 0 before any write.
    stamp: u32,
    /// wgmma groups in flight that write it or read it.
    accumulating: u16,
    reading: u16,
}

/// `Meta::stamp` after a write by wgmma.
const ACCUMULATED: u32 = u32::MAX;
/// What registers hold before any write.
const ZERO: Lanes = [0; 32];

/// Register files that are kept for later warps.
const POOLED: usize = 64;

thread_local! {
    /// Thousands of virtual registers a warp, which take longer to clear than many warps run: what
    /// `Meta` says was not written is not looked at.
    static POOL: RefCell<Vec<Vec<Lanes>>> = const { RefCell::new(Vec::new()) };
}

/// A register file with anything in it.
fn register_file(registers: usize) -> Vec<Lanes> {
    let kept = POOL.with_borrow_mut(Vec::pop).filter(|file| file.len() >= registers);
    kept.unwrap_or_else(|| zeroed_vec(registers))
}

impl Drop for Warp {
    fn drop(&mut self) {
        let file = std::mem::take(&mut self.registers);
        POOL.with_borrow_mut(|pool| {
            if pool.len() < POOLED {
                pool.push(file);
            }
        });
    }
}

/// What an access to a register ran into.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RegisterFault {
    /// An accumulator of a wgmma in flight.
    Accumulating,
    /// A fragment a wgmma in flight still reads.
    Reading,
}

/// One warp.
pub struct Warp {
    /// Index of its block in the gang.
    pub block: usize,
    /// Index within its block.
    pub index: u32,
    /// Index in the whole grid.
    pub global: u32,
    /// Lanes that exist and have not ended.
    pub live: u32,
    /// Where they stand, by ascending program counter.
    pub groups: Vec<Group>,
    registers: Vec<Lanes>,
    meta: Vec<Meta>,
    predicates: Vec<u32>,
    predicates_written: Vec<u32>,
    /// Whether any register has a wgmma in flight.
    in_flight: u32,
    fence_stamp: u32,
    /// What its lanes know of the others' accesses.
    pub clock: WarpClock,
    /// Local memory, lane by lane.
    pub frame: Vec<u8>,
    /// Bytes of `frame` that have been written.
    pub frame_written: Vec<bool>,
    /// wgmma groups not waited for, and the like.
    pub wgmma: crate::ops::wgmma::WarpState,
    /// Carry flags of the lanes.
    pub carry: u32,
    /// Lanes that have waited for the launch before.
    pub grid_waited: u32,
    /// What the last failed poll was for.
    pub last_wait: Option<String>,
}

impl Warp {
    /// A warp before its first instruction, with `lanes` lanes.
    pub fn new(kernel: &Kernel, block: usize, index: u32, global: u32, lanes: u32) -> Self {
        let frame = 32 * kernel.frame as usize;
        let mut clock = WarpClock::new(global);
        clock.retire(!lanes);
        Self {
            block,
            index,
            global,
            live: lanes,
            groups: vec![Group::at(0, lanes)],
            registers: register_file(kernel.registers as usize),
            meta: zeroed_vec(kernel.registers as usize),
            predicates: vec![0; kernel.predicates as usize],
            predicates_written: vec![0; kernel.predicates as usize],
            in_flight: 0,
            fence_stamp: 1,
            clock,
            frame: vec![0; frame],
            frame_written: vec![false; frame],
            wgmma: Default::default(),
            carry: 0,
            grid_waited: 0,
            last_wait: None,
        }
    }

    /// Value of a register.
    #[inline]
    pub fn register(&self, slot: u32) -> &Lanes {
        match self.meta[slot as usize].stamp {
            0 => &ZERO,
            _ => &self.registers[slot as usize],
        }
    }

    /// Whether a register may be read now.
    #[inline]
    pub fn check_read(&self, slot: u32) -> Option<RegisterFault> {
        let accumulates = self.in_flight != 0 && self.accumulates(slot);
        accumulates.then_some(RegisterFault::Accumulating)
    }

    /// Whether a register may be written now.
    #[inline]
    pub fn check_write(&self, slot: u32) -> Option<RegisterFault> {
        if self.in_flight == 0 {
            return None;
        }
        match self.meta[slot as usize] {
            Meta { accumulating: 1.., .. } => Some(RegisterFault::Accumulating),
            Meta { reading: 1.., .. } => Some(RegisterFault::Reading),
            _ => None,
        }
    }

    /// Whether nothing has ever written the register.
    pub fn is_untouched(&self, slot: u32) -> bool {
        self.meta[slot as usize].stamp == 0
    }

    /// Lanes of a register that hold a value.
    #[inline]
    pub fn written(&self, slot: u32) -> u32 {
        self.meta[slot as usize].written
    }

    /// Lanes of a register whose low part holds a value.
    #[inline]
    pub fn low_written(&self, slot: u32) -> u32 {
        self.meta[slot as usize].low_written
    }

    /// After a write: in `lanes` the low part holds a value, whatever the others do.
    #[inline]
    pub fn set_low_written(&mut self, slot: u32, lanes: u32) {
        self.meta[slot as usize].low_written |= lanes;
    }

    /// Writes a register in `lanes`; only those of `defined` hold a value then.
    #[inline]
    pub fn set(&mut self, slot: u32, lanes: u32, defined: u32, value: &Lanes) {
        let meta = &mut self.meta[slot as usize];
        meta.written = meta.written & !lanes | lanes & defined;
        meta.low_written = meta.low_written & !lanes | lanes & defined;
        let first = std::mem::replace(&mut meta.stamp, self.fence_stamp) == 0;
        let register = &mut self.registers[slot as usize];
        if lanes == u32::MAX {
            *register = *value;
        } else {
            if first {
                *register = ZERO;
            }
            for l in 0..32 {
                register[l] = if lanes >> l & 1 != 0 { value[l] } else { register[l] };
            }
        }
    }

    /// Value of a predicate, lane by lane.
    #[inline]
    pub fn predicate(&self, slot: u32) -> u32 {
        self.predicates[slot as usize]
    }

    /// Lanes of a predicate that hold a value.
    #[inline]
    pub fn predicate_written(&self, slot: u32) -> u32 {
        self.predicates_written[slot as usize]
    }

    /// Writes a predicate in `lanes`; only those of `defined` hold a value then.
    #[inline]
    pub fn set_predicate(&mut self, slot: u32, lanes: u32, defined: u32, value: u32) {
        let p = &mut self.predicates[slot as usize];
        *p = *p & !lanes | value & lanes;
        let written = &mut self.predicates_written[slot as usize];
        *written = *written & !lanes | lanes & defined;
    }

    /// wgmma.fence: registers written up to now may be used by wgmma.
    pub fn wgmma_fence(&mut self) {
        self.fence_stamp += 1;
    }

    /// Whether an ordinary instruction has written the register since the last wgmma.fence.
    pub fn written_since_fence(&self, slot: u32) -> bool {
        self.meta[slot as usize].stamp == self.fence_stamp
    }

    /// A wgmma starts: `accumulators` will be written, `fragments` are being read.
    pub fn hold(&mut self, accumulators: &[u32], fragments: &[u32]) {
        accumulators.iter().for_each(|r| self.meta[*r as usize].accumulating += 1);
        fragments.iter().for_each(|r| self.meta[*r as usize].reading += 1);
        self.in_flight += 1;
    }

    /// The wgmma that held these registers is complete.
    pub fn unhold(&mut self, accumulators: &[u32], fragments: &[u32]) {
        accumulators.iter().for_each(|r| self.meta[*r as usize].accumulating -= 1);
        fragments.iter().for_each(|r| self.meta[*r as usize].reading -= 1);
        self.in_flight -= 1;
    }

    /// Whether a wgmma in flight writes the register.
    pub fn accumulates(&self, slot: u32) -> bool {
        self.meta[slot as usize].accumulating != 0
    }

    /// wgmma's own write of an accumulator, which holds a value in the lanes of `defined`: needs no
    /// further fence.
    pub fn set_accumulator(&mut self, slot: u32, defined: u32, value: &Lanes) {
        self.registers[slot as usize] = *value;
        self.meta[slot as usize].written = defined;
        self.meta[slot as usize].low_written = defined;
        self.meta[slot as usize].stamp = ACCUMULATED;
    }

    /// Index of the group to run: the lowest program counter that can go on.
    pub fn runnable(&self) -> Option<usize> {
        self.groups.iter().position(|g| g.waiting.is_none())
    }

    /// Group `g` goes on to the next instruction.
    #[inline]
    pub fn step(&mut self, g: usize) {
        let pc = self.groups[g].pc + 1;
        self.groups[g].pc = pc;
        self.groups[g].note = None;
        if self.groups.get(g + 1).is_some_and(|next| next.pc <= pc) {
            let group = self.groups.remove(g);
            self.insert(pc, group.lanes);
        }
    }

    /// All of group `g` goes to `pc`.
    #[inline]
    pub fn jump(&mut self, g: usize, pc: u32) {
        if self.groups.len() == 1 {
            self.groups[0].pc = pc;
            self.groups[0].note = None;
        } else {
            let group = self.groups.remove(g);
            self.insert(pc, group.lanes);
        }
    }

    /// Group `g` goes on, but lets others run first.
    pub fn poll(&mut self, g: usize, why: Waiting) {
        if let Waiting::On(what) = why {
            self.last_wait = Some(format!("polls {what}"));
        }
        let lanes = self.groups[g].lanes;
        self.step(g);
        if let Some(group) = self.groups.iter_mut().find(|g| g.lanes & lanes != 0) {
            group.waiting = Some(Waiting::Poll);
        }
    }

    /// Moves `moved` of the lanes of group `g` to `pc`, the rest to the next instruction; groups
    /// that meet become one, and what waited there may look again.
    pub fn advance(&mut self, g: usize, moved: u32, pc: u32) {
        let group = self.groups.remove(g);
        let rest = group.lanes & !moved;
        if rest != 0 {
            self.insert(group.pc + 1, rest);
        }
        if moved != 0 {
            self.insert(pc, moved);
        }
    }

    /// Keeps `lanes` of group `g` where they are, waiting; the others go on.
    pub fn wait(&mut self, g: usize, lanes: u32, waiting: Waiting, note: Option<u64>) {
        let group = self.groups.remove(g);
        let rest = group.lanes & !lanes;
        if rest != 0 {
            self.insert(group.pc + 1, rest);
        }
        let at = self.groups.partition_point(|o| o.pc < group.pc);
        self.groups.insert(at, Group { pc: group.pc, lanes, waiting: Some(waiting), note });
    }

    /// Ends `lanes` of group `g`; the others go on.
    pub fn exit(&mut self, g: usize, lanes: u32) {
        let group = self.groups.remove(g);
        self.live &= !lanes;
        self.clock.retire(lanes);
        let rest = group.lanes & !lanes;
        if rest != 0 {
            self.insert(group.pc + 1, rest);
        }
        // A collective that waited for these lanes has to look again.
        self.wake();
    }

    /// Lets every waiting group look again.
    pub fn wake(&mut self) {
        self.groups.iter_mut().for_each(|g| g.waiting = None);
    }

    fn insert(&mut self, pc: u32, lanes: u32) {
        let at = self.groups.partition_point(|g| g.pc < pc);
        match self.groups.get_mut(at) {
            // A group that has begun to wait with a note keeps to itself: it has already arrived.
            Some(g) if g.pc == pc && g.note.is_none() => {
                g.lanes |= lanes;
                g.waiting = None;
            }
            _ => self.groups.insert(at, Group::at(pc, lanes)),
        }
    }
}
