//! Copies of a state share its buffers, and none of them can tell.

use crate::common::model::{Entry, run_entry};
use crate::common::stream::{Stream, rope_tables};
use infini_attn::{Problem, Rope, State, TensorView, Update, flush};
use proptest::prelude::*;

const N: usize = 6;

/// Positions that the longest sequence of steps reaches.
const ROWS: usize = 2 * N * 40;

fn problem(update: Update) -> Problem {
    let builder = Problem::builder().heads(4).kv_heads(2).key_dim(8).value_dim(4);
    builder.segment_len(N).update(update).build().expect("valid")
}

/// The same state in memory of its own.
fn apart(state: &State) -> State {
    State::from_bytes(&state.to_bytes().unwrap()).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    /// Some tokens more, by prefill or decode.
    Tokens(Entry, usize, u64),
    Flush,
    Reset,
    /// A copy joins the states.
    Copy,
    /// A copy takes the place of the state, which is dropped.
    Replace,
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let tokens =
        |entry| (1..2 * N, any::<u64>()).prop_map(move |(n, seed)| Step::Tokens(entry, n, seed));
    let step = prop_oneof![
        8 => tokens(Entry::Decode),
        2 => tokens(Entry::Prefill),
        1 => Just(Step::Flush),
        1 => Just(Step::Reset),
        4 => Just(Step::Copy),
        2 => Just(Step::Replace),
    ];
    prop::collection::vec((0usize..6, step), 1..40)
}

fn run(state: &mut State, step: &Step, rotated: bool) -> Vec<f64> {
    let p = *state.problem();
    match *step {
        Step::Tokens(entry, n, seed) => {
            let (cos, sin) = rope_tables(ROWS, 8, 1.0);
            let stream = Stream::<f32>::normal(&p, n, seed % 1000);
            let table = |t| TensorView::new(t, &[ROWS, 4]).unwrap();
            let mut inputs = stream.inputs();
            if rotated {
                inputs = inputs.rope(Rope::new(table(&cos), table(&sin)));
            }
            run_entry(entry, n, &inputs, &[0.2; 4], state).o
        }
        Step::Flush => flush(&p, state, &[0]).map(|()| vec![]).unwrap(),
        Step::Reset => state.reset(&[0]).map(|()| vec![]).unwrap(),
        Step::Copy | Step::Replace => vec![],
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A family of copies, each beside a state that shares nothing and goes through the same.
    #[test]
    fn what_happens_to_one_copy_no_other_sees(steps in steps(), delta: bool, rotated: bool) {
        let p = problem(if delta { Update::Delta } else { Update::Linear });
        let first = State::new(&p, 1).unwrap();
        let mut family = vec![(apart(&first), first)];
        for (which, step) in steps {
            let (i, room) = (which % family.len(), family.len() < 6);
            let (alone, state) = &mut family[i];
            match step {
                Step::Copy if room => {
                    let copy = (apart(alone), state.clone());
                    family.push(copy);
                }
                Step::Copy => {}
                Step::Replace => *state = state.try_clone().unwrap(),
                step => {
                    let (got, want) = (run(state, &step, rotated), run(alone, &step, rotated));
                    prop_assert_eq!(got, want, "{:?}", step);
                }
            }
            for (i, (alone, state)) in family.iter().enumerate() {
                prop_assert!(state.to_bytes().unwrap() == alone.to_bytes().unwrap(), "state {}", i);
            }
        }
    }
}

/// Threads decode copies of one state at once; the first to append does so in its rows.
#[test]
fn copies_in_many_threads() {
    let p = Problem::builder().heads(2).head_dim(16).segment_len(64).build().unwrap();
    let mut state = State::new(&p, 1).unwrap();
    let prompt = Stream::<f32>::normal(&p, 100, 1);
    run_entry(Entry::Prefill, 100, &prompt.inputs(), &[0.1; 2], &mut state);
    let go_on = |mut state: State, seed: u64| {
        let mut out = vec![];
        for t in 0..60 {
            let token = Stream::<f32>::normal(&p, 1, 1000 * seed + t);
            let mut next = state.clone();
            out.extend(run_entry(Entry::Decode, 1, &token.inputs(), &[0.1; 2], &mut next).o);
            state = next;
        }
        (out, state.to_bytes().unwrap())
    };
    let before = state.to_bytes().unwrap();
    let want: Vec<_> = (0..4).map(|seed| go_on(apart(&state), seed)).collect();
    for _ in 0..20 {
        let got = std::thread::scope(|scope| {
            let threads = [0, 1, 2, 3].map(|seed| {
                let (copy, go_on) = (state.clone(), &go_on);
                scope.spawn(move || go_on(copy, seed))
            });
            threads.map(|thread| thread.join().expect("no panic"))
        });
        assert!(got.iter().eq(&want), "a copy met another's tokens");
        assert!(state.to_bytes().unwrap() == before);
    }
}

#[test]
fn states_join_and_leave() {
    let p = problem(Update::Delta);
    let state = |slots: u64, seed: u64| {
        let streams = (0..slots).map(|slot| {
            let mut one = State::new(&p, 1).unwrap();
            let stream = Stream::<f32>::normal(&p, 5 + 4 * slot as usize, seed + slot);
            run_entry(Entry::Prefill, stream.tokens, &stream.inputs(), &[0.3; 4], &mut one);
            one
        });
        let streams: Vec<State> = streams.collect();
        State::concat(&streams.iter().collect::<Vec<_>>()).unwrap()
    };
    let (a, b) = (state(2, 10), state(3, 20));
    let all = State::concat(&[&a, &b]).unwrap();
    assert_eq!((0..5).map(|s| all.tokens(s)).collect::<Vec<_>>(), [5, 9, 5, 9, 13]);
    assert!(all.fork(&[0, 1]).unwrap().to_bytes().unwrap() == a.to_bytes().unwrap());
    assert!(all.fork(&[2, 3, 4]).unwrap().to_bytes().unwrap() == b.to_bytes().unwrap());

    let text = State::concat(&[]).unwrap_err().to_string();
    assert_eq!(text, "states: 0 elements given, at least one state expected");
    let other = State::new(&problem(Update::Linear), 1).unwrap();
    let text = State::concat(&[&a, &other]).unwrap_err().to_string();
    assert_eq!(text, "state: made for update = linear, the call has update = delta");
}

/// A copy made between two calls is of rows that the state may be about to complete.
#[test]
fn a_copy_outlives_the_segment_it_was_made_in() {
    let p = problem(Update::Linear);
    let mut state = State::new(&p, 1).unwrap();
    let mut copies = vec![];
    for t in 0..3 * N as u64 {
        copies.push((state.clone(), state.to_bytes().unwrap()));
        let token = Stream::<f32>::normal(&p, 1, t);
        run_entry(Entry::Decode, 1, &token.inputs(), &[0.0; 4], &mut state);
    }
    for (copy, bytes) in copies {
        assert!(copy.to_bytes().unwrap() == bytes, "{} tokens", copy.tokens(0));
    }
}
