//! Spans of calls, with the feature `tracing`.

use ::tracing::Level;

use crate::common::spans::{Recorded, recorded};
use infini_attn::{
    Inputs, KeySums, Outputs, Problem, State, TensorView, TensorViewMut, apply, compose, decode,
    flush, key_sums, merge_memories, merge_partials, prefill, segment_map,
};

const SHAPES: &str = "f32, Hq 2, Hkv 1, Dk 4, Dv 4, N 4, delta";

fn problem() -> Problem {
    Problem::builder().heads(2).head_dim(4).kv_heads(1).segment_len(4).build().expect("valid")
}

/// A call of two sequences in slots 2 and 0 of three, [2, 3, H, 4].
fn call(
    state: &mut State,
    decoding: bool,
    ranges: &[std::ops::Range<i32>],
) -> infini_attn::Result<()> {
    let (q, k, mut o) = (vec![0.5f32; 48], vec![0.25f32; 24], vec![0.0f32; 48]);
    let q = TensorView::new(&q, &[2, 3, 2, 4]).expect("its shape");
    let k = TensorView::new(&k, &[2, 3, 1, 4]).expect("its shape");
    let inputs = Inputs::new(q, k, k).slots(&[2, 0]).seq_ranges(ranges);
    let outputs = Outputs::new(TensorViewMut::new(&mut o, &[2, 3, 2, 4]).expect("its shape"));
    match decoding {
        true => decode(&problem(), &inputs, &[0.0; 2], state, outputs),
        false => prefill(&problem(), &inputs, &[0.0; 2], state, outputs),
    }
}

/// The only span, its name, and some of its fields.
#[track_caller]
fn expect(spans: &[Recorded], name: &str, fields: &[(&str, &str)]) {
    let [span] = spans else { panic!("one span expected: {spans:#?}") };
    assert_eq!(span.name, name);
    for (field, value) in fields {
        assert_eq!(span.field(field), *value, "{field}");
    }
    assert_eq!(
        span.fields.contains_key("error"),
        fields.iter().any(|(field, _)| *field == "error")
    );
}

#[test]
fn calls_have_spans_of_what_they_do() {
    let mut state = State::new(&problem(), 3).expect("room");
    for (decoding, name) in [(false, "prefill"), (true, "decode")] {
        let spans = recorded(Level::DEBUG, || {
            call(&mut state, decoding, &[0..3, 1..2]).expect("valid");
        });
        let fields = [("shapes", SHAPES), ("sequences", "2"), ("tokens", "4"), ("slots", "[2, 0]")];
        expect(&spans, name, &fields);
    }
    let spans = recorded(Level::DEBUG, || flush(&problem(), &mut state, &[2, 0]).expect("slots"));
    let fields = [("shapes", SHAPES), ("sequences", "2"), ("tokens", "4"), ("slots", "[2, 0]")];
    expect(&spans, "flush", &fields);
}

#[test]
fn spans_say_why_a_call_has_failed() {
    let mut state = State::new(&problem(), 3).expect("room");
    for (decoding, name) in [(false, "prefill"), (true, "decode")] {
        let mut text = String::new();
        let spans = recorded(Level::DEBUG, || {
            let refused = call(&mut state, decoding, &[0..3, 1..4]);
            text = refused.expect_err("a range beyond T").to_string();
        });
        expect(&spans, name, &[("shapes", SHAPES), ("error", &text)]);
        assert!(!spans[0].fields.contains_key("tokens"));
    }
    let spans = recorded(Level::DEBUG, || {
        flush(&problem(), &mut state, &[3]).expect_err("no slot");
    });
    expect(
        &spans,
        "flush",
        &[("error", "slots[0]: 3 given, less than the state's 3 slots expected")],
    );
}

#[test]
fn maps_and_merges_have_spans() {
    let p = problem();
    let k = vec![0.25f32; 2 * 6 * 4];
    let k = TensorView::new(&k, &[2, 6, 1, 4]).expect("its shape");
    let before = KeySums::zero(&p, 2).expect("room");
    let mut sums = None;
    let spans = recorded(Level::DEBUG, || sums = Some(key_sums(&p, k).expect("valid")));
    let of = |tokens| [("shapes", SHAPES), ("sequences", "2"), ("tokens", tokens)];
    expect(&spans, "key_sums", &of("12"));
    let mut first = None;
    let spans =
        recorded(Level::DEBUG, || first = Some(segment_map(&p, k, k, &before).expect("valid")));
    expect(&spans, "segment_map", &of("12"));
    let (first, sums) = (first.expect("a map"), sums.expect("sums"));
    let second = segment_map(&p, k, k, &sums).expect("valid");
    let spans = recorded(Level::DEBUG, || drop(compose(&first, &second).expect("in order")));
    expect(&spans, "compose", &of("24"));
    let mut state = State::new(&p, 2).expect("room");
    let spans = recorded(Level::DEBUG, || apply(&first, &mut state).expect("empty"));
    expect(&spans, "apply", &of("12"));

    let empty = State::new(&p, 2).expect("room");
    let spans = recorded(Level::DEBUG, || drop(merge_memories(&[&state, &empty]).expect("valid")));
    expect(
        &spans,
        "merge_memories",
        &[("shapes", "2 states"), ("sequences", "2"), ("tokens", "12")],
    );
    let (a, l, mut o) = (vec![0.5f32; 3 * 2 * 4], vec![0.0f32; 6], vec![0.0f32; 3 * 2 * 4]);
    let a = TensorView::new(&a, &[3, 2, 4]).expect("its shape");
    let l = TensorView::new(&l, &[2, 3]).expect("its shape");
    let spans = recorded(Level::DEBUG, || {
        let out = TensorViewMut::new(&mut o, &[3, 2, 4]).expect("its shape");
        merge_partials(&[a, a], &[l, l], out, None).expect("valid");
    });
    expect(&spans, "merge_partials", &[("shapes", "2 parts, [3, 2, 4]"), ("tokens", "3")]);
}

/// An application's own span is not written to where the crate's are not wanted.
#[test]
fn nothing_is_said_below_the_level() {
    let mut state = State::new(&problem(), 3).expect("room");
    let spans = recorded(Level::INFO, || {
        let own = ::tracing::info_span!(target: "infini_attn", "own", tokens = 7, error = ::tracing::field::Empty);
        own.in_scope(|| {
            call(&mut state, false, &[0..3, 1..2]).expect("valid");
            call(&mut state, true, &[0..3, 1..4]).expect_err("a range beyond T");
        });
    });
    expect(&spans, "own", &[("tokens", "7")]);
}
