//! Inputs of every magnitude that f32 has: what comes out is right, or not finite where a number on
//! the way left f32; it is never finite and wrong.

use crate::common::cases::RULES;
use crate::common::model::{Entry, Fast, Model, Oracle, run_entry, run_in_chunks};
use crate::common::stream::Stream;
use crate::common::tolerance::{STATE_TOLERANCE, output_tolerance};
use crate::common::{WithType, with_type};
use infini_attn::{DType, Denominator, Element, Problem, ProblemBuilder};

const TOKENS: usize = 53;
const GATE: [f32; 4] = [-1.0, 0.0, 0.5, 2.0];
/// Of q and k. Products of two are small or so large that one key takes all of a softmax; between
/// lies where rounded scores decide.
const SIZES: [f32; 8] = [1e-38, 1e-19, 1.0, 1e12, 1e19, 1e30, 1e36, 1e37];

/// 4 query heads on 2 KV heads, (Dk, Dv) = (16, 8), N = 16.
fn problem(change: impl FnOnce(ProblemBuilder) -> ProblemBuilder) -> Problem {
    let base = Problem::builder().heads(4).kv_heads(2).key_dim(16).value_dim(8).segment_len(16);
    change(base).build().expect("valid")
}

/// A row is compared where all of it is finite. The RMS of the difference may be so large a part of
/// that of what is expected, or about the smallest number there is.
fn never_wrong(
    what: &str,
    [got, want]: [&[f64]; 2],
    width: usize,
    (tolerance, smallest): (f64, f64),
    right: bool,
) {
    let rows = got.chunks_exact(width).zip(want.chunks_exact(width));
    let (mut difference, mut scale, mut count) = (0.0, 0.0, 0.0);
    for (row, (got, want)) in rows.enumerate() {
        if !got.iter().all(|x| x.is_finite()) {
            assert!(!right, "{what}, row {row}: {got:?} given, {want:?} expected");
            continue;
        }
        for (g, w) in got.iter().zip(want) {
            difference += (g - w) * (g - w);
            scale += w * w;
            count += 1.0;
        }
    }
    let rms = |sum: f64| (sum / f64::max(count, 1.0)).sqrt();
    let (error, allowed) = (rms(difference), tolerance * rms(scale) + smallest);
    assert!(error <= allowed, "{what}: RMS error {error:e}, {allowed:e} allowed");
}

/// Which results must be right, not merely not wrong.
#[derive(Clone, Copy, Debug, Default)]
struct Right {
    local: bool,
    memory: bool,
    outputs: bool,
}

struct Sized<'a> {
    what: &'a str,
    problem: Problem,
    /// Of q, k and v.
    size: [f32; 3],
    right: Right,
}

impl WithType for Sized<'_> {
    type Output = ();

    fn run<T: Element>(self) {
        let p = &self.problem;
        let size = |which| self.size["qkv".find(which).expect("one of q, k, v")];
        let stream = Stream::<T>::from_fn(p, TOKENS, 5, |which, x| size(which) * x);
        let mut oracle = Oracle::new(p);
        let want = oracle.run(&stream, &GATE);
        for (entry, chunk) in [(Entry::Prefill, TOKENS), (Entry::Decode, 5)] {
            let mut model = Fast::new(p);
            let got = run_in_chunks(entry, chunk, &stream, &GATE, &mut model.0);
            let smallest = if p.dtype() == DType::F32 { 1e-44 } else { 1e-40 };
            let outputs = (output_tolerance(p.dtype()), smallest);
            let check = |name: &str, got: &[f64], want: &[f64], width, tolerance, right| {
                let what =
                    format!("{}, {entry:?}, {:?}, {}: {name}", self.what, self.size, p.update());
                never_wrong(&what, [got, want], width, tolerance, right);
            };
            let (right, state) = (self.right, (STATE_TOLERANCE, 1e-44));
            check("z", &model.normalizer(), &oracle.normalizer(), 1, state, right.memory);
            check("M", &model.memory(), &oracle.memory(), 1, state, right.memory);
            check("a_mem", &got.a_mem, &want.a_mem, 8, outputs, right.memory);
            check("lse", &got.lse, &want.lse, 1, state, right.local);
            check("a_dot", &got.a_dot, &want.a_dot, 8, outputs, right.local);
            check("o", &got.o, &want.o, 8, outputs, right.outputs);
        }
    }
}

/// Every size of q, k and v.
fn every_size(what: &str, problem: Problem, sizes: &[f32], values: &[f32]) {
    for (&q, &k) in sizes.iter().flat_map(|q| sizes.iter().map(move |k| (q, k))) {
        for &v in values {
            // Sums of 53 products, with room for a large one.
            let fits = |x: f64| 1e3 * x < f64::from(f32::MAX);
            let [wide_q, wide_k, wide_v] = [q, k, v].map(f64::from);
            let local = fits(wide_q * wide_k) && fits(wide_v);
            let memory = fits(wide_k.max(1.0) * wide_v.max(1.0));
            let right = Right { local, memory, outputs: local && memory };
            with_type(problem.dtype(), Sized { what, problem, size: [q, k, v], right });
        }
    }
}

#[test]
fn every_size_is_right_or_not_finite() {
    for rule in RULES {
        every_size("f32", problem(|b| b.update(rule)), &SIZES, &[1e-38, 1.0, 1e30, 1e37]);
        let p = problem(|b| b.update(rule).dtype(DType::BF16));
        every_size("bf16", p, &[1.0, 1e19, 1e37], &[1e-38, 1.0, 1e37]);
    }
}

#[test]
fn every_size_under_every_denominator() {
    for denominator in [Denominator::Clamp(1e-2), Denominator::Add(1e-2)] {
        for rule in RULES {
            let p = problem(|b| b.update(rule).denominator(denominator));
            every_size(&denominator.to_string(), p, &SIZES[2..], &[1.0, 1e30]);
        }
    }
}

#[test]
fn rows_of_scores_at_minus_infinity_are_nan() {
    // Infinite inputs here as in the reference; products below f32 here alone.
    for (q, k, finite) in [(1.0, f32::NEG_INFINITY, false), (1e30, -1e30, true)] {
        let p = problem(|b| b);
        let stream = Stream::<f32>::from_fn(&p, 5, 6, |which, x| match which {
            'q' => q,
            'k' => k,
            _ => x,
        });
        let want = Oracle::new(&p).run(&stream, &GATE);
        for entry in [Entry::Prefill, Entry::Decode] {
            let got = run_entry(entry, 5, &stream.inputs(), &GATE, &mut Fast::new(&p).0);
            for (got, want) in [(&got.o, &want.o), (&got.a_dot, &want.a_dot), (&got.lse, &want.lse)]
            {
                assert!(got.iter().all(|x| x.is_nan()), "{got:?}");
                assert!(want.iter().all(|x| x.is_finite() == finite), "{want:?}");
            }
        }
    }
}
