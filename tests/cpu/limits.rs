//! Numbers that would leave their types: refused by an error that names both, and nothing changes.

use crate::common::buffers::{Arrangement, Asked, OutputBuffers};
use crate::common::model::{Entry, run_entry};
use crate::common::stream::Stream;
use infini_attn::{
    Error, KeySums, Problem, Result, Rope, State, TensorView, Update, apply, compose, flush,
    key_sums, merge_memories, prefill, segment_map,
};

const MOST: u64 = 1 << 62;
const GATE: [f32; 2] = [0.0; 2];

fn problem() -> Problem {
    let base = Problem::builder().heads(2).kv_heads(1).key_dim(4).value_dim(3).segment_len(4);
    base.update(Update::Linear).build().expect("valid")
}

/// A stream that has seen so many tokens.
fn seen(p: &Problem, tokens: u64) -> State {
    State::from_parts(p, &[0.5; 12], &[1.0; 4], &[tokens], &[tokens]).expect("valid")
}

#[track_caller]
fn refused<T>(result: Result<T>, argument: &str) {
    let error = result.err().expect("refused");
    assert!(matches!(error, Error::Value { .. }), "{error}");
    let message = error.to_string();
    assert!(message.starts_with(argument), "{message}");
    assert!(message.contains("4611686018427387904"), "{message}");
}

#[test]
fn a_scale_that_f32_cannot_hold() {
    let build = |scale| Problem::builder().scale(scale).build();
    for scale in [1e39, -1e39, 1e300] {
        let message = build(scale).expect_err("refused").to_string();
        assert!(message.starts_with("scale: ") && message.contains("finite f32"), "{message}");
    }
    for scale in [f64::from(f32::MAX), f64::from(f32::MIN), 1e-46, 0.0] {
        assert_eq!(build(scale).expect("valid").scale(), scale);
    }
}

#[test]
fn streams_end_at_the_most_tokens() {
    let p = problem();
    let stream = Stream::<f32>::normal(&p, 3, 1);
    let outputs = || OutputBuffers::<f32>::new(&[1, 3], 2, 3, Arrangement::Contiguous, Asked::ALL);
    for entry in [Entry::Prefill, Entry::Decode] {
        let mut state = seen(&p, MOST - 2);
        let before = state.to_bytes().expect("bytes");
        let (inputs, mut out) = (stream.inputs(), outputs());
        let result = entry.call(&inputs, &GATE, &mut state, out.views());
        refused(result, "q (sequence 0): ");
        assert_eq!(state.to_bytes().expect("bytes"), before);
        // What is taken can be saved and loaded.
        run_entry(entry, 2, &stream.slice(0..2).inputs(), &GATE, &mut state);
        flush(&p, &mut state, &[0]).expect("slot 0");
        let state = State::from_bytes(&state.to_bytes().expect("bytes")).expect("loads");
        assert_eq!((state.tokens(0), state.committed(0)), (MOST, MOST));
    }
}

#[test]
fn sums_and_maps_end_at_the_most_tokens() {
    let p = problem();
    let stream = Stream::<f32>::normal(&p, 8, 2);
    let view = |data, dim| TensorView::new(data, &[1, 8, 1, dim]).expect("shape");
    let (k, v) = (view(&stream.k, 4), view(&stream.v, 3));
    let full = KeySums::from_state(&seen(&p, MOST)).expect("room");
    refused(full.add(&full), "other (sequence 0): ");
    refused(full.add(&key_sums(&p, k).expect("valid")), "other (sequence 0): ");
    refused(segment_map(&p, k, v, &full), "k (sequence 0): ");
    refused(merge_memories(&[&seen(&p, MOST), &seen(&p, 1)]), "tokens[0]: ");
    // A map that was made for less.
    let late = KeySums::from_state(&seen(&p, MOST - 8)).expect("room");
    let map = segment_map(&p, k, v, &late).expect("it just fits");
    let mut state = State::from_parts(&p, &[0.5; 12], &[1.0; 4], &[MOST - 7], &[MOST - 8]);
    let state = state.as_mut().expect("valid");
    refused(apply(&map, state), "map (sequence 0): ");
    assert_eq!(state.tokens(0), MOST - 7);
    assert!(matches!(compose(&map, &map), Err(Error::Value { .. })));
}

#[test]
fn tables_as_wide_as_a_number() {
    let p = problem();
    let stream = Stream::<f32>::normal(&p, 0, 3);
    let empty = TensorView::new(&[0.0f32; 0], &[0, 1 << 63]).expect("no elements");
    let inputs = stream.inputs().rope(Rope::new(empty, empty));
    let mut state = State::new(&p, 1).expect("room");
    let mut out = OutputBuffers::<f32>::new(&[1, 0], 2, 3, Arrangement::Contiguous, Asked::ALL);
    let result = prefill(&p, &inputs, &GATE, &mut state, out.views());
    assert!(matches!(result, Err(Error::Shape { argument: "rope.cos", .. })), "{result:?}");
}
