//! The operator on the CPU, in flop/s: `cargo bench --bench operator`.
//!
//! Criterion prints elements per second; an element is one floating-point operation of the formula
//! (2 N² D per query head and segment for the causal local branch, 2 N D² for the retrieval, 4 N D²
//! per KV head for the delta update), so `Gelem/s` reads GF/s. The group `products` runs the
//! matrix-product crate on the same tiles with the same number of threads: its rate is the ceiling.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use infini_attn::{
    Element, Inputs, Outputs, Problem, State, TensorView, TensorViewMut, decode, prefill,
};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, StandardNormal};

/// (Hq, Hkv, D, N, T)
const SHAPES: [[usize; 5]; 3] =
    [[8, 8, 64, 512, 16384], [8, 2, 128, 2048, 16384], [8, 8, 128, 256, 16384]];

fn problem<T: Element>([heads, kv_heads, dim, segment_len, _]: [usize; 5]) -> Problem {
    Problem::builder()
        .heads(heads)
        .kv_heads(kv_heads)
        .head_dim(dim)
        .segment_len(segment_len)
        .dtype(T::DTYPE)
        .build()
        .expect("the shapes above are valid")
}

fn flops([heads, kv_heads, d, n, t]: [usize; 5]) -> u64 {
    let segment = heads * (2 * n * n * d + 2 * n * d * d) + kv_heads * 4 * n * d * d;
    (segment * t / n) as u64
}

struct Tensors<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    o: Vec<T>,
    shapes: [[usize; 4]; 2],
}

impl<T: Element> Tensors<T> {
    fn new(p: &Problem, batch: usize, tokens: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut normal = |heads: usize| {
            let x: Vec<f32> = (StandardNormal.sample_iter(&mut rng))
                .take(batch * tokens * heads * p.key_dim())
                .collect();
            let mut out = vec![T::zeroed(); x.len()];
            T::narrow(&x, &mut out);
            out
        };
        let (q, k, v) = (normal(p.heads()), normal(p.kv_heads()), normal(p.kv_heads()));
        let shape = |heads| [batch, tokens, heads, p.key_dim()];
        Self { o: q.clone(), q, k, v, shapes: [shape(p.heads()), shape(p.kv_heads())] }
    }

    fn run(&mut self, p: &Problem, state: &mut State, decoding: bool) {
        let [q, kv] = &self.shapes;
        let view = |x, shape: &[usize; 4]| TensorView::new(x, shape).expect("sized by new");
        let inputs = Inputs::new(view(&self.q, q), view(&self.k, kv), view(&self.v, kv));
        let outputs = Outputs::new(TensorViewMut::new(&mut self.o, q).expect("sized by new"));
        let gate = vec![0.0; p.heads()];
        let call = if decoding { decode } else { prefill };
        call(p, &inputs, &gate, state, outputs).expect("valid call");
    }
}

fn bench_prefill<T: Element>(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("prefill/delta/{}", T::DTYPE));
    group.sample_size(10);
    for shape in SHAPES {
        let p = problem::<T>(shape);
        let mut tensors = Tensors::<T>::new(&p, 1, shape[4]);
        group.throughput(Throughput::Elements(flops(shape)));
        group.bench_function(BenchmarkId::from_parameter(format!("{shape:?}")), |b| {
            b.iter(|| tensors.run(&p, &mut State::new(&p, 1).unwrap(), false));
        });
    }
}

/// The ceiling: scores and weighted values of one tile, on every thread of the pool at once.
fn bench_products(c: &mut Criterion) {
    let mut group = c.benchmark_group("products");
    for d in [64usize, 128] {
        let (rows, keys, calls) = (48usize, 128usize, 200usize);
        let threads = rayon::current_num_threads();
        let flops = threads * calls * 4 * rows * keys * d;
        group.throughput(Throughput::Elements(flops as u64));
        group.bench_function(format!("{rows}x{keys}x{d} and {rows}x{d}x{keys}"), |b| {
            b.iter(|| rayon::broadcast(|_| products(rows, keys, d, calls)));
        });
    }
}

fn products(rows: usize, keys: usize, d: usize, calls: usize) -> f32 {
    let (q, k, v) = (vec![0.5f32; rows * d], vec![0.25f32; d * keys], vec![0.5f32; keys * d]);
    let (mut s, mut o) = (vec![0.0f32; rows * keys], vec![0.0f32; rows * d]);
    let product = |dst: &mut [f32], a: &[f32], b: &[f32], n: usize, k: usize| {
        let (n_, k_, none) = (n as isize, k as isize, gemm::Parallelism::None);
        let (dst, a, b) = (dst.as_mut_ptr(), a.as_ptr(), b.as_ptr());
        // SAFETY: every buffer above has exactly the extents passed.
        unsafe {
            gemm::gemm(
                rows, n, k, dst, 1, n_, true, a, 1, k_, b, 1, n_, 1.0, 1.0, false, false, false,
                none,
            );
        }
    };
    for _ in 0..calls {
        product(&mut s, &q, &k, keys, d);
        product(&mut o, &s, &v, d, keys);
    }
    o[0]
}

/// One new token for each of 16 sequences whose open segments hold 1000 tokens, in place and by a copy
/// that advances while the state stays as it was.
fn bench_decode(c: &mut Criterion) {
    let p = problem::<bf16>([8, 2, 128, 2048, 0]);
    let (sequences, open) = (16, 1000);
    let mut state = State::new(&p, sequences).unwrap();
    Tensors::<bf16>::new(&p, sequences, open).run(&p, &mut state, false);
    let mut token = Tensors::<bf16>::new(&p, sequences, 1);
    let mut group = c.benchmark_group("decode/bf16");
    group.throughput(Throughput::Elements(sequences as u64));
    group.sample_size(20);
    let slots: Vec<usize> = (0..sequences).collect();
    for (name, copied) in [("16 sequences, 1000 open", false), ("the same, a copy", true)] {
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || state.fork(&slots).unwrap(),
                |state| {
                    let before = copied.then(|| state.clone());
                    token.run(&p, state, true);
                    before
                },
                criterion::BatchSize::LargeInput,
            );
        });
    }
}

/// Copies of a state of 16 MiB per slot, half of its rows in use.
fn bench_copies(c: &mut Criterion) {
    let p = problem::<f32>([8, 8, 128, 2048, 0]);
    let mut state = State::new(&p, 16).unwrap();
    Tensors::<f32>::new(&p, 16, 1024).run(&p, &mut state, false);
    let slots: Vec<usize> = (0..16).collect();
    let mut group = c.benchmark_group("copies");
    let rows = 16 * 8 * (2 * 1024 * 128 + 128 * 129) * size_of::<f32>();
    group.throughput(Throughput::Bytes(rows as u64));
    group.bench_function("clone", |b| b.iter(|| state.clone()));
    group.bench_function("fork", |b| b.iter(|| state.fork(&slots).unwrap()));
    group.bench_function("concat", |b| b.iter(|| State::concat(&[&state]).unwrap()));
}

/// Time per token of one long stream, fed 64 K tokens a call: elements are tokens.
fn bench_stream(c: &mut Criterion) {
    let p = problem::<f32>([2, 2, 64, 2048, 0]);
    let call = 1 << 16;
    let mut tensors = Tensors::<f32>::new(&p, 1, call);
    let mut group = c.benchmark_group("stream/f32");
    group.sample_size(10);
    for tokens in [1usize << 16, 1 << 20] {
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
            b.iter(|| {
                let mut state = State::new(&p, 1).unwrap();
                (0..tokens / call).for_each(|_| tensors.run(&p, &mut state, false));
                assert_eq!(state.tokens(0), tokens as u64);
            });
        });
    }
}

fn all(c: &mut Criterion) {
    bench_prefill::<f32>(c);
    bench_prefill::<bf16>(c);
    bench_products(c);
    bench_decode(c);
    bench_copies(c);
    bench_stream(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
