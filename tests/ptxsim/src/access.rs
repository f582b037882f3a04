//! Loads, stores and atomic updates, with every check of an address.

use std::ops::Range;
use std::sync::MutexGuard;

use crate::ast::Space;
use crate::bank::{sectors, shared_phases};
use crate::clock::{ActorKind, Epoch, ProxySpace, Scope};
use crate::context::{Cx, lanes};
use crate::count::Traffic;
use crate::diagnostic::{Kind, Place};
use crate::launch::Grid;
use crate::memory::{
    PAGE, Page, RANK_SHIFT, SHARED_WINDOW, Target, copy_few, global_address, target,
};
use crate::program::{Address, Lanes, Src};
use crate::shadow::{Access, Conflict, Proxy};

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
        let mut open = OpenPage::default();
        for l in lanes(self.mask) {
            let Some(region) = self.locate(l as u32, window, at[l], bytes, bytes) else { continue };
            self.touch_open(&mut open, region, bytes, Mode::Write, self.own(l, strong), "store");
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
            let mut old = [0; 16];
            let mut apply = |data: &mut [u8]| {
                old[..data.len()].copy_from_slice(data);
                for (i, element) in data.chunks_exact_mut(size as usize).enumerate() {
                    let mut word = [0; 8];
                    word[..element.len()].copy_from_slice(element);
                    let new = f(l, i, u64::from_le_bytes(word)).to_le_bytes();
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
        }
        out
    }

    /// Counts what an access costs: wavefronts of shared memory, or bytes and sectors of buffers.
    pub fn count_access(&mut self, window: Window, bytes: u32, at: &Lanes, mode: Mode) {
        let first = at[self.mask.trailing_zeros() as usize & 31];
        match (window, target(first)) {
            (Window::Shared, _) | (Window::Generic, Target::Shared(_)) => {
                let phases = shared_phases(&at.map(|a| a as u32), self.mask, bytes);
                self.gang.counters.add_phases(self.pc, phases);
            }
            (Window::Local | Window::Param | Window::Const, _) => {}
            (_, Target::Global { .. }) => self.count_global(bytes, at, mode),
            _ => {}
        }
    }

    fn count_global(&mut self, bytes: u32, at: &Lanes, mode: Mode) {
        let (read, written) = (mode != Mode::Write, mode != Mode::Read);
        let buffer = |l: usize| match target(at[l]) {
            Target::Global { buffer, offset } => Some((buffer, offset as u64)),
            _ => None,
        };
        let mut rest = self.mask;
        while let Some((number, _)) = lanes(rest).find_map(buffer) {
            let same = |l: &usize| buffer(*l).is_some_and(|(n, _)| n == number);
            let here = lanes(rest).filter(same).fold(0u32, |m, l| m | 1 << l);
            rest &= !here;
            let size = self.grid.buffer(number).map_or(0, |b| b.bytes);
            let mut note = |run: Range<u64>| {
                if !run.is_empty() {
                    let bytes = (run.end - run.start) as u32;
                    self.gang.counters.touch(number, run.start, bytes, read, written);
                }
            };
            // Neighbours are noted together.
            let mut run = 0..0;
            for (_, offset) in lanes(here).filter_map(buffer).filter(|(_, o)| *o < size) {
                if offset != run.end {
                    note(run);
                    run = offset..offset;
                }
                run.end += u64::from(bytes);
            }
            note(run);
            let moved = u64::from(bytes) * u64::from(here.count_ones());
            self.add_traffic(number, moved, sectors(at, here, bytes).into(), mode);
        }
    }

    /// Counts bytes a bulk copy moves.
    pub fn count_range(&mut self, region: Region, bytes: u32, mode: Mode) {
        let Region::Global { buffer, offset } = region else { return };
        let sectors = (offset + u64::from(bytes)).div_ceil(32) - offset / 32;
        let (read, written) = (mode != Mode::Write, mode != Mode::Read);
        self.gang.counters.touch(buffer, offset, bytes, read, written);
        self.add_traffic(buffer, bytes.into(), sectors, mode);
    }

    fn add_traffic(&mut self, buffer: usize, bytes: u64, sectors: u64, mode: Mode) {
        let mut traffic = Traffic::default();
        if mode != Mode::Write {
            (traffic.read, traffic.read_sectors) = (bytes, sectors);
        }
        if mode != Mode::Read {
            (traffic.written, traffic.written_sectors) = (bytes, sectors);
        }
        self.gang.counters.add_traffic(self.pc, buffer, traffic);
    }

    /// Finds the bytes at an address; reports and returns None when they are misaligned or do not
    /// exist.
    #[inline]
    pub fn locate(
        &mut self,
        lane: u32,
        window: Window,
        address: u64,
        bytes: u32,
        align: u32,
    ) -> Option<Region> {
        if address & u64::from(align - 1) != 0 {
            self.report_misaligned(lane, window, address, align);
            return None;
        }
        let found = self.find(window, address, bytes);
        if found.is_none() {
            self.report_outside(lane, window, address, bytes);
        }
        found
    }

    #[cold]
    fn report_misaligned(&mut self, lane: u32, window: Window, address: u64, align: u32) {
        let text = format!("address {address:#x} is not a multiple of {align} bytes");
        self.report_at(Kind::Misaligned, lane, text, self.place(window, address), None);
    }

    #[cold]
    fn report_outside(&mut self, lane: u32, window: Window, address: u64, bytes: u32) {
        let place = self.place(window, address);
        let text = match &place {
            Some(p) => format!("{bytes} bytes at {p} lie outside of it"),
            None => format!("address {address:#x} belongs to no allocation"),
        };
        self.report_at(Kind::OutOfBounds, lane, text, place, None);
    }

    #[inline]
    fn find(&self, window: Window, address: u64, bytes: u32) -> Option<Region> {
        let within = |offset: u64, len: usize| {
            (offset.checked_add(bytes.into())? <= len as u64).then_some(offset as usize)
        };
        let shared = |address: u64| {
            let (block, address) = self.shared_target(u32::try_from(address).ok()?)?;
            let b = &self.gang.blocks[block];
            (!b.ended() && b.shared.range(address, bytes).is_some())
                .then_some(Region::Shared { block, address })
        };
        match (window, target(address)) {
            (Window::Shared, _) => shared(address),
            (Window::Generic, Target::Shared(a)) => shared(a.into()),
            (Window::Local, _) => within(address, self.frame_bytes()).map(Region::Local),
            (Window::Generic, Target::Local(o)) => within(o, self.frame_bytes()).map(Region::Local),
            (Window::Param, _) => within(address, self.grid.params.len()).map(Region::Param),
            (Window::Generic, Target::Param(o)) => {
                within(o, self.grid.params.len()).map(Region::Param)
            }
            (
                Window::Generic | Window::Global | Window::Const,
                Target::Global { buffer, offset },
            ) => {
                let b = self.grid.buffer(buffer)?;
                let offset = u64::try_from(offset).ok()?;
                (offset.checked_add(bytes.into())? <= b.bytes)
                    .then_some(Region::Global { buffer, offset })
            }
            _ => None,
        }
    }

    fn frame_bytes(&self) -> usize {
        self.grid.kernel.frame as usize
    }

    /// An address in words.
    pub fn place(&self, window: Window, address: u64) -> Option<Place> {
        let named = |space: &str, buffer: &str, offset: i64| {
            Some(Place { space: space.into(), buffer: buffer.into(), offset })
        };
        let shared = |address: u64| {
            let (block, a) = self.shared_target(u32::try_from(address).ok()?)?;
            // The last variable that begins at or before the address.
            let ranges = &self.gang.blocks[block].shared.ranges;
            let r = ranges.iter().rev().find(|r| r.start <= a).or(ranges.first())?;
            named("shared", &r.name, i64::from(a) - i64::from(r.start))
        };
        match (window, target(address)) {
            (Window::Shared, _) => shared(address),
            (Window::Generic, Target::Shared(a)) => shared(a.into()),
            (Window::Local, _) => named("local", "frame", address as i64),
            (Window::Generic, Target::Local(o)) => named("local", "frame", o as i64),
            (Window::Param, _) => named("param", "parameters", address as i64),
            (Window::Generic, Target::Param(o)) => named("param", "parameters", o as i64),
            (_, Target::Global { buffer, offset }) => {
                named("global", &self.grid.buffer(buffer)?.name, offset)
            }
            _ => None,
        }
    }

    /// The place of a region.
    pub fn region_place(&self, region: Region) -> Option<Place> {
        match region {
            Region::Global { buffer, offset } => {
                self.place(Window::Global, global_address(buffer) + offset)
            }
            Region::Shared { block, address } => {
                let b = &self.gang.blocks[block];
                let rank = (block - b.cluster_first + 1) as u64;
                self.place(Window::Shared, rank << RANK_SHIFT | u64::from(address))
            }
            Region::Local(o) => self.place(Window::Local, o as u64),
            Region::Param(o) => self.place(Window::Param, o as u64),
        }
    }

    /// Checks and records an access in the shadow: initialised, no race, not an mbarrier object,
    /// not read-only.
    pub fn touch(&mut self, region: Region, bytes: u32, mode: Mode, actor: Actor, what: &str) {
        self.touch_open(&mut OpenPage::default(), region, bytes, mode, actor, what);
    }

    /// The same with the page that is open.
    #[inline]
    fn touch_open(
        &mut self,
        open: &mut OpenPage<'g>,
        region: Region,
        bytes: u32,
        mode: Mode,
        actor: Actor,
        what: &str,
    ) {
        if !self.grid.options.checks {
            return;
        }
        match region {
            Region::Global { buffer, offset } => {
                let b = self.grid.existing(buffer);
                if mode != Mode::Read && !b.writable {
                    let text = format!("{what} to constant memory");
                    self.report_at(
                        Kind::OutOfBounds,
                        actor.lane,
                        text,
                        self.region_place(region),
                        None,
                    );
                }
                let (mut from, end) = (offset, offset + u64::from(bytes));
                while from < end {
                    let to = end.min((from / PAGE + 1) * PAGE);
                    let part = Region::Global { buffer, offset: from };
                    self.touch_part(open, part, (to - from) as u32, mode, actor, what);
                    from = to;
                }
            }
            Region::Shared { block, address } => {
                if self.gang.blocks[block].shared.touches_mbarrier(address, bytes) {
                    let text = format!("{what} of an mbarrier object");
                    self.report_at(
                        Kind::Mbarrier,
                        actor.lane,
                        text,
                        self.region_place(region),
                        None,
                    );
                    return;
                }
                self.touch_part(open, region, bytes, mode, actor, what);
            }
            Region::Local(o) => self.touch_local(o, bytes, mode, actor.lane),
            Region::Param(_) if mode != Mode::Read => {
                let text = format!("{what} to the kernel's parameters");
                self.report_at(
                    Kind::OutOfBounds,
                    actor.lane,
                    text,
                    self.region_place(region),
                    None,
                );
            }
            Region::Param(_) => {}
        }
    }

    /// The same for an mbarrier object, by the instructions that may.
    pub fn touch_object(
        &mut self,
        region: Region,
        bytes: u32,
        mode: Mode,
        actor: Actor,
        what: &str,
    ) {
        if self.grid.options.checks {
            let open = &mut OpenPage::default();
            self.touch_part(open, region, bytes, mode, actor, what);
        }
    }

    fn touch_local(&mut self, o: usize, bytes: u32, mode: Mode, lane: u32) {
        let at = lane as usize * self.frame_bytes() + o;
        let written = &mut self.warp.frame_written[at..at + bytes as usize];
        if mode == Mode::Read && written.contains(&false) {
            let text = format!("load of {bytes} bytes of local memory that were never written");
            self.report_at(
                Kind::UninitialisedMemory,
                lane,
                text,
                self.region_place(Region::Local(o)),
                None,
            );
        } else if mode != Mode::Read {
            written.fill(true);
        }
    }

    /// A part that lies within one shadow.
    #[inline]
    fn touch_part(
        &mut self,
        open: &mut OpenPage<'g>,
        region: Region,
        bytes: u32,
        mode: Mode,
        actor: Actor,
        what: &str,
    ) {
        let (space, offset) = match region {
            Region::Global { offset, .. } => (ProxySpace::Global, offset % PAGE),
            Region::Shared { block, address } => {
                (ProxySpace::Shared, self.gang.blocks[block].shared.index(address) as u64)
            }
            _ => return,
        };
        let access = Access {
            offset,
            bytes,
            epoch: actor.epoch,
            pc: self.pc,
            proxy: actor.proxy,
            strong: actor.strong,
            cta: self.gang.blocks[self.warp.block].linear,
            cluster: self.gang.blocks[self.warp.block].cluster,
            clock: &self.warp.clock,
            lane: actor.lane,
        };
        let shadow = match region {
            Region::Global { buffer, offset } => &mut open.get(self.grid, buffer, offset).shadow,
            Region::Shared { block, .. } => &mut self.gang.blocks[block].shared.shadow,
            _ => return,
        };
        let uninitialised = mode != Mode::Write && !shadow.is_initialised(offset, bytes);
        let race = match mode {
            Mode::Read => shadow.read(&access, space),
            Mode::Write | Mode::Update => shadow.write(&access, space),
        };
        if mode != Mode::Read {
            shadow.mark_initialised(offset, bytes);
        }
        if uninitialised || race.is_err() {
            self.report_touch(region, bytes, uninitialised, race.err().as_ref(), actor.lane, what);
        }
    }

    #[cold]
    fn report_touch(
        &mut self,
        region: Region,
        bytes: u32,
        uninitialised: bool,
        race: Option<&crate::shadow::Race>,
        lane: u32,
        what: &str,
    ) {
        let Some(place) = self.region_place(region) else { return };
        if let Some(race) = race {
            let by_cp_async = race.other.actor.kind() == ActorKind::CpAsync;
            if race.conflict == Conflict::MissingProxyFence
                && by_cp_async
                && !self.grid.options.strict_proxies
            {
                return;
            }
            self.report_race(lane, race, what, place);
        } else if uninitialised {
            let text = format!("{what} of {bytes} bytes at {place} that were never written");
            self.report_at(Kind::UninitialisedMemory, lane, text, Some(place), None);
        }
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

    /// What a strong store or atomic of a lane makes visible to those who read it.
    pub fn publish(
        &mut self,
        lane: usize,
        window: Window,
        address: u64,
        scope: Scope,
        release: bool,
        rmw: bool,
    ) {
        let k = self.warp.clock.publish(1 << lane, release);
        let b = &self.gang.blocks[self.warp.block];
        let (cta, cluster) = (b.linear, b.cluster);
        match self.sync_key(window, address) {
            None => {}
            Some((Some(block), key)) => {
                self.gang.blocks[block].sync.publish(key, scope, cta, cluster, k, rmw);
            }
            Some((None, key)) => self.grid.sync().publish(key, scope, cta, cluster, k, rmw),
        }
    }

    /// What a strong load or atomic of a lane learns.
    pub fn observe(
        &mut self,
        lane: usize,
        window: Window,
        address: u64,
        scope: Scope,
        acquire: bool,
    ) {
        let b = &self.gang.blocks[self.warp.block];
        let (cta, cluster) = (b.linear, b.cluster);
        let k = match self.sync_key(window, address) {
            None => None,
            Some((Some(block), key)) => {
                self.gang.blocks[block].sync.observe(key, scope, cta, cluster)
            }
            Some((None, key)) => self.grid.sync().observe(key, scope, cta, cluster),
        };
        if let Some(k) = k {
            self.warp.clock.observe(1 << lane, &k, acquire);
        }
    }

    /// Block (for shared memory) and key of an address in the tables of synchronising accesses.
    fn sync_key(&self, window: Window, address: u64) -> Option<(Option<usize>, u64)> {
        let shared = |a: u32| {
            self.shared_target(a).map(|(block, a)| (Some(block), SHARED_WINDOW | u64::from(a)))
        };
        match (window, target(address)) {
            (Window::Shared, _) => shared(address as u32),
            (Window::Generic, Target::Shared(a)) => shared(a),
            (_, Target::Global { .. }) => Some((None, address)),
            _ => None,
        }
    }
}

/// A constant or register as the base of an address.
impl From<Src> for Address {
    fn from(base: Src) -> Self {
        Self { base, offset: 0, symbol: None }
    }
}
