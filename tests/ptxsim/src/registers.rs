//! Registers that a kernel starts with, and how setmaxnreg moves them between the warps of a block.
//!
//! A block takes its registers at launch: those of every thread at entry. `setmaxnreg.dec` leaves
//! some of them to the block, `setmaxnreg.inc` takes some that were left, and waits until there are
//! enough. What a warp has at its end stays its own.

use crate::arch::Arch;
use crate::ast::{Directives, Instr, Operand};

/// Fewest registers of a thread.
const LEAST: u32 = 24;
/// Most registers of a thread.
pub const MOST: u32 = 255;

/// What the setmaxnreg of a kernel ask for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Reallocation {
    /// The most that one of them increases to.
    pub largest: Option<u32>,
}

impl Reallocation {
    /// Of a program; None without any setmaxnreg.
    pub fn of<'a>(program: impl Iterator<Item = &'a Instr>) -> Option<Self> {
        let mut all = program.filter(|i| i.root == "setmaxnreg").peekable();
        all.peek()?;
        let increases = all.filter_map(|i| match i.operands[..] {
            [Operand::Int(n)] if i.mods.iter().any(|m| m == "inc") => u32::try_from(n).ok(),
            _ => None,
        });
        Some(Self { largest: increases.max() })
    }

    /// Registers of a thread at entry, as ptxas allots them to a kernel with setmaxnreg: all that the
    /// directives allow, but no more than the largest increase. None where they allow any number:
    /// then ptxas ignores setmaxnreg.
    pub fn at_entry(&self, directives: &Directives, arch: Arch) -> Option<u32> {
        let bound = most_registers(directives, arch)?;
        Some(self.largest.map_or(bound, |largest| largest.min(bound)))
    }
}

/// The most registers of a thread that a kernel's directives allow: `.maxnreg`, or the share of each
/// thread when `.minnctapersm` blocks of `.maxntid` (`.reqntid`) threads are on a multiprocessor, their
/// warps dealt to its four parts. More blocks or threads than it holds say nothing.
pub fn most_registers(directives: &Directives, arch: Arch) -> Option<u32> {
    let asked = directives.max_registers.map(|n| n.clamp(LEAST, MOST));
    let warps = directives.threads().map(|n| n.div_ceil(32).max(1));
    let resident = directives.min_blocks.zip(warps).and_then(|(blocks, warps)| {
        let all = blocks.max(1).checked_mul(warps)?;
        let fits = blocks <= arch.blocks_per_multiprocessor()
            && all <= arch.threads_per_multiprocessor() / 32;
        fits.then(|| all.next_multiple_of(4))
    });
    let share = resident.map(|warps| (arch.registers() / (32 * warps) / 8 * 8).min(MOST));
    [asked, share].into_iter().flatten().min()
}

/// Why a warp cannot go on at a setmaxnreg.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// The count is on the wrong side of the warp's.
    Direction {
        /// What the warp has.
        now: u32,
    },
    /// Another warp of the warpgroup has executed the setmaxnreg at this program counter.
    Other {
        /// Its program counter.
        pc: u32,
    },
    /// So many are left for the warp, all its own among them.
    Wait {
        /// Registers of a thread.
        free: u32,
    },
}

/// The registers of a block.
#[derive(Clone, Debug)]
pub struct Registers {
    /// Registers of a thread of each warp.
    held: Vec<u32>,
    /// Sum over the warps at launch.
    pool: u32,
    /// How many setmaxnreg each warp has executed, and those of each warpgroup, in order.
    executed: Vec<usize>,
    order: Vec<Vec<u32>>,
}

impl Registers {
    /// Those of a block of `warps` warps that start with `entry` each thread.
    pub fn new(warps: u32, entry: u32) -> Self {
        let (n, groups) = (warps as usize, warps.div_ceil(4) as usize);
        let pool = warps.saturating_mul(entry);
        Self { held: vec![entry; n], pool, executed: vec![0; n], order: vec![Vec::new(); groups] }
    }

    /// Gives a warp `count` registers a thread at the setmaxnreg at `pc`.
    pub fn set(&mut self, warp: u32, pc: u32, increase: bool, count: u32) -> Result<(), Refusal> {
        let (w, group) = (warp as usize, warp as usize / 4);
        match self.order[group].get(self.executed[w]) {
            Some(first) if *first != pc => return Err(Refusal::Other { pc: *first }),
            _ => {}
        }
        let now = self.held[w];
        if if increase { count < now } else { count > now } {
            return Err(Refusal::Direction { now });
        }
        let others = self.held.iter().sum::<u32>() - now;
        let free = self.pool.saturating_sub(others);
        if count > free {
            return Err(Refusal::Wait { free });
        }
        self.held[w] = count;
        if self.executed[w] == self.order[group].len() {
            self.order[group].push(pc);
        }
        self.executed[w] += 1;
        Ok(())
    }

    /// The first warp of a warpgroup that has executed fewer setmaxnreg than another, with the program
    /// counter of that which it lacks.
    pub fn unfinished(&self) -> Option<(u32, u32)> {
        let warps = self.executed.iter().enumerate();
        let mut lacks = warps.filter_map(|(w, n)| Some((w as u32, *self.order[w / 4].get(*n)?)));
        lacks.next()
    }

    /// The pool, in registers of a thread summed over the warps.
    pub fn pool(&self) -> u32 {
        self.pool
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(threads: Option<u32>, blocks: Option<u32>, most: Option<u32>) -> Directives {
        let max_threads = threads.map(|n| [n, 1, 1]);
        Directives { max_threads, min_blocks: blocks, max_registers: most, ..Default::default() }
    }

    /// Against what ptxas 13.0 told of such kernels for sm_90a.
    #[test]
    fn entry_counts_are_those_of_ptxas() {
        let of = |threads, blocks, most, largest| {
            let directives = bounds(threads, blocks, most);
            Reallocation { largest }.at_entry(&directives, Arch::Sm90a)
        };
        let inc = Some(232);
        assert_eq!(of(Some(384), Some(1), None, inc), Some(168));
        assert_eq!(of(Some(384), Some(2), None, inc), Some(80));
        assert_eq!(of(Some(384), Some(3), None, inc), Some(56));
        assert_eq!(of(Some(512), Some(1), None, inc), Some(128));
        // Nine warps count as twelve, but eighteen as twenty, fifteen as sixteen.
        assert_eq!(of(Some(288), Some(1), None, inc), Some(168));
        assert_eq!(of(Some(288), Some(2), None, inc), Some(96));
        assert_eq!(of(Some(96), Some(5), None, inc), Some(128));
        assert_eq!(of(Some(32), Some(31), None, inc), Some(64));
        assert_eq!(of(Some(1025), Some(1), None, inc), Some(56));
        // No more than the largest increase; without one, all.
        assert_eq!(of(Some(256), Some(1), None, inc), Some(232));
        assert_eq!(of(Some(384), Some(1), None, Some(160)), Some(160));
        assert_eq!(of(Some(256), Some(1), None, None), Some(255));
        assert_eq!(of(None, None, Some(200), Some(160)), Some(160));
        assert_eq!(of(None, None, Some(165), inc), Some(165));
        assert_eq!(of(Some(384), Some(1), Some(160), inc), Some(160));
        assert_eq!(of(None, None, Some(16), inc), Some(24));
        assert_eq!(of(None, None, Some(300), None), Some(255));
        // "'setmaxnreg' ignored; unable to determine register count at entry."
        assert_eq!(of(Some(384), None, None, inc), None);
        assert_eq!(of(None, Some(1), None, inc), None);
        assert_eq!(of(None, None, None, inc), None);
        assert_eq!(of(Some(512), Some(5), None, inc), None);
        assert_eq!(of(Some(64), Some(33), None, inc), None);
        assert_eq!(of(Some(4096), Some(1), None, inc), None);
        assert_eq!(of(Some(u32::MAX), Some(u32::MAX), None, inc), None);
    }

    #[test]
    fn threads_in_three_dimensions() {
        let directives = Directives {
            required_threads: Some([384, 2, 1]),
            min_blocks: Some(1),
            ..Default::default()
        };
        assert_eq!(most_registers(&directives, Arch::Sm90a), Some(80));
    }

    #[test]
    fn registers_are_taken_when_they_were_left() {
        let mut registers = Registers::new(12, 168);
        assert_eq!(registers.set(4, 9, true, 240), Err(Refusal::Wait { free: 168 }));
        for warp in 0..4 {
            assert_eq!(registers.set(warp, 5, false, 24), Ok(()));
        }
        // 4 x 144 were left: enough for 72 more of eight warps.
        for warp in 4..12 {
            assert_eq!(registers.set(warp, 9, true, 240), Ok(()));
        }
        assert_eq!(registers.set(4, 10, true, 248), Err(Refusal::Wait { free: 240 }));
        assert_eq!(registers.set(4, 10, false, 248), Err(Refusal::Direction { now: 240 }));
        assert_eq!(registers.set(0, 10, true, 16), Err(Refusal::Direction { now: 24 }));
        assert_eq!((registers.pool(), registers.unfinished()), (2016, None));
    }

    #[test]
    fn the_warps_of_a_warpgroup_execute_the_same() {
        let mut registers = Registers::new(8, 168);
        assert_eq!(registers.set(0, 5, false, 40), Ok(()));
        assert_eq!(registers.unfinished(), Some((1, 5)));
        assert_eq!(registers.set(1, 6, false, 40), Err(Refusal::Other { pc: 5 }));
        assert_eq!(registers.set(4, 6, false, 40), Ok(()));
    }
}
