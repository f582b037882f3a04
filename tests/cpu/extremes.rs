//! Extreme inputs: underflow and huge logits, NaN neighbours, constants, repetition.

use crate::common::buffers::{Arrangement, Asked, OutputBuffers};
use crate::common::metric::{log_rms, relative_rms};
use crate::common::model::{Entry, Fast, Model, Oracle, run_entry, run_in_chunks};
use crate::common::stream::Stream;
use crate::common::tolerance::{STATE_TOLERANCE, output_tolerance};
use crate::common::{WithType, bits, scalar, widen, with_type};
use half::{bf16, f16};
use infini_attn::{
    DType, Denominator, Element, Inputs, Problem, ProblemBuilder, State, TensorView, Update,
    prefill,
};

const RULES: [Update; 2] = [Update::Linear, Update::Delta];
const ENTRIES: [Entry; 2] = [Entry::Prefill, Entry::Decode];

/// 4 query heads on 2 KV heads, (Dk, Dv) = (16, 8), N = 16, delta, f32.
fn problem(change: impl FnOnce(ProblemBuilder) -> ProblemBuilder) -> Problem {
    let base = Problem::builder().heads(4).kv_heads(2).key_dim(16).value_dim(8).segment_len(16);
    change(base).build().expect("valid")
}

const GATE: [f32; 4] = [-1.0, 0.0, 0.5, 2.0];

/// A stream whose tokens were changed by hand must come out as in the reference, by both entries.
fn assert_as_reference<T: Element>(what: &str, stream: &Stream<T>) {
    let p = &stream.problem;
    let mut oracle = Oracle::new(p);
    let want = oracle.run(stream, &GATE);
    let shape = [stream.tokens, p.heads(), p.value_dim()];
    for (entry, chunk) in [(Entry::Prefill, stream.tokens), (Entry::Decode, 5)] {
        let mut model = Fast::new(p);
        let got = run_in_chunks(entry, chunk, stream, &GATE, &mut model.0);
        let tolerance = output_tolerance(p.dtype());
        let check = |name: &str, got: &[f64], want: &[f64], shape: &[usize], tolerance| {
            let label = format!("{what}, {entry:?}, {} {}: {name}", p.dtype(), p.update());
            relative_rms(&label, got, want, shape, tolerance).unwrap_or_else(|e| panic!("{e}"));
        };
        check("o", &got.o, &want.o, &shape, tolerance);
        check("a_dot", &got.a_dot, &want.a_dot, &shape, tolerance);
        check("a_mem", &got.a_mem, &want.a_mem, &shape, tolerance);
        let memory = [p.kv_heads(), p.key_dim(), p.value_dim()];
        check("M", &model.memory(), &oracle.memory(), &memory, STATE_TOLERANCE);
        check("z", &model.normalizer(), &oracle.normalizer(), &memory[..2], STATE_TOLERANCE);
        let shape = [p.heads(), stream.tokens];
        log_rms(what, &got.lse, &want.lse, &shape, STATE_TOLERANCE)
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Runs a check for every element type and rule.
fn for_every_type(check: impl Fn(Problem)) {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        RULES.into_iter().for_each(|rule| check(problem(|b| b.dtype(dtype).update(rule))));
    }
}

/// Builds a stream of the problem's element type and compares it with the reference.
struct Compare<'a, F> {
    what: &'a str,
    problem: Problem,
    value: F,
}

impl<F: Fn(char, f32) -> f32> WithType for Compare<'_, F> {
    type Output = ();

    fn run<T: Element>(self) {
        let stream = Stream::<T>::from_fn(&self.problem, 53, 77, &self.value);
        assert_as_reference(self.what, &stream);
    }
}

fn compare(what: &str, problem: Problem, value: impl Fn(char, f32) -> f32) {
    with_type(problem.dtype(), Compare { what, problem, value });
}

#[test]
fn queries_whose_sigma_underflows_still_retrieve() {
    // The retrieval is invariant to the scale of σ(q). A small scale keeps the local logits tame.
    for_every_type(|p| {
        let p = p.to_builder().scale(1e-4).build().expect("valid");
        for shift in [-200.0, -1e4] {
            compare("q far below 0", p, |c, x| if c == 'q' { x + shift } else { x });
        }
    });
}

#[test]
fn keys_whose_sigma_underflows_write_nothing() {
    for shift in [-200.0, -1e4] {
        for_every_type(|p| {
            let p = p.to_builder().scale(1e-4).build().expect("valid");
            compare("k far below 0", p, |c, x| if c == 'k' { x + shift } else { x });
        });
        let p = problem(|b| b.scale(1e-4));
        let stream = Stream::<f32>::from_fn(&p, 53, 3, |c, x| if c == 'k' { x + shift } else { x });
        let mut model = Fast::new(&p);
        let out = model.run(&stream, &GATE);
        assert!(model.memory().iter().chain(&model.normalizer()).all(|&x| x == 0.0));
        assert!(out.a_mem.iter().all(|&x| x == 0.0), "an empty memory answers 0");
        assert_eq!(model.0.committed(0), 48);
        // And the memory is as good as new for keys that do write.
        let later = Stream::<f32>::normal(&p, 32, 4);
        model.run(&later.slice(0..11), &GATE);
        assert_eq!(model.0.committed(0), 64);
        assert!(model.normalizer().iter().all(|&z| z > 0.0));
    }
}

#[test]
fn some_keys_underflow_and_some_do_not() {
    for_every_type(|p| {
        let far = |c: char, x: f32| if c == 'k' && x < 0.0 { 150.0 * x } else { x };
        compare("half the channels of k underflow", p, far);
        let far = |c: char, x: f32| if c != 'v' && x < 0.0 { 150.0 * x } else { x };
        compare("half the channels of q and k underflow", p, far);
    });
}

#[test]
fn underflow_under_every_denominator() {
    for denominator in [Denominator::Exact, Denominator::Clamp(1e-10), Denominator::Add(1e-6)] {
        for rule in RULES {
            let p = problem(|b| b.denominator(denominator).update(rule).scale(1e-4));
            compare("k near underflow", p, |c, x| if c == 'k' { x - 80.0 } else { x });
            // With an ε the product σ(q)·σ(k) itself must stay a normal f32: e⁻⁸⁰ does.
            compare("q and k at −40", p, |c, x| if c == 'v' { x } else { x - 40.0 });
            compare("q at −200", p, |c, x| if c == 'q' { x - 200.0 } else { x });
        }
    }
}

#[test]
fn denominators_that_underflow() {
    // z is a few of the smallest σ(k) in one channel and 0 in the others; queries and, in the second
    // segment, keys are larger in the others, up to where 1 / (σ(q)·z) is no f32 any more.
    for denominator in [Denominator::Exact, Denominator::Clamp(1e-40), Denominator::Add(1e-40)] {
        for (rule, others) in RULES.into_iter().flat_map(|r| [0.0, 1.0, 1e3].map(|x| (r, x))) {
            let p = problem(|b| b.denominator(denominator).update(rule).scale(1e-4));
            let mut stream = Stream::<f32>::normal(&p, 53, 8);
            for t in 0..53 {
                for h in 0..4 {
                    let q = stream.row_mut('q', t, h);
                    q.fill(others);
                    q[0] = -3.0 * (t % 16) as f32;
                }
                for h in 0..2 {
                    let k = stream.row_mut('k', t, h);
                    k.fill(if t < 16 { -200.0 } else { others });
                    k[0] = if t < 16 { -87.0 } else { -10.0 };
                }
            }
            assert_as_reference(&format!("{denominator}, others {others}"), &stream);
        }
    }
}

#[test]
fn logits_of_ten_thousand() {
    // q = ±a·e, k = ±a·e + small noise in other channels: scale · q·k reaches ±1e4.
    fn run<T: Element>() {
        for rule in RULES {
            let p = problem(|b| b.dtype(T::DTYPE).update(rule).scale(1.0));
            let mut stream = Stream::<T>::normal(&p, 40, 9);
            for t in 0..40 {
                let sign = |h: usize| if (t + h).is_multiple_of(3) { -96.0 } else { 96.0 };
                for h in 0..4 {
                    stream.row_mut('q', t, h).fill(T::zeroed());
                    stream.row_mut('q', t, h)[0] = scalar(sign(h));
                }
                for h in 0..2 {
                    // Steps of 0.5 in a channel q does not see, of 1 in the one it sees.
                    let k = sign(h) + (t % 16) as f32 - 8.0;
                    stream.row_mut('k', t, h)[0] = scalar(k);
                }
            }
            assert_as_reference("logits of ±1e4", &stream);
        }
    }
    run::<f32>();
    run::<f16>();
    run::<bf16>();
}

#[test]
fn all_keys_equal_average_the_values() {
    // Equal logits: the local branch is the running mean of V.
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for rule in RULES {
            compare("equal keys", problem(|b| b.dtype(dtype).update(rule)), |c, x| {
                if c == 'k' { 0.75 } else { x }
            });
        }
    }
    let p = problem(|b| b);
    let stream = Stream::<f32>::from_fn(&p, 16, 5, |c, x| if c == 'k' { -0.5 } else { x });
    let out = Fast::new(&p).run(&stream, &GATE);
    for (i, got) in out.a_dot.iter().enumerate() {
        let (t, h, c) = (i / 32, i / 8 % 4, i % 8);
        let values = (0..=t).map(|j| f64::from(stream.v[(j * 2 + h / 2) * 8 + c]));
        let mean = values.sum::<f64>() / (t as f64 + 1.0);
        assert!((got - mean).abs() < 1e-6, "token {t}, head {h}, channel {c}: {got}, {mean}");
    }
}

#[test]
fn constant_values_come_back() {
    for_every_type(|p| {
        compare("constant V", p, |c, x| if c == 'v' { 100.0 } else { x });
    });
}

/// Outputs and state of one call over a packed or padded batch, by bits.
fn batch_bits(p: &Problem, streams: &[Stream<f32>], entry: Entry) -> Vec<Vec<Vec<u8>>> {
    let mut packed = streams[0].slice(0..0);
    streams.iter().for_each(|s| packed.append(s));
    let mut cu = vec![0i32];
    streams.iter().for_each(|s| cu.push(cu[cu.len() - 1] + s.tokens as i32));
    let total = packed.tokens;
    let view = |data, heads, dim| TensorView::new(data, &[total, heads, dim]).expect("shape");
    let inputs = Inputs::new(view(&packed.q, 4, 16), view(&packed.k, 2, 16), view(&packed.v, 2, 8))
        .cu_seqlens(&cu);
    let mut state = State::new(p, streams.len()).unwrap();
    let mut out = OutputBuffers::<f32>::new(&[total], 4, 8, Arrangement::Contiguous, Asked::ALL);
    let result = entry.call(&inputs, &GATE, &mut state, out.views());
    result.expect("valid");
    (0..streams.len())
        .map(|b| {
            let rows = cu[b] as usize..cu[b + 1] as usize;
            let mut all: Vec<Vec<u8>> = vec![];
            for h in 0..4 {
                for t in rows.clone() {
                    all.extend(
                        out.named().iter().flat_map(|(_, x)| x.map(|x| bits(x.row(&[t, h])))),
                    );
                }
                let lse = bits(out.lse.as_ref().expect("asked for").row(&[h]));
                all.push(lse[4 * rows.start..4 * rows.end].to_vec());
            }
            let model = Fast(state.fork(&[b]).expect("a slot"));
            let floats = |x: Vec<f64>| x.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
            all.extend([floats(model.memory()), floats(model.normalizer())]);
            all
        })
        .collect()
}

fn poisoned(stream: &Stream<f32>) -> Stream<f32> {
    let mut stream = stream.clone();
    for data in [&mut stream.q, &mut stream.k, &mut stream.v] {
        data.fill(f32::NAN);
    }
    stream
}

#[test]
fn nan_in_one_sequence_never_reaches_another() {
    for rule in RULES {
        let p = problem(|b| b.update(rule));
        for (entry, lens) in [(Entry::Prefill, [37, 50, 21, 16]), (Entry::Decode, [3, 16, 1, 7])] {
            let streams: Vec<_> =
                (0..4).map(|i| Stream::<f32>::normal(&p, lens[i], 30 + i as u64)).collect();
            let clean = batch_bits(&p, &streams, entry);
            for bad in 0..4 {
                let mut streams = streams.clone();
                streams[bad] = poisoned(&streams[bad]);
                let got = batch_bits(&p, &streams, entry);
                for b in (0..4).filter(|&b| b != bad) {
                    assert!(got[b] == clean[b], "{entry:?}: NaN in sequence {bad} reached {b}");
                }
            }
        }
    }
}

#[test]
fn nan_in_padding_never_reaches_a_token() {
    // Padded rows hold NaN, then numbers: nothing may change.
    let p = problem(|b| b);
    for (entry, tokens, lens) in
        [(Entry::Prefill, 40, [0, 17, 40, 33]), (Entry::Decode, 8, [0, 1, 8, 5])]
    {
        let stream = Stream::<f32>::normal(&p, 4 * tokens, 40);
        let run = |padding: f32| {
            let mut s = stream.clone();
            for (b, &len) in lens.iter().enumerate() {
                for t in b * tokens + len as usize..(b + 1) * tokens {
                    (0..4).for_each(|h| s.row_mut('q', t, h).fill(padding));
                    (0..2).for_each(|h| s.row_mut('k', t, h).fill(padding));
                    (0..2).for_each(|h| s.row_mut('v', t, h).fill(padding));
                }
            }
            let view = |data, h, d| TensorView::new(data, &[4, tokens, h, d]).expect("shape");
            let inputs =
                Inputs::new(view(&s.q, 4, 16), view(&s.k, 2, 16), view(&s.v, 2, 8)).seq_lens(&lens);
            let mut state = State::new(&p, 4).unwrap();
            let mut out =
                OutputBuffers::<f32>::new(&[4, tokens], 4, 8, Arrangement::Gaps, Asked::ALL);
            let result = entry.call(&inputs, &GATE, &mut state, out.views());
            result.expect("valid");
            assert!(out.guards_intact());
            (out.bits(), Fast(state).memory())
        };
        assert!(run(f32::NAN) == run(3.0), "{entry:?}");
        assert!(run(f32::INFINITY) == run(3.0), "{entry:?}");
    }
}

#[test]
fn nan_in_one_kv_head_never_reaches_another() {
    for rule in RULES {
        let p = problem(|b| b.update(rule));
        let stream = Stream::<f32>::normal(&p, 53, 50);
        for bad in 0..2 {
            let mut other = stream.clone();
            for t in 0..53 {
                other.row_mut('k', t, bad).fill(f32::NAN);
                other.row_mut('v', t, bad).fill(f32::NAN);
                other.row_mut('q', t, 2 * bad + 1).fill(f32::NAN);
            }
            for (entry, chunk) in [(Entry::Prefill, 53), (Entry::Decode, 4)] {
                let run = |stream: &Stream<f32>| {
                    let (mut model, mut kept) = (Fast::new(&p), vec![]);
                    for start in (0..53).step_by(chunk) {
                        let part = stream.slice(start..(start + chunk).min(53));
                        let out =
                            run_entry(entry, part.tokens, &part.inputs(), &GATE, &mut model.0);
                        // Heads of the other KV head: [tokens, Hq, Dv] and [Hq, tokens].
                        let mine = |i: usize| i / 8 % 4 / 2 != bad;
                        for data in [&out.o, &out.a_dot, &out.a_mem] {
                            kept.extend((0..data.len()).filter(|&i| mine(i)).map(|i| data[i]));
                        }
                        let lse = out.lse.chunks(part.tokens).enumerate();
                        kept.extend(lse.filter(|(h, _)| h / 2 != bad).flat_map(|(_, x)| x));
                    }
                    let half = 1 - bad;
                    kept.extend(&model.memory()[half * 128..][..128]);
                    kept.extend(&model.normalizer()[half * 16..][..16]);
                    kept
                };
                assert_eq!(run(&other), run(&stream), "{entry:?}, {rule}");
            }
        }
    }
}

#[test]
fn nan_behind_a_closed_gate_is_absent() {
    // A branch of weight 0 that nobody asked for is not computed; what an earlier task left in its
    // buffers must not come through, nor may the branch itself.
    let p = problem(|b| b);
    let mut stream = Stream::<f32>::normal(&p, 53, 51);
    (0..53).for_each(|t| stream.row_mut('v', t, 0).fill(f32::NAN));
    let gate = [0.0, 0.0, f32::INFINITY, f32::NEG_INFINITY];
    let how = Arrangement::Contiguous;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    let mut state = State::new(&p, 1).unwrap();
    let mut out = OutputBuffers::<f32>::new(&[1, 53], 4, 8, how, Asked::NONE);
    pool.install(|| prefill(&p, &stream.inputs(), &gate, &mut state, out.views())).expect("valid");
    let want = Oracle::new(&p).run(&stream, &gate);
    for t in 0..53 {
        for h in 2..4 {
            let row = widen(out.o.row(&[0, t, h]));
            let want = &want.o[(t * 4 + h) * 8..][..8];
            relative_rms("o", &row, want, &[8], 1e-5).unwrap_or_else(|e| panic!("{t}, {h}: {e}"));
        }
    }
}

#[test]
fn nan_in_a_later_segment_never_reaches_an_earlier_one() {
    for rule in RULES {
        for n in [16, 64, 129] {
            let p = problem(|b| b.update(rule).segment_len(n));
            let stream = Stream::<f32>::normal(&p, 3 * n + 5, 60);
            for first in [n, 2 * n, 3 * n] {
                let mut late = stream.slice(0..first);
                late.append(&poisoned(&stream.slice(first..3 * n + 5)));
                let run = |s: &Stream<f32>| Fast::new(&p).run(s, &GATE);
                let (want, got) = (run(&stream), run(&late));
                let rows = first * 4 * 8;
                for (what, got, want) in [
                    ("o", &got.o, &want.o),
                    ("a_dot", &got.a_dot, &want.a_dot),
                    ("a_mem", &got.a_mem, &want.a_mem),
                ] {
                    assert_eq!(got[..rows], want[..rows], "{what}, N = {n}, NaN from {first}");
                }
                let tokens = 3 * n + 5;
                for h in 0..4 {
                    let lse = |x: &[f64]| x[h * tokens..][..first].to_vec();
                    assert_eq!(lse(&got.lse), lse(&want.lse), "lse, N = {n}, NaN from {first}");
                }
            }
        }
    }
}

#[test]
fn nan_does_reach_what_it_may() {
    // The tests above would pass if NaN were swallowed: it must not be.
    let p = problem(|b| b);
    let mut stream = Stream::<f32>::normal(&p, 40, 61);
    stream.row_mut('v', 3, 0).fill(f32::NAN);
    let out = Fast::new(&p).run(&stream, &GATE);
    let head = |data: &[f64], t: usize| data[t * 32];
    assert!(head(&out.a_dot, 3).is_nan(), "its own row");
    assert!(head(&out.a_mem, 20).is_nan(), "later rows through the memory");
    assert!(!head(&out.a_dot, 20).is_nan(), "not the next segment's local branch");
}

#[test]
fn a_reset_slot_forgets_nan() {
    // Stale keys and values of the open segment lie behind the ones in use.
    for n in [16, 200] {
        let p = problem(|b| b.segment_len(n));
        let stream = Stream::<f32>::normal(&p, n + 7, 62);
        for (entry, chunk) in [(Entry::Prefill, 3), (Entry::Prefill, n + 7), (Entry::Decode, 3)] {
            let run = |state: &mut State| {
                let mut all = vec![];
                for start in (0..n + 7).step_by(chunk) {
                    let part = stream.slice(start..(start + chunk).min(n + 7));
                    let out = run_entry(entry, part.tokens, &part.inputs(), &GATE, state);
                    all.extend([out.o, out.a_dot, out.a_mem, out.lse].concat());
                }
                all
            };
            let mut used = State::new(&p, 1).unwrap();
            let bad = poisoned(&stream.slice(0..n - 1));
            run_entry(Entry::Prefill, n - 1, &bad.inputs(), &GATE, &mut used);
            run_entry(Entry::Prefill, 3, &bad.slice(0..3).inputs(), &GATE, &mut used);
            run_entry(Entry::Prefill, n - 3, &bad.slice(0..n - 3).inputs(), &GATE, &mut used);
            used.reset(&[0]).expect("slot 0");
            let mut fresh = State::new(&p, 1).unwrap();
            assert_eq!(run(&mut used), run(&mut fresh), "{entry:?} by {chunk}, N = {n}");
            assert_eq!(Fast(used).memory(), Fast(fresh).memory());
        }
    }
}

#[test]
fn rows_with_nothing_to_attend_are_zero() {
    // A padded batch of nothing at all, and one with a single empty sequence.
    let p = problem(|b| b);
    let stream = Stream::<f32>::normal(&p, 6, 63);
    for lens in [[0, 0], [0, 3], [2, 0]] {
        for entry in ENTRIES {
            let view = |data, h, d| TensorView::new(data, &[2, 3, h, d]).expect("shape");
            let inputs =
                Inputs::new(view(&stream.q, 4, 16), view(&stream.k, 2, 16), view(&stream.v, 2, 8))
                    .seq_lens(&lens);
            let mut state = State::new(&p, 2).unwrap();
            let mut out =
                OutputBuffers::<f32>::new(&[2, 3], 4, 8, Arrangement::Contiguous, Asked::ALL);
            let result = entry.call(&inputs, &GATE, &mut state, out.views());
            result.expect("valid");
            for (b, &len) in lens.iter().enumerate() {
                for (t, h) in (0..3).flat_map(|t| (0..4).map(move |h| (t, h))) {
                    let lse = out.lse.as_ref().expect("asked for").get(&[b, h, t]);
                    let real = t < len as usize;
                    assert_eq!(lse == f32::NEG_INFINITY, !real);
                    for (name, x) in out.named() {
                        let row = x.expect("asked for").row(&[b, t, h]);
                        let zero = row.iter().all(|&x| x == 0.0);
                        assert_eq!(zero, !real || name == "a_mem", "{name} [{b}, {t}, {h}]");
                    }
                }
            }
        }
    }
}
