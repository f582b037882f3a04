//! The 16 named barriers of a block (`bar`, `barrier`) and the barrier of a cluster.
//!
//! Named barriers count threads, by whole warps: a warp arrives once all its threads that have not
//! exited executed the instruction, and may do so again in the same round unless it waits. Lane
//! sets and warp sets are bit masks.

use std::fmt;

use thiserror::Error;

/// Named barriers of a block.
pub const BARRIERS: usize = 16;

/// Misuse of a named barrier or of the cluster barrier.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
#[allow(missing_docs)] // the fields are what the messages name
pub enum BarrierError {
    /// No such barrier.
    #[error("barrier {id} does not exist; 0 to 15 do")]
    Id { id: u64 },
    /// The thread count is zero or not whole warps.
    #[error("barrier {id}: thread count {count} is not a positive multiple of 32")]
    CountMultiple { id: u32, count: u64 },
    /// The thread count is beyond the block.
    #[error("barrier {id}: thread count {count} is larger than the block of {threads} threads")]
    CountTooLarge { id: u32, count: u64, threads: u32 },
    /// `arrive` without a thread count.
    #[error("barrier {id}: arrive by warp {warp} needs a thread count")]
    CountMissing { id: u32, warp: u32 },
    /// Two counts in one round.
    #[error("barrier {id}: warp {warp} gives {count} threads, this round began with {expected}")]
    CountMismatch { id: u32, warp: u32, count: u32, expected: u32 },
    /// Reduction mixed with something else.
    #[error("barrier {id}: warp {warp} executes {second}, this round began with {first}")]
    Mixed { id: u32, warp: u32, first: Operation, second: Operation },
    /// Lanes that already wait for the barrier, or for the rest of their warp there, arrived again.
    #[error("barrier {id}: warp {warp} arrives while it waits; {arrived} of {needed} threads have")]
    Twice { id: u32, warp: u32, arrived: u32, needed: u32 },
    /// An aligned instruction executed by some lanes only.
    #[error("barrier {id}: partial warp {warp}: lanes {lanes:#010x} of {live:#010x} are executing")]
    PartialWarp { id: u32, warp: u32, lanes: u32, live: u32 },
    /// Lanes that have exited, or a warp outside the block.
    #[error("barrier {id}: lanes {lanes:#010x} of warp {warp} arrive, but {live:#010x} are live")]
    NotLive { id: u32, warp: u32, lanes: u32, live: u32 },
    /// A thread arrived twice in one round of the cluster barrier.
    #[error("cluster barrier: lanes {lanes:#010x} of warp {warp} arrive again in round {round}")]
    ClusterTwice { warp: u32, lanes: u32, round: u64 },
    /// A wait on the cluster barrier without an arrive.
    #[error(
        "cluster barrier: lanes {lanes:#010x} of warp {warp} wait without arrive, round {round}"
    )]
    WaitWithoutArrive { warp: u32, lanes: u32, round: u64 },
    /// Exited lanes, or a warp outside the cluster, used the cluster barrier.
    #[error("cluster barrier: lanes {lanes:#010x} of warp {warp}, but {live:#010x} are live")]
    ClusterNotLive { warp: u32, lanes: u32, live: u32 },
}

/// The reductions of `bar.red`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reduction {
    /// Number of threads whose predicate is true.
    Popc,
    /// Whether all predicates are true.
    And,
    /// Whether any predicate is true.
    Or,
}

/// What a warp does at a barrier.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Operation {
    /// Arrives and waits.
    Sync,
    /// Arrives and goes on.
    Arrive,
    /// Arrives, waits and reduces a predicate.
    Red(Reduction),
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sync => "sync",
            Self::Arrive => "arrive",
            Self::Red(Reduction::Popc) => "red.popc",
            Self::Red(Reduction::And) => "red.and",
            Self::Red(Reduction::Or) => "red.or",
        })
    }
}

/// One execution of a barrier instruction by lanes of a warp.
#[derive(Clone, Copy, Debug)]
pub struct Arrive {
    /// The warp in its block.
    pub warp: u32,
    /// The barrier.
    pub id: u64,
    /// The thread count; all threads of the block if not given.
    pub count: Option<u64>,
    /// What is done.
    pub operation: Operation,
    /// The executing lanes.
    pub lanes: u32,
    /// The instruction requires all live lanes of the warp at once (`bar`, `.aligned`).
    pub aligned: bool,
    /// Predicate of each lane, for reductions.
    pub predicate: u32,
}

/// A completed round of a barrier.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Release {
    /// The barrier.
    pub id: u32,
    /// All warps that arrived, whose past the waiting warps acquire.
    pub arrived: u32,
    /// The warps that waited and go on now.
    pub released: u32,
    /// The count of `popc`; 0 or 1 for `and`, `or` and without a reduction.
    pub value: u32,
}

#[derive(Clone, Debug)]
struct Round {
    operation: Operation,
    /// Threads it waits for.
    threads: u32,
    /// Threads that have arrived, in whole warps.
    count: u32,
    /// Whether a count was given: without, threads that exit are not waited for.
    counted: bool,
    /// Warps that have arrived.
    arrived: u32,
    /// Warps that wait.
    waiting: u32,
    /// Lanes of warps that have arrived in part, with whether any of them waits.
    partial: Vec<(u32, u32, bool)>,
    trues: u32,
    falses: u32,
}

impl Round {
    fn arrive_warp(&mut self, warp: u32, waits: bool) {
        self.count += 32;
        self.arrived |= 1 << warp;
        self.waiting |= u32::from(waits) << warp;
    }

    fn release(&self, id: u32) -> Release {
        let value = match self.operation {
            Operation::Red(Reduction::Popc) => self.trues,
            Operation::Red(Reduction::And) => u32::from(self.falses == 0),
            Operation::Red(Reduction::Or) => u32::from(self.trues > 0),
            Operation::Sync | Operation::Arrive => 0,
        };
        Release { id, arrived: self.arrived, released: self.waiting, value }
    }
}

/// The named barriers of one block of up to 32 warps.
#[derive(Clone, Debug)]
pub struct NamedBarriers {
    threads: u32,
    live: Vec<u32>,
    rounds: [Option<Round>; BARRIERS],
}

impl NamedBarriers {
    /// The barriers of a block of this many threads (1 to 1024).
    pub fn new(threads: u32) -> Self {
        let threads = threads.min(1024);
        Self { threads, live: live_lanes(threads), rounds: Default::default() }
    }

    /// Lanes of a warp execute a barrier instruction. Returns the release if this completes the
    /// round; until then the lanes of a `sync` or `red` have to wait.
    pub fn arrive(&mut self, a: Arrive) -> Result<Option<Release>, BarrierError> {
        let Arrive { warp, operation, lanes, .. } = a;
        let (id, threads) = self.check(&a)?;
        let live = self.live[warp as usize];
        let round = self.rounds[id as usize].get_or_insert_with(|| Round {
            operation,
            threads,
            count: 0,
            counted: false,
            arrived: 0,
            waiting: 0,
            partial: Vec::new(),
            trues: 0,
            falses: 0,
        });
        round.counted |= a.count.is_some();
        let predicate = a.predicate & lanes;
        round.trues += predicate.count_ones();
        round.falses += (lanes & !predicate).count_ones();
        let earlier = round.partial.iter().position(|p| p.0 == warp);
        let (_, before, waited) =
            earlier.map_or((warp, 0, false), |index| round.partial.swap_remove(index));
        let (all, waits) = (before | lanes, waited || operation != Operation::Arrive);
        if all & live == live {
            round.arrive_warp(warp, waits);
        } else {
            round.partial.push((warp, all, waits));
        }
        Ok(self.finish(id))
    }

    /// Lanes of a warp exit. Barriers that wait for exited threads only are released.
    pub fn exit(&mut self, warp: u32, lanes: u32) -> Vec<Release> {
        let Some(live) = self.live.get_mut(warp as usize) else { return Vec::new() };
        *live &= !lanes;
        let live = *live;
        for round in self.rounds.iter_mut().flatten() {
            let full = round.partial.iter().position(|p| p.0 == warp && p.1 & live == live);
            if let Some(index) = full {
                let (_, _, waits) = round.partial.swap_remove(index);
                round.arrive_warp(warp, waits);
            }
        }
        (0..BARRIERS as u32).filter_map(|id| self.finish(id)).collect()
    }

    /// Barriers with an incomplete round, each described as in "barrier 3: 64 of 128 threads
    /// arrived (warps 0, 2)": for deadlock reports and for arrivals left over at the end.
    pub fn incomplete(&self) -> Vec<(u32, String)> {
        let rounds = self.rounds.iter().enumerate();
        rounds
            .filter_map(|(id, round)| {
                let round = round.as_ref()?;
                let warps: Vec<String> = (0..32)
                    .filter(|w| round.arrived >> w & 1 == 1)
                    .map(|w| w.to_string())
                    .collect();
                let (count, threads, warps) = (round.count, round.threads, warps.join(", "));
                let text =
                    format!("barrier {id}: {count} of {threads} threads arrived (warps {warps})");
                Some((id as u32, text))
            })
            .collect()
    }

    /// Everything that can be wrong about an arrival; the barrier and its thread count.
    fn check(&self, a: &Arrive) -> Result<(u32, u32), BarrierError> {
        let Arrive { warp, operation, lanes, .. } = *a;
        if a.id >= BARRIERS as u64 {
            return Err(BarrierError::Id { id: a.id });
        }
        let id = a.id as u32;
        let live = self.live.get(warp as usize).copied().unwrap_or(0);
        if lanes == 0 || lanes & !live != 0 {
            return Err(BarrierError::NotLive { id, warp, lanes, live });
        }
        if a.aligned && lanes != live {
            return Err(BarrierError::PartialWarp { id, warp, lanes, live });
        }
        let threads = self.threads.next_multiple_of(32);
        let count = match a.count {
            Some(count) => count,
            None if operation == Operation::Arrive => {
                return Err(BarrierError::CountMissing { id, warp });
            }
            None => u64::from(threads),
        };
        if count == 0 || !count.is_multiple_of(32) {
            return Err(BarrierError::CountMultiple { id, count });
        }
        if count > u64::from(threads) {
            return Err(BarrierError::CountTooLarge { id, count, threads: self.threads });
        }
        let count = count as u32;
        if let Some(round) = &self.rounds[id as usize] {
            round_accepts(round, a, id, count)?;
        }
        Ok((id, count))
    }

    /// Resets the barrier and returns the release if its round is complete.
    fn finish(&mut self, id: u32) -> Option<Release> {
        let round = self.rounds[id as usize].as_ref()?;
        let full = round.count >= round.threads;
        let others_exited = (0..32)
            .zip(&self.live)
            .all(|(warp, live)| *live == 0 || round.arrived >> warp & 1 == 1);
        if !full && (round.counted || !others_exited) {
            return None;
        }
        let release = round.release(id);
        self.rounds[id as usize] = None;
        Some(release)
    }
}

/// Whether an arrival fits the round in progress.
fn round_accepts(round: &Round, a: &Arrive, id: u32, count: u32) -> Result<(), BarrierError> {
    let Arrive { warp, operation, lanes, .. } = *a;
    let partial = round.partial.iter().any(|p| p.0 == warp && p.1 & lanes != 0);
    if partial || round.waiting >> warp & 1 == 1 {
        let (arrived, needed) = (round.count, round.threads);
        return Err(BarrierError::Twice { id, warp, arrived, needed });
    }
    let reduces = |operation| matches!(operation, Operation::Red(_));
    if round.operation != operation && (reduces(round.operation) || reduces(operation)) {
        let (first, second) = (round.operation, operation);
        return Err(BarrierError::Mixed { id, warp, first, second });
    }
    if round.threads != count {
        return Err(BarrierError::CountMismatch { id, warp, count, expected: round.threads });
    }
    Ok(())
}

/// The lanes of each warp of a block that has this many threads.
fn live_lanes(threads: u32) -> Vec<u32> {
    let warps = threads.div_ceil(32);
    (0..warps).map(|warp| u32::MAX >> (32 - (threads - 32 * warp).min(32))).collect()
}

/// The barrier of a cluster; warps are counted through all its blocks.
#[derive(Clone, Debug)]
pub struct ClusterBarrier {
    live: Vec<u32>,
    /// Lanes that have arrived in this round.
    arrived: Vec<u32>,
    /// Lanes that arrived in a completed round and have not waited.
    ready: Vec<u32>,
    round: u64,
}

impl ClusterBarrier {
    /// The barrier of `blocks` blocks of `threads` threads each.
    pub fn new(blocks: u32, threads: u32) -> Self {
        let live = live_lanes(threads).repeat(blocks as usize);
        let none = vec![0; live.len()];
        Self { live, arrived: none.clone(), ready: none, round: 0 }
    }

    /// `barrier.cluster.arrive` by lanes of a warp: the round this completes, if it does.
    pub fn arrive(&mut self, warp: u32, lanes: u32) -> Result<Option<u64>, BarrierError> {
        self.check_live(warp, lanes)?;
        let again = self.arrived[warp as usize] & lanes;
        if again != 0 {
            return Err(BarrierError::ClusterTwice { warp, lanes: again, round: self.round });
        }
        self.arrived[warp as usize] |= lanes;
        Ok(self.finish())
    }

    /// `barrier.cluster.wait` by lanes of a warp: whether they may go on.
    pub fn wait(&mut self, warp: u32, lanes: u32) -> Result<bool, BarrierError> {
        self.check_live(warp, lanes)?;
        let index = warp as usize;
        let missing = lanes & !(self.arrived[index] | self.ready[index]);
        if missing != 0 {
            let (lanes, round) = (missing, self.round);
            return Err(BarrierError::WaitWithoutArrive { warp, lanes, round });
        }
        let go = lanes & !self.ready[index] == 0;
        if go {
            self.ready[index] &= !lanes;
        }
        Ok(go)
    }

    /// Lanes of a warp exit: the round this completes, if it does.
    pub fn exit(&mut self, warp: u32, lanes: u32) -> Option<u64> {
        *self.live.get_mut(warp as usize)? &= !lanes;
        self.finish()
    }

    /// Completed rounds.
    pub fn round(&self) -> u64 {
        self.round
    }

    fn check_live(&self, warp: u32, lanes: u32) -> Result<(), BarrierError> {
        let live = self.live.get(warp as usize).copied().unwrap_or(0);
        if lanes & !live != 0 {
            return Err(BarrierError::ClusterNotLive { warp, lanes, live });
        }
        Ok(())
    }

    fn finish(&mut self) -> Option<u64> {
        let complete = self.live.iter().zip(&self.arrived).all(|(l, a)| l & !a == 0);
        if !complete || self.arrived.iter().all(|a| *a == 0) {
            return None;
        }
        for (ready, arrived) in self.ready.iter_mut().zip(&mut self.arrived) {
            *ready |= std::mem::take(arrived);
        }
        self.round += 1;
        Some(self.round - 1)
    }
}

#[cfg(test)]
mod tests;
