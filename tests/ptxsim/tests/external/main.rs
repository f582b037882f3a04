//! Kernels by others that run in production, with their own host code, on the simulator's driver:
//! right to float64 in every schedule, and nothing found but what is wrong with them.
//!
//! They take minutes to compile: `cargo test -p ptxsim --test external -- --ignored`.

#[path = "../support/mod.rs"]
mod support;

mod programs;

use std::f64::consts::LOG2_E;

use bytemuck::cast_slice;
use half::{bf16, f16};
use serde_json::Value;

use programs::{CUTLASS, FLASHINFER, Outcome, Program, SCHEDULES};
use support::compare::{assert_close, generator, random, values};
use support::reference::{self, Attention};

/// Unit round-off of f16.
const F16: f64 = 1.0 / 2048.0;

/// A copy to several blocks of a cluster.
const MULTICAST: &str = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.\
    multicast::cluster";

/// Fails if anything was found.
#[track_caller]
fn assert_clean(case: &str, outcome: &Outcome) {
    assert_found(case, outcome, "", &[]);
}

/// Fails unless findings of this kind by each of these operations were found, and nothing else.
#[track_caller]
fn assert_found(case: &str, outcome: &Outcome, kind: &str, operations: &[&str]) {
    let findings = outcome.findings();
    let by = |finding: &Value, operation: &&str| {
        finding["message"].as_str().is_some_and(|message| message.starts_with(operation))
    };
    for finding in &findings {
        let expected = finding["kind"] == kind && operations.iter().any(|o| by(finding, o));
        assert!(expected, "{case}: {finding:#}");
    }
    for operation in operations {
        assert!(findings.iter().any(|f| by(f, operation)), "{case}: no {kind} by {operation}");
    }
}

/// A program with a known fault.
#[derive(Clone, Copy)]
enum Version {
    Published,
    /// Without the fault.
    Corrected,
}

impl Version {
    fn macros(self) -> &'static [&'static str] {
        match self {
            Self::Published => &[],
            Self::Corrected => &["CORRECTED"],
        }
    }
}

/// Products of m x n x k; an instruction that their way of working needs must have been executed.
fn products(name: &str, shapes: &[[usize; 3]], mnemonic: &str) {
    let program = Program::new(name, CUTLASS, &[]);
    for &[m, n, k] in shapes {
        let case = format!("{name} {m} x {n} x {k}");
        let mut rng = generator(&case);
        let a: Vec<bf16> = random(&mut rng, m * k, 1.0);
        let b: Vec<bf16> = random(&mut rng, n * k, 1.0);
        let c: Vec<f32> = random(&mut rng, m * n, 1.0);
        let product = reference::matmul(&values(&a), &values(&b), [m, n, k], true);
        let want: Vec<f64> =
            product.iter().zip(values(&c)).map(|(product, c)| product / 2.0 - c).collect();
        let files = [("a", cast_slice(&a)), ("b", cast_slice(&b)), ("c", cast_slice(&c))];
        for schedule in SCHEDULES {
            let case = format!("{case}, {schedule:?}");
            let outcome = program.run(schedule, &[m, n, k], &files);
            assert_clean(&case, &outcome);
            assert!(outcome.executed(mnemonic) > 0, "{case}: no {mnemonic}");
            assert_close(&case, &outcome.output::<f32>("d"), &want, 1e-6);
        }
    }
}

#[test]
#[ignore = "compiles for minutes"]
fn cutlass_pingpong() {
    let shapes = [[384, 256, 320], [200, 136, 72]];
    products("cutlass_pingpong", &shapes, MULTICAST);
}

#[test]
#[ignore = "compiles for minutes"]
fn cutlass_stream_k() {
    // More blocks than tiles, or tiles and a half: parts of a tile are added through global memory.
    let shapes = [[256, 128, 1024], [200, 300, 1000]];
    products("cutlass_stream_k", &shapes, "red.relaxed.gpu");
}

/// Inputs of an attention: [heads][tokens][128].
fn inputs(case: &str, shape: Attention) -> [Vec<f16>; 4] {
    let mut rng = generator(case);
    [1.0; 4].map(|scale| random(&mut rng, shape.heads * shape.tokens * shape.d, scale))
}

fn shape(heads: usize, tokens: usize, causal: bool) -> Attention {
    Attention { heads, tokens, d: 128, scale: 128f64.sqrt().recip(), causal }
}

/// [heads][tokens][d] from [tokens][heads][d], or the other way with the lengths exchanged.
fn exchanged<T: Copy>(x: &[T], [heads, tokens, d]: [usize; 3]) -> Vec<T> {
    let row = |i: usize| (i % tokens * heads + i / tokens) * d;
    (0..heads * tokens).flat_map(|i| x[row(i)..row(i) + d].to_vec()).collect()
}

/// Causal or full attention of one sequence. As published, every warp reads what all have stored to
/// shared memory when half of them have: a race, in which results are lost.
fn prefill(version: Version, cases: &[(usize, bool)]) {
    let program = Program::new("flashinfer_prefill", FLASHINFER, version.macros());
    for &(tokens, causal) in cases {
        let shape = shape(2, tokens, causal);
        let case = format!("FlashInfer's attention, {tokens} tokens, causal {causal}");
        let [q, k, v, _] = inputs(&case, shape);
        let stored = [&q, &k, &v].map(|x| exchanged(x, [tokens, shape.heads, shape.d]));
        let [q, k, v] = [q, k, v].map(|x| values(&x));
        let want = reference::attention(&q, &k, &v, shape);
        let log_sums = reference::log_sums(&q, &k, shape);
        let log_sums: Vec<f64> = log_sums.iter().map(|x| x * LOG2_E).collect();
        let files = [("q", 0), ("k", 1), ("v", 2)].map(|(name, i)| (name, cast_slice(&stored[i])));
        for schedule in SCHEDULES {
            let case = format!("{case}, {schedule:?}");
            let outcome = program.run(schedule, &[tokens, shape.heads, causal.into()], &files);
            let lse = exchanged(&outcome.output::<f32>("lse"), [shape.heads, tokens, 1]);
            assert_close(&case, &lse, &log_sums, 1e-6);
            match version {
                Version::Published => assert_found(&case, &outcome, "race", &["stmatrix", "load"]),
                Version::Corrected => {
                    assert_clean(&case, &outcome);
                    let o = exchanged(&outcome.output::<f16>("o"), [shape.heads, tokens, shape.d]);
                    assert_close(&case, &o, &want, F16);
                }
            }
        }
    }
}

#[test]
#[ignore = "compiles for minutes"]
fn flashinfer_prefill() {
    prefill(Version::Corrected, &[(256, true), (300, true), (300, false)]);
}

#[test]
#[ignore = "compiles for minutes"]
fn flashinfer_prefill_as_published() {
    prefill(Version::Published, &[(256, true)]);
}

/// Derivatives of causal attention. As published, the tile of q is loaded anew while a product may
/// read it, and that of dq stored while it is copied; either loses results.
fn backward(version: Version, tokens: &[usize]) {
    let program = Program::new("cutlass_attention_backward", CUTLASS, version.macros());
    for &tokens in tokens {
        let shape = shape(2, tokens, true);
        let case = format!("CUTLASS' attention backward, {tokens} tokens");
        let stored = inputs(&case, shape);
        let [q, k, v, d_o] = [0, 1, 2, 3].map(|i| values(&stored[i]));
        let o = reference::attention(&q, &k, &v, shape).into_iter().map(f16::from_f64);
        let log_sums = reference::log_sums(&q, &k, shape).into_iter().map(|x| x as f32);
        let (o, log_sums): (Vec<_>, Vec<_>) = (o.collect(), log_sums.collect());
        let want = reference::attention_backward([&q, &k, &v, &d_o], shape);
        let files = [
            ("q", cast_slice(&stored[0])),
            ("k", cast_slice(&stored[1])),
            ("v", cast_slice(&stored[2])),
            ("do", cast_slice(&stored[3])),
            ("o", cast_slice(&o)),
            ("lse", cast_slice(&log_sums)),
        ];
        for schedule in SCHEDULES {
            let case = format!("{case}, {schedule:?}");
            let outcome = program.run(schedule, &[shape.heads, tokens], &files);
            if let Version::Published = version {
                assert_found(&case, &outcome, "pending-read", &["bulk copy to", "store"]);
                continue;
            }
            assert_clean(&case, &outcome);
            for (name, want) in ["dq", "dk", "dv"].into_iter().zip(&want) {
                let got = outcome.output::<f16>(name);
                assert_close(&format!("{case}: {name}"), &got, want, F16);
            }
        }
    }
}

#[test]
#[ignore = "compiles for minutes"]
fn cutlass_attention_backward() {
    backward(Version::Corrected, &[256, 320]);
}

#[test]
#[ignore = "compiles for minutes"]
fn cutlass_attention_backward_as_published() {
    backward(Version::Published, &[256]);
}
