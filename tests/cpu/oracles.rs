//! Invariants and analytic oracles, on the fast backend and on the reference, over random problems.

use crate::common::metric::relative_rms;
use crate::common::model::{Fast, Model, Oracle, Output};
use crate::common::stream::{Stream, rope_tables};
use crate::common::widen;
use infini_attn::{DType, Denominator, EmptyMemory, Problem, Rope, TensorView, Update};
use proptest::prelude::*;

fn config() -> ProptestConfig {
    // Seeds are printed on failure; a file of them would not be reread from a clean clone.
    ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() }
}

/// Small problems of every policy, f32.
fn problems() -> impl Strategy<Value = Problem> {
    let denominator = prop_oneof![
        Just(Denominator::Exact),
        Just(Denominator::Clamp(0.1)),
        Just(Denominator::Add(0.1))
    ];
    let rule = prop_oneof![Just(Update::Linear), Just(Update::Delta)];
    let empty = prop_oneof![Just(EmptyMemory::Gate), Just(EmptyMemory::Bypass)];
    (1usize..3, 1usize..4, 1usize..20, 1usize..20, 1usize..9, rule, empty, denominator).prop_map(
        |(kv_heads, group, dk, dv, n, rule, empty, denominator)| {
            Problem::builder()
                .heads(kv_heads * group)
                .kv_heads(kv_heads)
                .key_dim(dk)
                .value_dim(dv)
                .segment_len(n)
                .update(rule)
                .empty_memory(empty)
                .denominator(denominator)
                .build()
                .expect("within the limits")
        },
    )
}

/// Problems whose retrieval is the paper's.
fn exact(rule: Update) -> impl Strategy<Value = Problem> {
    problems().prop_map(move |p| {
        let changed = p.to_builder().update(rule).denominator(Denominator::Exact);
        changed.build().expect("within the limits")
    })
}

fn gates(p: &Problem) -> Vec<f32> {
    (0..p.heads()).map(|h| h as f32 - 0.7).collect()
}

fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) -> Result<(), TestCaseError> {
    relative_rms(what, got, want, &[got.len()], tolerance).map_err(TestCaseError::fail)?;
    Ok(())
}

/// Rounding in f32 where an oracle takes a difference of larger numbers.
fn looser<M: Model>() -> f64 {
    10.0 * M::TOLERANCE
}

fn sigma(x: f64) -> f64 {
    if x > 0.0 { x + 1.0 } else { x.exp() }
}

/// Element (token, head, channel) of [T, heads, dim].
fn at(data: &[f64], heads: usize, dim: usize, t: usize, h: usize, c: usize) -> f64 {
    data[(t * heads + h) * dim + c]
}

/// Linear rule: a retrieval is a convex combination of the past values, column by column.
fn retrieval_is_convex<M: Model>(p: Problem, seed: u64) -> Result<(), TestCaseError> {
    let n = p.segment_len();
    let stream = Stream::<f32>::normal(&p, 4 * n, seed);
    let out = M::new(&p).run(&stream, &gates(&p));
    let v = widen(&stream.v);
    for t in n..4 * n {
        for h in 0..p.heads() {
            for c in 0..p.value_dim() {
                let past = (0..t / n * n)
                    .map(|j| at(&v, p.kv_heads(), p.value_dim(), j, h / p.group(), c));
                let (low, high) = past.fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)));
                let got = at(&out.a_mem, p.heads(), p.value_dim(), t, h, c);
                let slack = M::TOLERANCE * low.abs().max(high.abs());
                prop_assert!(
                    low - slack <= got && got <= high + slack,
                    "token {t}, head {h}, channel {c}: {got} outside {low} to {high}"
                );
            }
        }
    }
    Ok(())
}

/// Constant V = c: linear returns c from the second segment on. Delta returns c reading M_1; its
/// second segment then finds nothing to correct, so with equal segments the third reads c / 2, and
/// so does every later one: each writes back the half that its keys do not find.
fn constant_values<M: Model>(p: Problem, seed: u64) -> Result<(), TestCaseError> {
    let n = p.segment_len();
    let mut stream = Stream::<f32>::normal(&p, n, seed);
    stream.v.iter_mut().enumerate().for_each(|(i, v)| *v = 1.5 - (i % p.value_dim()) as f32);
    let segment = stream.clone();
    (0..3).for_each(|_| stream.append(&segment));
    let out = M::new(&p).run(&stream, &gates(&p));
    let rows = n * p.heads() * p.value_dim();
    let c: Vec<f64> = (0..rows).map(|i| 1.5 - (i % p.value_dim()) as f64).collect();
    for s in 1..4 {
        let share = if p.update() == Update::Linear || s == 1 { 1.0 } else { 0.5 };
        let want: Vec<f64> = c.iter().map(|c| c * share).collect();
        close(&format!("segment {s}"), &out.a_mem[s * rows..][..rows], &want, looser::<M>())?;
    }
    close("segment 0", &out.a_mem[..rows], &vec![0.0; rows], 0.0)
}

/// Memories over disjoint tokens add under the linear rule.
fn disjoint_memories_add<M: Model>(p: Problem, seed: u64) -> Result<(), TestCaseError> {
    let n = p.segment_len();
    let stream = Stream::<f32>::normal(&p, 5 * n, seed);
    let (mut first, mut second, mut both) = (M::new(&p), M::new(&p), M::new(&p));
    first.run(&stream.slice(0..2 * n), &gates(&p));
    second.run(&stream.slice(2 * n..5 * n), &gates(&p));
    both.run(&stream, &gates(&p));
    let add = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
    close("M", &both.memory(), &add(first.memory(), second.memory()), M::TOLERANCE)?;
    close("z", &both.normalizer(), &add(first.normalizer(), second.normalizer()), M::TOLERANCE)
}

/// Delta with one key for all tokens: the second segment replaces the first, and reading with that
/// key gives half the mean of its values, z having doubled.
fn one_key_is_overwritten<M: Model>(p: Problem, seed: u64) -> Result<(), TestCaseError> {
    let (n, kv, dk, dv) = (p.segment_len(), p.kv_heads(), p.key_dim(), p.value_dim());
    let mut stream = Stream::<f32>::normal(&p, 3 * n, seed);
    for t in 0..3 * n {
        for h in 0..p.heads() {
            let key = stream.row_mut('k', 0, h / p.group()).to_vec();
            stream.row_mut('k', t, h / p.group()).copy_from_slice(&key);
            stream.row_mut('q', t, h).copy_from_slice(&key);
        }
    }
    let mut model = M::new(&p);
    model.run(&stream.slice(0..2 * n), &gates(&p));
    let (k, v) = (widen(&stream.k), widen(&stream.v));
    let sum = |h: usize, c: usize| (n..2 * n).map(|t| at(&v, kv, dv, t, h, c)).sum::<f64>();
    let m = |i: usize| {
        let (h, d, c) = (i / (dk * dv), i / dv % dk, i % dv);
        sigma(at(&k, kv, dk, 0, h, d)) * sum(h, c)
    };
    close("M", &model.memory(), &(0..kv * dk * dv).map(m).collect::<Vec<_>>(), looser::<M>())?;
    let out = model.run(&stream.slice(2 * n..3 * n), &gates(&p));
    let want = |i: usize| sum(i / dv % p.heads() / p.group(), i % dv) / n as f64 / 2.0;
    let want: Vec<f64> = (0..out.a_mem.len()).map(want).collect();
    close("a_mem", &out.a_mem, &want, looser::<M>())
}

/// Any split of a stream, at every point and inside segments, gives the same outputs and state;
/// also after a flush at `flushed`.
fn splits_change_nothing<M: Model>(
    p: Problem,
    seed: u64,
    flushed: usize,
) -> Result<(), TestCaseError> {
    let tokens = 3 * p.segment_len() + 2;
    let stream = Stream::<f32>::normal(&p, tokens, seed);
    let flushed = flushed % tokens;
    let run = |cuts: &[usize]| {
        let (mut model, mut start) = (M::new(&p), 0);
        let mut all = Output { o: vec![], a_dot: vec![], a_mem: vec![], lse: vec![] };
        for &end in cuts.iter().chain([&tokens]) {
            let out = model.run(&stream.slice(start..end), &gates(&p));
            all.o.extend(out.o);
            all.a_dot.extend(out.a_dot);
            all.a_mem.extend(out.a_mem);
            // [Hq, T] of each call, brought to [T, Hq].
            let (len, heads) = (end - start, p.heads());
            all.lse.extend((0..len * heads).map(|i| out.lse[i % heads * len + i / heads]));
            if end == flushed {
                model.flush();
            }
            start = end;
        }
        (all, model)
    };
    let (want, whole) = run(&[flushed]);
    for split in 0..=tokens {
        let mut cuts = [flushed, split];
        cuts.sort_unstable();
        let (got, model) = run(&cuts);
        let tolerance = M::TOLERANCE;
        close(&format!("split {split}: o"), &got.o, &want.o, tolerance)?;
        close(&format!("split {split}: a_dot"), &got.a_dot, &want.a_dot, tolerance)?;
        close(&format!("split {split}: a_mem"), &got.a_mem, &want.a_mem, tolerance)?;
        close(&format!("split {split}: lse"), &got.lse, &want.lse, looser::<M>())?;
        close(&format!("split {split}: M"), &model.memory(), &whole.memory(), tolerance)?;
        close(&format!("split {split}: z"), &model.normalizer(), &whole.normalizer(), tolerance)?;
    }
    Ok(())
}

/// The order of tokens inside a segment does not matter to the memory; z grows with every segment.
fn order_inside_a_segment<M: Model>(p: Problem, seed: u64) -> Result<(), TestCaseError> {
    let n = p.segment_len();
    let stream = Stream::<f32>::normal(&p, 3 * n, seed);
    let turned: Vec<usize> =
        (0..3 * n).map(|t| t / n * n + (n - 1 - t % n + seed as usize) % n).collect();
    let (mut a, mut b) = (M::new(&p), M::new(&p));
    let mut before = a.normalizer();
    for s in 0..3 {
        a.run(&stream.slice(s * n..(s + 1) * n), &gates(&p));
        let z = a.normalizer();
        prop_assert!(z.iter().zip(&before).all(|(z, b)| z > b), "z must grow");
        before = z;
    }
    b.run(&stream.gather(&turned), &gates(&p));
    close("M", &b.memory(), &a.memory(), looser::<M>())?;
    close("z", &b.normalizer(), &a.normalizer(), M::TOLERANCE)
}

/// Rotation reaches the local branch only, and a common rotation of q and k not even that.
fn rotation_is_local<M: Model>(p: Problem, seed: u64) -> Result<(), TestCaseError> {
    let tokens = 3 * p.segment_len() + 1;
    let stream = Stream::<f32>::normal(&p, tokens, seed);
    let channels = p.key_dim() / 2 * 2;
    let (cos, sin) = rope_tables(64, channels, 1.0);
    let view = |data| TensorView::new(data, &[64, channels / 2]).expect("a table");
    let rope = || Rope::new(view(&cos), view(&sin)).interleaved(seed & 1 == 0);
    let same_place = vec![11; tokens];
    let (mut plain, mut rotated, mut together) = (M::new(&p), M::new(&p), M::new(&p));
    let want = plain.run(&stream, &gates(&p));
    let got = rotated.call(tokens, &stream.inputs().rope(rope()), &gates(&p));
    let inputs = stream.inputs().rope(rope().positions(&same_place));
    let common = together.call(tokens, &inputs, &gates(&p));
    prop_assert_eq!(&got.a_mem, &want.a_mem);
    prop_assert_eq!(rotated.memory(), plain.memory());
    prop_assert_eq!(rotated.normalizer(), plain.normalizer());
    // The tables are f32: cos² + sin² is 1 to 6e-8.
    let tolerance = f64::max(looser::<M>(), 1e-6);
    close("a_dot", &common.a_dot, &want.a_dot, tolerance)
}

/// β = −∞ is block-local causal attention; β = +∞ under the linear rule is linear attention over
/// the past segments. Both written out here without a memory. Between them the gate mixes.
fn the_gate_chooses<M: Model>(p: Problem, seed: u64) -> Result<(), TestCaseError> {
    let (n, kv, dk, dv) = (p.segment_len(), p.kv_heads(), p.key_dim(), p.value_dim());
    let tokens = 3 * n + 1;
    let stream = Stream::<f32>::normal(&p, tokens, seed);
    let (q, k, v) = (widen(&stream.q), widen(&stream.k), widen(&stream.v));
    let (mut local, mut past) = (vec![], vec![]);
    for t in 0..tokens {
        for h in 0..p.heads() {
            let g = h / p.group();
            let channels = || (0..dk).map(|d| at(&q, p.heads(), dk, t, h, d)).enumerate();
            let attend = |from: usize, to: usize, weight: &dyn Fn(usize) -> f64| {
                let sum: f64 = (from..to).map(weight).sum();
                (0..dv)
                    .map(|c| {
                        let x =
                            (from..to).map(|j| weight(j) * at(&v, kv, dv, j, g, c)).sum::<f64>();
                        if from == to { 0.0 } else { x / sum }
                    })
                    .collect::<Vec<_>>()
            };
            local.extend(attend(t / n * n, t + 1, &|j| {
                let dot: f64 = channels().map(|(d, x)| x * at(&k, kv, dk, j, g, d)).sum();
                (dot * p.scale()).exp()
            }));
            past.extend(attend(0, t / n * n, &|j| {
                channels().map(|(d, x)| sigma(x) * sigma(at(&k, kv, dk, j, g, d))).sum()
            }));
        }
    }
    let run = |beta: f32| M::new(&p).run(&stream, &vec![beta; p.heads()]);
    close("g = 0", &run(f32::NEG_INFINITY).o, &local, M::TOLERANCE)?;
    let open = run(f32::INFINITY);
    let skip = if p.empty_memory() == EmptyMemory::Bypass { n * p.heads() * dv } else { 0 };
    close("g = 1", &open.o[skip..], &past[skip..], M::TOLERANCE)?;
    let half = run(0.0);
    let mixed: Vec<f64> = local.iter().zip(&past).map(|(a, b)| (a + b) / 2.0).collect();
    close("g = ½", &half.o[skip..], &mixed[skip..], M::TOLERANCE)?;
    close("bypass", &half.o[..skip], &local[..skip], M::TOLERANCE)
}

macro_rules! on_both {
    ($($property:ident($problems:expr $(, $extra:ident in $range:expr)?);)+) => {
        mod fast {
            use super::*;
            proptest! {
                #![proptest_config(config())]
                $(#[test] fn $property(p in $problems, seed in 0u64..1 << 40 $(, $extra in $range)?) {
                    super::$property::<Fast>(p, seed $(, $extra)?)?;
                })+
            }
        }

        mod in_float64 {
            use super::*;
            proptest! {
                #![proptest_config(config())]
                $(#[test] fn $property(p in $problems, seed in 0u64..1 << 40 $(, $extra in $range)?) {
                    super::$property::<Oracle>(p, seed $(, $extra)?)?;
                })+
            }
        }
    };
}

on_both! {
    retrieval_is_convex(exact(Update::Linear));
    constant_values(prop_oneof![exact(Update::Linear), exact(Update::Delta)]);
    disjoint_memories_add(exact(Update::Linear));
    one_key_is_overwritten(exact(Update::Delta));
    splits_change_nothing(problems(), flushed in 0usize..40);
    order_inside_a_segment(problems());
    rotation_is_local(problems().prop_filter("a pair of channels", |p| p.key_dim() > 1));
    the_gate_chooses(exact(Update::Linear));
}

/// The rounded σ of half precision is the same on both sides of the division, so a constant V comes
/// back exactly, not to half precision.
#[test]
fn constant_values_survive_half_precision() {
    for dtype in [DType::F16, DType::BF16] {
        let p = Problem::builder()
            .heads(4)
            .kv_heads(2)
            .head_dim(64)
            .segment_len(32)
            .update(Update::Linear)
            .dtype(dtype)
            .build()
            .expect("valid");
        fn run<T: infini_attn::Element>(p: &Problem) -> Output {
            let stream = Stream::<T>::from_fn(p, 128, 5, |c, x| if c == 'v' { 3.25 } else { x });
            Fast::new(p).run(&stream, &gates(p))
        }
        let out = if dtype == DType::F16 { run::<half::f16>(&p) } else { run::<half::bf16>(&p) };
        assert!(out.a_mem[32 * 4 * 64..].iter().all(|&x| x == 3.25), "{dtype}");
    }
}
