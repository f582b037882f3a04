//! The four warps of a warpgroup, which execute the same wgmma instructions in the same order.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use super::Product;
use super::operand::Matrix;
use crate::clock::{Knowledge, WarpClock};
use crate::context::Cx;
use crate::diagnostic::Kind;
use crate::program::Flow;
use crate::warp::Warp;

/// Warps of a warpgroup.
const WARPS: usize = 4;

/// The warpgroups of a gang, by block and number.
#[derive(Default)]
pub struct GangState {
    warpgroups: BTreeMap<(usize, u32), Warpgroup>,
}

/// One warpgroup.
#[derive(Default)]
pub struct Warpgroup {
    /// Steps that some of the warps have executed, and not all; the first has number `passed`.
    log: VecDeque<Entry>,
    passed: u64,
    /// Steps each warp has executed.
    executed: [u64; WARPS],
    /// Products that some of the warps have issued, and not all.
    issued: VecDeque<Rc<RefCell<Operation>>>,
    /// Groups each warp has committed.
    committed: [u32; WARPS],
}

/// What all four warps have to agree in.
#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Step {
    /// A wgmma instruction without operands, at this program counter.
    Executed(u32),
    /// A product, with its descriptors (none for A in registers) and its scale-d.
    Product { pc: u32, a: Option<u64>, b: u64, accumulate: bool },
    /// The end of the warp.
    Ended,
}

impl Step {
    fn pc(self) -> Option<u32> {
        match self {
            Self::Executed(pc) | Self::Product { pc, .. } => Some(pc),
            Self::Ended => None,
        }
    }

    fn words(self, cx: &Cx<'_, '_>) -> String {
        let line = self.pc().map_or(0, |pc| cx.grid.kernel.instrs[pc as usize].line);
        match self {
            Self::Executed(_) => format!("PTX line {line}"),
            Self::Product { a, b, accumulate, .. } => {
                let a = a.map_or("registers".into(), |a| format!("{a:#x}"));
                format!("PTX line {line}, A {a}, B {b:#x}, scale-d {accumulate}")
            }
            Self::Ended => "the warp has ended".into(),
        }
    }
}

/// A step, and the warp of the grid that was there first.
#[derive(Clone, Copy)]
struct Entry {
    step: Step,
    first: u32,
}

/// A warp that has issued a product.
pub struct Issuer {
    /// Its place in the warpgroup.
    pub place: usize,
    /// What it knew.
    pub clock: WarpClock,
    /// What it knew at its last wgmma.fence.
    pub fence: Rc<Knowledge>,
}

/// One product of the warpgroup.
pub struct Operation {
    pub product: Arc<Product>,
    /// Descriptors; None for A in registers.
    pub descriptors: (Option<u64>, u64),
    /// scale-d.
    pub accumulate: bool,
    /// Number of its group.
    pub group: u32,
    /// The warps that have issued it, until it starts.
    pub issuers: Vec<Issuer>,
    /// The operands in shared memory, once it has started.
    pub operands: Option<(Option<Matrix>, Matrix)>,
}

impl Operation {
    /// A product that nobody has issued yet.
    pub fn new(
        product: Arc<Product>,
        descriptors: (Option<u64>, u64),
        accumulate: bool,
        group: u32,
    ) -> Self {
        let issuers = Vec::with_capacity(WARPS);
        Self { product, descriptors, accumulate, group, issuers, operands: None }
    }

    /// Whether all four warps have issued it, which starts it.
    pub fn is_issued(&self) -> bool {
        self.issuers.len() == WARPS
    }
}

impl Warpgroup {
    /// A warp has committed its group number `closed`; whether it was the last of the four.
    pub fn commit(&mut self, warp: u32, closed: u32) -> bool {
        self.committed[place(warp)] = closed;
        self.committed.iter().all(|c| *c >= closed)
    }

    /// The warps that have not committed group `done`, in words; None when all have.
    pub fn missing(&self, done: u32) -> Option<String> {
        let missing = (0..WARPS).filter(|w| self.committed[*w] < done);
        let missing: Vec<String> = missing.map(|w| w.to_string()).collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }

    /// A warp issues its next product, `new` if it is the first to.
    pub fn issue(&mut self, warp: &Warp, new: Operation) -> Rc<RefCell<Operation>> {
        let place = place(warp.index);
        let (clock, fence) = (warp.clock.clone(), warp.wgmma.fence.clone().unwrap_or_default());
        let mine =
            |o: &&Rc<RefCell<Operation>>| o.borrow().issuers.iter().all(|i| i.place != place);
        let operation = match self.issued.iter().find(mine) {
            Some(operation) => operation.clone(),
            None => {
                let operation = Rc::new(RefCell::new(new));
                self.issued.push_back(operation.clone());
                operation
            }
        };
        operation.borrow_mut().issuers.push(Issuer { place, clock, fence });
        if operation.borrow().is_issued() {
            self.issued.pop_front();
        }
        operation
    }
}

fn place(warp: u32) -> usize {
    warp as usize % WARPS
}

/// Whether all four warps of the warp's warpgroup exist.
pub fn is_whole(cx: &Cx<'_, '_>) -> bool {
    cx.grid.warps_per_block() as usize >= WARPS * (cx.warp.index as usize / WARPS + 1)
}

/// The first warp of the warpgroup, in the grid.
pub fn first_warp(cx: &Cx<'_, '_>) -> u32 {
    cx.warp.global - cx.warp.index % WARPS as u32
}

fn forget(state: &mut GangState, warp: &Warp) {
    state.warpgroups.remove(&(warp.block, warp.index / WARPS as u32));
}

/// The warp's warpgroup.
pub fn of<'s>(state: &'s mut GangState, warp: &Warp) -> &'s mut Warpgroup {
    state.warpgroups.entry((warp.block, warp.index / WARPS as u32)).or_default()
}

/// Compares with what the other warps of the warpgroup executed as their wgmma of this number: None
/// to go on.
pub fn log(cx: &mut Cx<'_, '_>, step: Step) -> Option<Flow> {
    let (warp, by) = (place(cx.warp.index), cx.warp.global);
    let group = of(&mut cx.gang.warpgroups, cx.warp);
    let number = group.executed[warp];
    group.executed[warp] += 1;
    let at = (number - group.passed) as usize;
    if at == group.log.len() {
        group.log.push_back(Entry { step, first: by });
    }
    let Entry { step: other, first } = group.log[at];
    while group.executed.iter().all(|n| *n > group.passed) {
        group.log.pop_front();
        group.passed += 1;
    }
    if step == Step::Ended && group.log.is_empty() {
        forget(&mut cx.gang.warpgroups, cx.warp);
    }
    if other == step {
        return None;
    }
    let text = format!(
        "the warps of a warpgroup differ in their wgmma number {number}: {}; {}",
        other.words(cx),
        step.words(cx)
    );
    // At the one that comes first in the text, which the other warp has left out.
    let sides = [(other, first), (step, by)].into_iter();
    let (pc, by) = sides.filter_map(|(step, by)| Some((step.pc()?, by))).min()?;
    cx.gang.report(cx.grid, Kind::Divergence, (pc, by, 0), text);
    Some(Flow::Fault)
}
