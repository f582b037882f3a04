//! A pool of states that owns its device memory, and the buffers that calls read besides tensors.

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, result};

use super::error::driver;
use super::launcher::Stopped;
use super::observer::Event;
use super::transfer::Parts;
use super::{Buffer, Device};
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Addresses, Operand, Requirement};
use crate::cuda::plan::allocation::PART_ALIGN;
use crate::cuda::plan::layout::StateLayout;
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::params::{InfiniCounters, InfiniState};
use crate::error::{Error, Result};
use crate::memory::Counters;
use crate::problem::Problem;

/// The state of `slots` independent streams in device memory: what [`crate::State`] is on the host.
///
/// Belongs to the stream of the [`Device`] it was made with; every call on it goes there, in order,
/// and returns when the work is enqueued. The counters that [`Self::tokens`] and its like show are
/// the host's mirror of the device's: they are where the stream will be when everything enqueued so
/// far is done.
///
/// Everything that a call needs is loaded and allocated before its first step. Should the driver then
/// refuse a step all the same, the slots that the call works on are unusable ([`Error::Unfinished`]) until
/// [`Self::reset`], [`Self::restore`] or a copy of another slot.
///
/// ```no_run
/// use infini_attn::{DType, Problem, cuda};
/// let device = cuda::Device::new(0)?;
/// let problem = Problem::builder().heads(8).head_dim(128).dtype(DType::BF16).build()?;
/// let mut state = cuda::State::new(&device, &problem, 4, false)?;
/// assert_eq!(state.tokens(0), 0);
/// let host: infini_attn::State = state.to_host()?;
/// # Ok::<(), infini_attn::Error>(())
/// ```
#[derive(Debug)]
pub struct State {
    device: Device,
    pub(super) mirror: Mirror,
    data: Buffer,
}

impl State {
    /// Empty streams in slots 0 to `slots` − 1. `rotation`: with room for rotated keys, which calls
    /// with [`Inputs::rope`](crate::cuda::Inputs::rope) need.
    ///
    /// # Errors
    /// Those of [`StateLayout::new`], [`Error::Driver`] when the device's memory does not suffice,
    /// [`Error::Capturing`].
    pub fn new(device: &Device, problem: &Problem, slots: usize, rotation: bool) -> Result<Self> {
        let layout = StateLayout::new(problem, slots, rotation)?;
        Self::empty(device, Mirror::new(&layout))
    }

    /// A state in memory that the application has allocated: [`Self::into_buffer`] the other way round, or
    /// the beginning of a buffer on which the plan of [`StateLayout::plan_init`] was run by hand. The
    /// problem, the number of slots and the layout are those of the mirror. The state owns the buffer from
    /// here on: memory that cudarc must not free is taken out again by [`Self::into_buffer`] and
    /// `CudaSlice::leak`.
    ///
    /// # Errors
    /// [`Error::Length`] for a buffer of fewer bytes than [`StateLayout::bytes`], [`Error::Address`] for
    /// one that does not begin at a multiple of 256, [`Error::Value`] for one of another stream or
    /// context object than the device's, [`Error::Capturing`]; the buffer is dropped.
    ///
    /// # Safety
    /// Once the work that is enqueued on the device's stream is done, the buffer holds what the layout's
    /// `plan_init` and other plans of this crate have left there, with the counters of the mirror; nobody
    /// else uses it from here on.
    pub unsafe fn from_buffer(
        device: &Device,
        data: CudaSlice<u8>,
        mirror: Mirror,
    ) -> Result<Self> {
        device.refuse_capture("a state of a buffer", "make it before the capture")?;
        device.check_context(Operand::State, data.stream())?;
        if data.stream() != device.stream() {
            return Err(Error::value("state", "a buffer of another stream", "of the same stream"));
        }
        let bytes = mirror.layout().bytes();
        if (data.len() as u64) < bytes {
            let expected = format!("at least {bytes} (bytes of the layout)");
            return Err(Error::Length { argument: "state", got: data.len(), expected });
        }
        let address = data.device_ptr(device.stream()).0;
        let addresses = Addresses::new().with(Operand::State, address);
        Requirement { operand: Operand::State, align: PART_ALIGN, before: 0, after: bytes }
            .check(&addresses)?;
        Ok(Self::of(device, mirror, Buffer { address, data }))
    }

    /// A state of what was checked.
    pub(super) fn of(device: &Device, mirror: Mirror, data: Buffer) -> Self {
        Self { device: device.clone(), mirror, data }
    }

    /// Its memory alone.
    pub(super) fn into_data(self) -> CudaSlice<u8> {
        self.data.data
    }

    /// The buffer that holds the state, and the mirror of its counters. Other streams wait for what is
    /// enqueued, as for every buffer.
    ///
    /// # Errors
    /// [`Error::Capturing`]; the state is dropped.
    pub fn into_buffer(self) -> Result<(CudaSlice<u8>, Mirror)> {
        self.device.refuse_capture("the buffer of a state", "take it after the capture")?;
        let mut data = self.data.data;
        drop(data.device_ptr_mut(self.device.stream()));
        self.device.pending("recording an event")?;
        Ok((data, self.mirror))
    }

    /// Empty slots, whatever the mirror says of them.
    pub(super) fn empty(device: &Device, mirror: Mirror) -> Result<Self> {
        let init = mirror.layout().plan_init()?;
        let state = Self::allocate(device, mirror)?;
        state.run(&init)?;
        Ok(state)
    }

    /// The device copy of a host state; it continues where that stands. Rotated keys of an open
    /// segment are rounded to the element type, as the kernels hold them.
    ///
    /// # Errors
    /// Those of [`Self::new`], and [`Error::Value`] when there is no room for the rotated keys that
    /// an open segment holds, or when an open key or value is not a number of the element type,
    /// which no call can have brought.
    pub fn from_host(device: &Device, state: &crate::State, rotation: bool) -> Result<Self> {
        let layout = StateLayout::new(state.problem(), state.sequences(), rotation)?;
        let (parts, mirror) = packed(state, &layout)?;
        let copy = Self::empty(device, mirror)?;
        copy.write(&parts)?;
        Ok(copy)
    }

    /// Puts a host state in the place of all slots, [`Self::from_host`] without an allocation. Waits for
    /// the device.
    ///
    /// # Errors
    /// Those of [`Self::restore`], before anything is written; the device's, and then all slots are
    /// [`Error::Unfinished`].
    pub fn overwrite(&mut self, state: &crate::State) -> Result<()> {
        self.device.refuse_capture("writing a state", "write it before the capture")?;
        self.problem().check_same(state.problem())?;
        if state.sequences() != self.sequences() {
            let expected = format!("{} (the slots of the state)", self.sequences());
            return Err(Error::Length { argument: "from", got: state.sequences(), expected });
        }
        let (parts, mirror) = packed(state, self.mirror.layout())?;
        let init = self.mirror.layout().plan_init()?;
        let written = self.run(&init).and_then(|()| self.write(&parts));
        match written {
            Ok(()) => self.mirror = mirror,
            Err(_) => self.mirror.break_off(&init)?,
        }
        written
    }

    /// Uploads the parts into empty slots.
    fn write(&self, parts: &Parts) -> Result<()> {
        let at = self.parts();
        let counters: Vec<InfiniCounters> = parts.counters.iter().map(|&c| c.into()).collect();
        self.upload(at.memory, bytemuck::cast_slice(&parts.memory))?;
        self.upload(at.normalizer, bytemuck::cast_slice(&parts.normalizer))?;
        self.upload(at.counters, bytemuck::cast_slice(&counters))?;
        self.upload(at.open_k, &parts.open_k)?;
        self.upload(at.open_k_rotated, &parts.open_k_rotated)?;
        self.upload(at.open_v, &parts.open_v)?;
        self.run(&self.mirror.layout().plan_snapshots()?)?;
        // The parts are read by then, whatever memory they lie in.
        self.device.synchronize()
    }

    /// The host copy, exactly: open segments are widened to f32. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Driver`] with what went wrong on the device, [`Error::Capturing`], [`Error::Value`]
    /// when the device's counters are not those of any sequence of calls, [`Error::Unfinished`].
    pub fn to_host(&self) -> Result<crate::State> {
        self.mirror.check_finished(0..self.sequences())?;
        self.device.refuse_capture("reading a state", "read it after the capture has ended")?;
        let (layout, p, at) = (self.mirror.layout(), self.problem(), self.parts());
        let rows = layout.slots() * p.kv_heads();
        let (dk, dv, n) = (p.key_dim(), p.value_dim(), p.segment_len());
        let counters = self.download::<InfiniCounters>(at.counters, layout.slots())?;
        let counters: Vec<Counters> = counters.into_iter().map(Counters::from).collect();
        let [open, rotated] = Parts::filled(&counters);
        let bytes = |wanted: bool, dim: usize| {
            if wanted { rows * n * dim * p.dtype().bytes() } else { 0 }
        };
        let parts = Parts {
            memory: self.download(at.memory, rows * dk * dv)?,
            normalizer: self.download(at.normalizer, rows * dk)?,
            open_k: self.download(at.open_k, bytes(open, dk))?,
            open_k_rotated: self.download(at.open_k_rotated, bytes(rotated, dk))?,
            open_v: self.download(at.open_v, bytes(open, dv))?,
            counters,
        };
        parts.unpack(p)
    }

    /// Takes over what the counters on the device are, where plans were run by hand that the mirror was
    /// not told of. Waits for the device. Slots in which a call was broken off stay refused.
    ///
    /// # Errors
    /// [`Error::Value`] for counters that no sequence of calls leads to; the mirror stays as it was.
    /// [`Error::Driver`], [`Error::Capturing`].
    pub fn refresh(&mut self) -> Result<()> {
        self.device.refuse_capture("reading counters", "read them after the capture has ended")?;
        let found = self.download::<InfiniCounters>(self.parts().counters, self.sequences())?;
        self.mirror.refresh(&found)
    }

    /// Forgets everything the given slots have seen, a call that was broken off there included.
    ///
    /// # Errors
    /// [`Error::Value`] for a slot out of range or named twice; nothing is reset then. The device's.
    pub fn reset(&mut self, slots: &[usize]) -> Result<()> {
        let plan = self.mirror.layout().plan_reset(slots)?;
        self.advance_with(&plan, Addresses::new())
    }

    /// Reads the status word, in which kernels note indices they could not accept, and clears it.
    /// Waits for the device. Only what comes from device memory can be wrong there: everything the
    /// host passes was checked before the launch.
    ///
    /// # Errors
    /// [`Error::Status`] naming what was met; those sequences were skipped (tokens at positions outside the
    /// tables: taken in without rotation), and the mirror does not
    /// know it. [`Error::Driver`], [`Error::Capturing`].
    pub fn status(&mut self) -> Result<()> {
        self.device.refuse_capture("reading the status word", "read it after the capture")?;
        let status = self.parts().status;
        match self.download::<u32>(status, 1)?[0] {
            0 => Ok(()),
            bits => {
                self.upload(status, &[0; 4])?;
                Err(Error::Status { bits })
            }
        }
    }

    /// The device and stream it belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The problem this state belongs to.
    pub fn problem(&self) -> &Problem {
        self.mirror.problem()
    }

    /// The mirror of its counters, for plans made by hand.
    pub fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// The device address of its allocation, laid out by [`Mirror::layout`].
    pub fn address(&self) -> u64 {
        self.data.address
    }

    /// Number of slots.
    pub fn sequences(&self) -> usize {
        self.mirror.layout().slots()
    }

    /// Tokens the slot has seen; also the default position of its next token.
    ///
    /// # Panics
    /// This and the two accessors below panic for a slot that the state does not have.
    pub fn tokens(&self, slot: usize) -> u64 {
        self.mirror.tokens(slot)
    }

    /// Tokens the slot has written into (M, z).
    pub fn committed(&self, slot: usize) -> u64 {
        self.mirror.committed(slot)
    }

    /// Tokens in the slot's open segment, 0 to N − 1.
    pub fn open_len(&self, slot: usize) -> usize {
        self.mirror.open_len(slot)
    }

    /// Bytes of device memory held.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    fn allocate(device: &Device, mirror: Mirror) -> Result<Self> {
        let data = device.allocate(mirror.layout().bytes(), "a state")?;
        Ok(Self::of(device, mirror, data))
    }

    /// Runs a plan that leaves the mirror where it is.
    fn run(&self, plan: &Plan) -> Result<()> {
        let addresses = Addresses::new().with(Operand::State, self.data.address);
        self.device.run(plan, addresses)
    }

    /// Runs a plan, with the addresses of everything else, and moves the mirror with it.
    pub(super) fn advance_with(&mut self, plan: &Plan, others: Addresses) -> Result<()> {
        self.mirror.check(plan)?;
        match self.device.try_run(plan, others.with(Operand::State, self.data.address)) {
            Ok(()) => self.mirror.advance(plan),
            Err(Stopped { error, midway }) => {
                if midway {
                    self.mirror.break_off(plan)?;
                }
                Err(error)
            }
        }
    }

    pub(super) fn parts(&self) -> InfiniState {
        self.mirror.layout().params(self.data.address)
    }

    fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: `to` and the bytes from there on belong to `data`, whose layout says so; the caller
        // keeps `from` until the stream was waited for, or it is pageable and read before this
        // returns.
        unsafe { result::memcpy_htod_async(to, from, self.device.stream().cu_stream()) }
            .map_err(|e| driver(format!("copying {} B to the device", from.len()), e))
    }

    /// Waits for the stream.
    fn download<T: bytemuck::Pod>(&self, from: u64, len: usize) -> Result<Vec<T>> {
        let mut to = vec![T::zeroed(); len];
        if len == 0 {
            return Ok(to);
        }
        self.device.bind()?;
        let what = || format!("copying {} B from the device", len * size_of::<T>());
        // SAFETY: the range belongs to `data`, whose layout says so; `to` lives until the stream was
        // waited for.
        unsafe { result::memcpy_dtoh_async(&mut to, from, self.device.stream().cu_stream()) }
            .map_err(|e| self.device.failed(what(), e))?;
        self.device.stream().synchronize().map_err(|e| self.device.failed(what(), e))?;
        self.device.tell(Event::Waited);
        Ok(to)
    }
}

/// The parts of a host state, and the mirror of a state that holds them.
fn packed(state: &crate::State, layout: &StateLayout) -> Result<(Parts, Mirror)> {
    let parts = Parts::pack(state)?;
    if !parts.open_k_rotated.is_empty() && !layout.rotation() {
        let expected = "true: an open segment of the state holds rotated keys";
        return Err(Error::value("rotation", false, expected));
    }
    let mirror = Mirror::of(layout, parts.counters.clone())?;
    Ok((parts, mirror))
}

impl crate::State {
    /// The device copy of this state; see [`State::from_host`].
    ///
    /// # Errors
    /// Those of [`State::from_host`].
    pub fn to_device(&self, device: &Device, rotation: bool) -> Result<State> {
        State::from_host(device, self, rotation)
    }
}
