//! The number of threads changes the order of the work, and no bit of the result.

use crate::common::model::{Entry, Output, run_entry};
use crate::common::stream::Stream;
use half::{bf16, f16};
use infini_attn::{Element, Problem, State, Update};

/// Outputs and the state's bytes after `tokens` tokens, on a pool of its own.
fn run<T: Element>(p: &Problem, stream: &Stream<T>, threads: usize) -> (Output, Vec<u8>) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    pool.install(|| {
        let mut state = State::new(p, 1).unwrap();
        let gate = vec![0.3; p.heads()];
        let out = run_entry(Entry::Prefill, stream.tokens, &stream.inputs(), &gate, &mut state);
        (out, state.to_bytes().expect("a state"))
    })
}

fn same_bits(a: &Output, b: &Output) -> bool {
    let bits = |o: &Output| -> Vec<u64> {
        [&o.o, &o.a_dot, &o.a_mem, &o.lse].into_iter().flatten().map(|x| x.to_bits()).collect()
    };
    bits(a) == bits(b)
}

fn check<T: Element>() {
    // (query heads, KV heads, N, tokens): pieces that many threads cut into short ends, streams
    // that end in an open segment, one KV head and several.
    let shapes = [
        (4, 1, 256, 49),
        (4, 1, 256, 97),
        (8, 2, 128, 97),
        (4, 1, 97, 97 * 2 + 50),
        (2, 2, 48, 1000),
        (8, 1, 64, 500),
    ];
    for update in [Update::Linear, Update::Delta] {
        for (heads, kv_heads, segment, tokens) in shapes {
            let p = Problem::builder()
                .heads(heads)
                .kv_heads(kv_heads)
                .head_dim(64)
                .segment_len(segment)
                .dtype(T::DTYPE)
                .update(update)
                .build()
                .expect("valid");
            let stream = Stream::<T>::normal(&p, tokens, 64);
            let (out, state) = run(&p, &stream, 1);
            for threads in [1, 2, 3, 7] {
                let case = format!("{update} {} {tokens} tokens, {threads} threads", T::DTYPE);
                let (other, other_state) = run(&p, &stream, threads);
                assert!(same_bits(&out, &other), "{case}: outputs");
                assert!(state == other_state, "{case}: state");
            }
        }
    }
}

#[test]
fn f32_bits() {
    check::<f32>();
}

#[test]
fn f16_bits() {
    check::<f16>();
}

#[test]
fn bf16_bits() {
    check::<bf16>();
}
