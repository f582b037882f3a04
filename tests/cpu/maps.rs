//! The delta rule as affine maps of token runs, against the float64 reference of the whole stream.

use crate::common::metric::relative_rms;
use crate::common::model::{Entry, run_entry, slot_values};
use crate::common::stream::Stream;
use half::bf16;
use infini_attn::{
    DType, Element, Error, KeySums, Problem, SegmentMap, State, TensorView, Update, apply, compose,
    flush, key_sums, reference, segment_map,
};
use proptest::prelude::*;

const TOLERANCE: f64 = 1e-5;

fn problem(update: Update, n: usize, dtype: DType) -> Problem {
    let b = Problem::builder().heads(4).kv_heads(2).key_dim(12).value_dim(7).segment_len(n);
    b.update(update).dtype(dtype).build().unwrap()
}

fn views<T: Element>(s: &Stream<T>) -> [TensorView<'_, T>; 2] {
    let inputs = s.inputs();
    [inputs.k, inputs.v]
}

/// Key sums and map of a run that finds `before`; and what the next run finds.
fn run_map<T: Element>(s: &Stream<T>, before: &KeySums) -> (SegmentMap, KeySums) {
    let [k, v] = views(s);
    let map = segment_map(&s.problem, k, v, before).unwrap();
    (map, before.add(&key_sums(&s.problem, k).unwrap()).unwrap())
}

/// The reference after `runs`, each flushed at its end: (M, z).
fn expected<T: Element>(p: &Problem, runs: &[Stream<T>]) -> (Vec<f64>, Vec<f64>) {
    let mut state = reference::State::new(p, 1).unwrap();
    for run in runs {
        reference::prefill(p, &run.inputs(), &[0.0; 4], &mut state).unwrap();
        state.flush(p, &[0]).unwrap();
    }
    (state.m, state.z)
}

fn check_state(state: &State, (m, z): &(Vec<f64>, Vec<f64>), tolerance: f64) {
    let got = [slot_values(&state.memory(), 0), slot_values(&state.normalizer(), 0)];
    relative_rms("M", &got[0], m, &[2, 12, 7], tolerance).unwrap();
    relative_rms("z", &got[1], z, &[2, 12], tolerance).unwrap();
}

fn flushed<T: Element>(run: &Stream<T>) -> State {
    let mut state = State::new(&run.problem, 1).unwrap();
    run_entry(Entry::Prefill, run.tokens, &run.inputs(), &[0.0; 4], &mut state);
    flush(&run.problem, &mut state, &[0]).unwrap();
    state
}

fn check_runs<T: Element>(update: Update, n: usize, lens: [usize; 4], seed: u64) {
    let p = problem(update, n, T::DTYPE);
    let runs = [0, 1, 2, 3].map(|i| Stream::<T>::normal(&p, lens[i], seed + i as u64));
    // The first run is prefilled, the others become maps that continue from the state.
    let start = flushed(&runs[0]);
    let (first, found) = run_map(&runs[1], &KeySums::from_state(&start).unwrap());
    let (second, found) = run_map(&runs[2], &found);
    let (third, end) = run_map(&runs[3], &found);
    let want = expected(&p, &runs);
    assert_eq!(end.tokens(), [lens.iter().sum::<usize>() as u64]);

    let mut one_by_one = start.clone();
    for map in [&first, &second, &third] {
        apply(map, &mut one_by_one).unwrap();
    }
    check_state(&one_by_one, &want, TOLERANCE);
    assert_eq!((one_by_one.tokens(0), one_by_one.committed(0)), (end.tokens()[0], end.tokens()[0]));

    let left = compose(&compose(&first, &second).unwrap(), &third).unwrap();
    let right = compose(&first, &compose(&second, &third).unwrap()).unwrap();
    for map in [left, right] {
        let mut at_once = start.clone();
        apply(&map, &mut at_once).unwrap();
        check_state(&at_once, &want, TOLERANCE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    /// Runs of any length, whole segments or not, equal the stream flushed at their ends.
    #[test]
    fn runs_compose_to_the_whole_stream(
        linear: bool,
        half: bool,
        n in 1usize..20,
        // Comparable lengths: a segment far longer than all before it over-subtracts, eq. (9).
        lens in [20usize..40, 1..40, 0..30, 1..40],
        seed in 0u64..1000,
    ) {
        let update = if linear { Update::Linear } else { Update::Delta };
        if half { check_runs::<bf16>(update, n, lens, seed) } else { check_runs::<f32>(update, n, lens, seed) }
    }
}

#[test]
fn the_first_run_finds_an_empty_memory() {
    let p = problem(Update::Delta, 16, DType::F32);
    let run = Stream::<f32>::normal(&p, 50, 1);
    let (map, _) = run_map(&run, &KeySums::zero(&p, 1).unwrap());
    let mut state = State::new(&p, 1).unwrap();
    apply(&map, &mut state).unwrap();
    check_state(&state, &expected(&p, &[run]), TOLERANCE);
}

#[test]
fn the_linear_rule_has_the_identity() {
    let p = problem(Update::Linear, 8, DType::F32);
    let run = Stream::<f32>::normal(&p, 40, 2);
    let (map, _) = run_map(&run, &KeySums::from_state(&flushed(&run)).unwrap());
    for (i, j) in (0..12).flat_map(|i| (0..12).map(move |j| (i, j))) {
        let want = if i == j { 1.0 } else { 0.0 };
        approx::assert_relative_eq!(map.a().at(&[0, 1, i, j]), want);
    }
    assert_eq!(
        (map.tokens(), map.b().shape(), map.dz().shape()),
        (&[40][..], &[1, 2, 12, 7][..], &[1, 2, 12][..])
    );
}

/// G = I − A of one segment maps the z it finds to its own Δz.
#[test]
fn g_maps_z_to_its_increment() {
    let p = problem(Update::Delta, 32, DType::F32);
    let (old, run) = (Stream::<f32>::normal(&p, 64, 3), Stream::<f32>::normal(&p, 32, 4));
    let before = KeySums::from_state(&flushed(&old)).unwrap();
    let (map, _) = run_map(&run, &before);
    for h in 0..2 {
        for i in 0..12 {
            let z = |j: usize| before.sums().at(&[0, h, j]);
            let az: f32 = (0..12).map(|j| map.a().at(&[0, h, i, j]) * z(j)).sum();
            approx::assert_relative_eq!(z(i) - az, map.dz().at(&[0, h, i]), max_relative = 1e-4);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_changes() {
    let p = problem(Update::Delta, 16, DType::F32);
    let run = Stream::<f32>::normal(&p, 32, 5);
    let [k, v] = views(&run);
    let state = flushed(&run);
    let (next, _) = run_map(&run, &KeySums::from_state(&state).unwrap());
    let (first, _) = run_map(&run, &KeySums::zero(&p, 1).unwrap());
    let untouched = |map: &SegmentMap, state: &State| {
        let mut after = state.clone();
        let error = apply(map, &mut after).unwrap_err();
        assert_eq!(after.to_bytes().unwrap(), state.to_bytes().unwrap());
        error
    };
    let error = untouched(&first, &state);
    assert!(matches!(&error, Error::Value { .. }), "{error}");
    assert!(error.to_string().contains("0 earlier tokens"), "{error}");
    assert!(matches!(compose(&first, &first), Err(Error::Value { .. })));
    assert!(compose(&first, &next).is_ok());
    assert!(matches!(untouched(&next, &State::new(&p, 2).unwrap()), Error::Length { .. }));

    let mut open = state.clone();
    run_entry(Entry::Prefill, 3, &run.slice(0..3).inputs(), &[0.0; 4], &mut open);
    let error = untouched(&next, &open);
    assert!(matches!(error, Error::OpenSegment { slot: 0, open_len: 3, .. }), "{error}");

    let other = problem(Update::Delta, 8, DType::F32);
    let wrong = untouched(&next, &State::new(&other, 1).unwrap());
    assert!(matches!(wrong, Error::Problem { field: "segment_len", .. }), "{wrong}");
    let zero = KeySums::zero(&other, 1).unwrap();
    assert!(matches!(segment_map(&p, k, v, &zero), Err(Error::Problem { .. })));
    let two = KeySums::zero(&p, 2).unwrap();
    assert!(matches!(segment_map(&p, k, v, &two), Err(Error::Length { argument: "before", .. })));
    assert!(matches!(two.add(&KeySums::zero(&p, 1).unwrap()), Err(Error::Length { .. })));

    let short = run.slice(0..31);
    let (short, before) = (views(&short)[1], KeySums::zero(&p, 1).unwrap());
    assert!(matches!(segment_map(&p, k, short, &before), Err(Error::Shape { argument: "v", .. })));
    assert!(matches!(key_sums(&p, v), Err(Error::Shape { argument: "k", .. })));
    let half = Stream::<bf16>::normal(&p, 4, 6);
    assert!(matches!(key_sums(&p, views(&half)[0]), Err(Error::DType { argument: "k", .. })));
}

#[test]
fn sums_and_maps_are_put_together_from_their_parts() {
    let p = problem(Update::Delta, 8, DType::F32);
    let [run, earlier] = [20, 9].map(|len| Stream::<f32>::normal(&p, len, len as u64));
    let found = key_sums(&p, views(&earlier)[0]).unwrap();
    let (map, _) = run_map(&run, &found);
    let elements = |view: TensorView<'_, f32>| view.as_slice().unwrap().to_vec();
    let (a, b, dz) = (elements(map.a()), elements(map.b()), elements(map.dz()));
    let sums = |dz: &[f32], tokens: &[u64]| KeySums::from_parts(&p, dz, tokens);

    assert_eq!(sums(&elements(found.sums()), found.tokens()).unwrap(), found);
    let own = sums(&dz, map.tokens()).unwrap();
    assert_eq!((map.before(), map.run_sums(), map.problem()), (&found, &own, &p));
    assert_eq!(SegmentMap::from_parts(&found, &own, &a, &b).unwrap(), map);

    let fails =
        |error: Error, words: &str| assert!(error.to_string().starts_with(words), "{error}");
    fails(sums(&dz[1..], &[20]).unwrap_err(), "sums: 23 elements given");
    fails(sums(&dz, &[0]).unwrap_err(), "tokens[0]: 0 given, at least 1");
    fails(
        sums(&dz, &[(1 << 62) + 1]).unwrap_err(),
        "tokens[0]: 4611686018427387905 tokens after 0",
    );
    let put = |own: &KeySums, a: &[f32], b: &[f32]| SegmentMap::from_parts(&found, own, a, b);
    fails(put(&own, &a[1..], &b).unwrap_err(), "a: 287 elements given");
    fails(put(&own, &a, &b[1..]).unwrap_err(), "b: 167 elements given");
    fails(put(&KeySums::zero(&p, 2).unwrap(), &a, &b).unwrap_err(), "run: 2 elements given, 1");
    fails(put(&sums(&dz, &[1 << 62]).unwrap(), &a, &b).unwrap_err(), "run (sequence 0)");
    let other = KeySums::zero(&problem(Update::Delta, 9, DType::F32), 1).unwrap();
    fails(put(&other, &a, &b).unwrap_err(), "state: made for segment_len = 9, the call has");
}
