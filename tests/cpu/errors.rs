//! Every refusal: a typed error that names the argument and both values, and nothing written.

use std::ops::Range;

use crate::common::buffers::{Arrangement, Asked, OutputBuffers, Strided};
use crate::common::stream::{Stream, normals};
use half::f16;
use infini_attn::{
    DType, Denominator, Element, EmptyMemory, Error, Inputs, Outputs, Problem, ProblemBuilder,
    Result, Rope, State, TensorView, TensorViewMut, Update, decode, flush, prefill, reference,
};

const GATE: [f32; 4] = [0.0; 4];

/// 4 query heads on 2 KV heads, (Dk, Dv) = (6, 5), N = 4, f32.
fn problem(change: impl FnOnce(ProblemBuilder) -> ProblemBuilder) -> Problem {
    let base = Problem::builder().heads(4).kv_heads(2).key_dim(6).value_dim(5).segment_len(4);
    change(base).build().expect("valid")
}

/// The error's kind, as its variant's name.
fn kind(error: &Error) -> &'static str {
    match error {
        Error::Shape { .. } => "Shape",
        Error::DType { .. } => "DType",
        Error::Stride { .. } => "Stride",
        Error::Length { .. } => "Length",
        Error::Value { .. } => "Value",
        Error::Problem { .. } => "Problem",
        Error::RotationChanged { .. } => "RotationChanged",
        Error::OpenSegment { .. } => "OpenSegment",
        Error::DeltaMerge { .. } => "DeltaMerge",
        _ => "another",
    }
}

/// The result must be an error of that kind whose message starts with the argument and contains
/// the words (the value received and what is accepted).
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, expected: &str, argument: &str, words: &[&str]) {
    let error = match result {
        Ok(value) => panic!("{argument}: accepted: {value:?}"),
        Err(error) => error,
    };
    let message = error.to_string();
    assert_eq!(kind(&error), expected, "{message}");
    assert!(message.starts_with(argument), "{message:?} does not begin with {argument:?}");
    for word in words {
        assert!(message.contains(word), "{message:?} does not contain {word:?}");
    }
}

/// A state of two slots in the middle of their streams, outputs, and a call of 3 tokens each, to be
/// spoilt by the tests.
struct Fixture {
    problem: Problem,
    stream: Stream<f32>,
    state: State,
    out: OutputBuffers<f32>,
}

/// Batch and tokens of the fixture's call.
const LEAD: [usize; 2] = [2, 3];

impl Fixture {
    fn new() -> Self {
        let problem = problem(|b| b);
        let mut state = State::new(&problem, 2).unwrap();
        for slot in 0..2 {
            let stream = Stream::<f32>::normal(&problem, 6, slot as u64);
            let mut o = vec![0.0; 6 * 20];
            let out = Outputs::new(TensorViewMut::new(&mut o, &[1, 6, 4, 5]).expect("shape"));
            let inputs = stream.inputs().slots(std::slice::from_ref(&slot));
            prefill(&problem, &inputs, &GATE, &mut state, out).expect("valid");
        }
        let stream = Stream::normal(&problem, 6, 7);
        let out = OutputBuffers::new(&LEAD, 4, 5, Arrangement::Gaps, Asked::ALL);
        Self { problem, stream, state, out }
    }

    fn views(&self) -> [TensorView<'_, f32>; 3] {
        let s = &self.stream;
        [view(&s.q, &[2, 3, 4, 6]), view(&s.k, &[2, 3, 2, 6]), view(&s.v, &[2, 3, 2, 5])]
    }

    /// The call must be refused by both entries, and by the reference, and change no bit.
    #[track_caller]
    fn refuses<'a>(
        &'a self,
        change: impl Fn(Inputs<'a, f32>) -> Inputs<'a, f32>,
        kind: &str,
        argument: &str,
        words: &[&str],
    ) {
        let [q, k, v] = self.views();
        let inputs = change(Inputs::new(q, k, v));
        self.refuses_call(&inputs, &GATE, kind, argument, words);
        let p = &self.problem;
        let mut state = reference::State::new(p, 2).unwrap();
        let open = inputs_of_two(self);
        reference::prefill(p, &open, &GATE, &mut state).expect("valid");
        let before = format!("{state:?}");
        refused(reference::prefill(p, &inputs, &GATE, &mut state), kind, argument, words);
        assert_eq!(format!("{state:?}"), before, "the reference's state changed");
    }

    #[track_caller]
    fn refuses_call(
        &self,
        inputs: &Inputs<'_, f32>,
        gate: &[f32],
        kind: &str,
        argument: &str,
        words: &[&str],
    ) {
        for entry in [prefill::<f32>, decode::<f32>] {
            let (mut state, mut out) = (self.state.clone(), self.out.clone());
            let result = entry(&self.problem, inputs, gate, &mut state, out.views());
            refused(result, kind, argument, words);
            assert_unchanged(&state, &self.state);
            assert_eq!(out.bits(), self.out.bits(), "{argument}: outputs were written");
        }
    }

    /// As [`Self::refuses`], for outputs.
    #[track_caller]
    fn refuses_outputs(
        &self,
        spoil: impl Fn(&mut OutputBuffers<f32>),
        kind: &str,
        argument: &str,
        words: &[&str],
    ) {
        let inputs = inputs_of_two(self);
        for entry in [prefill::<f32>, decode::<f32>] {
            let (mut state, mut out) = (self.state.clone(), self.out.clone());
            spoil(&mut out);
            let before = out.bits();
            let result = entry(&self.problem, &inputs, &GATE, &mut state, out.views());
            refused(result, kind, argument, words);
            assert_unchanged(&state, &self.state);
            assert_eq!(out.bits(), before, "{argument}: outputs were written");
        }
    }
}

fn inputs_of_two(f: &Fixture) -> Inputs<'_, f32> {
    let [q, k, v] = f.views();
    Inputs::new(q, k, v)
}

fn view<'a, T>(data: &'a [T], shape: &[usize]) -> TensorView<'a, T> {
    TensorView::new(data, shape).expect("the data have this shape")
}

/// Every number of the state, open segments included: f32 prints so that it reads back bit by bit.
#[track_caller]
fn assert_unchanged(state: &State, before: &State) {
    assert_eq!(format!("{state:?}"), format!("{before:?}"), "the state changed");
}

#[test]
fn the_fixture_itself_is_accepted() {
    let f = Fixture::new();
    for entry in [prefill::<f32>, decode::<f32>] {
        let (mut state, mut out) = (f.state.clone(), f.out.clone());
        entry(&f.problem, &inputs_of_two(&f), &GATE, &mut state, out.views()).expect("valid");
        assert_ne!(format!("{state:?}"), format!("{:?}", f.state));
        assert_ne!(out.bits(), f.out.bits());
    }
}

#[test]
fn shapes_of_inputs() {
    let f = Fixture::new();
    let data = vec![0.5f32; 1000];
    let some = |shape: &[usize]| view(&data[..shape.iter().product()], shape);
    let with = |q: &[usize], k: &[usize], v: &[usize]| {
        let (q, k, v) = (some(q), some(k), some(v));
        move |_| Inputs::new(q, k, v)
    };
    let (q, k, v) = ([2, 3, 4, 6], [2, 3, 2, 6], [2, 3, 2, 5]);
    f.refuses(with(&[6, 4, 6], &k, &v), "Shape", "q: ", &["[6, 4, 6]", "rank 4", "[B, T, H, D]"]);
    f.refuses(with(&[6], &k, &v), "Shape", "q: ", &["[6]", "rank 4"]);
    f.refuses(with(&[2, 3, 2, 6], &k, &v), "Shape", "q: ", &["[2, 3, 2, 6]", "[2, 3, 4, 6]"]);
    f.refuses(with(&[2, 3, 4, 5], &k, &v), "Shape", "q: ", &["[2, 3, 4, 5]", "[2, 3, 4, 6]"]);
    f.refuses(with(&q, &[2, 3, 4, 6], &v), "Shape", "k: ", &["[2, 3, 4, 6]", "[2, 3, 2, 6]"]);
    f.refuses(with(&q, &[2, 4, 2, 6], &v), "Shape", "k: ", &["[2, 4, 2, 6]", "[2, 3, 2, 6]"]);
    f.refuses(with(&q, &[6, 2, 6], &v), "Shape", "k: ", &["[6, 2, 6]", "[2, 3, 2, 6]"]);
    f.refuses(with(&q, &k, &[2, 3, 2, 6]), "Shape", "v: ", &["[2, 3, 2, 6]", "[2, 3, 2, 5]"]);
    f.refuses(with(&q, &k, &[1, 3, 2, 5]), "Shape", "v: ", &["[1, 3, 2, 5]", "[2, 3, 2, 5]"]);
    let cu = [0, 6];
    f.refuses(|i| i.cu_seqlens(&cu), "Shape", "q: ", &["[2, 3, 4, 6]", "rank 3", "[total, H, D]"]);
}

#[test]
fn strides_of_inputs() {
    let f = Fixture::new();
    let data = vec![0.5f32; 1000];
    let [q, k, v] = f.views();
    let wide = |heads: usize, dim: usize| {
        let strides = [6 * heads * dim, 2 * heads * dim, 2 * dim, 2].map(|s| s as i64);
        TensorView::strided(&data, 0, &[2, 3, heads, dim], &strides).expect("inside")
    };
    let words = ["contiguous", "2]"];
    f.refuses(|_| Inputs::new(wide(4, 6), k, v), "Stride", "q: ", &words);
    f.refuses(|_| Inputs::new(q, wide(2, 6), v), "Stride", "k: ", &words);
    f.refuses(|_| Inputs::new(q, k, wide(2, 5)), "Stride", "v: ", &words);
    let flat = TensorView::strided(&data, 0, &[2, 3, 4, 6], &[0, 0, 0, 0]).expect("inside");
    f.refuses(|_| Inputs::new(flat, k, v), "Stride", "q: ", &["contiguous", "[0, 0, 0, 0]"]);
}

#[test]
fn gates() {
    let f = Fixture::new();
    let inputs = inputs_of_two(&f);
    f.refuses_call(&inputs, &[0.0; 3], "Length", "gate: ", &["3 elements", "4"]);
    f.refuses_call(&inputs, &[], "Length", "gate: ", &["0 elements", "4"]);
    let nan = [0.0, 0.0, f32::NAN, 0.0];
    f.refuses_call(&inputs, &nan, "Value", "gate[2]: ", &["NaN", "infinity"]);
}

#[test]
fn lengths_of_padded_batches() {
    let f = Fixture::new();
    f.refuses(|i| i.seq_lens(&[3]), "Length", "seq_lens: ", &["1 elements", "2"]);
    f.refuses(|i| i.seq_lens(&[3, 3, 3]), "Length", "seq_lens: ", &["3 elements", "2"]);
    f.refuses(|i| i.seq_lens(&[3, 4]), "Value", "seq_lens[1]: ", &["4 given", "0 to T = 3"]);
    f.refuses(|i| i.seq_lens(&[-1, 3]), "Value", "seq_lens[0]: ", &["-1 given", "0 to T = 3"]);
}

#[test]
fn ranges_of_padded_batches() {
    let f = Fixture::new();
    let refuses = |ranges: &[Range<i32>], kind, argument, words: &[&str]| {
        f.refuses(|i| i.seq_ranges(ranges), kind, argument, words);
    };
    refuses(&[], "Length", "seq_ranges: ", &["0 elements", "2"]);
    refuses(&[0..3, 0..3, 0..3], "Length", "seq_ranges: ", &["3 elements", "2"]);
    #[allow(clippy::reversed_empty_ranges, reason = "what is refused")]
    for wrong in [1..4, 4..4, -1..2, 2..1, i32::MIN..i32::MAX] {
        let got = format!("{wrong:?} given");
        refuses(&[0..3, wrong], "Value", "seq_ranges[1]: ", &[&got, "0 to T = 3"]);
    }
}

#[test]
fn lengths_of_packed_batches() {
    let f = Fixture::new();
    let s = &f.stream;
    let packed = |cu: &'static [i32]| {
        let (q, k, v) = (view(&s.q, &[6, 4, 6]), view(&s.k, &[6, 2, 6]), view(&s.v, &[6, 2, 5]));
        move |_| Inputs::new(q, k, v).cu_seqlens(cu)
    };
    f.refuses(packed(&[]), "Value", "cu_seqlens[0]: ", &["nothing given", "0 expected"]);
    f.refuses(packed(&[1, 3, 6]), "Value", "cu_seqlens[0]: ", &["1 given", "0 expected"]);
    f.refuses(packed(&[0, 4, 3]), "Value", "cu_seqlens[2]: ", &["3 given", "cu_seqlens[1] = 4"]);
    f.refuses(packed(&[0, -1, 6]), "Value", "cu_seqlens[1]: ", &["-1 given", "cu_seqlens[0] = 0"]);
    f.refuses(packed(&[0, 3, 5]), "Value", "cu_seqlens[2]: ", &["5 given", "total = 6"]);
    f.refuses(packed(&[0, 3, 7]), "Value", "cu_seqlens[2]: ", &["7 given", "total = 6"]);
    f.refuses(packed(&[0]), "Value", "cu_seqlens[0]: ", &["0 given", "total = 6"]);
    f.refuses(packed(&[0, 6]), "Length", "state: ", &["2 elements", "1 (the batch size)"]);
}

#[test]
fn slots_of_a_call() {
    let f = Fixture::new();
    f.refuses(|i| i.slots(&[0]), "Length", "slots: ", &["1 elements", "2"]);
    f.refuses(|i| i.slots(&[0, 1, 2]), "Length", "slots: ", &["3 elements", "2"]);
    f.refuses(|i| i.slots(&[0, 2]), "Value", "slots[1]: ", &["2 given", "2 slots"]);
    f.refuses(|i| i.slots(&[1, 1]), "Value", "slots[1]: ", &["1 given", "other than slots[0]"]);
    let data = vec![0.5f32; 1000];
    let one = |heads: usize, dim: usize| view(&data[..3 * heads * dim], &[1, 3, heads, dim]);
    let inputs = Inputs::new(one(4, 6), one(2, 6), one(2, 5));
    f.refuses(|_| inputs, "Length", "state: ", &["2 elements", "1 (the batch size)", "slots"]);
}

#[test]
fn rotation_tables_and_positions() {
    let mut f = Fixture::new();
    f.state.reset(&[0, 1]).expect("slots");
    // The same 2 open tokens, with rotation: position 6 is next.
    let table = normals(1, 20 * 3);
    let rope = |rows: usize, half: usize| {
        Rope::new(
            view(&table[..rows * half], &[rows, half]),
            view(&table[..rows * half], &[rows, half]),
        )
    };
    let fresh = Fixture { state: State::new(&f.problem, 2).unwrap(), ..Fixture::new() };
    let call = |rope: Rope<'_>, kind: &str, argument: &str, words: &[&str]| {
        fresh.refuses_call(&inputs_of_two(&fresh).rope(rope), &GATE, kind, argument, words);
    };
    let cos = view(&table[..12], &[4, 3]);
    let wrong_rank = Rope::new(view(&table[..12], &[1, 4, 3]), cos);
    call(wrong_rank, "Shape", "rope.cos: ", &["[1, 4, 3]", "[positions, R/2]"]);
    let other = Rope::new(cos, view(&table[..8], &[4, 2]));
    call(other, "Shape", "rope.sin: ", &["[4, 2]", "[4, 3]"]);
    call(rope(4, 4), "Shape", "rope.cos: ", &["[4, 4]", "Dk = 6"]);
    let strided = TensorView::strided(&table, 0, &[4, 3], &[6, 2]).expect("inside");
    call(Rope::new(strided, cos), "Stride", "rope.cos: ", &["[6, 2]", "contiguous"]);
    call(Rope::new(cos, strided), "Stride", "rope.sin: ", &["[6, 2]", "contiguous"]);
    call(rope(2, 3), "Value", "positions (sequence 0, token 2): ", &["2 given", "0 to 2"]);
    call(rope(0, 3), "Value", "positions (sequence 0, token 2): ", &["2 given", "0 to 0"]);
    let rope = rope(4, 3);
    let positions = |list: &'static [i64]| rope.positions(list);
    call(
        positions(&[]),
        "Length",
        "positions: ",
        &["0 elements", "3 (shared)", "6 (per sequence)"],
    );
    call(positions(&[0; 5]), "Length", "positions: ", &["5 elements", "3 (shared)"]);
    let at = "positions (sequence 0, token 1): ";
    call(positions(&[0, 4, 0]), "Value", at, &["4 given", "0 to 4"]);
    call(positions(&[0, -1, 0]), "Value", at, &["-1 given", "0 to 4"]);
    call(positions(&[0, i64::MIN, 0]), "Value", at, &["-9223372036854775808 given"]);
    let at = "positions (sequence 1, token 2): ";
    call(positions(&[0, 1, 2, 3, 0, 9]), "Value", at, &["9 given", "0 to 4"]);
}

#[test]
fn positions_continue_from_the_state() {
    // 6 tokens seen: 3 more need 9 rows of the table.
    let f = Fixture::new();
    let (mut state, p) = (f.state.clone(), &f.problem);
    flush(p, &mut state, &[0, 1]).expect("slots");
    let f = Fixture { state, ..f };
    let table = normals(2, 27);
    let rope = |rows| {
        Rope::new(view(&table[..rows * 3], &[rows, 3]), view(&table[..rows * 3], &[rows, 3]))
    };
    let inputs = inputs_of_two(&f);
    let at = "positions (sequence 0, token 2): ";
    f.refuses_call(&inputs.rope(rope(8)), &GATE, "Value", at, &["8 given", "0 to 8"]);
    let (mut state, mut out) = (f.state.clone(), f.out.clone());
    prefill(&f.problem, &inputs.rope(rope(9)), &GATE, &mut state, out.views()).expect("9 rows");
}

#[test]
fn rotation_changed_inside_an_open_segment() {
    let f = Fixture::new();
    let table = normals(3, 48);
    let rope = Rope::new(view(&table, &[16, 3]), view(&table, &[16, 3]));
    let (plain, rotated) = (inputs_of_two(&f), inputs_of_two(&f).rope(rope));
    let words = ["slot 0", "2 tokens", "without rotation", "flush"];
    f.refuses_call(&rotated, &GATE, "RotationChanged", "rope: ", &words);
    // The other way round, in slot 1 only.
    let mut state = f.state.clone();
    state.reset(&[0, 1]).expect("slots");
    let lens = [0, 2];
    let (p, mut out) = (&f.problem, f.out.clone());
    prefill(p, &rotated.seq_lens(&lens), &GATE, &mut state, out.views()).expect("valid");
    let f = Fixture { state, ..Fixture::new() };
    let words = ["slot 1", "2 tokens", "with rotation", "without", "flush"];
    f.refuses_call(&plain, &GATE, "RotationChanged", "rope: ", &words);
    // An idle sequence keeps its open segment, and after a flush everything goes.
    let (mut state, mut out) = (f.state.clone(), f.out.clone());
    let lens = [3, 0];
    prefill(p, &plain.seq_lens(&lens), &GATE, &mut state, out.views()).expect("slot 1 is idle");
    flush(p, &mut state, &[1]).expect("slot 1");
    prefill(p, &plain, &GATE, &mut state, out.views()).expect("flushed");
}

#[test]
fn shapes_and_strides_of_outputs() {
    let f = Fixture::new();
    let buffer = |shape: &[usize]| Strided::<f32>::new(shape, Arrangement::Contiguous, 0.0);
    let words = ["[2, 3, 5, 4]", "[2, 3, 4, 5]"];
    let swapped = [2, 3, 5, 4];
    f.refuses_outputs(|o| o.o = buffer(&swapped), "Shape", "o: ", &words);
    f.refuses_outputs(|o| o.a_dot = Some(buffer(&swapped)), "Shape", "a_dot: ", &words);
    f.refuses_outputs(|o| o.a_mem = Some(buffer(&swapped)), "Shape", "a_mem: ", &words);
    f.refuses_outputs(|o| o.o = buffer(&[6, 4, 5]), "Shape", "o: ", &["[6, 4, 5]", "[2, 3, 4, 5]"]);
    let words = ["[2, 3, 4]", "[B, Hq, T]", "[2, 4, 3]"];
    f.refuses_outputs(|o| o.lse = Some(buffer(&[2, 3, 4])), "Shape", "lse: ", &words);
    // Views whose last dimension is not contiguous.
    let inputs = inputs_of_two(&f);
    let main = [120i64, 40, 10, 2];
    for (argument, at) in [("o: ", 0), ("a_dot: ", 1), ("a_mem: ", 2), ("lse: ", 3)] {
        let (mut state, mut data) = (f.state.clone(), vec![vec![7.0f32; 240]; 3]);
        let mut lse_data = vec![7.0f32; 48];
        let [o, a_dot, a_mem] = &mut data[..] else { unreachable!() };
        let strides = |i: usize| if at == i { main } else { [60, 20, 5, 1] };
        let shape = [2, 3, 4, 5];
        fn at_strides<'a>(d: &'a mut [f32], s: &[usize], by: &[i64]) -> TensorViewMut<'a, f32> {
            TensorViewMut::strided(d, 0, s, by).expect("inside")
        }
        let lse = if at == 3 { [24, 6, 2] } else { [12, 3, 1] };
        let outputs = Outputs::new(at_strides(o, &shape, &strides(0)))
            .a_dot(at_strides(a_dot, &shape, &strides(1)))
            .a_mem(at_strides(a_mem, &shape, &strides(2)))
            .lse(at_strides(&mut lse_data, &[2, 4, 3], &lse));
        let result = prefill(&f.problem, &inputs, &GATE, &mut state, outputs);
        refused(result, "Stride", argument, &["2]", "contiguous"]);
        assert_unchanged(&state, &f.state);
        assert!(data.iter().flatten().chain(&lse_data).all(|&x| x == 7.0));
    }
}

#[test]
fn element_types() {
    let p = problem(|b| b.dtype(DType::BF16));
    fn call<T: Element>(p: &Problem) -> Result<()> {
        let stream = Stream::<T>::normal(p, 3, 1);
        let mut state = State::new(p, 1).unwrap();
        let how = Arrangement::Contiguous;
        let mut out = OutputBuffers::<T>::new(&[1, 3], 4, 5, how, Asked::ALL);
        let before = out.bits();
        let result = prefill(p, &stream.inputs(), &GATE, &mut state, out.views());
        assert_eq!(result.is_err(), out.bits() == before);
        assert_unchanged(
            &state,
            &if result.is_err() { State::new(p, 1).unwrap() } else { state.clone() },
        );
        result
    }
    refused(call::<f32>(&p), "DType", "q: ", &["f32 given", "bf16 expected"]);
    refused(call::<f16>(&p), "DType", "q: ", &["f16 given", "bf16 expected"]);
    call::<half::bf16>(&p).expect("the problem's own type");
}

#[test]
fn decode_takes_sixteen_tokens_at_most() {
    let p = problem(|b| b);
    for (tokens, lens) in [(17, vec![17]), (20, vec![3, 17, 0])] {
        let b = lens.len();
        let stream = Stream::<f32>::normal(&p, b * tokens, 4);
        let four = |data, heads, dim| view(data, &[b, tokens, heads, dim]);
        let inputs =
            Inputs::new(four(&stream.q[..], 4, 6), four(&stream.k, 2, 6), four(&stream.v, 2, 5))
                .seq_lens(&lens);
        let mut state = State::new(&p, b).unwrap();
        let how = Arrangement::Contiguous;
        let mut out = OutputBuffers::<f32>::new(&[b, tokens], 4, 5, how, Asked::ALL);
        let before = out.bits();
        let result = decode(&p, &inputs, &GATE, &mut state, out.views());
        refused(result, "Value", "q (sequence ", &["17 given", "16", "prefill"]);
        assert_unchanged(&state, &State::new(&p, b).unwrap());
        assert_eq!(out.bits(), before);
    }
}

#[test]
fn a_state_of_another_problem() {
    let p = problem(|b| b);
    type Change = fn(ProblemBuilder) -> ProblemBuilder;
    let others: [(&str, &str, &str, Change); 10] = [
        ("heads", "8", "4", |b| b.heads(8)),
        ("kv_heads", "4", "2", |b| b.kv_heads(4)),
        ("key_dim", "8", "6", |b| b.key_dim(8).scale(6f64.powf(-0.5))),
        ("value_dim", "6", "5", |b| b.value_dim(6)),
        ("segment_len", "5", "4", |b| b.segment_len(5)),
        ("update", "linear", "delta", |b| b.update(Update::Linear)),
        ("empty_memory", "bypass", "gate", |b| b.empty_memory(EmptyMemory::Bypass)),
        ("denominator", "add:1e-6", "exact", |b| b.denominator(Denominator::Add(1e-6))),
        ("scale", "5e-1", "4.08", |b| b.scale(0.5)),
        ("dtype", "f16", "f32", |b| b.dtype(DType::F16)),
    ];
    let stream = Stream::<f32>::normal(&p, 3, 5);
    for (field, got, expected, change) in others {
        let mut state = State::new(&problem(change), 1).unwrap();
        let before = state.clone();
        let how = Arrangement::Contiguous;
        let mut out = OutputBuffers::<f32>::new(&[1, 3], 4, 5, how, Asked::ALL);
        let untouched = out.bits();
        let words = [format!("made for {field} = {got}"), format!("has {field} = {expected}")];
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        for entry in [prefill::<f32>, decode::<f32>] {
            let result = entry(&p, &stream.inputs(), &GATE, &mut state, out.views());
            refused(result, "Problem", "state: ", &words);
        }
        refused(flush(&p, &mut state, &[0]), "Problem", "state: ", &words);
        let mut reference = reference::State::new(state.problem(), 1).unwrap();
        let fresh = format!("{reference:?}");
        let result = reference::prefill(&p, &stream.inputs(), &GATE, &mut reference);
        refused(result, "Problem", "state: ", &words);
        refused(reference.flush(&p, &[0]), "Problem", "state: ", &words);
        assert_eq!(format!("{reference:?}"), fresh);
        assert_unchanged(&state, &before);
        assert_eq!(out.bits(), untouched);
    }
}

#[test]
fn slots_of_flush_reset_and_fork() {
    let f = Fixture::new();
    let (mut state, p) = (f.state.clone(), &f.problem);
    refused(flush(p, &mut state, &[0, 2]), "Value", "slots[1]: ", &["2 given", "2 slots"]);
    refused(flush(p, &mut state, &[1, 1]), "Value", "slots[1]: ", &["1 given", "slots[0]"]);
    refused(state.reset(&[0, 5]), "Value", "slots[1]: ", &["5 given", "2 slots"]);
    refused(state.reset(&[0, 0]), "Value", "slots[1]: ", &["0 given", "slots[0]"]);
    refused(state.fork(&[0, 0, 3]), "Value", "slots[2]: ", &["3 given", "2 slots"]);
    refused(State::new(p, 0).unwrap().fork(&[0]), "Value", "slots[0]: ", &["0 given", "0 slots"]);
    assert_unchanged(&state, &f.state);
    let mut reference = reference::State::new(p, 2).unwrap();
    refused(reference.flush(p, &[2]), "Value", "slots[0]: ", &["2 given", "2 slots"]);
    refused(reference.flush(p, &[1, 1]), "Value", "slots[1]: ", &["1 given", "slots[0]"]);
    state.fork(&[1, 1, 0]).expect("a slot may be forked twice");
}

#[test]
fn problems() {
    let build = |change: fn(ProblemBuilder) -> ProblemBuilder| change(Problem::builder()).build();
    type Change = fn(ProblemBuilder) -> ProblemBuilder;
    let extents: [(&str, Change, Change); 5] = [
        ("heads: ", |b| b.heads(0), |b| b.heads((1 << 24) + 1)),
        ("kv_heads: ", |b| b.kv_heads(0), |b| b.kv_heads((1 << 24) + 1)),
        ("key_dim: ", |b| b.key_dim(0), |b| b.key_dim((1 << 24) + 1)),
        ("value_dim: ", |b| b.value_dim(0), |b| b.value_dim((1 << 24) + 1)),
        ("segment_len: ", |b| b.segment_len(0), |b| b.segment_len(usize::MAX)),
    ];
    for (field, zero, huge) in extents {
        refused(build(zero), "Value", field, &["0 given", "1 to 16777216"]);
        refused(build(huge), "Value", field, &["1 to 16777216"]);
    }
    let words = ["at most 1099511627776"];
    let field = "floats of state per sequence: ";
    refused(build(|b| b.head_dim(1 << 24).segment_len(1 << 24)), "Value", field, &words);
    let words = ["3 given", "divisor of heads = 8"];
    refused(build(|b| b.heads(8).kv_heads(3)), "Value", "kv_heads: ", &words);
    let words = ["16 given", "divisor of heads = 8"];
    refused(build(|b| b.heads(8).kv_heads(16)), "Value", "kv_heads: ", &words);
    refused(build(|b| b.scale(f64::NAN)), "Value", "scale: ", &["NaN given", "finite"]);
    refused(build(|b| b.scale(f64::INFINITY)), "Value", "scale: ", &["inf given", "finite"]);
    for eps in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        for policy in [Denominator::Clamp(eps), Denominator::Add(eps)] {
            let result = Problem::builder().denominator(policy).build();
            refused(result, "Value", "denominator: ", &["positive, finite"]);
        }
    }
}

#[test]
fn names() {
    let words = ["Delta given", "linear or delta"];
    refused("Delta".parse::<Update>(), "Value", "update: ", &words);
    let words = ["none given", "gate or bypass"];
    refused("none".parse::<EmptyMemory>(), "Value", "empty_memory: ", &words);
    for text in ["", "exact:1", "clamp", "clamp:x", "sub:1"] {
        let words = [format!("{text} given")];
        refused(text.parse::<Denominator>(), "Value", "denominator: ", &[&words[0], "clamp:EPS"]);
    }
    refused("f64".parse::<DType>(), "Value", "dtype: ", &["f64 given", "f32, f16 or bf16"]);
    for denominator in [Denominator::Exact, Denominator::Clamp(1e-10), Denominator::Add(0.25)] {
        assert_eq!(denominator.to_string().parse::<Denominator>().expect("own name"), denominator);
    }
}

#[test]
fn views() {
    let mut data = vec![0.0f32; 24];
    let new = |shape: &[usize]| TensorView::new(&data, shape);
    let words = ["[]", "rank 1 to 4"];
    refused(new(&[]), "Shape", "shape: ", &words);
    let words = ["[1, 2, 3, 4, 1]", "rank 1 to 4"];
    refused(new(&[1, 2, 3, 4, 1]), "Shape", "shape: ", &words);
    refused(new(&[5, 5]), "Length", "data: ", &["24 elements", "[5, 5]"]);
    refused(new(&[usize::MAX, 2]), "Stride", "strides: ", &["2^62"]);
    let strided = |offset, shape: &[usize], strides: &[i64]| {
        TensorView::strided(&data, offset, shape, strides)
    };
    refused(strided(0, &[4, 6], &[1]), "Length", "strides: ", &["1 elements", "2 (the rank)"]);
    refused(strided(0, &[4, 6], &[6, 2]), "Length", "data: ", &["24 elements", "0 to 28"]);
    refused(strided(1, &[4, 6], &[6, 1]), "Length", "data: ", &["24 elements", "1 to 24"]);
    refused(strided(17, &[4, 6], &[-6, 1]), "Length", "data: ", &["24 elements", "-1 to 22"]);
    refused(strided(usize::MAX, &[1], &[1]), "Length", "data: ", &["24 elements"]);
    for stride in [i64::MAX, i64::MIN, 1 << 62, -(1 << 62)] {
        let words = [stride.to_string()];
        refused(strided(0, &[2, 1], &[stride, 1]), "Stride", "strides: ", &[&words[0], "2^62"]);
        refused(strided(0, &[3, 1], &[stride, 1]), "Stride", "strides: ", &[&words[0], "2^62"]);
    }
    strided(18, &[4, 6], &[-6, 1]).expect("backwards, inside");
    strided(3, &[9, 6], &[0, 1]).expect("a broadcast may be read");
    strided(99, &[0, 6], &[6, 1]).expect("nothing is reached");
    let mut strided_mut = |shape: &[usize], strides: &[i64]| {
        TensorViewMut::strided(&mut data, 0, shape, strides).map(|v| v.shape().to_vec())
    };
    let words = ["no two indices"];
    refused(strided_mut(&[9, 6], &[0, 1]), "Stride", "strides: ", &words);
    refused(strided_mut(&[3, 6], &[5, 1]), "Stride", "strides: ", &words);
    refused(strided_mut(&[2, 2, 6], &[6, 6, 1]), "Stride", "strides: ", &words);
    refused(strided_mut(&[5, 6], &[6, 1]), "Length", "data: ", &["24 elements", "0 to 29"]);
    strided_mut(&[2, 6], &[9, 1]).expect("rows apart");
    refused(TensorViewMut::new(&mut data, &[23]), "Length", "data: ", &["24 elements", "[23]"]);
}
