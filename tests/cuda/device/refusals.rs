//! A driver that refuses one call, whichever it is: what is left is the state before, the state after,
//! or one that is refused until it is reset. Only the simulator's driver refuses on demand.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaContext, CudaSlice, DeviceRepr, result, sys};
use half::bf16;
use infini_attn::cuda::{self, Device, Gate, Inputs, Outputs, TensorView, TensorViewMut};
use infini_attn::{DType, Error, Problem, State, Update};
use libloading::Library;

use crate::calls::on_cpu;
use crate::common::say::say;
use crate::common::stream::Stream;
use crate::groups::Group;

/// Where the names are that the crate looks for before it calls anything.
const LIBRARY: &str = include_str!("../../../src/cuda/device/library.rs");

/// New tokens of a prefill: into an open segment, and beyond two more.
const TOKENS: usize = 150;
const GATE: [f32; 2] = [0.3, -0.2];

pub fn groups() -> Vec<Group> {
    let check =
        |name: &str, f: fn(&Device) -> Result<()>| Group::check(&format!("refusals::{name}"), f);
    vec![
        check("prefill", |_| bear(Update::Delta, |scene| scene.prefill(TOKENS))),
        check("segment", |_| bear(Update::Delta, |scene| scene.segment(40))),
        check("decode", |_| bear(Update::Delta, |scene| scene.decode(3))),
        check("flush", |_| bear(Update::Delta, Scene::flush)),
        check("reset", |_| bear(Update::Delta, Scene::reset)),
        check("maps", |_| bear(Update::Delta, Scene::maps)),
        check("states", |_| bear(Update::Linear, Scene::states)),
    ]
}

/// A state in the middle of a segment, in a context of its own, so that nothing is loaded there yet.
struct Scene {
    state: cuda::State,
    gate: Gate<'static>,
    /// q, k, v, o.
    tensors: [CudaSlice<bf16>; 4],
    problem: Problem,
}

type Operation = fn(&mut Scene) -> infini_attn::Result<Option<cuda::State>>;

impl Scene {
    fn new(host: &State, stream: &Stream<bf16>) -> Result<Self> {
        let device = Device::from_stream(own_context()?.new_stream()?)?;
        let gate = Gate::new(&device, &GATE)?;
        let upload = |x: &[bf16]| device.upload(x);
        let tensors =
            [upload(&stream.q)?, upload(&stream.k)?, upload(&stream.v)?, upload(&stream.q)?];
        Ok(Self { state: host.to_device(&device, false)?, gate, tensors, problem: *host.problem() })
    }

    /// The first tokens of the stream into slot 1.
    fn call(&mut self, tokens: usize, run: Run) -> infini_attn::Result<Option<cuda::State>> {
        let Self { state, gate, tensors: [q, k, v, o], problem: p } = self;
        let shape = |heads: usize| [1, tokens, heads, p.key_dim()];
        let (many, few) = (shape(p.heads()), shape(p.kv_heads()));
        let inputs = Inputs::new(part(q, &many)?, part(k, &few)?, part(v, &few)?).slots(&[1]);
        let strides = many.iter().rev().scan(1, |s, &n| Some(std::mem::replace(s, *s * n as i64)));
        let strides: Vec<i64> = strides.collect::<Vec<_>>().into_iter().rev().collect();
        let outputs = Outputs::new(TensorViewMut::strided(o, 0, &many, &strides)?);
        run(p, &inputs, gate, state, outputs).map(|()| None)
    }

    fn prefill(&mut self, tokens: usize) -> infini_attn::Result<Option<cuda::State>> {
        self.call(tokens, cuda::prefill)
    }

    fn segment(&mut self, tokens: usize) -> infini_attn::Result<Option<cuda::State>> {
        self.call(tokens, cuda::segment)
    }

    fn decode(&mut self, tokens: usize) -> infini_attn::Result<Option<cuda::State>> {
        self.call(tokens, cuda::decode)
    }

    fn flush(&mut self) -> infini_attn::Result<Option<cuda::State>> {
        cuda::flush(&self.problem, &mut self.state, &[0, 1]).map(|()| None)
    }

    fn reset(&mut self) -> infini_attn::Result<Option<cuda::State>> {
        self.state.reset(&[1, 0]).map(|()| None)
    }

    /// A run of two segments as a map, onto the flushed state.
    fn maps(&mut self) -> infini_attn::Result<Option<cuda::State>> {
        self.flush()?;
        let Self { state, tensors: [_, k, v, _], problem: p, .. } = self;
        let shape = [2, 64, p.kv_heads(), p.key_dim()];
        let (k, v) = (part(k, &shape)?, part(v, &shape)?);
        let before = cuda::KeySums::from_state(state)?;
        let between = before.add(&cuda::key_sums(state.device(), p, k)?)?;
        let first = cuda::segment_map(p, k, v, &before)?;
        let second = cuda::segment_map(p, k, v, &between)?;
        cuda::apply(&cuda::compose(&first, &second)?, state).map(|()| None)
    }

    /// A copy, and both together.
    fn states(&mut self) -> infini_attn::Result<Option<cuda::State>> {
        self.flush()?;
        let copy = self.state.fork(&[1, 1])?;
        let host = copy.to_host()?.to_device(copy.device(), false)?;
        cuda::merge_memories(&[&host, &self.state]).map(Some)
    }

    /// Everything there is to see afterwards.
    fn look(&mut self, made: Option<&cuda::State>) -> Result<[Vec<u8>; 3]> {
        let device = self.state.device();
        // Whatever the refused call has left.
        _ = device.is_capturing();
        let o = device.stream().clone_dtoh(&self.tensors[3])?;
        device.synchronize()?;
        let made = made.map_or(Ok(Vec::new()), |made| made.to_host()?.to_bytes())?;
        Ok([self.state.to_host()?.to_bytes()?, bytemuck::cast_slice(&o).to_vec(), made])
    }
}

type Run = for<'a> fn(
    &Problem,
    &Inputs<'a, bf16>,
    &Gate,
    &mut cuda::State,
    Outputs<'a, bf16>,
) -> infini_attn::Result<()>;

pub fn own_context() -> Result<Arc<CudaContext>> {
    let (device, mut context) = (result::device::get(0)?, std::ptr::null_mut());
    // SAFETY: a context of the device, owned from here on by what is returned.
    unsafe {
        sys::cuCtxCreate_v4(&raw mut context, std::ptr::null_mut(), 0, device).result()?;
        Ok(CudaContext::from_raw_context(0, device, context)?)
    }
}

/// The beginning of a buffer.
fn part<'a, T: infini_attn::Element + DeviceRepr>(
    data: &'a CudaSlice<T>,
    shape: &[usize; 4],
) -> infini_attn::Result<TensorView<'a, T>> {
    let [_, t, h, d] = shape.map(|n| n as i64);
    TensorView::strided(data, 0, shape, &[t * h * d, h * d, d, 1])
}

/// Does the operation with each of its calls of the driver refused in turn.
fn bear(update: Update, operation: Operation) -> Result<()> {
    let Some(driver) = Driver::open() else {
        say(format_args!("skipped: only the simulator's driver refuses calls"));
        return Ok(());
    };
    let b = Problem::builder().heads(2).kv_heads(1).head_dim(64).segment_len(64);
    let problem = b.dtype(DType::BF16).update(update).build()?;
    let stream = Stream::<bf16>::normal(&problem, TOKENS, 5);
    let mut host = State::new(&problem, 1)?;
    on_cpu(&stream.slice(0..80), &GATE, &mut host);
    let host = host.fork(&[0, 0])?;
    let run = |host: &State| -> Result<_> {
        let mut scene = Scene::new(host, &stream)?;
        driver.refuse(None);
        let made = operation(&mut scene)?;
        let calls = driver.calls();
        Ok((scene.look(made.as_ref())?, calls))
    };
    let (expected, calls) = run(&host)?;
    let (from_empty, _) = run(&State::new(&problem, 2)?)?;
    let unknown = calls.keys().find(|function| !LIBRARY.contains(&format!("{function:?}")));
    ensure!(unknown.is_none(), "{unknown:?} is called, and not looked for before");
    let (mut runs, mut unfinished) = (0, 0);
    for (function, count) in calls {
        for nth in 1..=count {
            let mut scene = Scene::new(&host, &stream)?;
            driver.refuse(Some((&function, nth)));
            let first = operation(&mut scene);
            driver.refuse(None);
            let what = || format!("call {nth} of {function} refused: {first:?}");
            let stuck = settle(&mut scene, operation, &first, &expected, &from_empty);
            let stuck = stuck.with_context(what)?;
            let early =
                ["cuModule", "cuFunc", "cuMemAlloc"].iter().any(|f| function.starts_with(f));
            ensure!(!(stuck && early), "{}: after the first step", what());
            runs += 1;
            unfinished += usize::from(stuck);
        }
    }
    say(format_args!("{runs} calls refused; left unfinished: {unfinished}"));
    Ok(())
}

/// Checks what a refusal has left: the state after, the state before (for the operation then succeeds),
/// or one that is refused until a reset. Whether it was the last.
fn settle(
    scene: &mut Scene,
    operation: Operation,
    first: &infini_attn::Result<Option<cuda::State>>,
    expected: &[Vec<u8>; 3],
    from_empty: &[Vec<u8>; 3],
) -> Result<bool> {
    let made = match first {
        Ok(made) => {
            ensure!(scene.look(made.as_ref())? == *expected, "accepted, and something is wrong");
            return Ok(false);
        }
        Err(Error::Driver { .. } | Error::Launch { .. }) => {
            _ = scene.state.device().is_capturing();
            operation(scene)
        }
        Err(error) => anyhow::bail!("an error of another kind: {error}"),
    };
    match made {
        Ok(made) => {
            ensure!(scene.look(made.as_ref())? == *expected, "wrong after a second try");
            Ok(false)
        }
        Err(Error::Unfinished { .. }) => {
            let read = scene.state.to_host();
            ensure!(matches!(read, Err(Error::Unfinished { .. })), "read: {read:?}");
            scene.state.reset(&[0, 1])?;
            let made = operation(scene)?;
            ensure!(scene.look(made.as_ref())? == *from_empty, "wrong after a reset");
            Ok(true)
        }
        Err(error) => Err(error.into()),
    }
}

/// The driver's library, which was opened before, if it is the simulator's.
pub struct Driver(Library);

impl Driver {
    pub fn open() -> Option<Self> {
        // SAFETY: the library is open.
        let library = unsafe { Library::new("libcuda.so") }.ok()?;
        // SAFETY: it is not called as what it is looked up as.
        let refuses = unsafe { library.get::<fn()>("ptxsim_refuse") }.is_ok();
        refuses.then_some(Self(library))
    }

    /// Refuses one of the calls of a function from here on.
    pub fn refuse(&self, call: Option<(&str, u64)>) {
        let name = call.map(|(name, _)| CString::new(name).expect("a function's name"));
        let nth = call.map_or(0, |(_, nth)| nth);
        type Refuse = unsafe extern "C" fn(*const c_char, u64);
        // SAFETY: the function has this type, and the name lives as long as the call.
        unsafe {
            let refuse = self.0.get::<Refuse>("ptxsim_refuse").expect("looked for");
            refuse(name.as_ref().map_or(std::ptr::null(), |name| name.as_ptr()), nth);
        }
    }

    /// How often each function was called since.
    pub fn calls(&self) -> BTreeMap<String, u64> {
        let mut text: [c_char; 4096] = [0; 4096];
        // SAFETY: the function has this type, and ends its text with a 0.
        let text = unsafe {
            let calls = self.0.get::<unsafe extern "C" fn(*mut c_char, usize)>("ptxsim_calls");
            calls.expect("beside ptxsim_refuse")(text.as_mut_ptr(), text.len());
            CStr::from_ptr(text.as_ptr()).to_string_lossy()
        };
        let line = |line: &str| {
            let (function, count) = line.split_once(' ')?;
            Some((function.to_owned(), count.parse().ok()?))
        };
        text.lines().filter_map(line).collect()
    }
}
