//! Merging partial attentions and memories, against the float64 reference.

use half::{bf16, f16};
use infini_attn::{
    DType, Element, Error, Inputs, Outputs, Problem, State, TensorView, TensorViewMut, Update,
    flush, merge_memories, merge_partials, prefill, reference,
};
use proptest::prelude::*;

use crate::common::metric::assert_close;
use crate::common::stream::uniforms;
use crate::common::{narrow, widen};

fn rounded(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

const DK: usize = 6;
const DV: usize = 5;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;

fn problem(update: Update, segment_len: usize, dtype: DType) -> Problem {
    let b = Problem::builder().heads(HEADS).kv_heads(KV_HEADS).key_dim(DK).value_dim(DV);
    b.segment_len(segment_len).update(update).dtype(dtype).build().unwrap()
}

/// Keys and values of one segment, [tokens, Hkv, D], large enough that the softmax is not flat.
struct Keys {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Keys {
    fn new(seed: u64, tokens: usize) -> Self {
        let k = uniforms(seed, tokens * KV_HEADS * DK).iter().map(|x| 4.0 * x).collect();
        Self { k, v: uniforms(seed + 1, tokens * KV_HEADS * DV) }
    }

    /// Local attention of one query row [Hq, Dk] over the keys `range`, by the reference: the last
    /// row of a stream of those tokens attends all of them. Returns a_dot [Hq, Dv] and lse [Hq].
    fn attend(&self, q: &[f32], range: std::ops::Range<usize>) -> (Vec<f64>, Vec<f64>) {
        let n = range.len();
        if n == 0 {
            // Nothing attended: what the row holds must not matter.
            return (vec![f64::NAN; HEADS * DV], vec![f64::NEG_INFINITY; HEADS]);
        }
        let p = problem(Update::Linear, 1000, DType::F32);
        let (k, v) = (KV_HEADS * DK, KV_HEADS * DV);
        let q = q.repeat(n);
        let inputs = Inputs::new(
            TensorView::new(&q, &[1, n, HEADS, DK]).unwrap(),
            TensorView::new(&self.k[range.start * k..range.end * k], &[1, n, KV_HEADS, DK])
                .unwrap(),
            TensorView::new(&self.v[range.start * v..range.end * v], &[1, n, KV_HEADS, DV])
                .unwrap(),
        );
        let mut state = reference::State::new(&p, 1).unwrap();
        let out = reference::prefill(&p, &inputs, &[0.0; HEADS], &mut state).unwrap();
        let lse = (0..HEADS).map(|h| out.lse[h * n + n - 1]).collect();
        (out.a_dot[(n - 1) * HEADS * DV..].to_vec(), lse)
    }
}

/// Partial attentions of `rows` query rows: a_dot [rows, Hq, Dv], lse [Hq, rows].
#[derive(Clone)]
struct Partial {
    a_dot: Vec<f64>,
    lse: Vec<f64>,
}

impl Partial {
    fn new(keys: &Keys, q: &[f32], ranges: &[std::ops::Range<usize>]) -> Self {
        let rows = ranges.len();
        let mut partial = Self { a_dot: vec![], lse: vec![0.0; HEADS * rows] };
        for (r, (range, q)) in ranges.iter().zip(q.chunks_exact(HEADS * DK)).enumerate() {
            let (a_dot, lse) = keys.attend(q, range.clone());
            partial.a_dot.extend(a_dot);
            lse.iter().enumerate().for_each(|(h, &lse)| partial.lse[h * rows + r] = lse);
        }
        partial
    }
}

/// Merges packed partials and returns out and out_lse.
fn merge<T: Element>(parts: &[Partial]) -> (Vec<f64>, Vec<f64>) {
    let rows = parts[0].lse.len() / HEADS;
    let a_dot: Vec<Vec<T>> = parts.iter().map(|p| narrow(&rounded(&p.a_dot))).collect();
    let lse: Vec<Vec<f32>> = parts.iter().map(|p| rounded(&p.lse)).collect();
    let a_dot: Vec<_> =
        a_dot.iter().map(|a| TensorView::new(a, &[rows, HEADS, DV]).unwrap()).collect();
    let lse: Vec<_> = lse.iter().map(|l| TensorView::new(l, &[HEADS, rows]).unwrap()).collect();
    let (mut out, mut out_lse) = (vec![T::zeroed(); rows * HEADS * DV], vec![0.0; HEADS * rows]);
    merge_partials(
        &a_dot,
        &lse,
        TensorViewMut::new(&mut out, &[rows, HEADS, DV]).unwrap(),
        Some(TensorViewMut::new(&mut out_lse, &[HEADS, rows]).unwrap()),
    )
    .unwrap();
    (widen(&out), widen(&out_lse))
}

/// Query rows, their keys cut in three (some parts empty), and the whole.
fn split() -> ([Partial; 3], Partial) {
    let rows = 7;
    let keys = Keys::new(1, 40);
    let q = uniforms(3, rows * HEADS * DK);
    let cuts = [(10, 30), (0, 20), (20, 20), (20, 40), (0, 40), (1, 2), (39, 39)];
    let part = |f: &dyn Fn((usize, usize)) -> std::ops::Range<usize>| {
        Partial::new(&keys, &q, &cuts.map(f))
    };
    let parts = [part(&|(a, _)| 0..a), part(&|(a, b)| a..b), part(&|(_, b)| b..40)];
    (parts, part(&|_| 0..40))
}

#[test]
fn parts_of_a_segment_merge_into_the_whole() {
    fn check<T: Element>(limit: f64) {
        let (parts, whole) = split();
        for order in [[0, 1, 2], [2, 0, 1]] {
            let (out, lse) = merge::<T>(&order.map(|i| parts[i].clone()));
            assert_close("out", &out, &whole.a_dot, limit);
            assert_close("lse", &lse, &whole.lse, 1e-6);
        }
    }
    check::<f32>(1e-6);
    check::<f16>(1e-3);
    check::<bf16>(4e-3);
}

#[test]
fn two_parts_can_be_merged_before_the_third() {
    let ([a, b, c], whole) = split();
    let (a_dot, lse) = merge::<f32>(&[a, b]);
    let (out, lse) = merge::<f32>(&[Partial { a_dot, lse }, c]);
    assert_close("out", &out, &whole.a_dot, 1e-6);
    assert_close("lse", &lse, &whole.lse, 1e-6);
}

#[test]
fn outputs_of_prefill_merge_with_earlier_keys() {
    // The second half of a segment, computed as a stream of its own, merged with what its queries
    // attend in the first half.
    let (n, half) = (24, 11);
    let p = problem(Update::Delta, 100, DType::F32);
    let keys = Keys::new(5, n);
    let q = uniforms(7, n * HEADS * DK);
    let rows = n - half;
    let (k, v) = (&keys.k[half * KV_HEADS * DK..], &keys.v[half * KV_HEADS * DV..]);
    let inputs = Inputs::new(
        TensorView::new(&q[half * HEADS * DK..], &[1, rows, HEADS, DK]).unwrap(),
        TensorView::new(k, &[1, rows, KV_HEADS, DK]).unwrap(),
        TensorView::new(v, &[1, rows, KV_HEADS, DV]).unwrap(),
    );
    let (mut o, mut a_dot) = (vec![0.0f32; rows * HEADS * DV], vec![0.0f32; rows * HEADS * DV]);
    let mut lse = vec![0.0f32; HEADS * rows];
    let shape = [1, rows, HEADS, DV];
    let outputs = Outputs::new(TensorViewMut::new(&mut o, &shape).unwrap())
        .a_dot(TensorViewMut::new(&mut a_dot, &shape).unwrap())
        .lse(TensorViewMut::new(&mut lse, &[1, HEADS, rows]).unwrap());
    prefill(&p, &inputs, &[0.5; HEADS], &mut State::new(&p, 1).unwrap(), outputs).unwrap();

    let late = Partial { a_dot: widen(&a_dot), lse: widen(&lse) };
    let q = &q[half * HEADS * DK..];
    let early = Partial::new(&keys, q, &vec![0..half; rows]);
    let whole = Partial::new(&keys, q, &(half..n).map(|t| 0..t + 1).collect::<Vec<_>>());
    let (out, lse) = merge::<f32>(&[early, late]);
    assert_close("out", &out, &whole.a_dot, 1e-5);
    assert_close("lse", &lse, &whole.lse, 1e-5);
}

#[test]
fn strides_and_batches_are_free() {
    // Rows [B, T] = [2, 3] of `split`, a_dot stored [B, H, T, D], lse with gaps between its rows,
    // the output with gaps between its tokens.
    let (parts, _) = split();
    let (b, t) = (2, 3);
    let rows = parts[0].lse.len() / HEADS;
    let cut = |p: &Partial| {
        let mut a_dot = vec![0.0f32; b * HEADS * t * DV];
        let mut lse = vec![f32::NAN; b * HEADS * (t + 2)];
        for (i, j, h) in (0..b * t * HEADS).map(|i| (i / HEADS / t, i / HEADS % t, i % HEADS)) {
            let row = i * t + j;
            for c in 0..DV {
                let from = p.a_dot[(row * HEADS + h) * DV + c];
                a_dot[((i * HEADS + h) * t + j) * DV + c] = from as f32;
            }
            lse[(i * HEADS + h) * (t + 2) + j + 1] = p.lse[h * rows + row] as f32;
        }
        (a_dot, lse)
    };
    let data: Vec<_> = parts.iter().map(cut).collect();
    let (hd, td) = ((t * DV) as i64, DV as i64);
    let a_dot: Vec<_> = (data.iter())
        .map(|(a, _)| {
            let strides = [HEADS as i64 * hd, td, hd, 1];
            TensorView::strided(a, 0, &[b, t, HEADS, DV], &strides).unwrap()
        })
        .collect();
    let lse_strides = [(HEADS * (t + 2)) as i64, (t + 2) as i64, 1];
    let lse: Vec<_> = (data.iter())
        .map(|(_, l)| TensorView::strided(l, 1, &[b, HEADS, t], &lse_strides).unwrap())
        .collect();
    let token = HEADS * DV + 3;
    let (mut out, mut out_lse) = (vec![7.0f32; b * t * token], vec![7.0f32; data[0].1.len()]);
    let out_strides = [(t * token) as i64, token as i64, td, 1];
    let view = TensorViewMut::strided(&mut out, 2, &[b, t, HEADS, DV], &out_strides).unwrap();
    let lse_view = TensorViewMut::strided(&mut out_lse, 1, &[b, HEADS, t], &lse_strides).unwrap();
    merge_partials(&a_dot, &lse, view, Some(lse_view)).unwrap();

    let (expected, expected_lse) = merge::<f32>(&parts);
    for (row, got) in out.chunks_exact(token).enumerate() {
        assert_eq!(widen(&got[2..2 + HEADS * DV]), expected[row * HEADS * DV..][..HEADS * DV]);
        assert_eq!((&got[..2], &got[2 + HEADS * DV..]), (&[7.0; 2][..], &[7.0][..]));
    }
    for (i, got) in out_lse.chunks_exact(t + 2).enumerate() {
        let first = i % HEADS * rows + i / HEADS * t;
        assert_eq!(widen(&got[1..1 + t]), expected_lse[first..][..t]);
        assert_eq!((got[0], got[t + 1]), (7.0, 7.0));
    }
}

#[test]
fn one_part_passes_through_unchanged() {
    let (parts, whole) = split();
    let (out, lse) = merge::<f32>(std::slice::from_ref(&whole));
    assert_eq!(out, widen(&rounded(&whole.a_dot)));
    assert_eq!(lse, widen(&rounded(&whole.lse)));
    // Row 3 of the second part attends everything from 20 on, the third part nothing.
    let (out, _) = merge::<f32>(&[parts[2].clone(), parts[1].clone()]);
    let row = 3 * HEADS * DV;
    assert_eq!(out[row..][..HEADS * DV], widen(&rounded(&parts[1].a_dot))[row..][..HEADS * DV]);
}

/// Merges parts of one row and one head of width 2.
fn merge_one(parts: &[([f32; 2], f32)]) -> ([f32; 2], f32) {
    let a_dot: Vec<_> =
        parts.iter().map(|(a, _)| TensorView::new(a, &[1, 1, 1, 2]).unwrap()).collect();
    let lse: Vec<_> = (parts.iter())
        .map(|(_, l)| TensorView::new(std::slice::from_ref(l), &[1, 1, 1]).unwrap())
        .collect();
    let (mut out, mut out_lse) = ([9.0; 2], [9.0]);
    merge_partials(
        &a_dot,
        &lse,
        TensorViewMut::new(&mut out, &[1, 1, 1, 2]).unwrap(),
        Some(TensorViewMut::new(&mut out_lse, &[1, 1, 1]).unwrap()),
    )
    .unwrap();
    (out, out_lse[0])
}

#[test]
fn extreme_rows() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let ln2 = std::f32::consts::LN_2;
    // Nothing attended by any part.
    assert_eq!(merge_one(&[([nan, 1.0], -inf), ([2.0, inf], -inf)]), ([0.0, 0.0], -inf));
    // A part without keys is skipped, whatever it holds.
    assert_eq!(merge_one(&[([nan, inf], -inf), ([2.0, 3.0], -5.0)]), ([2.0, 3.0], -5.0));
    // Logits whose exponentials overflow or underflow.
    for log in [1e4, -1e4, 3e38, -3e38] {
        let (out, lse) = merge_one(&[([1.0, 3.0], log), ([3.0, 5.0], log)]);
        assert_eq!(lse, log + ln2);
        assert!((out[0] - 2.0).abs() < 1e-6 && (out[1] - 4.0).abs() < 1e-6, "{log}: {out:?}");
    }
    assert_eq!(merge_one(&[([1.0, 3.0], 1e4), ([3.0, 5.0], -1e4)]), ([1.0, 3.0], 1e4));
    // NaN is never lost.
    for parts in [[([1.0; 2], nan), ([2.0; 2], 0.0)], [([1.0; 2], -inf), ([2.0; 2], nan)]] {
        let (out, lse) = merge_one(&parts);
        assert!(out.iter().all(|x| x.is_nan()) && lse.is_nan(), "{parts:?}: {out:?} {lse}");
    }
    let (out, lse) = merge_one(&[([nan, 1.0], 0.0), ([2.0, 1.0], 0.0)]);
    assert!(out[0].is_nan() && (out[1] - 1.0).abs() < 1e-6 && lse == ln2, "{out:?} {lse}");
}

proptest! {
    #[test]
    fn the_result_is_a_weighted_mean(
        parts in prop::collection::vec(([-10f32..10.0, -10f32..10.0], -50f32..50.0), 1..9),
    ) {
        let (out, lse) = merge_one(&parts);
        let sum: f64 = parts.iter().map(|(_, l)| f64::from(*l).exp()).sum();
        prop_assert!((f64::from(lse) - sum.ln()).abs() < 1e-5);
        for c in 0..2 {
            let mean: f64 =
                parts.iter().map(|(a, l)| f64::from(*l).exp() / sum * f64::from(a[c])).sum();
            prop_assert!((f64::from(out[c]) - mean).abs() < 1e-4, "{} for {}", out[c], mean);
        }
    }
}

#[test]
fn partials_are_refused_by_name() {
    let (a, l) = (vec![0.0f32; 2 * 3 * 4 * 6], vec![0.0f32; 2 * 4 * 3]);
    let view = |shape: &[usize]| TensorView::new(&a[..shape.iter().product()], shape).unwrap();
    let log = |shape: &[usize]| TensorView::new(&l[..shape.iter().product()], shape).unwrap();
    let (good, good_log) = (view(&[2, 3, 4, 5]), log(&[2, 4, 3]));
    let gaps = TensorView::strided(&a, 0, &[2, 3, 4, 5], &[1, 2, 6, 24]).unwrap();
    let log_gaps = TensorView::strided(&l, 0, &[2, 4, 3], &[12, 1, 4]).unwrap();
    let refuse = |a_dot: &[TensorView<'_, f32>], lse: &[TensorView<'_, f32>], shape: &[usize]| {
        let mut out = vec![7.0f32; shape.iter().product()];
        let error = merge_partials(a_dot, lse, TensorViewMut::new(&mut out, shape).unwrap(), None)
            .unwrap_err()
            .to_string();
        assert!(out.iter().all(|&x| x == 7.0));
        error
    };
    let shape = [2, 3, 4, 5];
    for (expected, got) in [
        ("a_dot: 0 elements given, at least 1", refuse(&[], &[], &shape)),
        ("lse: 1 elements given, 2", refuse(&[good, good], &[good_log], &shape)),
        ("out: shape [3, 5] given", refuse(&[good], &[good_log], &[3, 5])),
        (
            "a_dot[1]: shape [2, 3, 4, 6] given, [2, 3, 4, 5]",
            refuse(&[good, view(&[2, 3, 4, 6])], &[good_log; 2], &shape),
        ),
        (
            "a_dot[0]: shape [6, 4, 5] given, [2, 3, 4, 5]",
            refuse(&[view(&[6, 4, 5])], &[good_log], &shape),
        ),
        (
            "lse[1]: shape [2, 3, 4] given, [2, 4, 3]",
            refuse(&[good; 2], &[good_log, log(&[2, 3, 4])], &shape),
        ),
        (
            "lse[0]: shape [2, 4, 3] given, [4, 6]",
            refuse(&[view(&[6, 4, 5])], &[good_log], &[6, 4, 5]),
        ),
        ("a_dot[1]: strides [1, 2, 6, 24]", refuse(&[good, gaps], &[good_log; 2], &shape)),
        ("lse[0]: strides [12, 1, 4]", refuse(&[good], &[log_gaps], &shape)),
    ] {
        assert!(got.contains(expected), "{got:?} does not contain {expected:?}");
    }
    let mut out = vec![0.0f32; 120];
    let mut wrong = vec![0.0f32; 24];
    let error = merge_partials(
        &[good],
        &[good_log],
        TensorViewMut::new(&mut out, &shape).unwrap(),
        Some(TensorViewMut::new(&mut wrong, &[2, 3, 4]).unwrap()),
    );
    assert!(matches!(error, Err(Error::Shape { argument: "out_lse", .. })), "{error:?}");
    let empty = TensorView::new(&[0.0f32; 0], &[2, 0, 4, 5]).unwrap();
    let empty_log = TensorView::new(&[0.0f32; 0], &[2, 4, 0]).unwrap();
    let out = TensorViewMut::new(&mut out[..0], &[2, 0, 4, 5]).unwrap();
    assert!(merge_partials(&[empty], &[empty_log], out, None).is_ok());
}

/// Tokens of a run, [sequences, tokens, H, D].
struct Run {
    sequences: usize,
    tokens: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Run {
    fn new(seed: u64, sequences: usize, tokens: usize) -> Self {
        let rows = sequences * tokens;
        Self {
            sequences,
            tokens,
            q: uniforms(seed, rows * HEADS * DK),
            k: uniforms(seed + 1, rows * KV_HEADS * DK),
            v: uniforms(seed + 2, rows * KV_HEADS * DV),
        }
    }

    fn inputs(&self) -> Inputs<'_, f32> {
        let (b, t) = (self.sequences, self.tokens);
        Inputs::new(
            TensorView::new(&self.q, &[b, t, HEADS, DK]).unwrap(),
            TensorView::new(&self.k, &[b, t, KV_HEADS, DK]).unwrap(),
            TensorView::new(&self.v, &[b, t, KV_HEADS, DV]).unwrap(),
        )
    }

    fn prefill(&self, state: &mut State) -> Vec<f64> {
        let p = *state.problem();
        let mut o = vec![0.0f32; self.sequences * self.tokens * HEADS * DV];
        let shape = [self.sequences, self.tokens, HEADS, DV];
        let outputs = Outputs::new(TensorViewMut::new(&mut o, &shape).unwrap());
        prefill(&p, &self.inputs(), &GATE, state, outputs).unwrap();
        widen(&o)
    }

    fn reference(&self, p: &Problem, state: &mut reference::State) -> Vec<f64> {
        reference::prefill(p, &self.inputs(), &GATE, state).unwrap().o
    }
}

const GATE: [f32; HEADS] = [0.3, -1.0, 2.0, 0.0];

fn memory(state: &State) -> (Vec<f64>, Vec<f64>) {
    let (m, z) = (state.memory(), state.normalizer());
    let index = |i: usize, shape: &[usize]| {
        let mut at = vec![0; shape.len()];
        shape.iter().enumerate().rev().fold(i, |i, (d, &e)| {
            at[d] = i % e;
            i / e
        });
        at
    };
    let all = |view: TensorView<'_, f32>| -> Vec<f64> {
        let shape = view.shape().to_vec();
        (0..shape.iter().product()).map(|i| view.at(&index(i, &shape)).into()).collect()
    };
    (all(m), all(z))
}

#[test]
fn linear_memories_add() {
    let p = problem(Update::Linear, 8, DType::F32);
    let runs = [Run::new(10, 2, 37), Run::new(20, 2, 16), Run::new(30, 2, 29)];
    let mut whole = reference::State::new(&p, 2).unwrap();
    let mut states = Vec::new();
    for (i, run) in runs.iter().enumerate() {
        let mut state = State::new(&p, 2).unwrap();
        run.prefill(&mut state);
        run.reference(&p, &mut whole);
        if i < 2 {
            flush(&p, &mut state, &[0, 1]).unwrap();
            whole.flush(&p, &[0, 1]).unwrap();
        }
        states.push(state);
    }
    let mut merged = merge_memories(&states.iter().collect::<Vec<_>>()).unwrap();
    for s in 0..2 {
        assert_eq!((merged.tokens(s), whole.tokens(s)), (82, 82));
        assert_eq!((merged.committed(s), whole.committed(s)), (77, 77));
        assert_eq!((merged.open_len(s), whole.open_len(s)), (5, 5));
    }
    let (m, z) = memory(&merged);
    assert_close("M", &m, &whole.m, 1e-5);
    assert_close("z", &z, &whole.z, 1e-5);
    // It goes on inside the open segment of the last.
    let next = Run::new(40, 2, 21);
    assert_close("o", &next.prefill(&mut merged), &next.reference(&p, &mut whole), 1e-5);
    let (m, z) = memory(&merged);
    assert_close("M", &m, &whole.m, 1e-5);
    assert_close("z", &z, &whole.z, 1e-5);
}

#[test]
fn one_state_and_empty_states_change_nothing() {
    for update in [Update::Linear, Update::Delta] {
        let p = problem(update, 8, DType::F32);
        let mut state = State::new(&p, 2).unwrap();
        Run::new(50, 2, 21).prefill(&mut state);
        let empty = State::new(&p, 2).unwrap();
        let bytes = state.to_bytes().unwrap();
        assert_eq!(merge_memories(&[&state]).unwrap().to_bytes().unwrap(), bytes);
        let merged = merge_memories(&[&empty, &empty, &state]).unwrap();
        assert_eq!(merged.to_bytes().unwrap(), bytes);
        // An open segment after a filled memory goes on as in one stream.
        let (first, then) = (Run::new(60, 2, 16), Run::new(70, 2, 5));
        let (mut a, mut b) = (State::new(&p, 2).unwrap(), State::new(&p, 2).unwrap());
        let mut whole = reference::State::new(&p, 2).unwrap();
        first.prefill(&mut a);
        then.prefill(&mut b);
        first.reference(&p, &mut whole);
        then.reference(&p, &mut whole);
        let mut merged = merge_memories(&[&a, &b]).unwrap();
        let next = Run::new(80, 2, 30);
        assert_close("o", &next.prefill(&mut merged), &next.reference(&p, &mut whole), 1e-5);
    }
}

#[test]
fn memories_that_do_not_add_are_refused() {
    let delta = problem(Update::Delta, 8, DType::F32);
    let linear = problem(Update::Linear, 8, DType::F32);
    let filled = |p: &Problem, tokens| {
        let mut state = State::new(p, 2).unwrap();
        Run::new(1, 2, tokens).prefill(&mut state);
        state
    };
    assert!(matches!(merge_memories(&[]), Err(Error::Length { argument: "states", got: 0, .. })));

    let (a, b, empty) = (filled(&delta, 16), filled(&delta, 8), State::new(&delta, 2).unwrap());
    match merge_memories(&[&empty, &a, &empty, &b]) {
        Err(Error::DeltaMerge { first, second, slot, first_tokens, second_tokens }) => {
            assert_eq!((first, second, slot, first_tokens, second_tokens), (1, 3, 0, 16, 8));
        }
        other => panic!("{other:?}"),
    }
    // Filled in different slots, they do add.
    let (mut a, mut b) = (a, b);
    a.reset(&[1]).unwrap();
    b.reset(&[0]).unwrap();
    let both = merge_memories(&[&a, &b]).unwrap();
    assert_eq!((both.tokens(0), both.tokens(1)), (16, 8));

    let open = filled(&linear, 11);
    match merge_memories(&[&State::new(&linear, 2).unwrap(), &open, &open]) {
        Err(Error::OpenSegment { argument: "states", slot: 0, open_len: 3 }) => {}
        other => panic!("{other:?}"),
    }
    match merge_memories(&[&open, &empty]) {
        Err(Error::Problem { field: "update", .. }) => {}
        other => panic!("{other:?}"),
    }
    let error = merge_memories(&[&State::new(&linear, 3).unwrap(), &open]).unwrap_err().to_string();
    assert!(error.contains("states[1]: 2 slots given, 3 (those of states[0])"), "{error}");

    let (m, z) = (vec![1.0; KV_HEADS * DK * DV], vec![1.0; KV_HEADS * DK]);
    let old = State::from_parts(&linear, &m, &z, &[1 << 62], &[1 << 62]).unwrap();
    let error = merge_memories(&[&old, &old, &old, &old]).unwrap_err().to_string();
    assert!(error.contains("tokens[0]: 18446744073709551615 given"), "{error}");
}
