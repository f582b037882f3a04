//! Slots as wholes: copies, drafts taken back, visits to the host, pools that grow; and states whose
//! memory comes from elsewhere.

use anyhow::Result;
use cudarc::driver::CudaContext;
use half::bf16;
use infini_attn::cuda::{self, CurrentContext, Device, Gate, plan_truncate};
use infini_attn::{Error, Problem, State};

use crate::calls::{Tokens, on_cpu, problem};
use crate::common::bits;
use crate::common::stream::Stream;
use crate::groups::Group;
use crate::refusals::Driver;

const GATE: [f32; 2] = [0.3, -0.4];
const N: usize = 64;
/// Tokens that the slots of [`Scene::host`] have seen.
const SEEN: [usize; 3] = [80, 10, 130];

pub fn groups() -> Vec<Group> {
    let check =
        |name: &str, f: fn(&Device) -> Result<()>| Group::check(&format!("slots::{name}"), f);
    vec![
        check("copies", copies),
        check("truncate", drafts_are_taken_back),
        check("host", some_slots_visit_the_host),
        check("broken", what_was_broken_off_is_replaced),
        check("buffers", memory_of_the_application),
        check("lent", memory_and_stream_that_are_lent),
    ]
}

struct Scene<'a> {
    p: Problem,
    stream: Stream<bf16>,
    gate: Gate<'a>,
    /// Slots of different lengths.
    host: State,
}

impl Scene<'_> {
    fn new(device: &Device) -> Result<Self> {
        let p = problem(2, 1, 64, N);
        let stream = Stream::<bf16>::normal(&p, 150, 5);
        let host = SEEN.map(|tokens| prefilled(&stream, tokens));
        let host = State::concat(&host.each_ref())?;
        Ok(Self { p, stream, gate: Gate::new(device, &GATE)?, host })
    }

    /// Output of the tokens from `first` on, brought to a slot.
    fn step(&self, state: &mut cuda::State, slot: usize, first: usize, count: usize) -> Vec<u8> {
        let result = self.try_step(state, slot, first, count);
        result.expect("a valid call")
    }

    fn try_step(
        &self,
        state: &mut cuda::State,
        slot: usize,
        first: usize,
        count: usize,
    ) -> infini_attn::Result<Vec<u8>> {
        let device = state.device().clone();
        let mut tokens = Tokens::new(&device, &self.stream.slice(first..first + count));
        let (inputs, outputs) = tokens.views();
        cuda::decode(&self.p, &inputs.slots(&[slot]), &self.gate, state, outputs)?;
        Ok(bits(&tokens.output(&device)))
    }
}

fn prefilled(stream: &Stream<bf16>, tokens: usize) -> State {
    let mut state = State::new(&stream.problem, 1).expect("room");
    on_cpu(&stream.slice(0..tokens), &GATE, &mut state);
    state
}

fn bytes(state: &cuda::State) -> Vec<u8> {
    state.to_host().expect("a state").to_bytes().expect("bytes")
}

pub fn copies(device: &Device) -> Result<()> {
    let scene = Scene::new(device)?;
    let with_empty = State::concat(&[&scene.host, &State::new(&scene.p, 1)?])?;
    let of = |slots: &[usize]| with_empty.fork(slots).expect("slots").to_bytes().expect("bytes");
    let mut a = scene.host.to_device(device, false)?;
    let mut b = cuda::State::new(device, &scene.p, 5, true)?;
    b.copy_slots(&a, &[(0, 4), (2, 1), (0, 0)])?;
    assert!(bytes(&b) == of(&[0, 2, 3, 3, 0]), "copies");
    assert_eq!((b.tokens(1), b.committed(1), b.open_len(1)), (130, 128, 2));
    b.copy_within(&[(4, 2), (1, 3)])?;
    assert!(bytes(&b) == of(&[0, 2, 0, 2, 0]), "copies within");
    assert!(bytes(&a.fork(&[2, 0, 2])?) == of(&[2, 0, 2]), "a fork");
    assert!(bytes(&a.resized(4)?) == of(&[0, 1, 2, 3]), "a larger pool");

    // They go on alike, apart from each other.
    let want = scene.step(&mut a, 0, 80, 3);
    let others = bytes(&b.fork(&[0, 1, 3, 4])?);
    assert!(scene.step(&mut b, 2, 80, 3) == want, "other bits of a copy");
    assert!(bytes(&b.fork(&[0, 1, 3, 4])?) == others, "another slot has changed");

    let before = bytes(&b);
    let side = device.on(device.stream().context().new_stream()?)?;
    let elsewhere = cuda::State::new(&side, &scene.p, 1, false)?;
    let other = cuda::State::new(device, &problem(2, 1, 64, 32), 1, false)?;
    for (result, expected) in [
        (b.copy_slots(&a, &[(0, 1), (1, 1)]), "pairs[1] (target): 1 given"),
        (b.copy_slots(&a, &[(3, 1)]), "pairs[0] (source): 3 given"),
        (b.copy_within(&[(0, 1), (1, 2)]), "pairs[1] (source): 1 given"),
        (b.copy_slots(&elsewhere, &[(0, 1)]), "from: of another stream given"),
        (b.copy_slots(&other, &[(0, 1)]), "state: made for segment_len = "),
        (a.resized(2).map(drop), "slots: 2 given, at least the 3 that there are expected"),
        (a.fork(&[0, 3]).map(drop), "slots[1]: 3 given"),
    ] {
        let text = result.expect_err(expected).to_string();
        assert!(text.starts_with(expected), "{text}");
    }
    assert!(bytes(&b) == before, "refused, and something has changed");
    Ok(())
}

fn drafts_are_taken_back(device: &Device) -> Result<()> {
    let scene = Scene::new(device)?;
    let mut state = scene.host.to_device(device, false)?;
    let mut shorter = prefilled(&scene.stream, 70);
    let mut want = shorter.to_device(device, false)?;
    on_cpu(&scene.stream.slice(70..80), &GATE, &mut shorter);
    state.restore(&[0], &shorter)?;
    state.truncate(0, 70)?;
    assert!(bytes(&state.fork(&[0])?) == bytes(&want), "another state");
    let next = scene.step(&mut state, 0, 70, 10);
    assert!(next == scene.step(&mut want, 0, 70, 10), "other bits after a draft");
    assert!(matches!(state.truncate(0, 81), Err(Error::Value { .. })));
    let text = state.truncate(0, 63).expect_err("committed").to_string();
    let expected = "tokens: 63 given for slot 0, at least 64 expected: what is committed cannot be \
                    taken back";
    assert_eq!(text, expected);
    state.truncate(0, 64)?;
    assert_eq!((state.tokens(0), state.committed(0), state.open_len(0)), (64, 64, 0));
    Ok(())
}

fn some_slots_visit_the_host(device: &Device) -> Result<()> {
    let scene = Scene::new(device)?;
    let mut state = scene.host.to_device(device, false)?;
    let two = state.to_host_slots(&[2, 0])?;
    assert!(two.to_bytes()? == scene.host.fork(&[2, 0])?.to_bytes()?, "downloaded");
    assert_eq!(state.to_host_slots(&[])?.sequences(), 0);
    state.restore(&[1, 2], &two)?;
    assert!(bytes(&state) == scene.host.fork(&[0, 2, 0])?.to_bytes()?, "restored");
    let before = bytes(&state);
    for (result, expected) in [
        (
            state.restore(&[1], &two),
            "slots: 1 elements given, 2 (the slots of the state put back) expected",
        ),
        (state.restore(&[1, 3], &two), "slots[1]: 3 given"),
        (state.restore(&[1, 1], &two), "slots[1]: 1 given"),
        (state.restore(&[0], &State::new(&problem(2, 1, 64, 32), 1)?), "state: made for"),
        (state.to_host_slots(&[3]).map(drop), "slots[0]: 3 given"),
    ] {
        let text = result.expect_err(expected).to_string();
        assert!(text.starts_with(expected), "{text}");
    }
    assert!(bytes(&state) == before, "refused, and something has changed");
    Ok(())
}

/// Slot 0 fills a segment, and the driver refuses what follows the first step.
fn what_was_broken_off_is_replaced(device: &Device) -> Result<()> {
    let Some(driver) = Driver::open() else { return Ok(()) };
    let scene = Scene::new(device)?;
    let mut shorter = prefilled(&scene.stream, 60);
    shorter = State::concat(&[&shorter, &scene.host])?;
    let broken = || -> Result<cuda::State> {
        let mut state = shorter.to_device(device, false)?;
        // Kernels are loaded, whoever was here before.
        scene.step(&mut state, 0, 60, 10);
        state.restore(&[0, 1, 2, 3], &shorter)?;
        driver.refuse(Some(("cuLaunchKernel", 2)));
        let refused = scene.try_step(&mut state, 0, 60, 10);
        driver.refuse(None);
        assert!(matches!(refused, Err(Error::Launch { .. })), "{refused:?}");
        Ok(state)
    };
    let mut state = broken()?;
    state.refresh()?;
    let host = State::new(&scene.p, 1)?;
    let mut other = host.to_device(device, false)?;
    for result in [
        state.copy_within(&[(0, 1)]),
        other.copy_slots(&state, &[(0, 0)]),
        state.truncate(0, 60),
        state.to_host_slots(&[1, 0]).map(drop),
        state.fork(&[0]).map(drop),
    ] {
        assert!(matches!(result, Err(Error::Unfinished { slot: 0 })), "{result:?}");
    }
    let mut resized = state.resized(5)?;
    assert!(matches!(resized.to_host(), Err(Error::Unfinished { slot: 0 })));
    resized.reset(&[0])?;
    let empty = State::new(&scene.p, 1)?;
    let want = State::concat(&[&empty, &scene.host, &empty])?;
    assert!(bytes(&resized) == want.to_bytes()?, "a larger pool");

    state.copy_within(&[(3, 0)])?;
    assert!(bytes(&state) == shorter.fork(&[3, 1, 2, 3])?.to_bytes()?, "copied within");
    let mut state = broken()?;
    state.restore(&[0], &shorter.fork(&[0])?)?;
    assert!(bytes(&state) == shorter.to_bytes()?, "restored");
    let mut state = broken()?;
    state.copy_slots(&other, &[(0, 0)])?;
    assert_eq!(state.tokens(0), 0);
    assert!(state.to_host().is_ok());
    Ok(())
}

/// A state that is taken apart, changed behind the mirror's back, and put together; a gate that is there.
fn memory_of_the_application(device: &Device) -> Result<()> {
    let scene = Scene::new(device)?;
    let state = scene.host.to_device(device, false)?;
    let want = scene.step(&mut state.fork(&[2])?, 0, 130, 3);
    let (buffer, mirror) = state.into_buffer()?;
    assert_eq!((mirror.tokens(0), buffer.len() as u64), (80, mirror.layout().bytes()));
    // SAFETY: what has just been taken out.
    let mut state = unsafe { cuda::State::from_buffer(device, buffer, mirror) }?;
    assert!(bytes(&state) == scene.host.to_bytes()?, "another state");

    let mut told = state.mirror().clone();
    let plan = cuda::plan_truncate(&told, 0, 70)?;
    let addresses = cuda::Addresses::new().with(cuda::Operand::State, state.address());
    // SAFETY: a plan for this state, which the mirror is told of below.
    unsafe { plan.run(&addresses, &mut device.launcher()) }?;
    told.advance(&plan)?;
    state.refresh()?;
    assert!(*state.mirror() == told, "{:?}", state.mirror());

    let logits = device.upload(&GATE)?;
    let gate = Gate::from_slice(device, logits)?;
    let scene = Scene { gate, ..scene };
    assert!(scene.step(&mut state, 2, 130, 3) == want, "other bits by another gate");
    state.truncate(2, 130)?;
    let more = device.upload(&[&[f32::NAN], &GATE[..]].concat())?;
    let lent = more.slice(1..);
    let scene = Scene { gate: Gate::lent(device, &lent)?, ..scene };
    assert!(scene.step(&mut state, 2, 130, 3) == want, "other bits by a gate that is lent");
    let gate = Gate::from_slice(device, device.upload(&[f32::NAN, -0.4])?)?;
    let scene = Scene { gate, ..scene };
    let o = scene.step(&mut state, 2, 133, 1);
    let rows: Vec<bf16> = bytemuck::pod_collect_to_vec(&o);
    let nan = |x: &bf16| x.is_nan();
    assert!(rows[..64].iter().all(nan) && !rows[64..].iter().any(nan), "{rows:?}");

    let layout = *state.mirror().layout();
    let mirror = || cuda::Mirror::new(&layout);
    let room = |device: &Device, bytes: u64| device.stream().alloc_zeros::<u8>(bytes as usize);
    let side = device.on(device.stream().context().new_stream()?)?;
    let other = Device::from_stream(CudaContext::new(device.ordinal())?.new_stream()?)?;
    for (buffer, expected) in [
        (room(device, layout.bytes() - 1)?, "state: "),
        (room(&side, layout.bytes())?, "state: a buffer of another stream given"),
        (room(&other, layout.bytes())?, "state: a buffer of device 0, of another CudaContext"),
    ] {
        // SAFETY: it is refused.
        let refused = unsafe { cuda::State::from_buffer(device, buffer, mirror()) };
        let text = refused.expect_err(expected).to_string();
        assert!(text.starts_with(expected), "{text}");
    }
    let refused = Gate::from_slice(device, other.upload(&GATE)?).expect_err("another context");
    assert!(refused.to_string().starts_with("gate: a buffer of device 0, of another"), "{refused}");
    Ok(())
}

/// A device on a stream of others, and memory that others have allocated and go on using.
fn memory_and_stream_that_are_lent(device: &Device) -> Result<()> {
    let scene = Scene::new(device)?;
    let mut owner = cuda::State::new(device, &scene.p, 3, false)?;
    let (at, mut mirror) = (owner.address(), owner.mirror().clone());
    let _current = CurrentContext::keep()?;
    // SAFETY: the stream lives as long as `device`, in the primary context.
    let borrowed =
        unsafe { Device::borrowed(device.ordinal(), device.stream().cu_stream() as u64) }?;
    let lend = |address, mirror: &mut cuda::Mirror, host: &State| {
        // SAFETY: the state's own memory, on its stream; or refused.
        unsafe { borrowed.lend(address, mirror, |state| state.overwrite(host)) }
    };
    lend(at, &mut mirror, &scene.host)?;
    owner.refresh()?;
    assert!(mirror == *owner.mirror() && bytes(&owner) == scene.host.to_bytes()?, "another state");
    // SAFETY: as above.
    let host = unsafe { borrowed.lend(at, &mut mirror, |state| state.to_host()) }?;
    assert!(mirror == *owner.mirror() && host.to_bytes()? == scene.host.to_bytes()?, "read back");

    let longer = State::new(&scene.p, 4)?;
    let other = State::new(&problem(2, 1, 64, 32), 3)?;
    for (result, expected) in [
        (lend(at + 8, &mut mirror, &scene.host), "state: "),
        (lend(0, &mut mirror, &scene.host), "state: "),
        (lend(at, &mut mirror, &longer), "from: 4 elements given, 3 (the slots of the state)"),
        (lend(at, &mut mirror, &other), "state: made for segment_len = "),
    ] {
        let text = result.expect_err(expected).to_string();
        assert!(text.starts_with(expected), "{text}");
    }
    assert!(bytes(&owner) == scene.host.to_bytes()?, "refused, and something has changed");

    let Some(driver) = Driver::open() else { return Ok(()) };
    driver.refuse(Some(("cuMemcpyHtoDAsync_v2", 2)));
    let refused = lend(at, &mut mirror, &scene.host);
    driver.refuse(None);
    assert!(matches!(refused, Err(Error::Driver { .. })), "{refused:?}");
    let refused = plan_truncate(&mirror, 0, 70);
    assert!(matches!(refused, Err(Error::Unfinished { slot: 0 })), "{refused:?}");
    driver.refuse(Some(("cuMemcpyHtoDAsync_v2", 2)));
    let refused = owner.overwrite(&State::new(&scene.p, 3)?);
    driver.refuse(None);
    assert!(matches!(refused, Err(Error::Driver { .. })), "{refused:?}");
    assert!(matches!(owner.to_host(), Err(Error::Unfinished { .. })));
    owner.overwrite(&scene.host)?;
    assert!(bytes(&owner) == scene.host.to_bytes()?, "written again");
    Ok(())
}
