//! Slots copied, put back and cut short; batches of prompts and tokens.

use crate::common::metric::assert_close;
use crate::common::model::{Entry, run_entry};
use crate::common::stream::{Stream, rope_tables};
use infini_attn::{
    Error, Inputs, Outputs, Problem, Rope, State, TensorView, TensorViewMut, forward,
};

const N: usize = 8;
const GATE: [f32; 4] = [0.3, -0.4, 0.1, 0.2];

fn problem() -> Problem {
    let builder = Problem::builder().heads(4).kv_heads(2).key_dim(8).value_dim(4);
    builder.segment_len(N).build().unwrap()
}

/// One slot after so many tokens.
fn after(tokens: usize, seed: u64, rotated: bool) -> State {
    let mut state = State::new(&problem(), 1).unwrap();
    more(&mut state, tokens, seed, rotated);
    state
}

fn more(state: &mut State, tokens: usize, seed: u64, rotated: bool) -> Vec<f64> {
    let stream = Stream::<f32>::normal(&problem(), tokens, seed);
    let (cos, sin) = rope_tables(64, 8, 1.0);
    let table = |t| TensorView::new(t, &[64, 4]).unwrap();
    let mut inputs = stream.inputs();
    if rotated {
        inputs = inputs.rope(Rope::new(table(&cos), table(&sin)));
    }
    run_entry(Entry::Forward, tokens, &inputs, &GATE, state).o
}

/// Slots after 0, N + 3 and 2 N + 5 tokens, the last one's rotated.
fn pool() -> State {
    State::concat(&[&after(0, 0, false), &after(N + 3, 1, false), &after(2 * N + 5, 2, true)])
        .unwrap()
}

fn slot(state: &State, slot: usize) -> Vec<u8> {
    state.fork(&[slot]).unwrap().to_bytes().unwrap()
}

#[test]
fn copies_of_slots_continue_where_their_sources_stand() {
    let from = pool();
    let mut to = State::new(&problem(), 4).unwrap();
    // A copy of the target keeps what it had.
    let shared = to.clone();
    to.copy_slots(&from, &[(2, 0), (1, 3), (2, 1)]).unwrap();
    let empty = slot(&shared, 0);
    for (got, want) in [(0, 2), (1, 2), (3, 1)] {
        assert_eq!(slot(&to, got), slot(&from, want), "slot {got}");
    }
    assert_eq!(slot(&to, 2), empty);
    assert!((0..4).all(|i| slot(&shared, i) == empty));
    // Rotated keys came with them.
    let (mut copy, mut source) = (to.fork(&[1]).unwrap(), from.fork(&[2]).unwrap());
    assert_eq!(more(&mut copy, 9, 7, true), more(&mut source, 9, 7, true));
    assert_eq!(copy.to_bytes().unwrap(), source.to_bytes().unwrap());
}

#[test]
fn copies_inside_a_state() {
    let mut state = State::concat(&[&pool(), &after(3, 9, false)]).unwrap();
    let before = state.clone();
    state.copy_within(&[(2, 0), (2, 3)]).unwrap();
    for (got, want) in [(0, 2), (1, 1), (2, 2), (3, 2)] {
        assert_eq!(slot(&state, got), slot(&before, want), "slot {got}");
    }
    // Rows of the longer open segment that was there mean nothing to what comes next.
    let mut alone = before.fork(&[1]).unwrap();
    state.copy_within(&[(1, 2)]).unwrap();
    let mut copy = state.fork(&[2]).unwrap();
    assert_eq!(more(&mut copy, 12, 3, false), more(&mut alone, 12, 3, false));
}

#[test]
fn what_was_taken_out_is_put_back() {
    let mut state = pool();
    let taken = state.fork(&[2, 1]).unwrap();
    let before = state.clone();
    state.reset(&[1, 2]).unwrap();
    state.restore(&[2, 1], &taken).unwrap();
    assert_eq!(state.to_bytes().unwrap(), before.to_bytes().unwrap());
    assert_eq!(
        state.resized(5).unwrap().fork(&[0, 1, 2]).unwrap().to_bytes().unwrap(),
        before.to_bytes().unwrap()
    );
    assert_eq!(state.resized(5).unwrap().tokens(4), 0);
}

#[test]
fn drafts_that_are_taken_back_leave_nothing_behind() {
    for rotated in [false, true] {
        let mut state = after(2 * N + 2, 4, rotated);
        let mut alone = State::from_bytes(&state.to_bytes().unwrap()).unwrap();
        // Beside a copy that holds the same rows, and alone.
        for shared in [None, Some(state.clone())] {
            let held = shared.as_ref().map(|s| s.to_bytes().unwrap());
            let seen = state.tokens(0);
            more(&mut state, 2, 50, rotated);
            state.truncate(0, seen).unwrap();
            assert_eq!(state.to_bytes().unwrap(), alone.to_bytes().unwrap());
            let (got, want) = (more(&mut state, 1, 51, rotated), more(&mut alone, 1, 51, rotated));
            assert_eq!(got, want);
            assert_eq!(state.to_bytes().unwrap(), alone.to_bytes().unwrap());
            assert_eq!(shared.map(|s| s.to_bytes().unwrap()), held);
        }
    }
    // To the beginning of the segment: the next one may begin without rotation.
    let mut state = after(N + 3, 4, true);
    state.truncate(0, N as u64).unwrap();
    more(&mut state, 1, 5, false);
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_changes() {
    let (mut state, other) =
        (pool(), State::new(&problem().to_builder().segment_len(4).build().unwrap(), 3).unwrap());
    let before = state.to_bytes().unwrap();
    let source = pool();
    let refused = |result: infini_attn::Result<()>, text: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    };
    refused(state.copy_slots(&other, &[]), "segment_len = 4, the call has segment_len = 8");
    refused(
        state.copy_slots(&source, &[(3, 0)]),
        "pairs[0] (source): 3 given, less than the state's 3",
    );
    refused(
        state.copy_slots(&source, &[(0, 1), (0, 1)]),
        "pairs[1] (target): 1 given, a slot other than that of pairs[0]",
    );
    refused(
        state.copy_within(&[(0, 1), (1, 2)]),
        "pairs[1] (source): 1 given, a slot other than that which pairs[0]",
    );
    refused(state.copy_within(&[(0, 3)]), "pairs[0] (target): 3 given");
    refused(state.restore(&[0], &source), "slots: 1 elements given, 3 (the slots of the state put");
    refused(state.resized(2).map(drop), "slots: 2 given, at least the 3 that there are");
    refused(state.truncate(3, 0), "slot: 3 given, less than the state's 3 slots");
    refused(
        state.truncate(1, N as u64 + 4),
        "tokens: 12 given, at most the 11 that slot 1 has seen",
    );
    let error = state.truncate(1, N as u64 - 1).unwrap_err();
    assert!(matches!(error, Error::Committed { slot: 1, tokens: 7, least: 8 }), "{error:?}");
    assert_eq!(state.to_bytes().unwrap(), before);
}

/// Packed q, k, v of streams one after another, and where each begins.
fn packed(streams: &[Stream<f32>]) -> (Stream<f32>, Vec<i32>) {
    let (mut all, mut cu) = (streams[0].slice(0..0), vec![0]);
    for stream in streams {
        all.append(stream);
        cu.push(all.tokens as i32);
    }
    (all, cu)
}

#[test]
fn prompts_and_tokens_in_one_call() {
    let p = problem();
    let streams =
        [1, 37, 1, 16, 0, 2].map(|tokens| Stream::<f32>::normal(&p, tokens, 80 + tokens as u64));
    let (all, cu) = packed(&streams);
    let view = |data, heads, dim| TensorView::new(data, &[all.tokens, heads, dim]).unwrap();
    let inputs = || Inputs::new(view(&all.q, 4, 8), view(&all.k, 2, 8), view(&all.v, 2, 4));
    let slots = [4, 0, 5, 2, 1, 3];
    let mut state = State::concat(&[&pool(), &pool()]).unwrap();
    state.reset(&[2, 5]).unwrap();
    let before = state.clone();
    let mut o = vec![f32::NAN; all.tokens * 16];
    let outputs = Outputs::new(TensorViewMut::new(&mut o, &[all.tokens, 4, 4]).unwrap());
    forward(&p, &inputs().cu_seqlens(&cu).slots(&slots), &GATE, &mut state, outputs).unwrap();
    for (i, stream) in streams.iter().enumerate().filter(|(_, s)| s.tokens > 0) {
        let mut alone = before.fork(&[slots[i]]).unwrap();
        let want = run_entry(Entry::Prefill, stream.tokens, &stream.inputs(), &GATE, &mut alone).o;
        let got: Vec<_> =
            o[16 * cu[i] as usize..16 * cu[i + 1] as usize].iter().map(|&x| x.into()).collect();
        assert_close(&format!("sequence {i}"), &got, &want, 1e-6);
        assert_eq!(slot(&state, slots[i]), alone.to_bytes().unwrap(), "sequence {i}");
    }
    assert_eq!(slot(&state, 1), slot(&before, 1));
}

/// Short batches are decoded, others prefilled: the same bits as by those names.
#[test]
fn forward_takes_the_way_that_fits() {
    for (tokens, entry) in [(1, Entry::Decode), (16, Entry::Decode), (17, Entry::Prefill)] {
        let stream = Stream::<f32>::normal(&problem(), tokens, 5);
        let mut states = [after(11, 6, false), after(11, 6, false)];
        let [a, b] = &mut states;
        let got = run_entry(Entry::Forward, tokens, &stream.inputs(), &GATE, a);
        assert_eq!(got, run_entry(entry, tokens, &stream.inputs(), &GATE, b), "{tokens}");
        assert_eq!(a.to_bytes().unwrap(), b.to_bytes().unwrap());
    }
}
