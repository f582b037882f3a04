//! Slots as wholes: copies, to the byte, and tokens taken back.

use crate::common::plans::{Step, base, mirror, problem, run};
use crate::common::simulator::Simulator;
use infini_attn::cuda::params::{InfiniCounters, InfiniState};
use infini_attn::cuda::{
    Addresses, Mirror, Operand, Plan, StateLayout, plan_copy_slots, plan_copy_within, plan_truncate,
};
use infini_attn::{Error, Problem};

fn small() -> Problem {
    problem(|b| b.value_dim(64).segment_len(16))
}

fn counters(tokens: u64, open_len: u32, rotated: u32) -> InfiniCounters {
    let committed = tokens - u64::from(open_len);
    InfiniCounters { tokens, committed, open_len, rotated, ..Default::default() }
}

/// A pool in simulated memory, every byte of it random but the counters, status and tickets.
struct Pool {
    mirror: Mirror,
    address: u64,
}

impl Pool {
    fn new(sim: &mut Simulator, rotation: bool, counters: &[InfiniCounters]) -> Self {
        let layout = StateLayout::new(&small(), counters.len(), rotation).expect("valid");
        let mirror = Mirror::with_counters(&layout, counters).expect("valid");
        let at = layout.params(0).counters as usize;
        let mut x = 12345 + counters.len() as u32;
        let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .take(layout.bytes() as usize)
        .collect();
        bytes[at..].fill(0);
        bytes[at..at + size_of_val(counters)].copy_from_slice(bytemuck::cast_slice(counters));
        let address = sim.upload("state", &bytes);
        Self { mirror, address }
    }

    fn bytes(&self, sim: &Simulator) -> Vec<u8> {
        sim.read(self.address, self.mirror.layout().bytes() as usize)
    }

    /// Every part: where it begins, bytes of a (slot, KV head) and how many of them `c` uses.
    fn parts(&self, c: InfiniCounters) -> Vec<(usize, usize, usize)> {
        let (at, open) = (self.mirror.layout().params(0), c.open_len as usize);
        let rotated = if c.rotated == 0 { 0 } else { open };
        let InfiniState { memory, normalizer, snapshot, snapshot_scale, .. } = at;
        let all = [
            (memory, 4 * 64 * 64, 4 * 64 * 64),
            (normalizer, 4 * 64, 4 * 64),
            (snapshot, 2 * 64 * 64, 2 * 64 * 64),
            (snapshot_scale, 4 * 2, 4 * 2),
            (at.open_k, 2 * 16 * 64, 2 * open * 64),
            (at.open_k_rotated, 2 * 16 * 64, 2 * rotated * 64),
            (at.open_v, 2 * 16 * 64, 2 * open * 64),
            // Of the slot: two halves, as of two heads.
            (at.counters, 16, 16),
        ];
        all.into_iter().map(|(at, room, used)| (at as usize, room, used)).collect()
    }
}

/// Runs a plan of copies, and checks every byte of both pools against copies by the host.
fn check(sim: &mut Simulator, from: &Pool, to: &mut Pool, pairs: &[(usize, usize)], plan: &Plan) {
    let (source, mut expected) = (from.bytes(sim), to.bytes(sim));
    let found: Vec<InfiniCounters> =
        sim.read(from.mirror.layout().params(from.address).counters, from.mirror.layout().slots());
    for &(slot, target) in pairs {
        let (of, into) = (from.parts(found[slot]), to.parts(found[slot]));
        for ((of, room, used), (into, ..)) in of.into_iter().zip(into) {
            for head in 0..2 {
                let [of, into] =
                    [(of, slot), (into, target)].map(|(at, s)| at + (2 * s + head) * room);
                expected[into..into + used].copy_from_slice(&source[of..of + used]);
            }
        }
    }
    let workspace = sim.allocate("workspace", plan.workspace_bytes());
    let addresses = Addresses::new()
        .with(Operand::State, to.address)
        .with(Operand::Source(0), from.address)
        .with(Operand::Workspace, sim.device.address(workspace));
    // SAFETY: the allocations have the sizes that the plan asks for.
    unsafe { plan.run(&addresses, sim) }.unwrap_or_else(|e| panic!("{plan}\n{e}"));
    assert!(from.address == to.address || from.bytes(sim) == source, "the source has changed");
    assert!(to.bytes(sim) == expected, "{plan}");
    to.mirror.advance(plan).expect("its own");
    for &(slot, target) in pairs {
        let now = |m: &Mirror, s| (m.tokens(s), m.committed(s), m.open_len(s));
        assert_eq!(now(&to.mirror, target), now(&from.mirror, slot));
    }
}

#[test]
fn copies_are_whole_and_nothing_else() {
    let mut sim = Simulator::new().schedules(2);
    let all = [counters(48, 0, 0), counters(21, 5, 1), counters(15, 15, 0)];
    let from = Pool::new(&mut sim, true, &all);
    let mut to = Pool::new(&mut sim, true, &[counters(3, 3, 0); 5]);
    let pairs = [(1, 4), (2, 0), (1, 1), (0, 3)];
    let plan = plan_copy_slots(&from.mirror, &to.mirror, &pairs).expect("valid");
    check(&mut sim, &from, &mut to, &pairs, &plan);
    // Where there is no room for rotated keys.
    let mut to = Pool::new(&mut sim, false, &[counters(3, 3, 0); 2]);
    let pairs = [(2, 1), (0, 0)];
    let plan = plan_copy_slots(&from.mirror, &to.mirror, &pairs).expect("valid");
    check(&mut sim, &from, &mut to, &pairs, &plan);
    // Within one state.
    let mut state = Pool::new(&mut sim, true, &[all[0], all[1], all[2], all[0], all[0]]);
    let before = Pool { mirror: state.mirror.clone(), address: state.address };
    let pairs = [(1, 0), (1, 3), (2, 4)];
    let plan = plan_copy_within(&state.mirror, &pairs).expect("valid");
    check(&mut sim, &before, &mut state, &pairs, &plan);
    // What was copied has moved.
    let text = before.mirror.clone().advance(&plan_truncate(&state.mirror, 0, 20).expect("valid"));
    assert!(matches!(text, Err(Error::Value { .. })), "{text:?}");
    let mut moved = state.mirror.clone();
    moved.advance(&plan_truncate(&moved, 1, 20).expect("valid")).expect("its own");
    let text = moved.check(&plan).expect_err("moved").to_string();
    assert!(
        text.starts_with("state (slot 1): 20 tokens seen, 16 committed, 4 open given"),
        "{text}"
    );
}

#[test]
fn no_pairs_are_no_steps_and_bad_pairs_are_refused() {
    let p = small();
    let from = StateLayout::new(&p, 3, true).expect("valid");
    let from = Mirror::with_counters(&from, &[counters(21, 5, 1); 3]).expect("valid");
    let to = mirror(&p, 4);
    assert!(run(&plan_copy_slots(&from, &to, &[]).expect("valid")).is_empty());
    let no_room = Mirror::new(&StateLayout::new(&p, 4, false).expect("valid"));
    let refused = |result: infini_attn::Result<Plan>| result.expect_err("refused").to_string();
    let copy = |to: &Mirror, pairs: &[(usize, usize)]| refused(plan_copy_slots(&from, to, pairs));
    for (got, expected) in [
        (
            copy(&to, &[(3, 0)]),
            "pairs[0] (source): 3 given, less than the state's 3 slots expected",
        ),
        (
            copy(&to, &[(0, 1), (2, 4)]),
            "pairs[1] (target): 4 given, less than the state's 4 slots expected",
        ),
        (
            copy(&to, &[(0, 1), (2, 1)]),
            "pairs[1] (target): 1 given, a slot other than that of pairs[0] expected",
        ),
        (
            copy(&no_room, &[(0, 1)]),
            "pairs[0] (source 0, its open segment with rotation): true given, false: the state has no room \
             for rotated keys expected",
        ),
        (
            refused(plan_copy_within(&to, &[(0, 1), (1, 2)])),
            "pairs[1] (source): 1 given, a slot other than that which pairs[0] writes expected",
        ),
    ] {
        assert_eq!(got, expected);
    }
    let other = mirror(&problem(|b| b), 4);
    assert!(matches!(plan_copy_slots(&from, &other, &[]), Err(Error::Problem { .. })));
    let mut broken = from.clone();
    broken.break_off(&plan_truncate(&broken, 1, 17).expect("valid")).expect("its own");
    for result in [
        plan_copy_slots(&broken, &to, &[(0, 0), (1, 1)]),
        plan_copy_within(&broken, &[(1, 0)]),
        plan_truncate(&broken, 1, 18),
    ] {
        assert!(matches!(result, Err(Error::Unfinished { slot: 1 })), "{result:?}");
    }
    // A copy in its place is whole again.
    broken.advance(&plan_copy_within(&broken, &[(0, 1)]).expect("valid")).expect("its own");
    assert!(plan_truncate(&broken, 1, 18).is_ok());
}

#[test]
fn tokens_of_the_open_segment_can_be_taken_back() {
    let p = small();
    let layout = StateLayout::new(&p, 2, true).expect("valid");
    let mut state =
        Mirror::with_counters(&layout, &[counters(5, 5, 0), counters(37, 5, 1)]).expect("valid");
    let plan = plan_truncate(&state, 1, 34).expect("valid");
    let after = InfiniCounters { open_len: 2, ..counters(34, 2, 1) };
    let at = layout.params(base(Operand::State)).counters + 32;
    assert_eq!(run(&plan), [Step::Copy { to: at, from: bytemuck::bytes_of(&after).to_vec() }]);
    state.advance(&plan).expect("as planned");
    assert_eq!((state.tokens(1), state.committed(1), state.open_len(1)), (34, 32, 2));
    assert!(state.advance(&plan).is_err(), "from where it was");
    assert!(run(&plan_truncate(&state, 1, 34).expect("valid")).is_empty());
    state.advance(&plan_truncate(&state, 1, 32).expect("valid")).expect("as planned");
    let refused =
        |slot, tokens| plan_truncate(&state, slot, tokens).expect_err("refused").to_string();
    assert_eq!(
        refused(1, 31),
        "tokens: 31 given for slot 1, at least 32 expected: what is committed cannot be taken back"
    );
    assert_eq!(refused(1, 33), "tokens: 33 given, at most the 32 that slot 1 has seen expected");
    assert_eq!(refused(2, 0), "slot: 2 given, less than the state's 2 slots expected");
}

#[test]
fn counters_that_no_calls_lead_to_are_refused() {
    let layout = StateLayout::new(&small(), 1, false).expect("valid");
    let refused = |c| Mirror::with_counters(&layout, &[c]).expect_err("refused").to_string();
    let c = counters(20, 4, 0);
    for (c, expected) in [
        (
            InfiniCounters { committed: 21, ..c },
            "committed[0]: 21 given, at most tokens[0] = 20 expected",
        ),
        (
            InfiniCounters { open_len: 16, ..c },
            "open_len[0]: 16 given, less than segment_len = 16 expected",
        ),
        (
            InfiniCounters { open_len: 5, ..c },
            "open_len[0]: 5 given, at most tokens[0] − committed[0] = 4 expected",
        ),
        (
            InfiniCounters { rotated: 1, ..c },
            "rotated[0]: true given, false: the state has no room for rotated keys expected",
        ),
    ] {
        assert_eq!(refused(c), expected);
    }
    assert_eq!(
        Mirror::with_counters(&layout, &[c; 2]).expect_err("two").to_string(),
        "state: 2 elements given, 1 (slots) expected"
    );
    // A slot that was broken off keeps what the host knew, whatever lies there.
    let mut state = Mirror::with_counters(&layout, &[c]).expect("valid");
    state.refresh(&[counters(18, 2, 0)]).expect("valid");
    assert_eq!((state.tokens(0), state.open_len(0)), (18, 2));
    state.break_off(&plan_truncate(&state, 0, 17).expect("valid")).expect("its own");
    state.refresh(&[InfiniCounters { open_len: 16, ..c }]).expect("not looked at");
    assert_eq!(state.tokens(0), 18);
    assert!(matches!(plan_truncate(&state, 0, 17), Err(Error::Unfinished { slot: 0 })));
}
