//! What surrounds a call: visits to the host, streams, graphs, maps, merges, captures.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, DevicePtr, DeviceRepr};
use half::{bf16, f16};
use infini_attn::cuda::{
    self, Arch, Device, Event, Gate, Inputs, Launcher, Outputs, Runs, Target, TensorView,
    TensorViewMut,
};
use infini_attn::{DType, Element, Error, Problem, State, TensorViewMut as HostMut, prefill};

use crate::common::metric::relative_rms;
use crate::common::stream::{Stream, normals};
use crate::common::switches::note;
use crate::common::{bits, narrow, widen};
use crate::full::is_small;
use crate::groups::Group;
use crate::refusals::Driver;

pub fn groups() -> Vec<Group> {
    let check =
        |name: &str, f: fn(&Device) -> Result<()>| Group::check(&format!("full::{name}"), f);
    vec![
        check("host", states_continue_after_a_visit_to_the_host),
        check("contexts", what_no_event_orders_is_refused),
        check("streams", other_streams_wait_and_give_the_same_bits),
        check("graph", a_captured_step_replays_across_segments),
        check("maps", maps_and_merges),
        check("merge_partials", merge_partials),
        check("capture", what_a_capture_cannot_hold_is_refused),
        check("host_tables", large_tables_are_copied_as_they_were),
        check("targets", calls_are_planned_for_the_target_that_is_given),
        check("observers", observers_are_told_of_every_launch),
    ]
}

pub fn problem(heads: usize, kv_heads: usize, dim: usize, segment_len: usize) -> Problem {
    let b = Problem::builder().heads(heads).kv_heads(kv_heads).head_dim(dim);
    b.segment_len(segment_len).dtype(DType::BF16).build().expect("valid")
}

/// A stream of some segments, and how long it is.
fn long(device: &Device) -> Result<(Problem, usize)> {
    Ok(match is_small(device)? {
        true => (problem(4, 2, 128, 128), 700),
        false => (problem(32, 8, 128, 2048), 3 * 2048 + 700),
    })
}

/// q, k, v of some tokens and room for their output, in device memory.
pub struct Tokens<T> {
    pub q: CudaSlice<T>,
    pub k: CudaSlice<T>,
    pub v: CudaSlice<T>,
    pub o: CudaSlice<T>,
    pub shapes: [[usize; 4]; 2],
}

impl<T: Element + DeviceRepr> Tokens<T> {
    pub fn new(device: &Device, stream: &Stream<T>) -> Self {
        let p = &stream.problem;
        let upload = |x: &[T]| device.upload(x).expect("room");
        let shapes = [p.heads(), p.kv_heads()].map(|h| [1, stream.tokens, h, p.key_dim()]);
        Self {
            q: upload(&stream.q),
            k: upload(&stream.k),
            v: upload(&stream.v),
            o: upload(&stream.q),
            shapes,
        }
    }

    pub fn views(&mut self) -> (Inputs<'_, T>, Outputs<'_, T>) {
        let Self { q, k, v, o, shapes: [many, few] } = self;
        let view = |x, shape| TensorView::new(x, shape).expect("a stream's own shape");
        let inputs = Inputs::new(view(q, many), view(k, few), view(v, few));
        (inputs, Outputs::new(TensorViewMut::new(o, many).expect("a stream's own shape")))
    }

    pub fn prefill(&mut self, state: &mut cuda::State, gate: &Gate) -> Vec<T> {
        let problem = *state.problem();
        let (inputs, outputs) = self.views();
        cuda::prefill(&problem, &inputs, gate, state, outputs).expect("a valid call");
        self.output(state.device())
    }

    pub fn output(&self, device: &Device) -> Vec<T> {
        let o = device.stream().clone_dtoh(&self.o).expect("a copy");
        device.synchronize().expect("no error on the device");
        o
    }
}

/// The CPU backend on the same stream.
pub fn on_cpu<T: Element>(stream: &Stream<T>, gate: &[f32], state: &mut State) -> Vec<f64> {
    let p = stream.problem;
    let mut o = vec![T::zeroed(); stream.tokens * p.heads() * p.value_dim()];
    let shape = [1, stream.tokens, p.heads(), p.value_dim()];
    let outputs = infini_attn::Outputs::new(HostMut::new(&mut o, &shape).expect("its shape"));
    prefill(&p, &stream.inputs(), gate, state, outputs).expect("a valid call");
    widen(&o)
}

fn close(what: &str, got: &[f64], want: &[f64], limit: f64) {
    relative_rms(what, got, want, &[got.len()], limit).unwrap_or_else(|e| panic!("{e}"));
}

fn states_continue_after_a_visit_to_the_host(device: &Device) -> Result<()> {
    let (p, tokens) = long(device)?;
    let gate = Gate::new(device, &normals(1, p.heads())).expect("room");
    let stream = Stream::<bf16>::normal(&p, tokens, 2);
    let before = tokens * 3 / 4;
    let mut state = cuda::State::new(device, &p, 1, false).expect("room");
    Tokens::new(device, &stream.slice(0..before)).prefill(&mut state, &gate);
    let mut visitor = state.to_host().expect("a state").to_device(device, false).expect("room");
    let rest = stream.slice(before..tokens);
    let outputs = [&mut state, &mut visitor].map(|state| {
        let o = Tokens::new(device, &rest).prefill(state, &gate);
        (bits(&o), state.to_host().expect("a state").to_bytes().expect("bytes"))
    });
    assert!(outputs[0].0 == outputs[1].0, "outputs differ");
    assert!(outputs[0].1 == outputs[1].1, "states differ");
    Ok(())
}

fn other_streams_wait_and_give_the_same_bits(device: &Device) -> Result<()> {
    let (p, tokens) = long(device)?;
    let stream = Stream::<bf16>::normal(&p, tokens, 3);
    let gate = Gate::new(device, &normals(4, p.heads())).expect("room");
    let mut first = cuda::State::new(device, &p, 1, false).expect("room");
    let want = Tokens::new(device, &stream).prefill(&mut first, &gate);
    let side = device.stream().context().new_stream().expect("a stream");
    let side = device.on(side).expect("the same context");
    let mut second = cuda::State::new(&side, &p, 1, false).expect("room");
    // Buffers of the first stream, written and read there, used on the second in between.
    let mut tokens = Tokens::new(device, &stream);
    device.stream().memset_zeros(&mut tokens.o).expect("a fill");
    let (inputs, outputs) = tokens.views();
    cuda::prefill(&p, &inputs, &gate, &mut second, outputs).expect("a valid call");
    assert!(bits(&tokens.output(device)) == bits(&want), "other bits on the second stream");
    Ok(())
}

/// A captured step, replayed over the ends of three segments, against single steps on the CPU; and
/// twice, for equal bits.
fn what_no_event_orders_is_refused(device: &Device) -> Result<()> {
    let context = device.stream().context();
    let each =
        [Device::from_stream(context.per_thread_stream()), device.on(context.per_thread_stream())];
    for refused in each {
        let text = refused.expect_err("one stream per thread").to_string();
        let expected = "stream: the per-thread default stream given, one stream for all threads: \
                        CudaContext::new_stream or default_stream expected";
        assert_eq!(text, expected);
    }
    assert!(Device::from_stream(context.default_stream()).is_ok());

    // The same context, by another object.
    let other = Device::from_stream(CudaContext::new(device.ordinal())?.new_stream()?)?;
    let text = device.on(other.stream().clone()).expect_err("another object").to_string();
    assert!(text.starts_with("stream: a stream of another context object given"), "{text}");
    let p = problem(2, 1, 64, 64);
    let stream = Stream::<bf16>::normal(&p, 100, 3);
    let gate = Gate::new(device, &[0.0; 2])?;
    let mut state = cuda::State::new(device, &p, 1, false)?;
    let (mut theirs, mut ours) = (Tokens::new(&other, &stream), Tokens::new(device, &stream));
    let (inputs, outputs) = theirs.views();
    let refused = cuda::prefill(&p, &inputs, &gate, &mut state, outputs).expect_err("another");
    let text = refused.to_string();
    assert!(
        text.starts_with("q: a buffer of device 0, of another CudaContext object given"),
        "{text}"
    );
    assert_eq!(state.tokens(0), 0);

    // Its kernels are those of the first.
    let expected = ours.prefill(&mut state, &gate);
    let driver = Driver::open();
    driver.iter().for_each(|driver| driver.refuse(None));
    let gate = Gate::new(&other, &[0.0; 2])?;
    let mut state = cuda::State::new(&other, &p, 1, false)?;
    assert!(theirs.prefill(&mut state, &gate) == expected, "other kernels");
    if let Some(driver) = driver {
        let calls = driver.calls();
        assert!(!calls.contains_key("cuModuleLoadData"), "{calls:?}");
    }
    Ok(())
}

fn a_captured_step_replays_across_segments(device: &Device) -> Result<()> {
    let (heads, kv_heads, n) = if is_small(device)? { (8, 2, 64) } else { (32, 8, 256) };
    let p = problem(heads, kv_heads, 128, n);
    let stream = Stream::<bf16>::normal(&p, 3 * n + 9, 7);
    let logits = normals(8, heads);
    let gate = Gate::new(device, &logits).expect("room");
    let mut cpu = State::new(&p, 1).unwrap();
    let want = on_cpu(&stream, &logits, &mut cpu);
    let [first, second] = [(); 2].map(|()| replay(device, &stream, &gate));
    assert!(bits(&first.0) == bits(&second.0), "the replays differ");
    close("o of replays", &widen(&first.0), &want, 8e-3);
    let m = |s: &State| widen(s.memory().as_slice().expect("contiguous"));
    close("M after replays", &m(&first.1), &m(&cpu), 4e-3);
    let counters = (first.1.tokens(0), first.1.committed(0), first.1.open_len(0));
    assert_eq!(counters, (3 * n as u64 + 9, 3 * n as u64, 9));
    Ok(())
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
        note("replay of a decode step");
        graph.launch().expect("a replay");
        all.extend(token.output(device));
    }
    state.status().expect("nothing was skipped");
    (all, state.to_host().expect("a state"))
}

/// Two runs of a stream as maps: applied one after the other, and composed, they leave the state of
/// the whole; two local attentions over halves of the keys merge into the attention over both.
pub fn maps_and_merges(device: &Device) -> Result<()> {
    maps_of::<bf16>(device)?;
    maps_of::<f16>(device)
}

fn maps_of<T: Element + DeviceRepr>(device: &Device) -> Result<()> {
    let p = problem(4, 2, 64, 64).to_builder().dtype(T::DTYPE).build()?;
    let stream = Stream::<T>::normal(&p, 4 * 64, 11);
    let mut cpu = State::new(&p, 1).unwrap();
    on_cpu(&stream, &[0.0; 4], &mut cpu);
    let want = widen(cpu.memory().as_slice().expect("contiguous"));
    let m = |s: &cuda::State| {
        widen(s.to_host().expect("a state").memory().as_slice().expect("contiguous"))
    };

    let runs = [stream.slice(0..128), stream.slice(128..256)];
    let tokens = runs.each_ref().map(|run| Tokens::new(device, run));
    let views = tokens.each_ref().map(|t| {
        let view = |x| TensorView::new(x, &t.shapes[1]).expect("a stream's own shape");
        (view(&t.k), view(&t.v))
    });
    let first = cuda::KeySums::zero(device, &p, 1).expect("room");
    let sums = cuda::key_sums(device, &p, views[0].0).expect("valid");
    let second = first.add(&sums).expect("one batch");
    let maps = [(views[0], &first), (views[1], &second)]
        .map(|((k, v), before)| cuda::segment_map(&p, k, v, before).expect("valid"));
    let mut state = cuda::State::new(device, &p, 1, false).expect("room");
    maps.iter().for_each(|map| cuda::apply(map, &mut state).expect("it follows"));
    close("M by maps", &m(&state), &want, 4e-3);
    assert_eq!((state.tokens(0), state.committed(0)), (256, 256));
    let mut state = cuda::State::new(device, &p, 1, false).expect("room");
    let whole = cuda::compose(&maps[0], &maps[1]).expect("one follows the other");
    cuda::apply(&whole, &mut state).expect("it follows");
    close("M by the composed map", &m(&state), &want, 4e-3);
    assert!(cuda::apply(&maps[0], &mut state).is_err(), "a map for no earlier tokens");

    // One filled memory among empty ones is itself.
    let empty = cuda::State::new(device, &p, 1, false).expect("room");
    let merged = cuda::merge_memories(&[&state, &empty]).expect("one is empty");
    assert!(m(&merged) == m(&state), "merged with an empty one");
    assert!(matches!(cuda::merge_memories(&[&state, &state]), Err(Error::DeltaMerge { .. })));
    Ok(())
}

pub fn merge_partials(device: &Device) -> Result<()> {
    partials_of::<bf16>(device)?;
    partials_of::<f16>(device)
}

fn partials_of<T: Element + DeviceRepr>(device: &Device) -> Result<()> {
    let shape = [1, 33, 4, 64];
    let (rows, logs) =
        ([0, 1].map(|i| normals(20 + i, 33 * 4 * 64)), [0, 1].map(|i| normals(30 + i, 33 * 4)));
    let rows = rows.map(|row| narrow::<T>(&row));
    let mut want = vec![T::zeroed(); rows[0].len()];
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
    let mut out = device.upload(&vec![T::zeroed(); want.len()]).expect("room");
    cuda::merge_partials(
        device,
        &parts.each_ref().map(|x| TensorView::new(x, &shape).expect("its shape")),
        &weights.each_ref().map(|x| TensorView::new(x, &[1, 4, 33]).expect("its shape")),
        TensorViewMut::new(&mut out, &shape).expect("its shape"),
        None,
    )
    .expect("valid");
    let got = device.stream().clone_dtoh(&out).expect("a copy");
    device.synchronize().expect("no error on the device");
    close("merged", &widen(&got), &widen(&want), 4e-3);
    Ok(())
}

fn what_a_capture_cannot_hold_is_refused(device: &Device) -> Result<()> {
    let p = problem(4, 2, 64, 64);
    let mut state = cuda::State::new(device, &p, 1, false).expect("room");
    let gate = Gate::new(device, &[0.0; 4]).expect("room");
    let mut token = Tokens::new(device, &Stream::<bf16>::normal(&p, 1, 9));
    let (inputs, outputs) = token.views();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    device.stream().begin_capture(mode).expect("a capture");
    let results = [
        cuda::decode(&p, &inputs, &gate, &mut state, outputs).map(drop),
        state.to_host().map(drop),
        state.status(),
        device.synchronize(),
        cuda::State::new(device, &p, 1, false).map(drop),
    ];
    device.stream().end_capture(CUgraphInstantiate_flags(0)).expect("an empty graph");
    for result in results {
        assert!(matches!(result, Err(Error::Capturing { .. })), "{result:?}");
    }
    // The capture is unharmed, and so is the state.
    assert_eq!(token.prefill(&mut state, &gate).len(), 4 * 64);
    Ok(())
}

/// More than launches carry: what it is copied from may change as soon as it is enqueued.
fn large_tables_are_copied_as_they_were(device: &Device) -> Result<()> {
    let lens = [70_000, 300_000, 65_537, 100_000, 70_001];
    let copies = lens.map(|len| device.stream().clone_htod(&vec![0_u8; len]).expect("room"));
    let mut from = vec![0; 300_000];
    for round in 1..4 {
        for (i, copy) in copies.iter().enumerate() {
            from.fill(10 * round + i as u8);
            let to = copy.device_ptr(device.stream()).0;
            device.launcher().copy(to, &from[..copy.len()])?;
        }
        from.fill(0);
        for (i, copy) in copies.iter().enumerate() {
            let got = device.stream().clone_dtoh(copy).expect("a copy");
            device.synchronize()?;
            assert!(got.iter().all(|byte| *byte == 10 * round + i as u8), "copy {i}");
        }
    }
    Ok(())
}

fn calls_are_planned_for_the_target_that_is_given(device: &Device) -> Result<()> {
    let own = device.target()?;
    // Every block of a pair has a multiprocessor to itself.
    let most = own.multiprocessors / 2;
    let clusters = own.arch == Arch::Sm80 || (1..=most).contains(&own.pairs);
    assert!(clusters && (2..=16).contains(&own.cluster_blocks), "{own:?}");
    let portable = Target { arch: Arch::Sm80, multiprocessors: 7, split_len: 64, ..own };
    let other = device.with_target(portable)?;
    assert_eq!((other.target()?, device.target()?), (portable, own));
    assert_eq!(other.prefill_options()?.target, portable);
    assert_eq!(other.decode_options(Runs::Once)?.target, portable);
    let none = device.with_target(Target { multiprocessors: 0, ..own }).expect_err("none");
    assert_eq!(none.to_string(), "target.multiprocessors: 0 given, 1 or more expected");
    if device.capability() != (9, 0) {
        let newer = device.with_target(Target { arch: Arch::Sm90, ..own }).expect_err("newer");
        assert_eq!(newer.to_string(), "target.arch: sm90 given, sm80 at most expected");
    }
    let too_late = unsafe { cuda::replace_kernels(std::path::Path::new("nowhere")) };
    assert!(matches!(too_late, Err(Error::Io { .. })), "{too_late:?}");
    Ok(())
}

fn observers_are_told_of_every_launch(device: &Device) -> Result<()> {
    let told = Arc::new(Mutex::new(Vec::<String>::new()));
    let own = told.clone();
    let observed = device.observed_by(move |event| {
        own.lock().expect("no panic").push(match event {
            Event::Launch(launch) => launch.kernel.operation.into(),
            _ => "done".into(),
        });
    });
    let p = problem(2, 1, 64, 64);
    let gate = Gate::new(&observed, &[0.0; 2])?;
    let mut state = cuda::State::new(&observed, &p, 1, false)?;
    let mut tokens = Tokens::new(&observed, &Stream::<bf16>::normal(&p, 130, 3));
    // Uploads wait.
    told.lock().expect("no panic").clear();
    tokens.prefill(&mut state, &gate);
    let told = told.lock().expect("no panic").join(" ");
    let expected = "table table segment_state normaliser_scan segment_transition memory_scan \
                    segment_attention append done";
    assert_eq!(told, expected);
    Ok(())
}
