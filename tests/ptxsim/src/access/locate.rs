//! From an address to the bytes it names, and to words for a report.

use super::{Region, Window};
use crate::context::Cx;
use crate::diagnostic::{Kind, Place};
use crate::memory::{RANK_SHIFT, Target, global_address, target};
use crate::program::Variable;

impl Cx<'_, '_> {
    /// Finds the bytes at an address; reports and returns None when they are misaligned or do not
    /// exist. The alignment is a power of two.
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
        match found {
            Some(Region::Global { .. }) => self.needs_grid_wait(1 << lane, "touches global memory"),
            Some(_) => {}
            None => self.report_outside(lane, window, address, bytes),
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
        let local = |offset: u64| {
            let v = self.local(offset)?;
            let inside = offset - u64::from(v.offset) + u64::from(bytes) <= u64::from(v.bytes);
            inside.then_some(Region::Local(offset as usize))
        };
        match (window, target(address)) {
            (Window::Shared, _) => shared(address),
            (Window::Generic, Target::Shared(a)) => shared(a.into()),
            (Window::Local, _) => local(address),
            (Window::Generic, Target::Local(o)) => local(o),
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

    /// The last local variable that begins at or before an offset of the frame.
    pub(super) fn local(&self, offset: u64) -> Option<&Variable> {
        let locals = &self.grid.kernel.locals;
        let after = locals.partition_point(|v| u64::from(v.offset) <= offset);
        locals.get(after.checked_sub(1)?)
    }

    pub(super) fn frame_bytes(&self) -> usize {
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
        let local = |offset: u64| match self.local(offset) {
            Some(v) => named("local", &v.name, offset as i64 - i64::from(v.offset)),
            None => named("local", "frame", offset as i64),
        };
        match (window, target(address)) {
            (Window::Shared, _) => shared(address),
            (Window::Generic, Target::Shared(a)) => shared(a.into()),
            (Window::Local, _) => local(address),
            (Window::Generic, Target::Local(o)) => local(o),
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
}
