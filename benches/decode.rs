//! Decoding many streams on the CPU: `cargo bench --bench decode`.
//!
//! Elements are tokens, bytes those that a step must read: the keys and values in use of every open
//! segment, M and z. The streams go on and on, their segments filling out of step, so that they are half
//! full on average and commits are part of what is measured. The group `memory` reads and copies buffers
//! far beyond the caches on as many threads: the rates that a decode out of memory is compared to. (64
//! streams of (8, 2, 64, 512) take 17 MiB, which caches may hold.)
//!
//! `mixed` is a batch of 64 streams of which 2 bring a prompt of 512 tokens and 62 one token each, as one
//! prefill and as a decode and a prefill.

use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use half::bf16;
use infini_attn::{
    Element, Inputs, Outputs, Problem, State, TensorView, TensorViewMut, decode, prefill,
};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

/// (Hq, Hkv, D, N)
type Shape = [usize; 4];

fn problem<T: Element>([heads, kv_heads, dim, segment_len]: Shape) -> Problem {
    Problem::builder()
        .heads(heads)
        .kv_heads(kv_heads)
        .head_dim(dim)
        .segment_len(segment_len)
        .dtype(T::DTYPE)
        .build()
        .expect("the shapes below are valid")
}

/// Normal numbers for calls of up to so many tokens in all.
struct Tokens<T> {
    problem: Problem,
    x: Vec<T>,
    o: Vec<T>,
}

impl<T: Element> Tokens<T> {
    fn new(problem: &Problem, total: usize) -> Self {
        let width = total * problem.heads() * problem.key_dim();
        let mut rng = SmallRng::seed_from_u64(1);
        let x: Vec<f32> = StandardNormal.sample_iter(&mut rng).take(width).collect();
        let mut rows = vec![T::zeroed(); width];
        T::narrow(&x, &mut rows);
        Self { problem: *problem, x: rows, o: vec![T::zeroed(); width] }
    }

    /// Calls `entry` with a packed batch of `slots`; sequence i is tokens `cu[i]` to `cu[i + 1]`.
    fn run(&mut self, entry: Entry<T>, state: &mut State, slots: &[usize], cu: &[i32]) {
        let (p, total, d) = (&self.problem, cu[slots.len()] as usize, self.problem.key_dim());
        let view = |heads: usize| {
            TensorView::new(&self.x[..total * heads * d], &[total, heads, d]).expect("sized")
        };
        let inputs = Inputs::new(view(p.heads()), view(p.kv_heads()), view(p.kv_heads()));
        let o = &mut self.o[..total * p.heads() * d];
        let outputs = Outputs::new(TensorViewMut::new(o, &[total, p.heads(), d]).expect("sized"));
        let gate = [0.0; 8];
        entry(p, &inputs.cu_seqlens(cu).slots(slots), &gate, state, outputs).expect("valid");
    }
}

/// Where sequences of such lengths begin and end.
fn packed(lens: impl IntoIterator<Item = usize>) -> Vec<i32> {
    let mut cu = vec![0];
    lens.into_iter().for_each(|len| cu.push(cu[cu.len() - 1] + len as i32));
    cu
}

type Entry<T> =
    fn(&Problem, &Inputs<'_, T>, &[f32], &mut State, Outputs<'_, T>) -> infini_attn::Result<()>;

/// Streams past their first segment, half full on average: of each as much as its number says.
fn streams<T: Element>(p: &Problem, count: usize) -> State {
    let n = p.segment_len();
    let mut state = State::new(p, count).expect("room");
    let mut tokens = Tokens::<T>::new(p, 2 * n);
    for i in 0..count {
        let len = n + (2 * i + 1) * n / (2 * count);
        tokens.run(prefill, &mut state, &[i], &packed([len]));
    }
    state
}

/// Bytes a step of so many streams must read on average.
fn bytes(p: &Problem, streams: usize) -> u64 {
    let row = p.key_dim() + p.value_dim();
    let open = (p.segment_len() + 1) * row / 2;
    let memory = p.key_dim() * (p.value_dim() + 1);
    (size_of::<f32>() * streams * p.kv_heads() * (open + memory)) as u64
}

fn bench_decode<T: Element>(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("decode/{}", T::DTYPE));
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(1500));
    for kv_heads in [2, 8] {
        for (dim, n) in [(64, 512), (64, 2048), (128, 512), (128, 2048)] {
            for count in [1, 8, 64] {
                let p = problem::<T>([8, kv_heads, dim, n]);
                let (elements, bytes) = (count as u64, bytes(&p, count));
                group.throughput(Throughput::ElementsAndBytes { elements, bytes });
                let mut running = None;
                group.bench_function(format!("8,{kv_heads},{dim},{n} x{count}"), |b| {
                    // Made only if it is asked for.
                    let (state, tokens) = running.get_or_insert_with(|| {
                        (streams::<T>(&p, count), Tokens::<T>::new(&p, count))
                    });
                    let (slots, cu) = ((0..count).collect::<Vec<_>>(), packed(vec![1; count]));
                    b.iter(|| tokens.run(decode, state, &slots, &cu));
                });
            }
        }
    }
}

/// What the memory gives to all threads of the pool at once.
fn bench_memory(c: &mut Criterion) {
    let (from, mut into) = (vec![1u64; 32 << 20], vec![0u64; 32 << 20]);
    let each = from.len().div_ceil(rayon::current_num_threads());
    let mut group = c.benchmark_group("memory");
    group.sample_size(20);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(1500));
    let bytes = size_of_val(&from[..]) as u64;
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function("read", |b| {
        let sum = |part: &[u64]| part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x));
        b.iter(|| from.par_chunks(each).map(sum).reduce(|| 0, u64::wrapping_add));
    });
    group.throughput(Throughput::Bytes(2 * bytes));
    group.bench_function("copy, read and written", |b| {
        b.iter(|| {
            let parts = from.par_chunks(each).zip(into.par_chunks_mut(each));
            parts.for_each(|(from, into)| into.copy_from_slice(from));
        });
    });
}

fn bench_mixed(c: &mut Criterion) {
    let mut group = c.benchmark_group("mixed/bf16");
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_millis(3000));
    for shape in [[8, 2, 64, 512], [8, 2, 128, 2048], [8, 8, 64, 2048]] {
        let p = problem::<bf16>(shape);
        let mut running = None;
        for together in [true, false] {
            let name = if together { "one prefill" } else { "decode and prefill" };
            group.bench_function(format!("{shape:?}, {name}"), |b| {
                let (state, tokens) = running.get_or_insert_with(|| {
                    (streams::<bf16>(&p, 64), Tokens::<bf16>::new(&p, 2 * 512 + 62))
                });
                let slots: Vec<usize> = (0..64).collect();
                let lens = [vec![512; 2], vec![1; 62]];
                let all = packed(lens.concat());
                let [prompts, others] = lens.map(packed);
                b.iter(|| {
                    state.reset(&[0, 1]).expect("slots");
                    if together {
                        tokens.run(prefill, state, &slots, &all);
                    } else {
                        tokens.run(decode, state, &slots[2..], &others);
                        tokens.run(prefill, state, &slots[..2], &prompts);
                    }
                });
            });
        }
    }
}

fn all(c: &mut Criterion) {
    bench_memory(c);
    bench_decode::<bf16>(c);
    bench_decode::<f32>(c);
    bench_mixed(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
