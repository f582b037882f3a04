//! Loads, stores and atomic updates, with every check of an address.

mod locate;
mod sync;
mod touch;
mod traffic;

use std::sync::MutexGuard;

use crate::ast::Space;
use crate::clock::{Epoch, Scope};
use crate::context::{Cx, lanes};
use crate::launch::Grid;
use crate::memory::{PAGE, Page, copy_few};
use crate::program::{Address, Lanes, Src};
use crate::shadow::Proxy;

/// State space of a memory instruction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Window {
    /// Any, by the address.
    Generic,
    /// `.global`.
    Global,
    /// `.const`.
    Const,
    /// `.shared`, `.shared::cta`, `.shared::cluster`.
    Shared,
    /// `.local` and the parameters of calls.
    Local,
    /// Parameters of the kernel.
    Param,
}

impl Window {
    /// The window of a named variable.
    pub fn of(space: Space) -> Self {
        match space {
            Space::Global => Self::Global,
            Space::Const => Self::Const,
            Space::Shared => Self::Shared,
            Space::Local => Self::Local,
            Space::Param => Self::Param,
            Space::Reg => Self::Generic,
        }
    }
}

/// Bytes that have been found to exist.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Region {
    /// In a global buffer.
    Global {
        /// Number of the buffer.
        buffer: usize,
        /// First byte.
        offset: u64,
    },
    /// In the shared memory of a block of the gang.
    Shared {
        /// Index of the block.
        block: usize,
        /// Shared address without rank.
        address: u32,
    },
    /// In the thread's local memory.
    Local(usize),
    /// In the kernel's parameters.
    Param(usize),
}

/// Who makes an access, for the shadow.
#[derive(Clone, Copy, Debug)]
pub struct Actor {
    /// Whose knowledge decides, and who is named.
    pub lane: u32,
    /// What is recorded.
    pub epoch: Epoch,
    /// Generic or async proxy.
    pub proxy: Proxy,
    /// Scope of a strong access.
    pub strong: Option<Scope>,
}

/// What an access does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Reads and writes at once.
    Update,
}

/// The page of global memory that the lanes of an instruction work on, locked until they need
/// another.
#[derive(Default)]
struct OpenPage<'g>(Option<(usize, u64, MutexGuard<'g, Page>)>);

impl<'g> OpenPage<'g> {
    #[inline]
    fn get(&mut self, grid: &'g Grid<'g>, buffer: usize, offset: u64) -> &mut Page {
        let wanted = (buffer, offset / PAGE);
        // Never two at once: another warp may hold them in the other order.
        self.0.take_if(|(buffer, number, _)| (*buffer, *number) != wanted);
        let open = || (buffer, offset / PAGE, grid.existing(buffer).page(offset));
        &mut self.0.get_or_insert_with(open).2
    }
}

impl<'g> Cx<'_, 'g> {
    /// Addresses of a memory operand.
    pub fn addresses(&mut self, a: &Address) -> Lanes {
        let base = self.read(&a.base);
        std::array::from_fn(|l| base[l].wrapping_add(a.offset as u64))
    }

    /// The executing lane's own accesses.
    #[inline]
    pub fn own(&self, lane: usize, strong: Option<Scope>) -> Actor {
        let lane = lane as u32;
        let epoch = self.warp.clock.epoch(1 << lane);
        Actor { lane, epoch, proxy: Proxy::Generic, strong }
    }

    /// Loads `bytes` bytes per executing lane, the first in the lowest bits; 0 where the address
    /// is bad.
    #[inline]
    pub fn load(
        &mut self,
        window: Window,
        bytes: u32,
        at: &Lanes,
        strong: Option<Scope>,
    ) -> [u128; 32] {
        self.count_access(window, bytes, at, Mode::Read);
        let mut out = [0; 32];
        let mut open = OpenPage::default();
        for l in lanes(self.mask) {
            let Some(region) = self.locate(l as u32, window, at[l], bytes, bytes) else { continue };
            self.touch_open(&mut open, region, bytes, Mode::Read, self.own(l, strong), "load");
            let mut data = [0; 16];
            match region {
                Region::Global { buffer, offset } => {
                    let page = open.get(self.grid, buffer, offset);
                    let at = (offset % PAGE) as usize;
                    copy_few(&mut data[..bytes as usize], &page.data[at..]);
                }
                region => self.copy_out(l, region, &mut data[..bytes as usize]),
            }
            out[l] = u128::from_le_bytes(data);
        }
        out
    }

    /// Stores the low `bytes` bytes of every executing lane's value.
    #[inline]
    pub fn store(
        &mut self,
        window: Window,
        bytes: u32,
        at: &Lanes,
        values: &[u128; 32],
        strong: Option<Scope>,
    ) {
        self.count_access(window, bytes, at, Mode::Write);
        self.gang.activity += 1;
        let mut open = OpenPage::default();
        let repeats = strong.is_none() && !ascends(at, self.mask);
        let mut stored = 0;
        for l in lanes(self.mask) {
            if stored >> l & 1 != 0 {
                continue;
            }
            let Some(region) = self.locate(l as u32, window, at[l], bytes, bytes) else { continue };
            let mut actor = self.own(l, strong);
            if repeats && !matches!(region, Region::Local(_)) {
                // One value to one address: whichever lane is last, so they count as one access.
                let alike = |o: &usize| at[*o] == at[l] && values[*o] == values[l];
                actor.epoch.lanes = lanes(self.mask).filter(alike).fold(0, |m, o| m | 1 << o);
                stored |= actor.epoch.lanes;
            }
            self.touch_open(&mut open, region, bytes, Mode::Write, actor, "store");
            let data = &values[l].to_le_bytes()[..bytes as usize];
            match region {
                Region::Global { buffer, offset } => {
                    open.get(self.grid, buffer, offset).write(offset % PAGE, data);
                }
                region => self.copy_in(l, region, data),
            }
        }
    }

    /// Replaces, lane after lane, the `count` elements of `size` bytes at the address by
    /// `f(lane, element, old)`; returns the old values.
    pub fn update(
        &mut self,
        window: Window,
        size: u32,
        count: u32,
        at: &Lanes,
        scope: Scope,
        mut f: impl FnMut(usize, usize, u64) -> u64,
    ) -> [u128; 32] {
        let bytes = size * count;
        self.count_access(window, bytes, at, Mode::Update);
        let mut out = [0; 32];
        let mut open = OpenPage::default();
        for l in lanes(self.mask) {
            let Some(region) = self.locate(l as u32, window, at[l], bytes, bytes) else { continue };
            let actor = self.own(l, Some(scope));
            self.touch_open(&mut open, region, bytes, Mode::Update, actor, "atomic");
            let (mut old, mut changed) = ([0; 16], false);
            let mut apply = |data: &mut [u8]| {
                old[..data.len()].copy_from_slice(data);
                for (i, element) in data.chunks_exact_mut(size as usize).enumerate() {
                    let mut word = [0; 8];
                    word[..element.len()].copy_from_slice(element);
                    let new = f(l, i, u64::from_le_bytes(word)).to_le_bytes();
                    changed |= new != word;
                    element.copy_from_slice(&new[..element.len()]);
                }
            };
            match region {
                // Under the lock of the page: other blocks may run at the same time.
                Region::Global { buffer, offset } => {
                    let page = open.get(self.grid, buffer, offset);
                    let at = (offset % PAGE) as usize;
                    apply(&mut page.data[at..at + bytes as usize]);
                }
                region => {
                    let mut data = [0; 16];
                    let data = &mut data[..bytes as usize];
                    self.copy_out(l, region, data);
                    apply(data);
                    self.copy_in(l, region, data);
                }
            }
            out[l] = u128::from_le_bytes(old);
            self.gang.activity += u64::from(changed);
        }
        out
    }

    /// Copies bytes out of a region, unchecked.
    #[inline]
    pub fn copy_out(&self, lane: usize, region: Region, out: &mut [u8]) {
        match region {
            Region::Global { buffer, offset } => self.grid.existing(buffer).copy_out(offset, out),
            Region::Shared { block, address } => {
                let shared = &self.gang.blocks[block].shared;
                let at = shared.index(address);
                copy_few(out, &shared.data[at..]);
            }
            Region::Local(o) => {
                let at = lane * self.frame_bytes() + o;
                out.copy_from_slice(&self.warp.frame[at..at + out.len()]);
            }
            Region::Param(o) => out.copy_from_slice(&self.grid.params[o..o + out.len()]),
        }
    }

    /// Copies bytes into a region, unchecked.
    #[inline]
    pub fn copy_in(&mut self, lane: usize, region: Region, bytes: &[u8]) {
        match region {
            Region::Global { buffer, offset } => self.grid.existing(buffer).copy_in(offset, bytes),
            Region::Shared { block, address } => {
                self.gang.blocks[block].shared.write(address, bytes);
            }
            Region::Local(o) => {
                let at = lane * self.frame_bytes() + o;
                self.warp.frame[at..at + bytes.len()].copy_from_slice(bytes);
            }
            Region::Param(_) => {}
        }
    }
}

/// Whether addresses ascend from lane to lane, so that no two are the same.
fn ascends(at: &Lanes, mask: u32) -> bool {
    lanes(mask).zip(lanes(mask).skip(1)).all(|(a, b)| at[a] < at[b])
}

/// A constant or register as the base of an address.
impl From<Src> for Address {
    fn from(base: Src) -> Self {
        Self { base, offset: 0, symbol: None }
    }
}
