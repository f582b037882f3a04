//! The host's side of a state in device memory.

use std::sync::{Mutex, MutexGuard, TryLockError};

use infini_attn::DType;
use infini_attn::cuda::params::{INFINI_SCALE_COLUMNS, InfiniCounters};
use infini_attn::cuda::{
    Addresses, Mirror, Operand, Plan, StateLayout, plan_copy_slots, plan_copy_within, plan_flush,
    plan_truncate,
};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use super::place::Place;
use super::python;
use crate::error;
use crate::problem::parsed;
use crate::state::{self, State};

/// Bytes of a slot's counters in device memory.
const COUNTERS: usize = size_of::<InfiniCounters>();

/// What the host knows of a state in device memory, whose buffer Python owns: problem, slots, layout and
/// counters. Where `place` is asked for, work is enqueued on the state at `address`.
#[pyclass(frozen, name = "_DeviceState", module = "infini_attn._core")]
pub struct DeviceState(Mutex<Mirror>);

impl DeviceState {
    /// Never waits for another call.
    pub fn read(&self) -> PyResult<MutexGuard<'_, Mirror>> {
        self.0.try_lock().map_err(|e| {
            PyRuntimeError::new_err(match e {
                TryLockError::WouldBlock => "state: in use by another call",
                TryLockError::Poisoned(_) => "state: left half-written by a call that crashed",
            })
        })
    }

    /// Enqueues a plan on this state, and moves the counters with it.
    pub fn run(&self, place: &Place<'_>, plan: &Plan, addresses: Addresses) -> PyResult<()> {
        let mut mirror = self.read()?;
        mirror.check(plan).map_err(python)?;
        match enqueue(place, plan, addresses) {
            Ok(()) => mirror.advance(plan).map_err(python),
            Err(Stopped { error, midway }) => {
                if midway {
                    mirror.break_off(plan).map_err(python)?;
                }
                Err(error)
            }
        }
    }

    fn change(&self, place: &Bound<'_, PyAny>, address: u64, plan: &Plan) -> PyResult<()> {
        let (place, _current) = Place::of(place)?;
        self.run(&place, plan, Addresses::new().with(Operand::State, address))
    }

    fn planned(&self, plan: impl FnOnce(&Mirror) -> infini_attn::Result<Plan>) -> PyResult<Plan> {
        plan(&*self.read()?).map_err(python)
    }

    fn list(&self, counter: impl Fn(&Mirror, usize) -> u64) -> PyResult<Vec<u64>> {
        let mirror = self.read()?;
        Ok((0..mirror.layout().slots()).map(|slot| counter(&mirror, slot)).collect())
    }
}

/// Why a run did not come to its end, and whether the driver has taken some of its steps.
pub struct Stopped {
    pub error: PyErr,
    midway: bool,
}

/// Enqueues a plan, in a workspace of Python's.
pub fn enqueue(place: &Place<'_>, plan: &Plan, addresses: Addresses) -> Result<(), Stopped> {
    let before = |error| Stopped { error, midway: false };
    place.device().load(plan).map_err(|e| before(python(e)))?;
    let workspace = place.workspace(plan.workspace_bytes()).map_err(before)?;
    let addresses = addresses.with(Operand::Workspace, workspace.address);
    let mut launcher = place.device().launcher();
    // SAFETY: Python keeps the tensors until the work is enqueued, and their allocator until it is
    // done; that nobody writes to them meanwhile is the caller's promise, as with every function of
    // the library that owns them.
    let run = unsafe { plan.run(&addresses, &mut launcher) };
    run.map_err(|e| Stopped { error: python(e), midway: launcher.taken() > 0 })
}

#[pymethods]
impl DeviceState {
    /// Of empty streams; with `counters`, the bytes of the state's part `counters`, of streams that
    /// stand there.
    #[new]
    #[pyo3(signature = (problem, slots, rotation, counters = None))]
    fn create(
        problem: &str,
        slots: usize,
        rotation: bool,
        counters: Option<&[u8]>,
    ) -> PyResult<Self> {
        let layout = StateLayout::new(&parsed(problem)?, slots, rotation).map_err(python)?;
        let mirror = match counters {
            Some(bytes) => Mirror::with_counters(&layout, &self::counters(bytes)?),
            None => Ok(Mirror::new(&layout)),
        };
        Ok(Self(Mutex::new(mirror.map_err(python)?)))
    }

    /// What the host knows of a copy of the state.
    fn copy(&self) -> PyResult<Self> {
        Ok(Self(Mutex::new(self.read()?.clone())))
    }

    /// Tokens each stream has seen.
    #[getter]
    fn tokens(&self) -> PyResult<Vec<u64>> {
        self.list(Mirror::tokens)
    }

    /// Tokens each stream has written into its memory.
    #[getter]
    fn committed(&self) -> PyResult<Vec<u64>> {
        self.list(Mirror::committed)
    }

    /// Tokens in each stream's open segment.
    #[getter]
    fn open_len(&self) -> PyResult<Vec<u64>> {
        self.list(|mirror, slot| mirror.open_len(slot) as u64)
    }

    #[pyo3(signature = (place, address, slots = None))]
    fn reset(
        &self,
        place: &Bound<'_, PyAny>,
        address: u64,
        slots: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let slots = self.slots(slots)?;
        let plan = self.planned(|mirror| mirror.layout().plan_reset(&slots))?;
        self.change(place, address, &plan)
    }

    #[pyo3(signature = (place, address, slots = None))]
    fn flush(
        &self,
        place: &Bound<'_, PyAny>,
        address: u64,
        slots: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let slots = self.slots(slots)?;
        let plan = self.planned(|mirror| plan_flush(mirror.problem(), mirror, &slots))?;
        self.change(place, address, &plan)
    }

    fn truncate(
        &self,
        place: &Bound<'_, PyAny>,
        address: u64,
        slot: usize,
        tokens: u64,
    ) -> PyResult<()> {
        let plan = self.planned(|mirror| plan_truncate(mirror, slot, tokens))?;
        self.change(place, address, &plan)
    }

    /// Slots of this state continue where slots of the state `other` at `from` stand: (from, to).
    fn copy_slots(
        &self,
        place: &Bound<'_, PyAny>,
        address: u64,
        other: &Bound<'_, Self>,
        from: u64,
        pairs: Vec<(usize, usize)>,
    ) -> PyResult<()> {
        let (place, _current) = Place::of(place)?;
        let addresses = Addresses::new().with(Operand::State, address);
        if std::ptr::eq(self, other.get()) {
            let plan = self.planned(|mirror| plan_copy_within(mirror, &pairs))?;
            return self.run(&place, &plan, addresses);
        }
        let other = other.get().read()?;
        let plan = self.planned(|mirror| plan_copy_slots(&other, mirror, &pairs))?;
        self.run(&place, &plan, addresses.with(Operand::Source(0), from))
    }

    /// The host copy of the state at `address`. Waits for the device.
    fn to_host(&self, py: Python<'_>, place: &Bound<'_, PyAny>, address: u64) -> PyResult<State> {
        let (place, _current) = Place::of(place)?;
        let (mut mirror, device) = (self.read()?.clone(), place.device());
        // SAFETY: Python keeps the buffer, in which plans of this layout have run, on this stream.
        let read = || unsafe { device.lend(address, &mut mirror, |state| state.to_host()) };
        py.detach(read).map(State::new).map_err(python)
    }

    /// Reads the status word of the state at `address`, and clears it: RuntimeError where kernels have
    /// met indices that they could not accept. Waits for the device.
    fn status(&self, py: Python<'_>, place: &Bound<'_, PyAny>, address: u64) -> PyResult<()> {
        let (place, _current) = Place::of(place)?;
        let (mut mirror, device) = (self.read()?.clone(), place.device());
        // SAFETY: as in `to_host`.
        let read = || unsafe { device.lend(address, &mut mirror, |state| state.status()) };
        py.detach(read).map_err(python)
    }

    /// Puts a host state in the place of all slots at `address`. Waits for the device.
    fn overwrite(
        &self,
        py: Python<'_>,
        place: &Bound<'_, PyAny>,
        address: u64,
        from: &State,
    ) -> PyResult<()> {
        let (place, _current) = Place::of(place)?;
        let (mut mirror, device, from) = (self.read()?, place.device(), from.read()?);
        let (mirror, from) = (&mut *mirror, &*from);
        // SAFETY: as in `to_host`.
        let write = || unsafe { device.lend(address, mirror, |state| state.overwrite(from)) };
        py.detach(write).map_err(python)
    }
}

impl DeviceState {
    fn slots(&self, given: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<usize>> {
        let count = self.read()?.layout().slots();
        state::slots(given, count)
    }
}

/// Counters as they lie in device memory.
fn counters(bytes: &[u8]) -> PyResult<Vec<InfiniCounters>> {
    if !bytes.len().is_multiple_of(COUNTERS) {
        let expected = format_args!("a multiple of {COUNTERS}");
        return Err(error::value("counters", format_args!("{} bytes", bytes.len()), expected));
    }
    Ok(bytes.chunks_exact(COUNTERS).map(bytemuck::pod_read_unaligned).collect())
}

/// Name, element type, shape and offset in bytes.
type Part = (&'static str, &'static str, Vec<usize>, u64);

/// Where the parts of a state lie in device memory, and the bytes of the whole.
#[pyfunction]
pub fn _device_layout(problem: &str, slots: usize, rotation: bool) -> PyResult<(Vec<Part>, u64)> {
    let p = &parsed(problem)?;
    let layout = StateLayout::new(p, slots, rotation).map_err(python)?;
    let (at, tickets) = (layout.params(0), layout.tickets());
    let (h, dk, dv, n) = (p.kv_heads(), p.key_dim(), p.value_dim(), p.segment_len());
    let element = if p.dtype() == DType::F16 { "float16" } else { "bfloat16" };
    let scales = dv / INFINI_SCALE_COLUMNS as usize;
    let parts = [
        ("memory", "float32", vec![slots, h, dk, dv], at.memory),
        ("normalizer", "float32", vec![slots, h, dk], at.normalizer),
        ("snapshot", element, vec![slots, h, dk, dv], at.snapshot),
        ("snapshot_scale", "float32", vec![slots, h, scales], at.snapshot_scale),
        ("open_k", element, vec![slots, h, n, dk], at.open_k),
        ("open_k_rotated", element, vec![slots, h, n, dk], at.open_k_rotated),
        ("open_v", element, vec![slots, h, n, dv], at.open_v),
        ("counters", "int64", vec![slots, COUNTERS / 8], at.counters),
        ("status", "int32", vec![1], at.status),
        ("head_tickets", "int32", vec![slots, h, p.group()], tickets[0]),
        ("sequence_tickets", "int32", vec![slots], tickets[1]),
    ];
    let there = |(name, ..): &Part| rotation || *name != "open_k_rotated";
    Ok((parts.into_iter().filter(there).collect(), layout.bytes()))
}
