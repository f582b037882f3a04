//! Gradients of the reference against central differences of its forward, in float64.

use crate::common::metric::relative_rms;
use crate::common::stream::{normals, rope_tables, uniforms};
use infini_attn::reference::{self, OpenGradient, Output, State, StateGradient};
use infini_attn::{Denominator, EmptyMemory, Inputs, Problem, Rope, TensorView, Update};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Rows of the rotation tables.
const ROWS: usize = 64;

/// One stream in calls, and the weights of a loss that is linear in all that the calls put out.
#[derive(Clone, Debug)]
struct Stream {
    p: Problem,
    /// Tokens of the calls.
    calls: Vec<usize>,
    /// Whether the memory holds something before the first call.
    filled: bool,
    /// Channels and pairing of the rotation.
    rope: Option<(usize, bool)>,
    bptt: Option<usize>,
    x: Arguments,
    weights: Vec<Output>,
    end: StateGradient,
}

/// What the loss is a function of.
#[derive(Clone, Debug, Default)]
struct Arguments {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    m: Vec<f64>,
    z: Vec<f64>,
    gate: Vec<f32>,
}

/// N(0, 1), none so near to 0 that a step crosses the kink of σ'.
fn values(seed: u64, len: usize) -> Vec<f64> {
    let away = |x: f32| f64::from(if x.abs() < 1e-3 { x + 0.01 } else { x });
    normals(seed, len).into_iter().map(away).collect()
}

fn weights(seed: u64, len: usize) -> Vec<f64> {
    normals(seed, len).into_iter().map(f64::from).collect()
}

impl Stream {
    fn new(p: Problem, calls: Vec<usize>, seed: u64) -> Self {
        let (hq, hkv, dk, dv) = (p.heads(), p.kv_heads(), p.key_dim(), p.value_dim());
        let (tokens, some) = (calls.iter().sum::<usize>(), |i, len| weights(seed * 64 + i, len));
        let x = Arguments {
            q: values(seed * 64, tokens * hq * dk),
            k: values(seed * 64 + 1, tokens * hkv * dk),
            v: some(2, tokens * hkv * dv),
            m: some(3, hkv * dk * dv),
            z: uniforms(seed, hkv * dk).into_iter().map(|z| 1.2 + f64::from(z)).collect(),
            // Multiples of a step that f32 has.
            gate: normals(seed * 64 + 4, hq)
                .into_iter()
                .map(|b| (b * 256.0).round() / 256.0)
                .collect(),
        };
        let outputs = |(i, len): (usize, &usize)| {
            let main = |j| some(8 * i as u64 + j, len * hq * dv);
            Output { o: main(5), a_dot: main(6), a_mem: main(7), lse: some(8, len * hq) }
        };
        let open = |j| OpenGradient {
            k: some(50 + j, hkv * dk),
            k_rotated: vec![0.0; hkv * dk],
            v: some(51 + j, hkv * dv),
        };
        let end = StateGradient {
            m: some(60, hkv * dk * dv),
            z: some(61, hkv * dk),
            open: vec![(0..(tokens % p.segment_len()) as u64).map(open).collect()],
        };
        let weights = calls.iter().enumerate().map(outputs).collect();
        Self { p, calls, filled: false, rope: None, bptt: None, x, weights, end }
    }

    /// Calls `each` with the inputs of so many tokens from the `start`-th.
    fn inputs<R>(
        &self,
        x: &Arguments,
        start: usize,
        len: usize,
        each: impl FnOnce(&Inputs<'_, f64>) -> R,
    ) -> R {
        let p = &self.p;
        let (channels, interleaved) = self.rope.unwrap_or((0, false));
        let (cos, sin) = rope_tables(ROWS, channels, 1.2);
        let table = |data| TensorView::new(data, &[ROWS, channels / 2]).expect("a table");
        let view = |data: &'_ [f64], heads, dim| -> Vec<f64> {
            let width: usize = heads * dim;
            data[start * width..][..len * width].to_vec()
        };
        let (q, k) = (view(&x.q, p.heads(), p.key_dim()), view(&x.k, p.kv_heads(), p.key_dim()));
        let v = view(&x.v, p.kv_heads(), p.value_dim());
        let tensor =
            |data, heads, dim| TensorView::new(data, &[1, len, heads, dim]).expect("shape");
        let inputs = Inputs::new(
            tensor(&q, p.heads(), p.key_dim()),
            tensor(&k, p.kv_heads(), p.key_dim()),
            tensor(&v, p.kv_heads(), p.value_dim()),
        );
        match self.rope {
            Some(_) => {
                each(&inputs.rope(Rope::new(table(&cos), table(&sin)).interleaved(interleaved)))
            }
            None => each(&inputs),
        }
    }

    /// The state before the first call.
    fn start(&self, x: &Arguments) -> State {
        let mut state = State::new(&self.p, 1).expect("a state");
        if self.filled {
            let n = self.p.segment_len();
            let other = Stream::new(self.p, vec![n], 99);
            let fill = |inputs: &Inputs<'_, f64>| {
                reference::prefill(&self.p, inputs, &x.gate, &mut state).map(|_| ())
            };
            other.inputs(&other.x, 0, n, fill).expect("a valid call");
        }
        (state.m, state.z) = (x.m.clone(), x.z.clone());
        state
    }

    /// (Call, first token, tokens, whether a block of truncated propagation begins.)
    fn parts(&self) -> Vec<(usize, usize, usize, bool)> {
        let (n, mut start, mut parts) = (self.p.segment_len(), 0, vec![]);
        for (i, &len) in self.calls.iter().enumerate() {
            let end = start + len;
            let mut segment = 0;
            while start < end {
                let stop = end.min((start / n + 1) * n);
                let cut = self.bptt.is_some_and(|block| segment % block == 0);
                parts.push((i, start, stop - start, cut));
                (start, segment) = (stop, segment + 1);
            }
        }
        parts
    }

    /// M and z that the parts find.
    fn found(&self) -> Vec<[Vec<f64>; 2]> {
        let mut found = vec![];
        self.run(&self.x, |_, state| found.push([state.m.clone(), state.z.clone()]));
        found
    }

    /// The outputs part by part and the state after the last; `before` is shown each part's state.
    fn run(
        &self,
        x: &Arguments,
        mut before: impl FnMut(usize, &mut State),
    ) -> (Vec<Output>, State) {
        let mut state = self.start(x);
        let mut outputs = vec![];
        for (i, (_, start, len, _)) in self.parts().into_iter().enumerate() {
            before(i, &mut state);
            let call = |inputs: &Inputs<'_, f64>| {
                reference::prefill(&self.p, inputs, &x.gate, &mut state).expect("a valid call")
            };
            outputs.push(self.inputs(x, start, len, call));
        }
        (outputs, state)
    }

    /// The loss, in which M and z that a block of truncated propagation finds are constants.
    fn loss(&self, x: &Arguments, found: &[[Vec<f64>; 2]]) -> f64 {
        let (p, parts) = (&self.p, self.parts());
        let (outputs, state) = self.run(x, |i, state| {
            if parts[i].3 {
                [state.m, state.z] = found[i].clone();
            }
        });
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut loss = dot(&self.end.m, &state.m) + dot(&self.end.z, &state.z);
        for (out, (call, start, len, _)) in outputs.iter().zip(&parts) {
            let (w, first) = (&self.weights[*call], self.calls[..*call].iter().sum::<usize>());
            let (at, width) = (start - first, p.heads() * p.value_dim());
            for (w, out) in [(&w.o, &out.o), (&w.a_dot, &out.a_dot), (&w.a_mem, &out.a_mem)] {
                loss += dot(&w[at * width..], out);
            }
            for h in 0..p.heads() {
                loss += dot(&w.lse[h * self.calls[*call] + at..], &out.lse[h * len..][..*len]);
            }
        }
        let (tokens, open) = (self.calls.iter().sum::<usize>(), &self.end.open[0]);
        let (k, v) = (p.kv_heads() * p.key_dim(), p.kv_heads() * p.value_dim());
        for (t, row) in (tokens - open.len()..).zip(open) {
            loss += dot(&row.k, &x.k[t * k..]) + dot(&row.v, &x.v[t * v..]);
            loss += dot(&row.k_rotated, &self.rotated(&x.k[t * k..][..k], t));
        }
        loss
    }

    /// Keys of all heads, rotated to a token's place in the stream.
    fn rotated(&self, k: &[f64], t: usize) -> Vec<f64> {
        let (mut k, (channels, interleaved)) = (k.to_vec(), self.rope.unwrap_or((0, false)));
        let (cos, sin) = rope_tables(ROWS, channels, 1.2);
        let (half, position) =
            (channels / 2, t + if self.filled { self.p.segment_len() } else { 0 });
        for row in k.chunks_exact_mut(self.p.key_dim()) {
            for i in 0..half {
                let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                let (x, y) = (row[a], row[b]);
                let (c, s) =
                    (f64::from(cos[position * half + i]), f64::from(sin[position * half + i]));
                (row[a], row[b]) = (c * x - s * y, s * x + c * y);
            }
        }
        k
    }

    /// The reference's gradients to q, k, v, M, z and the gate.
    fn gradients(&self) -> [Vec<f64>; 6] {
        let (mut states, mut start) = (vec![self.start(&self.x)], 0);
        let mut starts = vec![];
        for &len in &self.calls {
            let mut next = states.last().expect("the first").clone();
            let call = |inputs: &Inputs<'_, f64>| {
                reference::prefill(&self.p, inputs, &self.x.gate, &mut next).map(|_| ())
            };
            self.inputs(&self.x, start, len, call).expect("a valid call");
            states.push(next);
            starts.push(start);
            start += len;
        }
        let mut gradient = self.end.clone();
        let mut all: [Vec<f64>; 6] = Default::default();
        all[5] = vec![0.0; self.p.heads()];
        for i in (0..self.calls.len()).rev() {
            let call = |inputs: &Inputs<'_, f64>| {
                let (p, gate, outputs) = (&self.p, &self.x.gate, &self.weights[i]);
                reference::prefill_backward(
                    p,
                    inputs,
                    gate,
                    &states[i],
                    outputs,
                    &mut gradient,
                    self.bptt,
                )
            };
            let got = self.inputs(&self.x, starts[i], self.calls[i], call).expect("a valid call");
            for (all, part) in all.iter_mut().zip([got.q, got.k, got.v]) {
                all.splice(0..0, part);
            }
            all[5].iter_mut().zip(got.gate).for_each(|(all, part)| *all += part);
        }
        assert!(gradient.open[0].is_empty());
        (all[3], all[4]) = (gradient.m, gradient.z);
        all
    }

    /// Central differences of the loss by every argument.
    fn differences(&self) -> [Vec<f64>; 6] {
        let found = self.found();
        let by = |len: usize, step: f64, change: &dyn Fn(&mut Arguments, usize, f64)| -> Vec<f64> {
            let at = |i, step| {
                let mut x = self.x.clone();
                change(&mut x, i, step);
                self.loss(&x, &found)
            };
            (0..len).map(|i| (at(i, step) - at(i, -step)) / (2.0 * step)).collect()
        };
        let (x, step) = (&self.x, 1e-5);
        [
            by(x.q.len(), step, &|x, i, step| x.q[i] += step),
            by(x.k.len(), step, &|x, i, step| x.k[i] += step),
            by(x.v.len(), step, &|x, i, step| x.v[i] += step),
            by(x.m.len(), step, &|x, i, step| x.m[i] += step),
            by(x.z.len(), step, &|x, i, step| x.z[i] += step),
            by(x.gate.len(), 1.0 / 8192.0, &|x, i, step| x.gate[i] += step as f32),
        ]
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let (got, want) = (self.gradients(), self.differences());
        for ((name, got), want) in ["q", "k", "v", "M", "z", "gate"].into_iter().zip(got).zip(want)
        {
            // Differences of a loss that does not depend on an argument are 0 up to rounding.
            let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            if norm(&want) < 1e-7 && norm(&got) < 1e-7 {
                continue;
            }
            relative_rms(name, &got, &want, &[got.len()], 1e-6).map_err(TestCaseError::fail)?;
        }
        Ok(())
    }
}

fn streams() -> impl Strategy<Value = Stream> {
    let denominator = prop_oneof![
        Just(Denominator::Exact),
        Just(Denominator::Clamp(0.1)),
        Just(Denominator::Clamp(4.0)),
        Just(Denominator::Add(0.5))
    ];
    let rule = prop_oneof![Just(Update::Linear), Just(Update::Delta)];
    let empty = prop_oneof![Just(EmptyMemory::Gate), Just(EmptyMemory::Bypass)];
    let heads = (1usize..3, 1usize..4);
    let shape = (1usize..6, 1usize..5, 1usize..6);
    let calls = prop::collection::vec(0usize..9, 1..4);
    let rope = prop::option::of((1usize..3, any::<bool>()));
    let (bptt, gates) = (prop::option::of(1usize..4), prop::option::of(any::<bool>()));
    let policies = (rule, empty, denominator);
    let rest = (calls, rope, bptt, gates, any::<bool>(), any::<bool>(), 0u64..1 << 40);
    (heads, shape, policies, rest).prop_map(|((kv_heads, group), (dk, dv, n), policies, rest)| {
        let (rule, empty, denominator) = policies;
        let (calls, rope, bptt, gate, filled, negative, seed) = rest;
        let p = Problem::builder()
            .heads(kv_heads * group)
            .kv_heads(kv_heads)
            .key_dim(dk)
            .value_dim(dv)
            .segment_len(n)
            .update(rule)
            .empty_memory(empty)
            .denominator(denominator)
            .build()
            .expect("within the limits");
        let mut stream = Stream::new(p, calls, seed);
        (stream.filled, stream.bptt) = (filled, bptt);
        if !filled {
            stream.x.m.fill(0.0);
            stream.x.z.fill(0.0);
        }
        stream.rope = rope.map(|(pairs, interleaved)| (2 * pairs.min(dk / 2), interleaved));
        if stream.rope.is_some() {
            for (j, row) in stream.end.open[0].iter_mut().enumerate() {
                row.k_rotated = weights(seed + 7 * j as u64, row.k.len());
            }
        }
        // A closed branch.
        if let Some(open) = gate {
            stream.x.gate[0] = if open { f32::INFINITY } else { f32::NEG_INFINITY };
        }
        // Rows without a positive channel, some of them far below.
        if negative {
            let shift = |x: &mut f64| *x = -x.abs() * 3.0;
            stream.x.q.iter_mut().for_each(shift);
            stream.x.k.iter_mut().skip(dk).step_by(2).for_each(shift);
        }
        stream
    })
}

proptest! {
    // Fixed: at the kink of a clamped denominator differences say nothing.
    #![proptest_config(ProptestConfig {
        cases: 80,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(2404_07143),
        ..ProptestConfig::default()
    })]
    #[test]
    fn the_reference_agrees_with_differences(stream in streams()) {
        stream.check()?;
    }
}

/// A branch that nothing depends on is absent, whatever it holds.
#[test]
fn a_closed_branch_may_hold_anything() {
    let p = Problem::builder().heads(2).kv_heads(1).head_dim(4).segment_len(3).build();
    let mut stream = Stream::new(p.expect("valid"), vec![7], 5);
    stream.filled = true;
    stream.x.gate = vec![f32::NEG_INFINITY; 2];
    stream.x.m[3] = f64::NAN;
    stream.weights[0].a_mem.fill(0.0);
    stream.end.m.fill(0.0);
    stream.end.z.fill(0.0);
    let got = stream.gradients();
    assert!(got.iter().flatten().all(|x| x.is_finite()), "{got:?}");
    assert!(got[3].iter().chain(&got[4]).chain(&got[5]).all(|x| *x == 0.0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let p = Problem::builder().heads(2).kv_heads(1).head_dim(4).segment_len(3).build();
    let stream = Stream::new(p.expect("valid"), vec![7], 5);
    let refused = |argument: &str, bptt, change: &dyn Fn(&mut Output, &mut StateGradient)| {
        let (mut outputs, mut gradient) = (stream.weights[0].clone(), stream.end.clone());
        change(&mut outputs, &mut gradient);
        let before = format!("{gradient:?}");
        let (p, gate, state) = (&stream.p, &stream.x.gate, stream.start(&stream.x));
        let result = stream.inputs(&stream.x, 0, 7, |inputs| {
            reference::prefill_backward(p, inputs, gate, &state, &outputs, &mut gradient, bptt)
        });
        let error = result.expect_err("refused").to_string();
        assert!(error.starts_with(argument), "{error}");
        assert_eq!(format!("{gradient:?}"), before);
    };
    refused("outputs.o: 55 ", None, &|up, _| up.o.truncate(55));
    refused("outputs.a_dot: 55 ", None, &|up, _| up.a_dot.truncate(55));
    refused("outputs.a_mem: 55 ", None, &|up, _| up.a_mem.truncate(55));
    refused("outputs.lse: 13 ", None, &|up, _| up.lse.truncate(13));
    refused("gradient.m: 15 ", None, &|_, gradient| gradient.m.truncate(15));
    refused("gradient.z: 3 ", None, &|_, gradient| gradient.z.truncate(3));
    refused("gradient.open: 0 ", None, &|_, gradient| gradient.open[0].clear());
    refused("gradient.open.k: 3 ", None, &|_, gradient| gradient.open[0][0].k.truncate(3));
    refused("gradient.open.k_rotated: 3 ", None, &|_, gradient| {
        gradient.open[0][0].k_rotated.truncate(3)
    });
    refused("gradient.open.v: 3 ", None, &|_, gradient| gradient.open[0][0].v.truncate(3));
    refused("bptt_segments: 0 ", Some(0), &|_, _| ());
}
