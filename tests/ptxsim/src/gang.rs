//! Blocks that run together, and the order in which their warps do.
//!
//! A gang is one block, the blocks of a cluster, or, for kernels whose blocks wait for each other,
//! the whole grid. Gangs share nothing but global memory and may run on different threads.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::clock::SyncTable;
use crate::context::Cx;
use crate::count::Counters;
use crate::diagnostic::{Findings, Kind};
use crate::launch::Grid;
use crate::memory::SharedMemory;
use crate::ops;
use crate::program::{Flow, Waiting};
use crate::registers::Registers;
use crate::warp::{Group, Warp};

/// Rounds in which every warp only polls, after which nothing is expected to happen any more.
const STALLED_ROUNDS: u32 = 64;
/// Rounds without a change to memory or a barrier, after which an operation that was put off is
/// performed: a warp may be polling memory with loads.
const IDLE_ROUNDS: u32 = 64;
/// Most instructions a warp runs before another one has its turn.
const QUANTUM: u32 = 256;
/// Used-up turns after which divergent lanes change places.
const STUCK_TURNS: u32 = 16;

/// One thread block.
pub struct Block {
    /// Its number in the grid, x fastest.
    pub linear: u32,
    /// Number of its cluster in the grid.
    pub cluster: u32,
    /// Index in the gang of the first block of its cluster.
    pub cluster_first: usize,
    /// Shared memory.
    pub shared: SharedMemory,
    /// Named barriers.
    pub barriers: ops::barrier::BlockState,
    /// What atomics in its shared memory carry.
    pub sync: SyncTable,
    /// Its registers, where the launch or the kernel tells their number.
    pub registers: Option<Registers>,
    /// Warps that have not ended.
    pub running: u32,
}

impl Block {
    /// Whether all its warps have ended.
    pub fn ended(&self) -> bool {
        self.running == 0
    }
}

/// An asynchronous operation that is performed when nothing else can run, or at the end; it may
/// itself complete mbarrier phases.
type Pending = Box<dyn FnOnce(&mut State, &Grid<'_>)>;

/// Everything of a gang but its warps.
pub struct State {
    /// The blocks.
    pub blocks: Vec<Block>,
    /// What was executed.
    pub counters: Counters,
    /// What was found.
    pub findings: Findings,
    /// What breaks a rule that hardware is known not to insist on.
    pub warnings: Findings,
    /// Counts events that something may have waited for.
    pub version: u64,
    /// Counts stores and atomics that change something: what polls of memory wait for.
    pub activity: u64,
    /// Operations put off, in lazy timing.
    pub pending: Vec<Pending>,
    /// cp.async groups.
    pub cp_async: ops::cp_async::GangState,
    /// Bulk groups.
    pub bulk: ops::bulk::GangState,
    /// Cluster barriers.
    pub clusters: ops::cluster::GangState,
    /// What the warps of each warpgroup do together.
    pub warpgroups: ops::wgmma::GangState,
    /// A counter for %clock and %globaltimer.
    pub time: u64,
    /// Order of what is free to choose.
    pub rng: ChaCha8Rng,
}

impl State {
    /// Says that something happened that others may wait for.
    pub fn progress(&mut self) {
        self.version += 1;
    }

    /// Reports something that no instruction under way has caused: `by` is the program counter,
    /// warp and lane of the one that once did.
    pub fn report(&mut self, grid: &Grid<'_>, kind: Kind, by: (u32, u32, u32), message: String) {
        self.findings.add(by.0, None, grid.diagnostic(kind, by, message));
    }

    /// Where what breaks a rule belongs that hardware is known not to insist on.
    pub fn forgiven(&mut self, grid: &Grid<'_>) -> &mut Findings {
        if grid.options.strict_proxies { &mut self.findings } else { &mut self.warnings }
    }

    /// Performs an operation now, or puts it off when asynchronous operations are lazy.
    pub fn start(&mut self, grid: &Grid<'_>, run: impl FnOnce(&mut Self, &Grid<'_>) + 'static) {
        if grid.options.timing.is_lazy() {
            self.pending.push(Box::new(run));
        } else {
            run(self, grid);
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Status {
    Ready,
    /// Cannot go on before `State::version` moves past this.
    Blocked(u64),
    /// Polls; better not run before `State::version` moves past this.
    Polling(u64),
    Done,
}

/// A gang while it runs.
pub struct Gang<'g> {
    grid: &'g Grid<'g>,
    state: State,
    warps: Vec<Warp>,
    status: Vec<Status>,
    /// Turns each warp has used up in a row with divergent lanes.
    stuck: Vec<u32>,
    /// Warp instructions executed.
    executed: u64,
}

/// What remains of a gang.
pub struct Outcome {
    /// What was executed.
    pub counters: Counters,
    /// What was found.
    pub findings: Findings,
    /// What breaks a rule that hardware is known not to insist on.
    pub warnings: Findings,
    /// Whether it ran to its end.
    pub complete: bool,
}

impl<'g> Gang<'g> {
    /// The gang of these blocks, whole clusters each.
    pub fn new(grid: &'g Grid<'g>, blocks: std::ops::Range<u32>) -> Self {
        let size = grid.cluster_size();
        let first = blocks.start;
        let seed = grid.options.seed ^ u64::from(first).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut warps = Vec::new();
        let mut state = State {
            blocks: Vec::new(),
            counters: Counters::new(grid.kernel.instrs.len()),
            findings: Findings::default(),
            warnings: Findings::default(),
            version: 1,
            activity: 0,
            pending: Vec::new(),
            cp_async: Default::default(),
            bulk: Default::default(),
            clusters: Default::default(),
            warpgroups: Default::default(),
            time: 0,
            rng: ChaCha8Rng::seed_from_u64(seed),
        };
        for linear in blocks {
            let block = state.blocks.len();
            state.blocks.push(Block {
                linear,
                cluster: linear / size,
                cluster_first: block - block % size as usize,
                shared: SharedMemory::new(&grid.shared),
                barriers: ops::barrier::BlockState::new(grid.threads()),
                sync: SyncTable::default(),
                registers: grid
                    .registers
                    .map(|entry| Registers::new(grid.warps_per_block(), entry)),
                running: grid.warps_per_block(),
            });
            warps.extend((0..grid.warps_per_block()).map(|w| grid.warp(block, linear, w)));
        }
        let n = warps.len();
        Self { grid, state, warps, status: vec![Status::Ready; n], stuck: vec![0; n], executed: 0 }
    }

    /// Runs all warps to their end.
    pub fn run(mut self) -> Outcome {
        let (mut stalled, mut idle) = (0, 0);
        let mut seen = (0, 0);
        let mut order: Vec<usize> = Vec::new();
        let complete = loop {
            if self.grid.stopped() {
                break false;
            }
            let now = (self.state.version, self.state.activity);
            if now != seen {
                (seen, stalled, idle) = (now, 0, 0);
            }
            idle += 1;
            if idle > IDLE_ROUNDS {
                idle = 0;
                self.perform_one();
            }
            order.clear();
            order.extend((0..self.warps.len()).filter(|w| self.ready(*w)));
            if order.is_empty() {
                if self.status.iter().all(|s| *s == Status::Done) {
                    break true;
                }
                if self.perform_one() {
                    continue;
                }
                stalled += 1;
                order.extend(
                    (0..self.warps.len()).filter(|w| matches!(self.status[*w], Status::Polling(_))),
                );
                if order.is_empty() || stalled > STALLED_ROUNDS {
                    self.report_deadlock();
                    break false;
                }
            }
            if order.len() > 1 {
                let i = self.state.rng.random_range(0..order.len());
                order.rotate_left(i);
            }
            if !self.turns(&order) {
                break false;
            }
        };
        while complete && self.perform_one() {}
        let State { counters, findings, warnings, .. } = self.state;
        Outcome { counters, findings, warnings, complete }
    }

    /// Whether a warp may do something it could not do before.
    fn ready(&self, w: usize) -> bool {
        match self.status[w] {
            Status::Ready => true,
            Status::Blocked(v) | Status::Polling(v) => v != self.state.version,
            Status::Done => false,
        }
    }

    /// One turn for each of these warps; false when the launch has to end.
    fn turns(&mut self, order: &[usize]) -> bool {
        for &w in order {
            let quantum = self.state.rng.random_range(QUANTUM / 8..=QUANTUM);
            match self.turn(w, quantum) {
                Some(status) => self.status[w] = status,
                None => {
                    self.grid.stop();
                    return false;
                }
            }
        }
        let running = self.status.iter().any(|s| *s != Status::Done);
        if running && self.executed > self.grid.options.max_instructions {
            self.report_endless();
            self.grid.stop();
            return false;
        }
        true
    }

    /// Performs one operation that was put off.
    fn perform_one(&mut self) -> bool {
        let pending = self.state.pending.len();
        if pending == 0 {
            return ops::cp_async::perform_one(&mut self.state, self.grid)
                || ops::bulk::perform_one(&mut self.state, self.grid);
        }
        let i = self.state.rng.random_range(0..pending);
        let op = self.state.pending.remove(i);
        op(&mut self.state, self.grid);
        self.state.progress();
        true
    }

    /// Runs a warp for at most `quantum` instructions; None after a fault.
    fn turn(&mut self, w: usize, quantum: u32) -> Option<Status> {
        let version = self.state.version;
        let warp = &mut self.warps[w];
        warp.wake();
        let mut cx = Cx {
            warp,
            gang: &mut self.state,
            grid: self.grid,
            mask: 0,
            pc: 0,
            defined: u32::MAX,
            note: None,
        };
        // Lanes that spin at a low program counter may wait for lanes further on.
        let high = self.stuck[w] >= STUCK_TURNS;
        for _ in 0..quantum {
            let next = if high {
                cx.warp.groups.iter().rposition(|g| g.waiting.is_none())
            } else {
                cx.warp.runnable()
            };
            let Some(g) = next else {
                self.stuck[w] = 0;
                let polls = cx.warp.groups.iter().any(|g| g.waiting == Some(Waiting::Poll));
                return Some(if polls {
                    Status::Polling(version)
                } else {
                    Status::Blocked(version)
                });
            };
            self.executed += 1;
            match step(&mut cx, g) {
                Step::On => {}
                Step::Fault => return None,
                Step::Ended => return Some(Status::Done),
            }
        }
        let divergent = self.warps[w].groups.len() > 1 && !high;
        self.stuck[w] = if divergent { self.stuck[w] + 1 } else { 0 };
        Some(Status::Ready)
    }

    fn report_deadlock(&mut self) {
        let mut text = String::from("nothing can go on:");
        let mut first = None;
        for warp in self.warps.iter().filter(|w| w.live != 0) {
            for g in &warp.groups {
                let by = (g.pc, warp.global, g.lanes.trailing_zeros() & 31);
                let at = self.grid.location(by.0, by.1, by.2);
                let why = warp.last_wait.as_deref().unwrap_or("polls");
                let why = match &g.waiting {
                    Some(Waiting::Lanes(missing) | Waiting::Aligned(missing)) => {
                        format!("waits for lanes {missing:#x}")
                    }
                    Some(Waiting::On(what)) => format!("waits for {what}"),
                    Some(Waiting::Poll) | None => why.to_string(),
                };
                text += &format!("\n  {at}, lanes {:#x}: {why}", g.lanes);
                first.get_or_insert(by);
            }
        }
        for b in &self.state.blocks {
            for (address, cell) in &b.shared.mbarriers {
                text += &format!(
                    "\n  block {}: mbarrier at shared {address:#x}: {}",
                    b.linear, cell.state
                );
            }
        }
        if let Some(by) = first {
            self.state.report(self.grid, Kind::Deadlock, by, text);
        }
    }

    fn report_endless(&mut self) {
        let Some((warp, g)) = self.warps.iter().find_map(|w| Some((w, w.groups.first()?))) else {
            return;
        };
        let by = (g.pc, warp.global, g.lanes.trailing_zeros() & 31);
        let text = format!("no end after {} warp instructions", self.grid.options.max_instructions);
        self.state.report(self.grid, Kind::Deadlock, by, text);
    }
}

enum Step {
    On,
    Ended,
    Fault,
}

/// One instruction of group `g`.
#[inline]
fn step(cx: &mut Cx<'_, '_>, g: usize) -> Step {
    let group = &cx.warp.groups[g];
    let (pc, all) = (group.pc, group.lanes);
    (cx.pc, cx.mask, cx.note, cx.defined) = (pc, all, group.note, u32::MAX);
    let kernel = cx.grid.kernel;
    let Some(instr) = kernel.instrs.get(pc as usize) else {
        return end(cx, g);
    };
    if let Some(guard) = instr.guard {
        cx.mask = all & cx.test(guard);
        if cx.mask == 0 {
            cx.gang.counters.executed[pc as usize] += 1;
            cx.warp.step(g);
            return Step::On;
        }
    }
    let flow = (instr.exec)(cx);
    match flow {
        Flow::Next => cx.warp.step(g),
        Flow::Jump(target) if cx.mask == all => cx.warp.jump(g, target),
        Flow::Jump(target) => cx.warp.advance(g, cx.mask, target),
        Flow::Exit => {
            cx.gang.counters.executed[pc as usize] += 1;
            return end(cx, g);
        }
        Flow::Wait(why) => {
            cx.warp.wait(g, cx.mask, why, cx.note);
            return Step::On;
        }
        Flow::Spin(why) => {
            cx.warp.poll(g, why);
        }
        Flow::Fault => return Step::Fault,
    }
    cx.gang.counters.executed[pc as usize] += 1;
    Step::On
}

/// Ends the executing lanes.
fn end(cx: &mut Cx<'_, '_>, g: usize) -> Step {
    let awaited = |g: &Group| match g.waiting {
        Some(Waiting::Aligned(missing)) if missing & cx.mask != 0 => Some((g.pc, g.lanes)),
        _ => None,
    };
    if let Some((pc, lanes)) = cx.warp.groups.iter().find_map(awaited) {
        let missing = cx.warp.live & !lanes;
        (cx.pc, cx.mask) = (pc, lanes);
        cx.left_behind(missing);
        return Step::Fault;
    }
    cx.needs_grid_wait(cx.mask, "ends");
    cx.warp.exit(g, cx.mask);
    ops::barrier::lanes_ended(cx);
    ops::cluster::lanes_ended(cx);
    cx.gang.progress();
    if cx.warp.live != 0 {
        return Step::On;
    }
    if !ops::wgmma::warp_ended(cx) {
        return Step::Fault;
    }
    let block = cx.block();
    block.running -= 1;
    let ended = block.ended();
    ops::bulk::warp_ended(cx);
    if ended {
        ops::mbarrier::block_ended(cx);
        ops::misc::block_ended(cx);
    }
    Step::Ended
}
