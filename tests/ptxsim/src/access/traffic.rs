//! Counting: wavefronts of shared memory, bytes and sectors of global memory.

use std::ops::Range;

use super::{Mode, Region, Window};
use crate::bank::{sectors, shared_phases};
use crate::context::{Cx, lanes};
use crate::count::Traffic;
use crate::memory::{Target, target};
use crate::program::Lanes;

impl Cx<'_, '_> {
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
}
