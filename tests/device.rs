//! The operator on a CUDA device: the shared table of cases, long streams, graphs, streams. Without
//! a device every test says how much it skipped, and why. Where the driver is the simulator's
//! (tests/ptxsim/driver), tests take less.
#![cfg(feature = "cuda")]

mod common;

use common::cases::Case;
use common::device::{Entry, OnDevice};
use common::driver::run_cases;
use common::metric::relative_rms;
use common::say::say;
use common::stream::{Stream, normals};
use common::tensor_cases::{Shape, pairwise};
use common::{bits, widen};
use cudarc::driver::CudaSlice;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::bf16;
use infini_attn::cuda::{
    self, Arch, Device, Gate, Inputs, KERNELS, Outputs, TensorView, TensorViewMut,
};
use infini_attn::{DType, Error, Problem, State, TensorViewMut as HostMut, prefill};

/// How much is run.
struct Extent {
    /// Multiply-adds of a case.
    budget: u64,
    /// Of so many cases one is taken.
    every: usize,
    /// Heads, KV heads, dimension, N.
    long_streams: &'static [[usize; 4]],
}

/// Some tenths of a second of the float64 reference per case.
const DEVICE: Extent = Extent {
    budget: 200_000_000,
    every: 1,
    long_streams: &[[8, 2, 128, 2048], [4, 4, 64, 512], [4, 1, 256, 256]],
};

/// The simulator's driver; tests/cuda_sim.rs runs all cases by plans. One in 31 meets every
/// dimension that a newer architecture has kernels for.
const SIMULATOR: Extent =
    Extent { budget: 2_000_000, every: 31, long_streams: &[[2, 1, 128, 128], [1, 1, 256, 64]] };

fn extent(device: &Device) -> &'static Extent {
    match device.name().expect("a name").as_str() {
        "PTX simulator" => &SIMULATOR,
        _ => &DEVICE,
    }
}

/// The first device; none: says what was skipped.
fn device(skipped: &str) -> Option<Device> {
    match Device::new(0) {
        Ok(device) => Some(device),
        Err(error @ Error::NoDevice { .. }) => {
            say(format_args!("skipped {skipped}: {error}"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Shapes that kernels of an architecture are compiled for.
fn shapes(arch: Arch) -> Vec<Shape> {
    let attention = KERNELS.iter().filter(|k| k.operation == "segment_attention");
    let attention = attention.filter(|k| k.arch == arch);
    attention.filter_map(|k| k.dtype.map(|dtype| (dtype, k.key_dim, k.value_dim))).collect()
}

/// Every case that `choose` makes of the table's; it gets a case's number.
fn run(entry: Entry, divisor: u64, choose: impl Fn(usize, Case) -> Option<Case>) {
    let cases = |budget: u64, every: usize, arch| -> Vec<Case> {
        let table = pairwise(&shapes(arch), budget / divisor).into_iter().enumerate();
        table.step_by(every).filter_map(|(i, case)| choose(i, case)).collect()
    };
    // In all shapes: those without newer kernels are served by the portable ones.
    let all = cases(DEVICE.budget, 1, Arch::Sm80).len();
    let Some(device) = device(&format!("{all} cases of {entry:?}")) else { return };
    let Extent { budget, every, .. } = *extent(&device);
    // Where few are run, they are those of the newest kernels.
    let few = every > 1 && device.target().expect("a target").arch == Arch::Sm90;
    let cases = cases(budget, every, if few { Arch::Sm90 } else { Arch::Sm80 });
    if cases.len() < all {
        say(format_args!("on the simulator: {} of {all} cases of {entry:?}", cases.len()));
    }
    let backend = OnDevice { device, entry };
    let summary = run_cases(&backend, &cases).finish(&format!("{backend:?}"));
    assert_eq!((summary.ran, summary.refused.len()), (cases.len(), 0));
}

#[test]
fn prefill_runs_the_table() {
    run(Entry::Prefill, 1, |_, case| Some(case));
}

#[test]
fn segment_runs_the_table() {
    run(Entry::Segment, 1, |_, case| Some(case.within_segments()));
}

#[test]
fn decode_runs_the_table_in_short_calls() {
    run(Entry::Decode, 4, |i, case| Some(case.recut([16, 5, 1, 11][i % 4])));
}

#[test]
fn entries_take_turns() {
    run(Entry::Mixed, 1, |_, case| Some(case).filter(|c| c.calls.len() > 1));
}

fn problem(heads: usize, kv_heads: usize, dim: usize, segment_len: usize) -> Problem {
    let b = Problem::builder().heads(heads).kv_heads(kv_heads).head_dim(dim);
    b.segment_len(segment_len).dtype(DType::BF16).build().expect("valid")
}

/// q, k, v of some tokens and room for their output, in device memory.
struct Tokens {
    q: CudaSlice<bf16>,
    k: CudaSlice<bf16>,
    v: CudaSlice<bf16>,
    o: CudaSlice<bf16>,
    shapes: [[usize; 4]; 2],
}

impl Tokens {
    fn new(device: &Device, stream: &Stream<bf16>) -> Self {
        let p = &stream.problem;
        let upload = |x: &[bf16]| device.upload(x).expect("room");
        let shapes = [p.heads(), p.kv_heads()].map(|h| [1, stream.tokens, h, p.key_dim()]);
        Self {
            q: upload(&stream.q),
            k: upload(&stream.k),
            v: upload(&stream.v),
            o: upload(&stream.q),
            shapes,
        }
    }

    fn views(&mut self) -> (Inputs<'_, bf16>, Outputs<'_, bf16>) {
        let Self { q, k, v, o, shapes: [many, few] } = self;
        let view = |x, shape| TensorView::new(x, shape).expect("a stream's own shape");
        let inputs = Inputs::new(view(q, many), view(k, few), view(v, few));
        (inputs, Outputs::new(TensorViewMut::new(o, many).expect("a stream's own shape")))
    }

    fn prefill(&mut self, state: &mut cuda::State, gate: &Gate) -> Vec<bf16> {
        let problem = *state.problem();
        let (inputs, outputs) = self.views();
        cuda::prefill(&problem, &inputs, gate, state, outputs).expect("a valid call");
        self.output(state.device())
    }

    fn output(&self, device: &Device) -> Vec<bf16> {
        let o = device.stream().clone_dtoh(&self.o).expect("a copy");
        device.synchronize().expect("no error on the device");
        o
    }
}

/// The CPU backend on the same stream.
fn on_cpu(stream: &Stream<bf16>, gate: &[f32], state: &mut State) -> Vec<f64> {
    let p = stream.problem;
    let mut o = vec![bf16::ZERO; stream.tokens * p.heads() * p.value_dim()];
    let shape = [1, stream.tokens, p.heads(), p.value_dim()];
    let outputs = infini_attn::Outputs::new(HostMut::new(&mut o, &shape).expect("its shape"));
    prefill(&p, &stream.inputs(), gate, state, outputs).expect("a valid call");
    widen(&o)
}

fn close(what: &str, got: &[f64], want: &[f64], limit: f64) {
    relative_rms(what, got, want, &[got.len()], limit).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn long_streams_are_those_of_the_cpu() {
    let all = DEVICE.long_streams.len();
    let Some(device) = device(&format!("{all} long streams")) else { return };
    for &[heads, kv_heads, dim, n] in extent(&device).long_streams {
        let p = problem(heads, kv_heads, dim, n);
        let (stream, logits) = (Stream::<bf16>::normal(&p, 4 * n + 77, 5), normals(6, heads));
        let mut cpu = State::new(&p, 1);
        let want = on_cpu(&stream, &logits, &mut cpu);
        let mut state = cuda::State::new(&device, &p, 1, false).expect("room");
        let gate = Gate::new(&device, &logits).expect("room");
        let got = Tokens::new(&device, &stream).prefill(&mut state, &gate);
        close(&format!("o at {dim}, {n}"), &widen(&got), &want, 8e-3);
        let host = state.to_host().expect("a state");
        let m = |s: &State| widen(s.memory().as_slice().expect("contiguous"));
        close(&format!("M at {dim}, {n}"), &m(&host), &m(&cpu), 4e-3);
        assert_eq!(host.open_len(0), cpu.open_len(0));
    }
}

#[test]
fn states_continue_after_a_visit_to_the_host() {
    let Some(device) = device("a state's visit to the host") else { return };
    let p = problem(4, 2, 64, 128);
    let gate = Gate::new(&device, &normals(1, 4)).expect("room");
    let stream = Stream::<bf16>::normal(&p, 400, 2);
    let mut state = cuda::State::new(&device, &p, 1, false).expect("room");
    Tokens::new(&device, &stream.slice(0..300)).prefill(&mut state, &gate);
    let mut visitor = state.to_host().expect("a state").to_device(&device, false).expect("room");
    let rest = stream.slice(300..400);
    let outputs = [&mut state, &mut visitor].map(|state| {
        let o = Tokens::new(&device, &rest).prefill(state, &gate);
        (bits(&o), state.to_host().expect("a state").to_bytes().expect("bytes"))
    });
    assert!(outputs[0].0 == outputs[1].0, "outputs differ");
    assert!(outputs[0].1 == outputs[1].1, "states differ");
}

#[test]
fn other_streams_wait_and_give_the_same_bits() {
    let Some(device) = device("a second stream") else { return };
    let p = problem(8, 2, 128, 256);
    let stream = Stream::<bf16>::normal(&p, 3000, 3);
    let gate = Gate::new(&device, &normals(4, 8)).expect("room");
    let mut first = cuda::State::new(&device, &p, 1, false).expect("room");
    let want = Tokens::new(&device, &stream).prefill(&mut first, &gate);
    let side = device.stream().context().new_stream().expect("a stream");
    let side = device.on(side).expect("the same context");
    let mut second = cuda::State::new(&side, &p, 1, false).expect("room");
    // Buffers of the first stream, written and read there, used on the second in between.
    let mut tokens = Tokens::new(&device, &stream);
    device.stream().memset_zeros(&mut tokens.o).expect("a fill");
    let (inputs, outputs) = tokens.views();
    cuda::prefill(&p, &inputs, &gate, &mut second, outputs).expect("a valid call");
    assert!(bits(&tokens.output(&device)) == bits(&want), "other bits on the second stream");
}

/// A captured step, replayed over the ends of three segments, against single steps on the CPU; and
/// twice, for equal bits.
#[test]
fn a_captured_step_replays_across_segments() {
    let Some(device) = device("graphs of a decode step") else { return };
    let p = problem(8, 2, 128, 64);
    let stream = Stream::<bf16>::normal(&p, 3 * 64 + 9, 7);
    let logits = normals(8, 8);
    let gate = Gate::new(&device, &logits).expect("room");
    let mut cpu = State::new(&p, 1);
    let want = on_cpu(&stream, &logits, &mut cpu);
    let [first, second] = [(); 2].map(|()| replay(&device, &stream, &gate));
    assert!(bits(&first.0) == bits(&second.0), "the replays differ");
    close("o of replays", &widen(&first.0), &want, 8e-3);
    let m = |s: &State| widen(s.memory().as_slice().expect("contiguous"));
    close("M after replays", &m(&first.1), &m(&cpu), 4e-3);
    assert_eq!((first.1.tokens(0), first.1.committed(0), first.1.open_len(0)), (201, 192, 9));
}

fn replay(device: &Device, stream: &Stream<bf16>, gate: &Gate) -> (Vec<bf16>, State) {
    let p = stream.problem;
    let mut state = cuda::State::new(device, &p, 1, false).expect("room");
    let mut token = Tokens::new(device, &stream.slice(0..1));
    let (inputs, outputs) = token.views();
    cuda::prepare_decode(&p, &inputs, gate, &state, &outputs).expect("room");
    let cu_stream = device.stream();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    cu_stream.begin_capture(mode).expect("a capture");
    // SAFETY: `token`, `gate` and `state` outlive the graph, which runs on the device's stream.
    let plan = unsafe { cuda::record_decode(&p, &inputs, gate, &state, outputs) };
    let graph = cu_stream.end_capture(CUgraphInstantiate_flags(0)).expect("a graph").expect("one");
    let plan = plan.expect("a plan that is captured");

    let mut all = vec![];
    for t in 0..stream.tokens {
        let next = stream.slice(t..t + 1);
        for (to, from) in
            [(&mut token.q, &next.q), (&mut token.k, &next.k), (&mut token.v, &next.v)]
        {
            cu_stream.memcpy_htod(from, to).expect("a copy");
        }
        state.advance(&plan).expect("a plan for any counters");
        graph.launch().expect("a replay");
        all.extend(token.output(device));
    }
    state.status().expect("nothing was skipped");
    (all, state.to_host().expect("a state"))
}

/// Two runs of a stream as maps: applied one after the other, and composed, they leave the state of
/// the whole; two local attentions over halves of the keys merge into the attention over both.
#[test]
fn maps_and_merges_are_those_of_the_cpu() {
    let Some(device) = device("maps and merges") else { return };
    let p = problem(4, 2, 64, 64);
    let stream = Stream::<bf16>::normal(&p, 4 * 64, 11);
    let mut cpu = State::new(&p, 1);
    on_cpu(&stream, &[0.0; 4], &mut cpu);
    let want = widen(cpu.memory().as_slice().expect("contiguous"));
    let m = |s: &cuda::State| {
        widen(s.to_host().expect("a state").memory().as_slice().expect("contiguous"))
    };

    let runs = [stream.slice(0..128), stream.slice(128..256)];
    let tokens = runs.each_ref().map(|run| Tokens::new(&device, run));
    let views = tokens.each_ref().map(|t| {
        let view = |x| TensorView::new(x, &t.shapes[1]).expect("a stream's own shape");
        (view(&t.k), view(&t.v))
    });
    let first = cuda::KeySums::zero(&device, &p, 1).expect("room");
    let sums = cuda::key_sums(&device, &p, views[0].0).expect("valid");
    let second = first.add(&sums).expect("one batch");
    let maps = [(views[0], &first), (views[1], &second)]
        .map(|((k, v), before)| cuda::segment_map(&p, k, v, before).expect("valid"));
    let mut state = cuda::State::new(&device, &p, 1, false).expect("room");
    maps.iter().for_each(|map| cuda::apply(map, &mut state).expect("it follows"));
    close("M by maps", &m(&state), &want, 4e-3);
    assert_eq!((state.tokens(0), state.committed(0)), (256, 256));
    let mut state = cuda::State::new(&device, &p, 1, false).expect("room");
    let whole = cuda::compose(&maps[0], &maps[1]).expect("one follows the other");
    cuda::apply(&whole, &mut state).expect("it follows");
    close("M by the composed map", &m(&state), &want, 4e-3);
    assert!(cuda::apply(&maps[0], &mut state).is_err(), "a map for no earlier tokens");

    // One filled memory among empty ones is itself.
    let empty = cuda::State::new(&device, &p, 1, false).expect("room");
    let merged = cuda::merge_memories(&[&state, &empty]).expect("one is empty");
    assert!(m(&merged) == m(&state), "merged with an empty one");
    assert!(matches!(cuda::merge_memories(&[&state, &state]), Err(Error::DeltaMerge { .. })));
}

#[test]
fn partial_attentions_merge_as_on_the_cpu() {
    let Some(device) = device("a merge of partial results") else { return };
    let shape = [1, 33, 4, 64];
    let (rows, logs) =
        ([0, 1].map(|i| normals(20 + i, 33 * 4 * 64)), [0, 1].map(|i| normals(30 + i, 33 * 4)));
    let rows = rows.map(|row| row.into_iter().map(bf16::from_f32).collect::<Vec<_>>());
    let mut want = vec![bf16::ZERO; rows[0].len()];
    let host = |x| infini_attn::TensorView::new(x, &shape).expect("its shape");
    let host_log = |x| infini_attn::TensorView::new(x, &[1, 4, 33]).expect("its shape");
    infini_attn::merge_partials(
        &rows.each_ref().map(|x| host(x)),
        &logs.each_ref().map(|x| host_log(x)),
        HostMut::new(&mut want, &shape).expect("its shape"),
        None,
    )
    .expect("valid");
    let parts = rows.each_ref().map(|x| device.upload(x).expect("room"));
    let weights = logs.each_ref().map(|x| device.upload(x).expect("room"));
    let mut out = device.upload(&want).expect("room");
    device.stream().memset_zeros(&mut out).expect("a fill");
    cuda::merge_partials(
        &device,
        &parts.each_ref().map(|x| TensorView::new(x, &shape).expect("its shape")),
        &weights.each_ref().map(|x| TensorView::new(x, &[1, 4, 33]).expect("its shape")),
        TensorViewMut::new(&mut out, &shape).expect("its shape"),
        None,
    )
    .expect("valid");
    let got = device.stream().clone_dtoh(&out).expect("a copy");
    device.synchronize().expect("no error on the device");
    close("merged", &widen(&got), &widen(&want), 4e-3);
}

#[test]
fn what_a_capture_cannot_hold_is_refused() {
    let Some(device) = device("refusals under capture") else { return };
    let p = problem(4, 2, 64, 64);
    let mut state = cuda::State::new(&device, &p, 1, false).expect("room");
    let gate = Gate::new(&device, &[0.0; 4]).expect("room");
    let mut token = Tokens::new(&device, &Stream::normal(&p, 1, 9));
    let (inputs, outputs) = token.views();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    device.stream().begin_capture(mode).expect("a capture");
    let results = [
        cuda::decode(&p, &inputs, &gate, &mut state, outputs).map(drop),
        state.to_host().map(drop),
        state.status(),
        device.synchronize(),
        cuda::State::new(&device, &p, 1, false).map(drop),
    ];
    device.stream().end_capture(CUgraphInstantiate_flags(0)).expect("an empty graph");
    for result in results {
        assert!(matches!(result, Err(Error::Capturing { .. })), "{result:?}");
    }
    // The capture is unharmed, and so is the state.
    assert_eq!(token.prefill(&mut state, &gate).len(), 4 * 64);
}
