//! What the semantics of an instruction work on: one warp, the blocks of its gang, the grid.

use crate::clock::{Actor, ActorKind, Epoch};
use crate::diagnostic::{Diagnostic, Kind, Location, Place};
use crate::gang::State;
use crate::launch::Grid;
use crate::program::{Dst, Flow, Lanes, Pred, PredDst, Src, Waiting};
use crate::shadow::{Conflict, Race};
use crate::warp::{Group, RegisterFault, Warp};

/// One instruction of one warp, for some of its lanes.
pub struct Cx<'a, 'g> {
    /// The warp.
    pub warp: &'a mut Warp,
    /// Blocks of the gang, asynchronous operations, counters, findings.
    pub gang: &'a mut State,
    /// What all blocks share: kernel, dimensions, global memory, options.
    pub grid: &'g Grid<'g>,
    /// Lanes that execute the instruction.
    pub mask: u32,
    /// Its program counter.
    pub pc: u32,
    /// Lanes in which the operands taken so far hold values: those of the result that will.
    pub defined: u32,
    /// What a waiting instruction remembers of its first attempt; None at the first.
    pub note: Option<u64>,
}

/// The lanes of a mask, ascending.
#[inline]
pub fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros() as usize;
        (rest != 0).then(|| {
            rest &= rest - 1;
            lane
        })
    })
}

impl Cx<'_, '_> {
    /// Value of an operand whose every executing lane must hold one.
    #[inline]
    pub fn read(&mut self, src: &Src) -> Lanes {
        self.require(src);
        *self.value(src)
    }

    /// Value of an operand for a result: what the instruction then writes holds a value only where
    /// the operand does. Compilers compute with undefined lanes whose results nobody uses.
    #[inline]
    pub fn take(&mut self, src: &Src) -> Lanes {
        self.check(src);
        *self.value(src)
    }

    /// Reports an operand that does not hold a value in some executing lane, or must not be read.
    #[inline]
    pub fn require(&mut self, src: &Src) {
        if let Src::Reg(slot) = src {
            let missing = self.mask & !self.warp.written(*slot);
            if missing != 0 && self.grid.options.checks {
                self.report_missing(*slot, missing);
            }
            if let Some(fault) = self.warp.check_read(*slot) {
                self.register_fault(*slot, fault);
            }
        }
    }

    #[cold]
    fn report_missing(&mut self, slot: u32, missing: u32) {
        let name = &self.grid.kernel.names[slot as usize];
        let text = format!(
            "register {name} holds no value in lanes {missing:#x}: it, or what it \
                            was computed from, was never written"
        );
        self.report_lane(Kind::UninitialisedRegister, missing.trailing_zeros(), text);
    }

    #[cold]
    fn register_fault(&mut self, slot: u32, fault: RegisterFault) {
        let name = &self.grid.kernel.names[slot as usize];
        let text = match fault {
            RegisterFault::Accumulating => {
                format!("{name} is an accumulator of a wgmma that has not been waited for")
            }
            RegisterFault::Reading => {
                format!("{name} is still read by a wgmma that has not been waited for")
            }
        };
        self.report(Kind::AccumulatorInFlight, text);
    }

    /// Writes a register in the executing lanes.
    #[inline]
    pub fn write(&mut self, dst: Dst, value: &Lanes) {
        if let Dst(Some(slot)) = dst {
            if let Some(fault) = self.warp.check_write(slot) {
                self.register_fault(slot, fault);
            }
            self.warp.set(slot, self.mask, self.defined, value);
        }
    }

    /// Lanes in which a predicate is true, which every executing lane must hold; all 32 bits,
    /// whatever the mask.
    #[inline]
    pub fn test(&mut self, pred: Pred) -> u32 {
        if let Pred::Reg { slot, .. } = pred {
            let missing = self.mask & !self.warp.predicate_written(slot);
            if missing != 0 && self.grid.options.checks {
                let text = format!(
                    "a predicate holds no value in lanes {missing:#x}: it, or what it was computed \
                     from, was never written"
                );
                self.report_lane(Kind::UninitialisedRegister, missing.trailing_zeros(), text);
            }
        }
        self.predicate(pred)
    }

    /// Lanes in which a predicate is true, for a result, as [`Cx::take`].
    #[inline]
    pub fn take_predicate(&mut self, pred: Pred) -> u32 {
        if let Pred::Reg { slot, .. } = pred {
            self.defined &= self.warp.predicate_written(slot);
        }
        self.predicate(pred)
    }

    #[inline]
    fn predicate(&self, pred: Pred) -> u32 {
        match pred {
            Pred::Constant(v) => {
                if v {
                    u32::MAX
                } else {
                    0
                }
            }
            Pred::Reg { slot, negated } => {
                self.warp.predicate(slot) ^ if negated { u32::MAX } else { 0 }
            }
        }
    }

    /// Writes a predicate in the executing lanes.
    #[inline]
    pub fn set(&mut self, dst: PredDst, value: u32) {
        if let PredDst(Some(slot)) = dst {
            self.warp.set_predicate(slot, self.mask, self.defined, value);
        }
    }

    /// Value of an operand that has been checked.
    #[inline]
    fn value<'x>(&'x self, src: &'x Src) -> &'x Lanes {
        match src {
            Src::Imm(v) => v,
            Src::Reg(slot) => self.warp.register(*slot),
        }
    }

    /// Notes where an operand holds a value, and reports one that must not be read now.
    #[inline]
    pub fn check(&mut self, src: &Src) {
        if let Src::Reg(slot) = src {
            self.defined &= self.warp.written(*slot);
            if let Some(fault) = self.warp.check_read(*slot) {
                self.register_fault(*slot, fault);
            }
        }
    }

    /// d = f(a), where f looks at the low part of `a` alone.
    #[inline]
    pub fn map1_low(&mut self, d: Dst, a: &Src, f: impl Fn(u64) -> u64) {
        let before = self.defined;
        self.check(a);
        if let Src::Reg(slot) = a {
            self.defined = before & self.warp.low_written(*slot);
        }
        let a = self.value(a);
        let value = std::array::from_fn(|l| f(a[l]));
        self.write(d, &value);
    }

    /// d = f(a).
    #[inline]
    pub fn map1(&mut self, d: Dst, a: &Src, f: impl Fn(u64) -> u64) {
        self.check(a);
        let a = self.value(a);
        let value = std::array::from_fn(|l| f(a[l]));
        self.write(d, &value);
    }

    /// d = f(a, b).
    #[inline]
    pub fn map2(&mut self, d: Dst, a: &Src, b: &Src, f: impl Fn(u64, u64) -> u64) {
        self.check(a);
        self.check(b);
        let (a, b) = (self.value(a), self.value(b));
        let value = std::array::from_fn(|l| f(a[l], b[l]));
        self.write(d, &value);
    }

    /// d = f(a, b, c).
    #[inline]
    pub fn map3(&mut self, d: Dst, a: &Src, b: &Src, c: &Src, f: impl Fn(u64, u64, u64) -> u64) {
        self.map3_lanes(d, a, b, c, |a, b, c| std::array::from_fn(|l| f(a[l], b[l], c[l])));
    }

    /// The same with a function of all lanes.
    #[inline]
    pub fn map3_lanes(
        &mut self,
        d: Dst,
        a: &Src,
        b: &Src,
        c: &Src,
        f: impl Fn(&Lanes, &Lanes, &Lanes) -> Lanes,
    ) {
        self.check(a);
        self.check(b);
        self.check(c);
        let value = f(self.value(a), self.value(b), self.value(c));
        self.write(d, &value);
    }

    /// A lane mask from a comparison of two operands.
    #[inline]
    pub fn compare(&mut self, a: &Src, b: &Src, f: impl Fn(u64, u64) -> bool) -> u32 {
        self.check(a);
        self.check(b);
        let (a, b) = (self.value(a), self.value(b));
        (0..32).fold(0, |m, l| m | u32::from(f(a[l], b[l])) << l)
    }

    /// An operand that must be the same in all executing lanes.
    pub fn uniform(&mut self, src: &Src, what: &str) -> u64 {
        let v = self.read(src);
        let first = v[self.mask.trailing_zeros() as usize & 31];
        if let Some(lane) = lanes(self.mask).find(|l| v[*l] != first) {
            let text = format!("{what} differs between lanes: {first:#x} and {:#x}", v[lane]);
            self.report_lane(Kind::InvalidOperand, lane as u32, text);
        }
        first
    }

    /// For an instruction that all lanes of the warp execute together: None to go on, otherwise
    /// what to return.
    pub fn converged(&mut self) -> Option<Flow> {
        if self.mask == self.warp.live {
            return None;
        }
        let missing = self.warp.live & !self.mask;
        let others = || self.warp.groups.iter().filter(|g| g.lanes & self.mask == 0);
        let here = others().fold(self.mask, |lanes, g| lanes | g.lanes) == self.warp.live;
        // The others may still come, by a path further on in the text as well.
        let come = |g: &Group| !matches!(g.waiting, Some(Waiting::Aligned(_)));
        if here && others().any(come) {
            return Some(Flow::Wait(Waiting::Aligned(missing)));
        }
        Some(self.left_behind(missing))
    }

    /// Reports that lanes have not come to an aligned instruction.
    pub fn left_behind(&mut self, missing: u32) -> Flow {
        let text =
            format!("divergent lanes at an aligned instruction: lanes {missing:#x} are missing");
        self.fault(Kind::Divergence, text)
    }

    /// For an instruction with a member mask: None when all its lanes are here, otherwise what to
    /// return.
    pub fn gathered(&mut self, members: u32) -> Option<Flow> {
        let gone = members & !self.warp.live;
        if gone != 0 {
            let text = format!("the mask {members:#x} names lanes {gone:#x}, which have ended");
            return Some(self.fault(Kind::Divergence, text));
        }
        let outside = self.mask & !members;
        if outside != 0 {
            let text = format!("lanes {outside:#x} execute it, the mask {members:#x} lacks them");
            return Some(self.fault(Kind::Divergence, text));
        }
        let missing = members & !self.mask;
        (missing != 0).then_some(Flow::Wait(Waiting::Lanes(missing)))
    }

    /// The block of the warp.
    pub fn block(&mut self) -> &mut crate::gang::Block {
        &mut self.gang.blocks[self.warp.block]
    }

    /// Index in the gang of the block that a shared address names, and the address in it.
    #[inline]
    pub fn shared_target(&self, address: u32) -> Option<(usize, u32)> {
        let rank = address >> crate::memory::RANK_SHIFT;
        let local = address & ((1 << crate::memory::RANK_SHIFT) - 1);
        if rank == 0 {
            return Some((self.warp.block, local));
        }
        let cluster = self.gang.blocks[self.warp.block].cluster_first;
        let size = self.grid.cluster_size();
        (rank <= size).then(|| (cluster + rank as usize - 1, local))
    }

    /// Reports something about the whole warp instruction.
    pub fn report(&mut self, kind: Kind, message: String) {
        self.report_lane(kind, self.mask.trailing_zeros() & 31, message);
    }

    /// Reports something about one lane.
    pub fn report_lane(&mut self, kind: Kind, lane: u32, message: String) {
        self.report_at(kind, lane, message, None, None);
    }

    /// Reports lanes of an early launch that do what `what` says without having waited for the launch
    /// before.
    #[inline]
    pub fn needs_grid_wait(&mut self, lanes: u32, what: &str) {
        let missing = lanes & !self.warp.grid_waited;
        if self.grid.options.early && missing != 0 {
            let text = format!("{what} before griddepcontrol.wait, in an early launch");
            self.report_lane(Kind::MissingGridWait, missing.trailing_zeros(), text);
        }
    }

    /// Reports with a place in memory and another access.
    #[cold]
    pub fn report_at(
        &mut self,
        kind: Kind,
        lane: u32,
        message: String,
        address: Option<Place>,
        other: Option<(u32, Location)>,
    ) {
        let (other_pc, other) = other.unzip();
        let diagnostic = self.diagnostic(kind, lane, message, address, other);
        self.gang.findings.add(self.pc, other_pc, diagnostic);
    }

    /// Warns of what does no harm.
    #[cold]
    pub fn warn(&mut self, kind: Kind, lane: u32, message: String) {
        let diagnostic = self.diagnostic(kind, lane, message, None, None);
        self.gang.warnings.add(self.pc, None, diagnostic);
    }

    /// Reports what breaks a rule that hardware is known not to insist on.
    #[cold]
    pub fn forgive(&mut self, kind: Kind, lane: u32, message: String) {
        let diagnostic = self.diagnostic(kind, lane, message, None, None);
        self.gang.forgiven(self.grid).add(self.pc, None, diagnostic);
    }

    fn diagnostic(
        &self,
        kind: Kind,
        lane: u32,
        message: String,
        address: Option<Place>,
        other: Option<Location>,
    ) -> Diagnostic {
        let by = (self.pc, self.warp.global, lane);
        Diagnostic { other, address, ..self.grid.diagnostic(kind, by, message) }
    }

    /// Reports something after which the launch cannot go on.
    #[cold]
    pub fn fault(&mut self, kind: Kind, message: String) -> Flow {
        self.report(kind, message);
        Flow::Fault
    }

    /// Reports a race found by the shadow of some memory; one that hardware is known to forgive
    /// only as a warning.
    #[cold]
    pub fn report_race(
        &mut self,
        lane: u32,
        race: &Race,
        what: &str,
        place: Place,
        forgiven: bool,
    ) {
        let kind = match race.conflict {
            Conflict::PendingWrite => Kind::PendingWrite,
            Conflict::PendingRead => Kind::PendingRead,
            Conflict::MissingProxyFence => Kind::MissingProxyFence,
            _ => Kind::Race,
        };
        let order = match race.conflict {
            Conflict::ReadAfterWrite => {
                "reads what another access wrote, without order between them"
            }
            Conflict::WriteAfterRead => {
                "writes what another access reads, without order between them"
            }
            Conflict::WriteAfterWrite => {
                "writes what another access wrote, without order between them"
            }
            Conflict::MissingProxyFence => {
                "the other access was made in the other proxy, and no fence.proxy.async lies between"
            }
            Conflict::PendingWrite => {
                "an asynchronous operation that has not been waited for writes it"
            }
            Conflict::PendingRead => {
                "an asynchronous operation that has not been waited for still reads it"
            }
        };
        let by = self.grid.actor(race.other.actor);
        let other = self.grid.location_of(race.other_pc, &race.other);
        let message = format!("{what}: {order} (the other: {by})");
        let diagnostic = self.diagnostic(kind, lane, message, Some(place), Some(other));
        let found = if forgiven { &mut self.gang.warnings } else { &mut self.gang.findings };
        found.add(self.pc, Some(race.other_pc), diagnostic);
    }
}

impl Grid<'_> {
    /// Something that the instruction at `by` (program counter, warp and lane) has caused.
    pub fn diagnostic(&self, kind: Kind, by: (u32, u32, u32), message: String) -> Diagnostic {
        let at = self.location(by.0, by.1, by.2);
        Diagnostic { kind, message, at, other: None, address: None, repeated: 1 }
    }

    /// Where a lane of a warp stands.
    pub fn location(&self, pc: u32, warp: u32, lane: u32) -> Location {
        let (ptx_line, source) = match self.kernel.instrs.get(pc as usize) {
            None => (0, None),
            Some(i) => (i.line, self.kernel.source(i).map(|(file, line)| (file.to_string(), line))),
        };
        let per_block = self.warps_per_block();
        let block = self.block_index(warp / per_block);
        Location { ptx_line, source, block, warp: warp % per_block, lane }
    }

    /// Where an epoch was made.
    pub fn location_of(&self, pc: u32, e: &Epoch) -> Location {
        let lane = e.lanes.trailing_zeros() & 31;
        let warp = match e.actor.kind() {
            ActorKind::Barrier => self.barrier_block(e.actor.index()) * self.warps_per_block(),
            _ => e.actor.index(),
        };
        self.location(pc, warp, lane)
    }

    /// An actor in words.
    pub fn actor(&self, actor: Actor) -> &'static str {
        match actor.kind() {
            ActorKind::Thread => "an ordinary access",
            ActorKind::Init => "an mbarrier.init",
            ActorKind::CpAsync => "a cp.async",
            ActorKind::Bulk | ActorKind::BulkRead => "a bulk copy",
            ActorKind::Wgmma => "a wgmma",
            ActorKind::Barrier => "a bulk copy that completes on an mbarrier",
        }
    }
}
