//! What the public interface promises besides numbers: threads, limits, forks, size.

use crate::common::buffers::{Arrangement, Asked, OutputBuffers};
use crate::common::model::{Entry, Fast, Model, run_entry};
use crate::common::stream::Stream;
use half::{bf16, f16};
use infini_attn::{
    DType, Denominator, EmptyMemory, Error, Inputs, KeySums, MAX_DECODE_TOKENS, Outputs, Problem,
    ProblemBuilder, Rope, SegmentMap, State, TensorView, TensorViewMut, Update, decode, flush,
    prefill, reference,
};

const GATE: [f32; 4] = [-1.0, 0.0, 0.5, 2.0];

fn problem() -> Problem {
    let builder = Problem::builder().heads(4).kv_heads(2).key_dim(8).value_dim(6).segment_len(8);
    builder.build().expect("valid")
}

#[test]
fn everything_is_send_and_sync() {
    fn check<T: Send + Sync>() {}
    check::<Problem>();
    check::<ProblemBuilder>();
    check::<State>();
    check::<reference::State>();
    check::<reference::Output>();
    check::<Error>();
    check::<KeySums>();
    check::<SegmentMap>();
    check::<Rope<'_>>();
    check::<(DType, Update, EmptyMemory, Denominator)>();
    check::<(TensorView<'_, f32>, TensorView<'_, f16>, TensorView<'_, bf16>)>();
    check::<(TensorViewMut<'_, f32>, TensorViewMut<'_, f16>, TensorViewMut<'_, bf16>)>();
    check::<(Inputs<'_, f32>, Inputs<'_, bf16>)>();
    check::<(Outputs<'_, f32>, Outputs<'_, bf16>)>();
    fn is_error<T: std::error::Error + 'static>() {}
    is_error::<Error>();
}

#[test]
fn decode_takes_none_to_sixteen_tokens_of_each_sequence() {
    // Every number of tokens at every fill of the open segment, against prefill.
    assert_eq!(MAX_DECODE_TOKENS, 16);
    let p = problem();
    let stream = Stream::<f32>::normal(&p, 8 + 16, 1);
    for open in 0..8 {
        for tokens in 0..=16 {
            let mut by_decode = State::new(&p, 1).unwrap();
            let start = stream.slice(0..open);
            run_entry(Entry::Prefill, open, &start.inputs(), &GATE, &mut by_decode);
            let mut by_prefill = by_decode.clone();
            let part = stream.slice(open..open + tokens);
            let [a, b] = [(Entry::Decode, &mut by_decode), (Entry::Prefill, &mut by_prefill)]
                .map(|(entry, state)| run_entry(entry, tokens, &part.inputs(), &GATE, state));
            let close = a.o.iter().zip(&b.o).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs()));
            assert!(close, "{tokens} tokens after {open}");
            assert_eq!(by_decode.tokens(0), (open + tokens) as u64);
            assert_eq!(by_decode.committed(0), by_prefill.committed(0));
            assert_eq!(by_decode.open_len(0), (open + tokens) % 8);
        }
    }
}

#[test]
fn decode_serves_a_ragged_batch() {
    let p = problem();
    let lens = [0, 16, 3, 1];
    let stream = Stream::<f32>::normal(&p, 4 * 16, 2);
    let view = |data, h, d| TensorView::new(data, &[4, 16, h, d]).expect("shape");
    let inputs = Inputs::new(view(&stream.q, 4, 8), view(&stream.k, 2, 8), view(&stream.v, 2, 6))
        .seq_lens(&lens);
    let mut state = State::new(&p, 4).unwrap();
    let how = Arrangement::Contiguous;
    let mut out = OutputBuffers::<f32>::new(&[4, 16], 4, 6, how, Asked::ALL);
    decode(&p, &inputs, &GATE, &mut state, out.views()).expect("valid");
    for (slot, len) in lens.into_iter().enumerate() {
        assert_eq!(state.tokens(slot), len as u64);
    }
}

#[test]
fn forks_go_their_own_ways() {
    let p = problem();
    let stream = Stream::<f32>::normal(&p, 40, 3);
    let mut prompt = Fast::new(&p);
    prompt.run(&stream.slice(0..20), &GATE);
    let mut forks = prompt.0.fork(&[0, 0]).expect("slot 0");
    assert_eq!((forks.sequences(), forks.tokens(1), forks.open_len(1)), (2, 20, 4));
    // Slot 0 goes on; slot 1 and the prompt stay.
    let slot = [0];
    let part = stream.slice(20..40);
    let got = run_entry(Entry::Prefill, 20, &part.inputs().slots(&slot), &GATE, &mut forks);
    let mut stayed = Fast(forks.fork(&[1]).expect("slot 1"));
    assert_eq!(stayed.memory(), prompt.memory());
    let want = prompt.run(&part, &GATE);
    assert_eq!(got, want);
    assert_eq!(stayed.run(&part, &GATE), want);
}

#[test]
fn flush_of_nothing_changes_nothing() {
    let p = problem();
    let mut model = Fast::new(&p);
    flush(&p, &mut model.0, &[0]).expect("slot 0");
    assert_eq!((model.0.committed(0), model.0.tokens(0)), (0, 0));
    model.run(&Stream::<f32>::normal(&p, 11, 4), &GATE);
    flush(&p, &mut model.0, &[0]).expect("slot 0");
    let (memory, counters) = (model.memory(), (model.0.tokens(0), model.0.committed(0)));
    assert_eq!(counters, (11, 11));
    flush(&p, &mut model.0, &[0]).expect("slot 0");
    flush(&p, &mut model.0, &[]).expect("no slot");
    assert_eq!((model.memory(), (model.0.tokens(0), model.0.committed(0))), (memory, counters));
}

#[test]
fn the_state_does_not_grow() {
    let p = problem();
    let mut model = Fast::new(&p);
    let before = model.0.bytes();
    model.run(&Stream::<f32>::normal(&p, 5000, 5), &GATE);
    assert_eq!(model.0.bytes(), before);
    // M, z and one segment's keys and values per KV head at the least, and not far above.
    let least = 4 * 2 * (8 * 6 + 8 + 8 * (8 + 6));
    assert!((least..least + 256).contains(&before), "{before} bytes, {least} at the least");
}

#[test]
fn an_empty_state_serves_an_empty_batch() {
    let p = problem();
    let mut state = State::new(&p, 0).unwrap();
    let none: [f32; 0] = [];
    let view = |h, d| TensorView::new(&none, &[0, 5, h, d]).expect("shape");
    let inputs = Inputs::new(view(4, 8), view(2, 8), view(2, 6));
    let mut o = [];
    let o = TensorViewMut::new(&mut o, &[0, 5, 4, 6]).expect("shape");
    prefill(&p, &inputs, &GATE, &mut state, Outputs::new(o)).expect("valid");
}

#[test]
fn a_states_size_is_known_beforehand() {
    for (heads, n) in [(1, 1), (2, 300), (4, 256)] {
        let p = Problem::builder().heads(4).kv_heads(heads).key_dim(6).value_dim(5);
        let p = p.segment_len(n).build().expect("valid");
        for slots in [0, 1, 7] {
            let state = State::new(&p, slots).expect("room");
            assert_eq!(p.state_bytes(slots, false).expect("64 bits"), state.bytes() as u64);
        }
        let mut model = Fast::new(&p);
        let (rows, stream) = ([1.0; 12], Stream::<f32>::normal(&p, 3, 1));
        let table = TensorView::new(&rows, &[6, 2]).expect("shape");
        let inputs = stream.inputs().rope(infini_attn::Rope::new(table, table));
        run_entry(Entry::Decode, 3, &inputs, &GATE, &mut model.0);
        assert_eq!(p.state_bytes(1, true).expect("64 bits"), model.0.bytes() as u64);
        let error = p.state_bytes(usize::MAX, false).expect_err("more than 64 bits count");
        let bytes = usize::MAX as u128 * u128::from(p.state_bytes(1, false).expect("64 bits"));
        assert!(error.to_string().contains(&format!("{} slots: {bytes} B", usize::MAX)), "{error}");
    }
}

#[test]
fn a_fork_takes_time_by_its_own_slots() {
    let p = Problem::builder().head_dim(1).segment_len(1).build().expect("valid");
    let slots: Vec<usize> = (0..1 << 18).rev().collect();
    let state = State::new(&p, slots.len()).expect("room");
    let start = std::time::Instant::now();
    let fork = state.fork(&slots).expect("room");
    assert_eq!(fork.sequences(), slots.len());
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}
