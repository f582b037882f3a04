//! Checks of an access against what is known of its bytes.

use super::{Actor, Mode, OpenPage, Region};
use crate::clock::{ActorKind, ProxySpace, WarpClock};
use crate::context::Cx;
use crate::diagnostic::Kind;
use crate::memory::PAGE;
use crate::shadow::{Access, Conflict, Race};

impl<'g> Cx<'_, 'g> {
    /// Checks and records an access in the shadow: initialised, no race, not an mbarrier object,
    /// not read-only.
    pub fn touch(&mut self, region: Region, bytes: u32, mode: Mode, actor: Actor, what: &str) {
        self.touch_open(&mut OpenPage::default(), region, bytes, mode, actor, what);
    }

    /// The same with the page that is open.
    #[inline]
    pub(super) fn touch_open(
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
            Region::Shared { .. } => {
                if !self.meets_object(region, bytes, actor.lane, what) {
                    self.touch_part(open, region, bytes, mode, actor, what);
                }
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

    /// Whether an ordinary access meets an mbarrier object, which is reported.
    #[inline]
    fn meets_object(&mut self, region: Region, bytes: u32, lane: u32, what: &str) -> bool {
        let Region::Shared { block, address } = region else { return false };
        let meets = self.gang.blocks[block].shared.touches_mbarrier(address, bytes);
        if meets {
            let text = format!("{what} of an mbarrier object");
            self.report_at(Kind::Mbarrier, lane, text, self.region_place(region), None);
        }
        meets
    }

    /// Checks and records an access to an mbarrier object, by the instructions that may.
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
        let access = self.access(offset, bytes, actor, &self.warp.clock);
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

    #[inline]
    fn access<'c>(
        &self,
        offset: u64,
        bytes: u32,
        actor: Actor,
        clock: &'c WarpClock,
    ) -> Access<'c> {
        Access {
            offset,
            bytes,
            epoch: actor.epoch,
            pc: self.pc,
            proxy: actor.proxy,
            strong: actor.strong,
            cta: self.gang.blocks[self.warp.block].linear,
            cluster: self.gang.blocks[self.warp.block].cluster,
            clock,
            lane: actor.lane,
        }
    }

    /// Records a read of shared memory on behalf of a warp that knew `clock` at the time.
    pub fn read_by(
        &mut self,
        region: Region,
        bytes: u32,
        actor: Actor,
        clock: &WarpClock,
    ) -> Result<(), Race> {
        let Region::Shared { block, address } = region else { return Ok(()) };
        let offset = self.gang.blocks[block].shared.index(address) as u64;
        let access = self.access(offset, bytes, actor, clock);
        self.gang.blocks[block].shared.shadow.read(&access, ProxySpace::Shared)
    }

    /// Whether bytes of shared memory have been written, all of them; they must be no mbarrier.
    pub fn holds_values(&mut self, region: Region, bytes: u32, lane: u32, what: &str) -> bool {
        let Region::Shared { block, address } = region else { return true };
        if !self.grid.options.checks || self.meets_object(region, bytes, lane, what) {
            return true;
        }
        let shared = &self.gang.blocks[block].shared;
        shared.shadow.is_initialised(shared.index(address) as u64, bytes)
    }

    #[cold]
    fn report_touch(
        &mut self,
        region: Region,
        bytes: u32,
        uninitialised: bool,
        race: Option<&Race>,
        lane: u32,
        what: &str,
    ) {
        let Some(place) = self.region_place(region) else { return };
        if let Some(race) = race {
            let forgiven = self.is_forgiven(region, race);
            self.report_race(lane, race, what, place, forgiven);
        } else if uninitialised {
            let text = format!("{what} of {bytes} bytes at {place} that were never written");
            self.report_at(Kind::UninitialisedMemory, lane, text, Some(place), None);
        }
    }

    /// Whether only the text of the rules asks for the fence that is missing: compilers leave it
    /// out after cp.async and mbarrier.init.
    pub fn is_forgiven(&self, region: Region, race: &Race) -> bool {
        let object = match region {
            Region::Shared { block, address } => {
                self.gang.blocks[block].shared.mbarriers.contains_key(&address)
            }
            _ => false,
        };
        let by_cp_async = race.other.actor.kind() == ActorKind::CpAsync;
        race.conflict == Conflict::MissingProxyFence
            && (by_cp_async || object)
            && !self.grid.options.strict_proxies
    }
}
