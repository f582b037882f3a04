//! Random histories against a checker that keeps every access of every byte and a full vector
//! clock for every thread.

use proptest::prelude::*;

use super::*;

const WARPS: usize = 2;
const LANES: usize = 3;
const THREADS: usize = WARPS * LANES;
const BYTES: usize = 512;

/// What a thread does.
#[derive(Clone, Debug)]
enum Op {
    Access { thread: usize, offset: usize, bytes: usize, strong: bool, write: bool },
    SyncLanes { warp: usize, mask: u32 },
    Handover { from: usize, lanes: u32, to_lanes: u32 },
    BarSync,
}

/// Lanes of the test as lanes of a warp: the last stands at the far end.
fn lane(i: usize) -> u32 {
    [0, 1, 31][i]
}

fn mask(lanes: u32) -> u32 {
    (0..LANES).filter(|&i| lanes >> i & 1 == 1).fold(0, |mask, i| mask | 1 << lane(i))
}

type Times = [u32; THREADS];

#[derive(Clone)]
struct Past {
    thread: usize,
    time: u32,
    range: (usize, usize),
    strong: bool,
    write: bool,
}

struct Oracle {
    clocks: [Times; THREADS],
    bytes: Vec<Vec<Past>>,
}

impl Oracle {
    fn new() -> Self {
        let mut clocks = [[0; THREADS]; THREADS];
        (0..THREADS).for_each(|t| clocks[t][t] = 1);
        Self { clocks, bytes: vec![Vec::new(); BYTES] }
    }

    fn races(&mut self, now: Past) -> bool {
        let clock = self.clocks[now.thread];
        let mut race = false;
        for byte in now.range.0..now.range.1 {
            race |= self.bytes[byte].iter().any(|old| {
                let strong = old.strong && now.strong && old.range == now.range;
                let ordered = old.thread == now.thread || clock[old.thread] >= old.time;
                (old.write || now.write) && !strong && !ordered
            });
            self.bytes[byte].push(now.clone());
        }
        race
    }

    fn synchronise(&mut self, from: &[usize], to: &[usize]) {
        let mut sum = [0; THREADS];
        for &thread in from {
            for (sum, time) in sum.iter_mut().zip(self.clocks[thread]) {
                *sum = time.max(*sum);
            }
        }
        for &thread in to {
            for (mine, time) in self.clocks[thread].iter_mut().zip(sum) {
                *mine = time.max(*mine);
            }
        }
        from.iter().for_each(|&thread| self.clocks[thread][thread] += 1);
    }
}

fn threads(warp: usize, lanes: u32) -> Vec<usize> {
    (0..LANES).filter(|&i| lanes >> i & 1 == 1).map(|i| warp * LANES + i).collect()
}

fn op() -> impl Strategy<Value = Op> {
    let size = prop_oneof![Just(1usize), Just(2), Just(4), Just(8), Just(16), Just(64)];
    // Few distinct places, across the border of two regions, so that accesses meet.
    let access = (0..THREADS, size, 0..128usize, 0..4u8, any::<bool>()).prop_map(
        |(thread, bytes, place, strong, write)| {
            let offset = (224 + place % 64) / bytes * bytes;
            Op::Access { thread, offset, bytes, strong: strong != 0, write }
        },
    );
    prop_oneof![
        6 => access,
        2 => (0..WARPS, 1..1u32 << LANES).prop_map(|(warp, mask)| Op::SyncLanes { warp, mask }),
        3 => (0..WARPS, 1..1u32 << LANES, 1..1u32 << LANES)
            .prop_map(|(from, lanes, to_lanes)| Op::Handover { from, lanes, to_lanes }),
        2 => Just(Op::BarSync),
    ]
}

/// Both verdicts of one operation.
fn step(w: &mut World, oracle: &mut Oracle, op: &Op) -> (bool, bool) {
    const ALL: u32 = (1 << LANES) - 1;
    match *op {
        Op::Access { thread, offset, bytes, strong, write } => {
            let who = (thread / LANES, lane(thread % LANES));
            let scope = strong.then_some(Scope::Gpu);
            let found = w.access(who, (offset as u64, bytes as u32), scope, write).is_err();
            let time = oracle.clocks[thread][thread];
            let range = (offset, offset + bytes);
            return (found, oracle.races(Past { thread, time, range, strong, write }));
        }
        Op::SyncLanes { warp, mask: lanes } => {
            let whole = if lanes == ALL { ALL_LANES } else { mask(lanes) };
            w.warps[warp].sync_lanes(whole);
            let members = threads(warp, lanes);
            oracle.synchronise(&members, &members);
        }
        Op::Handover { from, lanes, to_lanes } => {
            let k = w.warps[from].release(mask(lanes));
            w.warps[1 - from].acquire(mask(to_lanes), &k);
            oracle.synchronise(&threads(from, lanes), &threads(1 - from, to_lanes));
        }
        Op::BarSync => {
            w.bar_sync();
            let all: Vec<_> = (0..THREADS).collect();
            oracle.synchronise(&all, &all);
        }
    }
    (false, false)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn same_verdict_as_the_full_history(ops in prop::collection::vec(op(), 1..200)) {
        let (mut w, mut oracle) = (World::new(WARPS as u32), Oracle::new());
        for (i, op) in ops.iter().enumerate() {
            let (found, race) = step(&mut w, &mut oracle, op);
            prop_assert_eq!(found, race, "step {}: {:?}", i, op);
            // After a race the cells hold only what came later: start over, the clocks go on.
            if race {
                w.shadow.reset_accesses();
                oracle.bytes.iter_mut().for_each(Vec::clear);
            }
        }
    }
}
