//! Every refusal of `prefill_backward`: an error that names the argument and both values, and nothing
//! written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::fixture::{Arguments, Fixture};
use crate::common::buffers::{Arrangement, Asked, CANARY, OutputBuffers};
use crate::common::stream::Stream;
use infini_attn::{
    DType, Error, HostLayout, InputGradients, Inputs, OutputGradients, Outputs, Problem, State,
    StateGradient, Tape, TensorView, TensorViewMut, prefill, prefill_backward,
};

/// 4 query heads on 2 KV heads, (Dk, Dv) = (6, 5), N = 4, and two sequences of 3 tokens.
fn small() -> (Problem, Stream<f32>, [usize; 1], [i32; 3]) {
    let p = Problem::builder().heads(4).kv_heads(2).key_dim(6).value_dim(5).segment_len(4);
    let p = p.build().expect("valid");
    (p, Stream::normal(&p, 6, 3), [6], [0, 3, 6])
}

/// The call must be refused by an error whose message starts with the argument and contains the words,
/// and write nothing.
#[track_caller]
fn refused(argument: &str, words: &[&str], change: impl FnOnce(&mut Arguments<'_, '_, f32>)) {
    let (p, stream, lead, cu) = small();
    let mut fixture = Fixture::new(&p, &lead, &stream, &cu);
    // Once, so that open segments have gradients to lose.
    fixture.backward(|_| {}).expect("valid");
    let before = (fixture.into.bits(), format!("{:?}", fixture.gradient));
    let error = fixture.backward(change).expect_err("refused").to_string();
    assert!(error.starts_with(argument), "{error:?} does not begin with {argument:?}");
    let missing: Vec<_> = words.iter().filter(|word| !error.contains(**word)).collect();
    assert!(missing.is_empty(), "{error:?} does not contain {missing:?}");
    let after = (fixture.into.bits(), format!("{:?}", fixture.gradient));
    assert!(before == after, "{argument}: something was written");
}

#[test]
fn the_fixture_itself_is_accepted() {
    let (p, stream, lead, cu) = small();
    let mut fixture = Fixture::new(&p, &lead, &stream, &cu);
    let before = (fixture.into.bits(), format!("{:?}", fixture.gradient));
    fixture.backward(|_| {}).expect("valid");
    assert_ne!(fixture.into.bits(), before.0);
    assert_ne!(format!("{:?}", fixture.gradient), before.1);
}

/// A call that is cancelled before it begins writes nothing; one that is cancelled later ends before it
/// comes to the first tokens, whose gradients are the last.
#[test]
fn calls_end_early() {
    static STOP: AtomicBool = AtomicBool::new(true);
    refused("", &["cancelled"], |a| a.inputs = a.inputs.cancel(&STOP));
    static LATER: AtomicBool = AtomicBool::new(false);
    let p = Problem::builder().heads(4).kv_heads(1).segment_len(64).build().expect("valid");
    let stream = Stream::<f32>::normal(&p, 1 << 14, 3);
    let (lead, cu) = ([1 << 14], [0, 1 << 14]);
    for threads in [1, 3] {
        LATER.store(false, Ordering::Relaxed);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let mut fixture = Fixture::new(&p, &lead, &stream, &cu);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(2));
                LATER.store(true, Ordering::Relaxed);
            });
            let result = pool.install(|| fixture.backward(|a| a.inputs = a.inputs.cancel(&LATER)));
            assert!(matches!(result, Err(Error::Cancelled { taken }) if taken == [0]));
            assert!(
                fixture.into.q.row(&[0, 0]).iter().all(|dq| *dq == CANARY),
                "{threads} threads"
            );
        });
    }
}

#[test]
fn gradients_to_rotated_keys_need_room() {
    let (cos, sin) = ([1.0f32; 16 * 2], [0.0f32; 16 * 2]);
    let table = |x| TensorView::new(x, &[16, 2]).expect("a table");
    let (p, stream, _, cu) = small();
    let mut fixture = Fixture::new(&p, &[6], &stream, &cu);
    let tape = Tape::of(&State::new(&p, 2).expect("room")).expect("room");
    let layout = HostLayout::new(&p, 2, false).expect("a layout");
    let mut memory = vec![0u64; layout.bytes() as usize / 8];
    let mut lent =
        StateGradient::lent(&layout, bytemuck::cast_slice_mut(&mut memory)).expect("it fits");
    let rope = infini_attn::Rope::new(table(&cos), table(&sin));
    let inputs = fixture.inputs().rope(rope);
    let outputs = {
        let (out, up) = (&fixture.out, &fixture.up);
        OutputGradients::new(out.o.view(), out.lse.as_ref().expect("asked").view(), up.o.view())
    };
    let into = &mut fixture.into;
    let (q, k, v) = (into.q.view_mut(), into.k.view_mut(), into.v.view_mut());
    let into = InputGradients::new(q, k, v, &mut into.gate);
    let result = prefill_backward(&p, &inputs, &fixture.gate, &tape, &outputs, &mut lent, into);
    let error = result.expect_err("refused").to_string();
    assert!(error.starts_with("state gradient: one without rotation given"), "{error}");
}

/// Gradients to the tokens that the second call of the fixture found in open segments.
#[test]
fn open_rows_are_read_by_token() {
    let (p, stream, lead, cu) = small();
    let mut fixture = Fixture::new(&p, &lead, &stream, &cu);
    fixture.backward(|_| {}).expect("valid");
    let mut others = vec![];
    for (slot, head, j) in (0..12).map(|i| (i / 6, i / 3 % 2, i % 3)) {
        let row = fixture.gradient.open(slot, head, j).expect("there");
        assert_eq!([row.k.len(), row.k_rotated.len(), row.v.len()], [6, 6, 5]);
        assert!(row.k.iter().chain(&row.v).all(|x| x.is_finite() && *x != 0.0), "{row:?}");
        assert!(row.k_rotated.iter().all(|x| *x == 0.0));
        assert!(!others.contains(&row), "slot {slot}, KV head {head}, token {j}");
        others.push(row);
    }
    let behind = fixture.gradient.open(0, 0, 3).expect("there");
    assert!(behind.k.iter().chain(&behind.v).all(|x| *x == 0.0), "three tokens were open");
    for (argument, [slot, head, j]) in
        [("slots[0]", [2, 0, 0]), ("kv_head", [0, 2, 0]), ("j", [0, 0, 4])]
    {
        let error = fixture.gradient.open(slot, head, j).expect_err("refused").to_string();
        assert!(error.starts_with(argument), "{error}");
    }
}

/// A call that fails leaves no tape to be taken for that of another.
#[test]
fn failed_calls_leave_no_tape() {
    static STOP: AtomicBool = AtomicBool::new(true);
    let (p, stream, _, cu) = small();
    let (mut state, mut tape) = (State::new(&p, 2).expect("room"), Tape::every(1).expect("one"));
    let fixture = Fixture::new(&p, &[6], &stream, &cu);
    let mut o = vec![0.0; 6 * 4 * 5];
    let mut call = |inputs: Inputs<'_, f32>, tape: &mut Tape| {
        let o = TensorViewMut::new(&mut o, &[6, 4, 5]).expect("its shape");
        prefill(&p, &inputs, &fixture.gate, &mut state, Outputs::new(o).tape(tape))
    };
    call(fixture.inputs(), &mut tape).expect("valid");
    assert_eq!(tape.slots(), Some(2));
    call(fixture.inputs().cancel(&STOP), &mut tape).expect_err("cancelled");
    assert_eq!((tape.slots(), tape.bytes()), (None, 0));
}

#[test]
fn shapes_are_named() {
    let data: &'static [f32] = &[0.5; 1000];
    let some =
        |shape: &[usize]| TensorView::new(&data[..shape.iter().product()], shape).expect("a shape");
    let (o, lse) = (some(&[6, 4, 5]), some(&[4, 6]));
    let (wide, long) = (some(&[6, 4, 6]), some(&[7, 4, 5]));
    let new = OutputGradients::new;
    refused("o: ", &["[6, 4, 6]", "[6, 4, 5]"], |a| a.outputs = new(wide, lse, o));
    refused("lse: ", &["[6, 4]", "[4, 6]"], |a| a.outputs = new(o, some(&[6, 4]), o));
    refused("d_o: ", &["[7, 4, 5]", "[6, 4, 5]"], |a| a.outputs = new(o, lse, long));
    refused("a_dot: ", &["[7, 4, 5]", "[6, 4, 5]"], |a| a.outputs = a.outputs.a_dot(long, o));
    refused("d_a_dot: ", &["[6, 4, 6]", "[6, 4, 5]"], |a| a.outputs = a.outputs.a_dot(o, wide));
    refused("d_a_mem: ", &["[6, 4, 6]", "[6, 4, 5]"], |a| a.outputs = a.outputs.a_mem(wide));
    refused("d_lse: ", &["[4, 5]", "[4, 6]"], |a| a.outputs = a.outputs.lse(some(&[4, 5])));
    refused("q: ", &["[6, 2, 6]", "[6, 4, 6]"], |a| a.inputs.q = some(&[6, 2, 6]));
    refused("k: ", &["[6, 4, 6]", "[6, 2, 6]"], |a| a.inputs.k = wide);
    refused("v: ", &["[6, 2, 6]", "[6, 2, 5]"], |a| a.inputs.v = some(&[6, 2, 6]));
    refused("gate: ", &["3", "4"], |a| a.gate = &[0.0; 3]);
    refused("cu_seqlens[2]: ", &["5", "6"], |a| a.inputs = a.inputs.cu_seqlens(&[0, 3, 5]));
}

/// As [`refused`], for gradients of the given shapes.
#[track_caller]
fn refused_gradients(argument: &str, words: &[&str], shapes: [&[usize]; 3], gates: usize) {
    let mut data = [(); 3].map(|()| vec![0.5f32; 1000]);
    let mut gate = vec![0.5; gates];
    let [q, k, v] = &mut data;
    for (data, shape) in [&mut *q, &mut *k, &mut *v].into_iter().zip(shapes) {
        data.truncate(shape.iter().product());
    }
    let new = TensorViewMut::new;
    let into = InputGradients::new(
        new(q, shapes[0]).expect("a shape"),
        new(k, shapes[1]).expect("a shape"),
        new(v, shapes[2]).expect("a shape"),
        &mut gate,
    );
    let (p, stream, lead, cu) = small();
    let mut fixture = Fixture::new(&p, &lead, &stream, &cu);
    let before = format!("{:?}", fixture.gradient);
    let inputs = fixture.inputs();
    let (out, up) = (&fixture.out, &fixture.up);
    let lse = out.lse.as_ref().expect("asked for").view();
    let outputs = OutputGradients::new(out.o.view(), lse, up.o.view());
    let (gate_in, tape) = (&fixture.gate, &fixture.tape);
    let result =
        prefill_backward(&p, &inputs, gate_in, tape, &outputs, &mut fixture.gradient, into);
    let error = result.expect_err("refused").to_string();
    assert!(error.starts_with(argument), "{error:?} does not begin with {argument:?}");
    assert!(words.iter().all(|word| error.contains(word)), "{error:?}");
    assert_eq!(format!("{:?}", fixture.gradient), before);
    assert!(data.iter().flatten().chain(&gate).all(|x| *x == 0.5), "{argument}: written");
}

#[test]
fn shapes_of_gradients_are_named() {
    let (q, k, v): (&[usize], &[usize], &[usize]) = (&[6, 4, 6], &[6, 2, 6], &[6, 2, 5]);
    refused_gradients("dq: ", &["[6, 4, 5]", "[6, 4, 6]"], [&[6, 4, 5], k, v], 4);
    refused_gradients("dk: ", &["[6, 4, 6]", "[6, 2, 6]"], [q, q, v], 4);
    refused_gradients("dv: ", &["[5, 2, 5]", "[6, 2, 5]"], [q, k, &[5, 2, 5]], 4);
    refused_gradients("d_gate: ", &["3", "4"], [q, k, v], 3);
}

#[test]
fn element_types_are_named() {
    let (p, stream, lead, cu) = small();
    let half = p.to_builder().dtype(DType::F16).build().expect("valid");
    let mut fixture = Fixture::new(&p, &lead, &stream, &cu);
    let tape = Tape::of(&State::new(&half, 2).expect("a state")).expect("a tape");
    let mut gradient = StateGradient::new(&half, 2).expect("a gradient");
    let before = fixture.into.bits();
    let inputs = fixture.inputs();
    let (out, up, into) = (&fixture.out, &fixture.up, &mut fixture.into);
    let lse = out.lse.as_ref().expect("asked for").view();
    let outputs = OutputGradients::new(out.o.view(), lse, up.o.view());
    let (q, k, v) = (into.q.view_mut(), into.k.view_mut(), into.v.view_mut());
    let gradients = InputGradients::new(q, k, v, &mut into.gate);
    let gate = &fixture.gate;
    let error = prefill_backward(&half, &inputs, gate, &tape, &outputs, &mut gradient, gradients);
    let error = error.expect_err("refused").to_string();
    assert!(error.starts_with("q: dtype f32 given, f16"), "{error}");
    assert_eq!(fixture.into.bits(), before);
}

#[test]
fn tapes_and_state_gradients_of_others_are_refused() {
    let (p, stream, lead, whole) = small();
    let other = p.to_builder().segment_len(5).build().expect("valid");
    let tape = |p, slots| Tape::of(&State::new(p, slots).expect("a state")).expect("a tape");
    refused("tape: ", &["no call"], |a| a.tape = Box::leak(Box::new(Tape::new())));
    refused("state: ", &["5", "4"], |a| a.tape = Box::leak(Box::new(tape(&other, 2))));
    refused("state: ", &["3", "2"], |a| a.tape = Box::leak(Box::new(tape(&p, 3))));
    // Filled by a call on one of the slots only, or on other tokens.
    let mut state = State::new(&p, 2).expect("a state");
    let mut out = OutputBuffers::<f32>::new(&lead, 4, 5, Arrangement::Contiguous, Asked::NONE);
    for (slots, cu) in [(&[1][..], &[0, 6][..]), (&[0, 1], &[0, 1, 6])] {
        let mut tape = Tape::every(1).expect("a tape");
        let fixture = Fixture::new(&p, &lead, &stream, &whole);
        let inputs = fixture.inputs().cu_seqlens(cu).slots(slots);
        let views = out.views().tape(&mut tape);
        prefill(&p, &inputs, &fixture.gate, &mut state, views).expect("a valid call");
        refused("tape: ", &["one of a call on", "3 in slot 0, 3 in slot 1"], |a| {
            a.tape = Box::leak(Box::new(tape))
        });
    }
    let gradient =
        |p: &Problem, slots| Box::leak(Box::new(StateGradient::new(p, slots).expect("one")));
    refused("state: ", &["5", "4"], |a| a.gradient = gradient(&other, 2));
    refused("state gradient: ", &["3", "2"], |a| a.gradient = gradient(&p, 3));
    refused("bptt_segments: ", &["0", "at least 1"], |a| a.bptt_segments = Some(0));
    assert!(Tape::every(0).is_err());
}
