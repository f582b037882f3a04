//! A training step of the operator on the CPU: `cargo bench --bench gradients`.
//!
//! Per shape the forward pass that fills a tape, the backward pass by tapes of every segment, of every
//! eighth and of none, and both passes together; criterion's elements are tokens.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use infini_attn::{
    Element, InputGradients, Inputs, OutputGradients, Outputs, Problem, State, StateGradient, Tape,
    TensorView, TensorViewMut, prefill, prefill_backward,
};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, StandardNormal};

/// (Hq, Hkv, D, N, T)
const SHAPES: [[usize; 5]; 3] =
    [[8, 8, 64, 512, 8192], [8, 2, 128, 2048, 8192], [4, 4, 16, 64, 4096]];

struct Step<T> {
    problem: Problem,
    gate: Vec<f32>,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    d_o: Vec<T>,
    o: Vec<T>,
    lse: Vec<f32>,
    gradients: [Vec<T>; 3],
    d_gate: Vec<f32>,
    of_q: [usize; 4],
    of_kv: [usize; 4],
}

impl<T: Element> Step<T> {
    fn new([heads, kv_heads, dim, segment_len, tokens]: [usize; 5]) -> Self {
        let problem = Problem::builder().heads(heads).kv_heads(kv_heads).head_dim(dim);
        let problem = problem.segment_len(segment_len).dtype(T::DTYPE).build();
        let mut rng = SmallRng::seed_from_u64(1);
        let mut normal = |heads: usize| {
            let x: Vec<f32> =
                StandardNormal.sample_iter(&mut rng).take(tokens * heads * dim).collect();
            let mut out = vec![T::zeroed(); x.len()];
            T::narrow(&x, &mut out);
            out
        };
        let (q, k, v, d_o) = (normal(heads), normal(kv_heads), normal(kv_heads), normal(heads));
        Self {
            problem: problem.expect("the shapes above are valid"),
            gate: vec![0.0; heads],
            o: q.clone(),
            lse: vec![0.0; tokens * heads],
            gradients: [q.clone(), k.clone(), v.clone()],
            d_gate: vec![0.0; heads],
            of_q: [1, tokens, heads, dim],
            of_kv: [1, tokens, kv_heads, dim],
            q,
            k,
            v,
            d_o,
        }
    }

    fn forward(&mut self, mut tape: Tape) -> Tape {
        let view = |x, shape: &[usize; 4]| TensorView::new(x, shape).expect("sized by new");
        let (q, kv) = (&self.of_q, &self.of_kv);
        let inputs = Inputs::new(view(&self.q, q), view(&self.k, kv), view(&self.v, kv));
        let lse = TensorViewMut::new(&mut self.lse, &[1, q[2], q[1]]).expect("sized by new");
        let o = TensorViewMut::new(&mut self.o, q).expect("sized by new");
        let mut state = State::new(&self.problem, 1).expect("memory");
        let outputs = Outputs::new(o).lse(lse).tape(&mut tape);
        prefill(&self.problem, &inputs, &self.gate, &mut state, outputs).expect("valid call");
        tape
    }

    fn backward(&mut self, tape: &Tape) {
        let view = |x, shape: &[usize; 4]| TensorView::new(x, shape).expect("sized by new");
        let (q, kv) = (&self.of_q, &self.of_kv);
        let inputs = Inputs::new(view(&self.q, q), view(&self.k, kv), view(&self.v, kv));
        let lse = TensorView::new(&self.lse, &[1, q[2], q[1]]).expect("sized by new");
        let outputs = OutputGradients::new(view(&self.o, q), lse, view(&self.d_o, q));
        let [dq, dk, dv] = &mut self.gradients;
        let into = |x, shape| TensorViewMut::new(x, shape).expect("sized by new");
        let gradients =
            InputGradients::new(into(dq, q), into(dk, kv), into(dv, kv), &mut self.d_gate);
        let mut state = StateGradient::new(&self.problem, 1).expect("memory");
        let p = &self.problem;
        prefill_backward(p, &inputs, &self.gate, tape, &outputs, &mut state, gradients)
            .expect("valid call");
    }
}

fn bench<T: Element>(c: &mut Criterion) {
    for shape in SHAPES {
        let mut step = Step::<T>::new(shape);
        let mut group = c.benchmark_group(format!("gradients/delta/{}/{shape:?}", T::DTYPE));
        group.sample_size(10).throughput(Throughput::Elements(shape[4] as u64));
        let every = |segments| Tape::every(segments).expect("at least 1");
        group.bench_function("forward", |b| b.iter(|| step.forward(every(1))));
        for (name, tape) in [("1", every(1)), ("8", every(8)), ("none", Tape::new())] {
            let tape = step.forward(tape);
            let id = BenchmarkId::new("backward, tape of every", name);
            group.bench_function(id, |b| b.iter(|| step.backward(&tape)));
        }
        group.bench_function("both", |b| {
            b.iter(|| {
                let tape = step.forward(every(1));
                step.backward(&tape);
            });
        });
    }
}

fn all(c: &mut Criterion) {
    bench::<f32>(c);
    bench::<bf16>(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
