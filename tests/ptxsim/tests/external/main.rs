//! Kernels by others that run in production, with their own host code, on the simulator's driver:
//! right to float64 in every schedule, and nothing found but what is wrong with them.
//!
//! They take minutes to compile: `cargo test -p ptxsim --test external -- --ignored`.

#[path = "../support/mod.rs"]
mod support;

mod programs;

use bytemuck::cast_slice;
use half::{bf16, f16};

use programs::{CUTLASS, FLASHINFER, Outcome, Program, SCHEDULES};
use support::compare::{assert_close, generator, random, values};
use support::reference::{self, Attention};

/// Unit round-off of f16.
const F16: f64 = 1.0 / 2048.0;

/// Fails if anything was found.
#[track_caller]
fn assert_clean(case: &str, outcome: &Outcome) {
    let findings = outcome.findings();
    assert!(findings.is_empty(), "{case}: {findings:#?}");
}

/// Products of m x n x k that must be clean.
fn products(program: &str, shapes: &[[usize; 3]]) {
    let program_of = Program::new(program, CUTLASS, &[]);
    for &[m, n, k] in shapes {
        let case = format!("{program} {m} x {n} x {k}");
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
            let outcome = program_of.run(schedule, &[m, n, k], &files);
            assert_clean(&case, &outcome);
            assert_close(&case, &outcome.output::<f32>("d"), &want, 1e-6);
        }
    }
}

#[test]
#[ignore = "compiles for minutes"]
fn cutlass_pingpong() {
    products("cutlass_pingpong", &[[384, 256, 320], [200, 136, 72]]);
}

#[test]
#[ignore = "compiles for minutes"]
fn cutlass_stream_k() {
    products("cutlass_stream_k", &[[384, 256, 1024], [200, 136, 520]]);
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

/// Causal and full attention; `check` sees what was found.
fn prefill(macros: &[&str], tokens: &[usize], masks: &[bool], check: impl Fn(&str, &Outcome)) {
    let program = Program::new("flashinfer_prefill", FLASHINFER, macros);
    for (&tokens, &causal) in tokens.iter().flat_map(|t| masks.iter().map(move |mask| (t, mask))) {
        let shape = shape(2, tokens, causal);
        let case = format!("FlashInfer, {tokens} tokens, causal {causal}");
        let [q, k, v, _] = inputs(&case, shape);
        let stored = [&q, &k, &v].map(|x| exchanged(x, [tokens, shape.heads, shape.d]));
        let [q, k, v] = [q, k, v].map(|x| values(&x));
        let want = reference::attention(&q, &k, &v, shape);
        let log_sums = reference::log_sums(&q, &k, shape);
        let files = [("q", 0), ("k", 1), ("v", 2)].map(|(name, i)| (name, cast_slice(&stored[i])));
        for schedule in SCHEDULES {
            let case = format!("{case}, {schedule:?}");
            let args = [tokens, tokens, shape.heads, shape.heads, causal.into()];
            let outcome = program.run(schedule, &args, &files);
            check(&case, &outcome);
            let o = exchanged(&outcome.output::<f16>("o"), [shape.heads, tokens, shape.d]);
            assert_close(&case, &o, &want, 2.0 * F16);
            let to_base_2: Vec<f64> =
                log_sums.iter().map(|x| x * std::f64::consts::LOG2_E).collect();
            let lse = exchanged(&outcome.output::<f32>("lse"), [shape.heads, tokens, 1]);
            assert_close(&case, &lse, &to_base_2, 1e-6);
        }
    }
}

#[test]
#[ignore = "compiles for minutes"]
fn flashinfer_prefill() {
    prefill(&["CORRECTED"], &[256, 300], &[true, false], assert_clean);
}

/// Derivatives of causal attention; `check` sees what was found.
fn backward(macros: &[&str], tokens: &[usize], check: impl Fn(&str, &Outcome)) {
    let program = Program::new("cutlass_attention_backward", CUTLASS, macros);
    for &tokens in tokens {
        let shape = shape(2, tokens, true);
        let case = format!("CUTLASS' attention backward, {tokens} tokens");
        let stored = inputs(&case, shape);
        let [q, k, v, d_o] = [0, 1, 2, 3].map(|i| values(&stored[i]));
        let o: Vec<f16> =
            reference::attention(&q, &k, &v, shape).into_iter().map(f16::from_f64).collect();
        let lse: Vec<f32> =
            reference::log_sums(&q, &k, shape).into_iter().map(|x| x as f32).collect();
        let want = reference::attention_backward([&q, &k, &v, &d_o], shape);
        let files = [
            ("q", cast_slice(&stored[0])),
            ("k", cast_slice(&stored[1])),
            ("v", cast_slice(&stored[2])),
            ("do", cast_slice(&stored[3])),
            ("o", cast_slice(&o)),
            ("lse", cast_slice(&lse)),
        ];
        for schedule in SCHEDULES {
            let case = format!("{case}, {schedule:?}");
            let outcome = program.run(schedule, &[shape.heads, tokens], &files);
            check(&case, &outcome);
            for (name, want) in ["dq", "dk", "dv"].into_iter().zip(&want) {
                let got = outcome.output::<f16>(name);
                assert_close(&format!("{case}: {name}"), &got, want, 4.0 * F16);
            }
        }
    }
}

#[test]
#[ignore = "compiles for minutes"]
fn cutlass_attention_backward() {
    backward(&["CORRECTED"], &[256, 328], assert_clean);
}
