//! The crate's typed calls on a CUDA device as backends.
//!
//! Every call runs twice, from the same state: the second run must leave the same bits. Guards lie
//! around and between all rows, in device memory as well. After every call the device's counters
//! must be those that the host expects, and the status word 0.

use cudarc::driver::{CudaSlice, DeviceRepr};
use half::{bf16, f16};
use infini_attn::cuda::{
    self, Device, Gate, Inputs, Outputs, Rope, State, TensorView, TensorViewMut,
};
use infini_attn::{DType, Element, Problem, Result};

use super::Backend;
use super::entry::Entry;
use crate::common::buffers::{OutputBuffers, Strided};
use crate::common::call::{Call, TABLE_ROWS, laid_out};
use crate::common::cases::Case;
use crate::common::model::slot_values;
use crate::common::tolerance::Precision;

/// An entry point on a device.
#[derive(Debug)]
pub struct OnDevice {
    pub device: Device,
    pub entry: Entry,
}

/// A state, calls made on it, and what was found.
pub struct Tracked {
    state: State,
    calls: u64,
    findings: Vec<String>,
}

impl Backend for OnDevice {
    type State = Tracked;
    const PRECISION: Precision = Precision::TensorCore;
    // 16 bytes of 16-bit elements.
    const MARGIN: usize = 8;

    fn refuses(&self, case: &Case) -> Option<&'static str> {
        self.entry.refuses(case)
    }

    fn new_state(&self, case: &Case, slots: usize) -> Tracked {
        let state = State::new(&self.device, &case.problem, slots, case.rope.is_some());
        let state = state.unwrap_or_else(|e| panic!("{}: {e}", case.name));
        Tracked { state, calls: 0, findings: vec![] }
    }

    fn call<T: Element>(
        &self,
        problem: &Problem,
        call: &Call<'_, T>,
        gate: &[f32],
        state: &mut Tracked,
        out: &mut OutputBuffers<T>,
    ) -> Result<()> {
        let entry = self.entry.of(problem, call, |slot| state.state.open_len(slot), state.calls);
        state.calls += 1;
        let slots: Vec<usize> = (0..state.state.sequences()).collect();
        let mut twin = state.state.fork(&slots)?;
        let mut again = out.clone();
        run(entry, problem, call, gate, &mut state.state, out)?;
        run(entry, problem, call, gate, &mut twin, &mut again)?;
        let same = again.bits() == out.bits()
            && twin.to_host()?.to_bytes()? == state.state.to_host()?.to_bytes()?;
        if !same {
            state.findings.push("a second run leaves other bits".into());
        }
        Ok(())
    }

    fn flush(&self, problem: &Problem, state: &mut Tracked, slots: &[usize]) -> Result<()> {
        cuda::flush(problem, &mut state.state, slots)
    }

    fn memory(&self, _: &Problem, state: &Tracked, slot: usize) -> [Vec<f64>; 2] {
        let host = state.state.to_host().expect("a state of the device");
        [slot_values(&host.memory(), slot), slot_values(&host.normalizer(), slot)]
    }

    fn counters(&self, state: &Tracked, slot: usize) -> [u64; 3] {
        let s = &state.state;
        [s.tokens(slot), s.committed(slot), s.open_len(slot) as u64]
    }

    fn findings(&self, state: &mut Tracked) -> Vec<String> {
        let mut findings = std::mem::take(&mut state.findings);
        findings.extend(state.state.status().err().map(|e| e.to_string()));
        match state.state.to_host() {
            Err(error) => findings.push(error.to_string()),
            Ok(host) => findings.extend((0..host.sequences()).filter_map(|slot| {
                let got = [host.tokens(slot), host.committed(slot), host.open_len(slot) as u64];
                let expected = self.counters(state, slot);
                (got != expected).then(|| format!("slot {slot}: {got:?}, {expected:?} expected"))
            })),
        }
        findings
    }
}

/// One call, with buffers of its own.
fn run<T: Element>(
    entry: Entry,
    problem: &Problem,
    call: &Call<'_, T>,
    gate: &[f32],
    state: &mut State,
    out: &mut OutputBuffers<T>,
) -> Result<()> {
    match T::DTYPE {
        DType::BF16 => run_as::<T, bf16>(entry, problem, call, gate, state, out),
        DType::F16 => run_as::<T, f16>(entry, problem, call, gate, state, out),
        other => panic!("no case of the device is {other}"),
    }
}

/// `D` is `T`, as cudarc knows it.
fn run_as<T: Element, D: Element + DeviceRepr>(
    entry: Entry,
    problem: &Problem,
    call: &Call<'_, T>,
    gate: &[f32],
    state: &mut State,
    out: &mut OutputBuffers<T>,
) -> Result<()> {
    let device = state.device().clone();
    let gate = Gate::new(&device, gate)?;
    let [q, k, v] = [&call.q, &call.k, &call.v].map(|x| upload::<T, D>(&device, x));
    let (q, k, v) = (q?, k?, v?);
    let view = |x: &Strided<T>| (x.offset(), x.shape().to_vec(), x.strides().to_vec());
    let tensor = |data, x| {
        let (offset, shape, strides) = view(x);
        TensorView::<D>::strided(data, offset, &shape, &strides)
    };
    let mut inputs = Inputs::new(tensor(&q, &call.q)?, tensor(&k, &call.k)?, tensor(&v, &call.v)?);
    inputs = laid_out!(inputs, call);
    let tables = call.rope.as_ref().map(|r| [table(&device, r.cos), table(&device, r.sin)]);
    let tables = tables.map(|[cos, sin]| Ok::<_, infini_attn::Error>((cos?, sin?))).transpose()?;
    if let (Some(r), Some((cos, sin))) = (&call.rope, &tables) {
        let half = r.rotation.channels / 2;
        let table = |data| TensorView::strided(data, 0, &[TABLE_ROWS, half], &[half as i64, 1]);
        let rope = Rope::new(table(cos)?, table(sin)?).interleaved(r.rotation.interleaved);
        inputs = inputs.rope(match &r.positions {
            Some(positions) => rope.positions(positions),
            None => rope,
        });
    }
    let mut o = upload::<T, D>(&device, &out.o)?;
    let mut lse = out.lse.as_ref().map(|x| device.upload(x.data())).transpose()?;
    let mut a_dot = out.a_dot.as_ref().map(|x| upload::<T, D>(&device, x)).transpose()?;
    let mut a_mem = out.a_mem.as_ref().map(|x| upload::<T, D>(&device, x)).transpose()?;
    let mut outputs = Outputs::new(writable(&mut o, &out.o)?);
    if let (Some(data), Some(x)) = (&mut lse, &out.lse) {
        outputs = outputs.lse(TensorViewMut::strided(data, x.offset(), x.shape(), x.strides())?);
    }
    if let (Some(data), Some(x)) = (&mut a_dot, &out.a_dot) {
        outputs = outputs.a_dot(writable(data, x)?);
    }
    if let (Some(data), Some(x)) = (&mut a_mem, &out.a_mem) {
        outputs = outputs.a_mem(writable(data, x)?);
    }
    match entry {
        Entry::Segment => cuda::segment(problem, &inputs, &gate, state, outputs)?,
        Entry::Decode => cuda::decode(problem, &inputs, &gate, state, outputs)?,
        Entry::Forward => cuda::forward(problem, &inputs, &gate, state, outputs)?,
        _ => cuda::prefill(problem, &inputs, &gate, state, outputs)?,
    }
    download(&device, &o, &mut out.o);
    for (data, x) in [(&a_dot, &mut out.a_dot), (&a_mem, &mut out.a_mem)] {
        if let (Some(data), Some(x)) = (data, x) {
            download(&device, data, x);
        }
    }
    if let (Some(data), Some(x)) = (&lse, &mut out.lse) {
        x.data_mut().copy_from_slice(&device.stream().clone_dtoh(data).expect("a copy"));
    }
    device.synchronize()
}

/// The buffer as it is, guards included.
fn upload<T: Element, D: Element + DeviceRepr>(
    device: &Device,
    x: &Strided<T>,
) -> Result<CudaSlice<D>> {
    device.upload(bytemuck::cast_slice(x.data()))
}

/// A rotation table; one without columns still gets an address.
fn table(device: &Device, values: &[f32]) -> Result<CudaSlice<f32>> {
    device.upload(if values.is_empty() { &[0.0] } else { values })
}

fn writable<'a, T: Element, D: Element + DeviceRepr>(
    data: &'a mut CudaSlice<D>,
    x: &Strided<T>,
) -> Result<TensorViewMut<'a, D>> {
    TensorViewMut::strided(data, x.offset(), x.shape(), x.strides())
}

fn download<T: Element, D: Element + DeviceRepr>(
    device: &Device,
    from: &CudaSlice<D>,
    to: &mut Strided<T>,
) {
    let values = device.stream().clone_dtoh(from).expect("a copy");
    to.data_mut().copy_from_slice(bytemuck::cast_slice(&values));
}
