//! A state in memory of the caller's is the same as one that owns its memory, to the bit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::model::{Entry, run_entry};
use crate::common::stream::{Stream, rope_tables};
use infini_attn::{
    DType, Denominator, EmptyMemory, Error, HostLayout, Inputs, Outputs, Problem, Rope, State,
    StateViewMut, TensorView, TensorViewMut, Update, flush, forward,
};
use proptest::prelude::*;

const N: usize = 6;
const SLOTS: usize = 3;
const GATE: [f32; 4] = [0.3, -0.4, 0.1, 0.2];
const ROWS: usize = 1 << 10;

fn problem(update: Update) -> Problem {
    let builder = Problem::builder().heads(4).kv_heads(2).key_dim(8).value_dim(4);
    builder.segment_len(N).update(update).build().expect("valid")
}

/// Zeros for a layout, at a multiple of 8.
fn memory(layout: &HostLayout) -> Vec<u64> {
    vec![0; layout.bytes() as usize / 8]
}

fn view<'a>(layout: &HostLayout, memory: &'a mut [u64]) -> StateViewMut<'a> {
    StateViewMut::new(layout, bytemuck::cast_slice_mut(memory)).expect("a state")
}

#[derive(Clone, Debug)]
enum Step {
    Tokens(usize, Vec<usize>, u64),
    Flush(usize),
    Reset(usize),
    Truncate(usize, u64),
    Copy(usize, usize),
    Import(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let slot = || 0..SLOTS;
    let tokens = |most| {
        let slots = Just((0..SLOTS).collect::<Vec<_>>()).prop_shuffle();
        (0..most, slots, 1..=SLOTS, any::<u64>()).prop_map(|(n, mut slots, count, seed)| {
            slots.truncate(count);
            Step::Tokens(n, slots, seed % 1000)
        })
    };
    let step = prop_oneof![
        6 => tokens(3),
        3 => tokens(4 * N),
        1 => slot().prop_map(Step::Flush),
        1 => slot().prop_map(Step::Reset),
        1 => (slot(), 0..3u64).prop_map(|(slot, n)| Step::Truncate(slot, n)),
        1 => (slot(), slot()).prop_map(|(from, to)| Step::Copy(from, to)),
        1 => slot().prop_map(Step::Import),
    ];
    prop::collection::vec(step, 1..40)
}

/// Outputs of a call of `n` tokens in each of the slots, by either state.
fn call(
    p: &Problem,
    (n, slots, seed): (usize, &[usize], u64),
    rotated: bool,
    run: impl FnOnce(&Inputs<'_, f32>, Outputs<'_, f32>) -> infini_attn::Result<()>,
) -> (Vec<u32>, Result<(), String>) {
    let stream = Stream::<f32>::normal(p, n * slots.len(), seed);
    let (cos, sin) = rope_tables(ROWS, 8, 1.0);
    let table = |t| TensorView::new(t, &[ROWS, 4]).unwrap();
    let cu: Vec<i32> = (0..=slots.len()).map(|i| (i * n) as i32).collect();
    let total = n * slots.len();
    let flat = |view: TensorView<'_, f32>| view.as_slice().expect("contiguous").to_vec();
    let [q, k, v] = [stream.inputs().q, stream.inputs().k, stream.inputs().v].map(flat);
    let tensor = |x, heads, dim| TensorView::new(x, &[total, heads, dim]).unwrap();
    let mut inputs =
        Inputs::new(tensor(&q, 4, 8), tensor(&k, 2, 8), tensor(&v, 2, 4)).cu_seqlens(&cu);
    inputs = inputs.slots(slots);
    if rotated {
        inputs = inputs.rope(Rope::new(table(&cos), table(&sin)));
    }
    let (mut o, mut lse) = (vec![0.0; total * 16], vec![0.0; total * 4]);
    let outputs = Outputs::new(TensorViewMut::new(&mut o, &[total, 4, 4]).unwrap())
        .lse(TensorViewMut::new(&mut lse, &[4, total]).unwrap());
    let result = run(&inputs, outputs).map_err(|e| e.to_string());
    (o.iter().chain(&lse).map(|x| x.to_bits()).collect(), result)
}

fn apply(
    step: &Step,
    own: &mut State,
    lent: &mut StateViewMut<'_>,
    rotated: bool,
) -> [(Vec<u32>, Result<(), String>); 2] {
    let p = *own.problem();
    let quiet = |result: infini_attn::Result<()>| (vec![], result.map_err(|e| e.to_string()));
    match step {
        Step::Tokens(n, slots, seed) => {
            let what = (*n, &slots[..], *seed);
            [
                call(&p, what, rotated, |i, o| forward(&p, i, &GATE, own, o)),
                call(&p, what, rotated, |i, o| lent.forward(&p, i, &GATE, o)),
            ]
        }
        &Step::Flush(slot) => [quiet(flush(&p, own, &[slot])), quiet(lent.flush(&[slot]))],
        &Step::Reset(slot) => [quiet(own.reset(&[slot])), quiet(lent.reset(&[slot]))],
        &Step::Truncate(slot, n) => {
            let tokens = own.tokens(slot).saturating_sub(n);
            [quiet(own.truncate(slot, tokens)), quiet(lent.truncate(slot, tokens))]
        }
        &Step::Copy(from, to) => {
            let pairs = [(from, to)];
            [quiet(own.copy_within(&pairs)), quiet(lent.copy_within(&pairs))]
        }
        &Step::Import(slot) => {
            let from = own.fork(&[slot]).unwrap();
            let pairs = [(0, (slot + 1) % SLOTS)];
            [quiet(own.copy_slots(&from, &pairs)), quiet(lent.copy_slots(&from, &pairs))]
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Every call begins with what the one before has left in memory.
    #[test]
    fn histories_are_those_of_a_state_that_owns_its_memory(
        steps in steps(), delta: bool, rotated: bool
    ) {
        let p = problem(if delta { Update::Delta } else { Update::Linear });
        let layout = HostLayout::new(&p, SLOTS, rotated).unwrap();
        let (mut own, mut memory) = (State::new(&p, SLOTS).unwrap(), memory(&layout));
        for step in steps {
            let before = memory.clone();
            let mut lent = view(&layout, &mut memory);
            let [a, b] = apply(&step, &mut own, &mut lent, rotated);
            prop_assert_eq!(&a, &b, "{:?}", step);
            prop_assert_eq!(own.to_bytes().unwrap(), lent.state().to_bytes().unwrap());
            if a.1.is_err() {
                prop_assert_eq!(&before, &memory, "{:?}", step);
            }
        }
    }

    #[test]
    fn text_of_a_problem(heads in 1..4usize, group in 1..4usize, dk in 1..300usize, eps in 1e-9..1f32,
                         which in 0..3usize, scale in -2.0..2f64) {
        let p = Problem::builder().heads(heads * group).kv_heads(heads).key_dim(dk).value_dim(7);
        let denominator = [Denominator::Exact, Denominator::Clamp(eps), Denominator::Add(eps)][which];
        let p = p.denominator(denominator).scale(scale).dtype(DType::BF16);
        let p = p.empty_memory(EmptyMemory::Bypass).build().unwrap();
        prop_assert_eq!(p.to_string().parse::<Problem>().unwrap(), p);
    }
}

#[test]
fn a_text_without_a_field_or_with_a_bad_one_is_refused() {
    let text = problem(Update::Delta).to_string();
    let error = |text: &str| text.parse::<Problem>().unwrap_err().to_string();
    assert_eq!(error("heads=4"), "kv_heads: nothing given, a value expected");
    let bad = text.replace("segment_len=6", "segment_len=six");
    assert_eq!(error(&bad), "segment_len: six given, a valid value expected");
}

#[test]
fn copies_of_a_view_s_state_are_in_memory_of_their_own() {
    let p = problem(Update::Delta);
    let layout = HostLayout::new(&p, SLOTS, false).unwrap();
    let mut memory = memory(&layout);
    let mut lent = view(&layout, &mut memory);
    call(&p, (N + 2, &[1], 5), false, |i, o| lent.forward(&p, i, &GATE, o)).1.unwrap();
    let copies = [lent.state().clone(), lent.state().fork(&[0, 1, 2]).unwrap()];
    memory.fill(!0);
    for copy in copies {
        assert_eq!((copy.tokens(1), copy.committed(1), copy.open_len(1)), (8, 6, 2));
        assert!(copy.memory().as_slice().unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn what_is_no_state_is_refused() {
    let p = problem(Update::Delta);
    let layout = HostLayout::new(&p, SLOTS, false).unwrap();
    let mut memory = memory(&layout);
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut memory);
    let len = bytes.len();
    let error = |bytes: &mut [u8]| StateViewMut::new(&layout, bytes).unwrap_err().to_string();
    let expected = format!("state: {} elements given, {len} bytes expected", len - 8);
    assert_eq!(error(&mut bytes[8..]), expected);
    let mut longer = vec![0u64; len / 8 + 1];
    let shifted = &mut bytemuck::cast_slice_mut(&mut longer)[4..][..len];
    assert!(error(shifted).ends_with("a multiple of 8 expected"), "{}", error(shifted));

    let counters = layout.parts().last().unwrap();
    assert_eq!((counters.name, &counters.shape[..]), ("counters", &[SLOTS, 4][..]));
    let at = counters.offset as usize / 8;
    for (slot, stored, expected) in [
        (1, [-1i64, 0, 0, 0], "tokens[1]: -1 given, at least 0 expected"),
        (0, [3, 4, 0, 0], "committed[0]: 4 given, at most tokens[0] = 3 expected"),
        (2, [9, 0, 6, 0], "open_len[2]: 6 given, less than segment_len = 6 expected"),
        (
            0,
            [3, 0, 3, 1],
            "rotated[0]: 1 given, 0: the state has no room for rotated keys expected",
        ),
        (0, [3, 0, 0, 2], "rotated[0]: 2 given, 0 or 1 expected"),
    ] {
        memory.fill(0);
        memory[at + 4 * slot..][..4].copy_from_slice(&stored.map(|x| x as u64));
        assert_eq!(error(bytemuck::cast_slice_mut(&mut memory)), expected);
    }
}

#[test]
fn rotation_without_room_is_refused_before_anything_is_written() {
    let p = problem(Update::Delta);
    let layout = HostLayout::new(&p, SLOTS, false).unwrap();
    let mut memory = memory(&layout);
    let mut lent = view(&layout, &mut memory);
    let (_, result) = call(&p, (2, &[0], 1), true, |i, o| lent.forward(&p, i, &GATE, o));
    let expected = "rope: a rotation given, a state with room for rotated keys expected";
    assert_eq!(result.unwrap_err(), expected);
    let mut rotated = State::new(&p, 1).unwrap();
    call(&p, (2, &[0], 1), true, |i, o| forward(&p, i, &GATE, &mut rotated, o)).1.unwrap();
    let error = lent.copy_slots(&rotated, &[(0, 1)]).unwrap_err().to_string();
    assert!(error.starts_with("rotated[0]: true given, false: the state has no room"), "{error}");
    assert!(memory.iter().all(|&x| x == 0));
}

/// Prefills a stream, and asks the call to end after a while; how many tokens it took in.
fn cut_short(stream: &Stream<f32>, lent: &mut StateViewMut<'_>, after: Duration) -> usize {
    let (stop, mut out) = (AtomicBool::new(false), vec![0.0; stream.tokens * 16]);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(after);
            stop.store(true, Ordering::Relaxed);
        });
        let out = TensorViewMut::new(&mut out, &[1, stream.tokens, 4, 4]).unwrap();
        let inputs = stream.inputs().cancel(&stop);
        lent.prefill(&problem(Update::Delta), &inputs, &GATE, Outputs::new(out))
    });
    match result {
        Ok(()) => stream.tokens,
        Err(Error::Cancelled { taken }) => taken[0],
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_cancelled_call_has_moved_the_counters_as_far_as_it_came() {
    let p = problem(Update::Delta);
    let layout = HostLayout::new(&p, 1, false).unwrap();
    let stream = Stream::<f32>::normal(&p, 300_000, 3);
    for milliseconds in 1..1000 {
        let mut memory = memory(&layout);
        let mut lent = view(&layout, &mut memory);
        let taken = cut_short(&stream, &mut lent, Duration::from_millis(milliseconds));
        if !(1..stream.tokens).contains(&taken) {
            continue;
        }
        let mut own = State::new(&p, 1).unwrap();
        run_entry(Entry::Prefill, taken, &stream.slice(0..taken).inputs(), &GATE, &mut own);
        let lent = view(&layout, &mut memory);
        assert_eq!(lent.state().to_bytes().unwrap(), own.to_bytes().unwrap());
        return;
    }
    panic!("no call was cut short");
}

#[test]
fn a_state_of_no_slots_lies_anywhere() {
    for rotation in [false, true] {
        let layout = HostLayout::new(&problem(Update::Delta), 0, rotation).unwrap();
        let state = StateViewMut::new(&layout, &mut []).unwrap();
        assert_eq!(state.state().sequences(), 0);
    }
}

#[test]
fn layouts_cover_their_bytes_in_order() {
    for (slots, rotation) in [(0, true), (1, false), (3, true), (64, false)] {
        let p = problem(Update::Delta);
        let layout = HostLayout::new(&p, slots, rotation).unwrap();
        let mut at = 0;
        for part in layout.parts() {
            assert_eq!(part.offset, at, "{}", part.name);
            at += part.bytes().next_multiple_of(256);
        }
        assert_eq!(at, layout.bytes());
        assert_eq!(layout.parts().len(), 5 + usize::from(rotation));
    }
    let error = HostLayout::new(&problem(Update::Delta), usize::MAX, true).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
}
