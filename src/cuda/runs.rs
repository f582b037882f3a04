//! Merges and affine maps of disjoint token runs, with device memory of their own.
//!
//! What the CPU functions of the same names are for the host. Results live on the stream of what
//! they were made from; sums, maps and states of another stream are refused.

use cudarc::driver::{DeviceRepr, result};

use super::buffers::{Operands, TensorView, TensorViewMut};
use super::device::{Buffer, driver};
use super::maps::{KeySumsMirror, MapAddresses, SegmentMapMirror};
use super::maps::{plan_add_key_sums, plan_apply, plan_compose, plan_key_sums, plan_segment_map};
use super::merge::{plan_merge_memories, plan_merge_partials};
use super::{Addresses, Device, Operand, Plan, State};
use crate::{Element, Error, Problem, Result};

/// [`crate::merge_partials`] on the device's stream.
///
/// # Errors
/// Those of [`crate::merge_partials`] and of [`plan_merge_partials`]; the device's.
pub fn merge_partials<T: Element + DeviceRepr>(
    device: &Device,
    a_dot: &[TensorView<'_, T>],
    lse: &[TensorView<'_, f32>],
    mut out: TensorViewMut<'_, T>,
    mut out_lse: Option<TensorViewMut<'_, f32>>,
) -> Result<()> {
    device.refuse_capture("a merge", "record the plan of plan_merge_partials")?;
    let parts: Vec<_> = a_dot.iter().map(|view| view.tensor()).collect();
    let logs: Vec<_> = lse.iter().map(|view| view.tensor()).collect();
    let log = out_lse.as_ref().map(|view| view.tensor());
    let plan = plan_merge_partials(&parts, &logs, &out.tensor(), log.as_ref())?;
    let mut operands = Operands::new(device)?;
    // The plan has refused lists that an index does not reach.
    for (i, (a_dot, lse)) in (0u16..).zip(a_dot.iter().zip(lse)) {
        operands.read(Operand::Part(i), a_dot)?;
        operands.read(Operand::PartLse(i), lse)?;
    }
    operands.write(Operand::O, &mut out)?;
    if let Some(out_lse) = &mut out_lse {
        operands.write(Operand::Lse, out_lse)?;
    }
    let addresses = operands.addresses.clone();
    device.run(&plan, addresses)
}

/// [`crate::merge_memories`] on the states' stream: the state over all their tokens.
///
/// # Errors
/// Those of [`crate::merge_memories`]; [`Error::Value`] for states of several streams; the device's.
pub fn merge_memories(states: &[&State]) -> Result<State> {
    let Some((last, earlier)) = states.split_last() else {
        return Err(Error::Length { argument: "states", got: 0, expected: "at least 1".into() });
    };
    let mirrors: Vec<_> = earlier.iter().map(|state| state.mirror()).collect();
    let plan = plan_merge_memories(&mirrors, last.mirror())?;
    for (i, state) in earlier.iter().enumerate() {
        same_stream(&format!("states[{i}]"), state.device(), last.device())?;
    }
    let mut merged = last.fork(&(0..last.sequences()).collect::<Vec<_>>())?;
    let mut addresses = Addresses::new().with(Operand::State, merged.address());
    for (i, state) in (0u16..).zip(earlier) {
        addresses.set(Operand::Source(i), state.address());
    }
    merged.mirror.check(&plan)?;
    merged.device().run(&plan, addresses)?;
    merged.mirror.advance(&plan)?;
    Ok(merged)
}

/// Σ σ(k) over a run of tokens in device memory; see [`crate::KeySums`].
#[derive(Debug)]
pub struct KeySums {
    device: Device,
    mirror: KeySumsMirror,
    data: Buffer,
}

impl KeySums {
    /// The sums over no tokens, for `batch` sequences: what the first run of a stream finds.
    ///
    /// # Errors
    /// [`Error::Driver`] when the device's memory does not suffice, [`Error::Capturing`].
    pub fn zero(device: &Device, problem: &Problem, batch: usize) -> Result<Self> {
        Self::allocate(device, KeySumsMirror::zero(problem, batch))
    }

    /// What a run that continues `state` finds: its z and its committed tokens, slot by slot.
    ///
    /// # Errors
    /// As [`Self::zero`].
    pub fn from_state(state: &State) -> Result<Self> {
        let device = state.device();
        let sums = Self::allocate(device, KeySumsMirror::from_state(state.mirror()))?;
        let (from, bytes) = (state.parts().normalizer, sums.mirror.bytes() as usize);
        if bytes > 0 {
            // SAFETY: z of the state and the sums have this size; both live on this stream.
            unsafe {
                let to = sums.data.address;
                result::memcpy_dtod_async(to, from, bytes, device.stream().cu_stream())
            }
            .map_err(|e| driver("copying a normaliser", e))?;
        }
        Ok(sums)
    }

    /// The sums over both runs.
    ///
    /// # Errors
    /// Those of [`crate::KeySums::add`]; [`Error::Value`] for another stream; the device's.
    pub fn add(&self, other: &KeySums) -> Result<KeySums> {
        let (plan, mirror) = plan_add_key_sums(&self.mirror, &other.mirror)?;
        same_stream("other", &other.device, &self.device)?;
        let sums = Self::allocate(&self.device, mirror)?;
        let addresses = Addresses::new()
            .with(Operand::First, self.data.address)
            .with(Operand::Second, other.data.address)
            .with(Operand::KeySums, sums.data.address);
        self.device.run(&plan, addresses)?;
        Ok(sums)
    }

    /// Tokens summed, per sequence.
    pub fn tokens(&self) -> &[u64] {
        self.mirror.tokens()
    }

    /// Device address of the sums, f32 [B, Hkv, Dk].
    pub fn address(&self) -> u64 {
        self.data.address
    }

    /// Zeros.
    fn allocate(device: &Device, mirror: KeySumsMirror) -> Result<Self> {
        let data = zeroed(device, mirror.bytes(), "key sums")?;
        Ok(Self { device: device.clone(), mirror, data })
    }
}

/// The affine map of a run of segments in device memory; see [`crate::SegmentMap`].
#[derive(Debug)]
pub struct SegmentMap {
    device: Device,
    mirror: SegmentMapMirror,
    data: Buffer,
}

impl SegmentMap {
    /// Tokens of the run, per sequence.
    pub fn tokens(&self) -> &[u64] {
        self.mirror.tokens()
    }

    /// Device addresses of A, B and Δz.
    pub fn addresses(&self) -> MapAddresses {
        self.mirror.addresses(self.data.address)
    }

    /// Room for the map that a plan makes.
    fn allocate(device: &Device, mirror: SegmentMapMirror) -> Result<Self> {
        let data = zeroed(device, mirror.bytes(), "a map")?;
        Ok(Self { device: device.clone(), mirror, data })
    }

    fn run(self, plan: &Plan, addresses: Addresses) -> Result<Self> {
        self.device.run(plan, addresses.with(Operand::Map, self.data.address))?;
        Ok(self)
    }
}

/// [`crate::key_sums`] on the device's stream: k [B, T, Hkv, Dk].
///
/// # Errors
/// Those of [`crate::key_sums`] and of [`plan_key_sums`]; the device's.
pub fn key_sums<T: Element + DeviceRepr>(
    device: &Device,
    problem: &Problem,
    k: TensorView<'_, T>,
) -> Result<KeySums> {
    let (plan, mirror) = plan_key_sums(problem, &k.tensor())?;
    let sums = KeySums::allocate(device, mirror)?;
    let mut operands = Operands::new(device)?;
    operands.read(Operand::K, &k)?;
    let addresses = operands.addresses.clone().with(Operand::KeySums, sums.data.address);
    device.run(&plan, addresses)?;
    Ok(sums)
}

/// [`crate::segment_map`] on the stream of `before`: k [B, T, Hkv, Dk], v [B, T, Hkv, Dv].
///
/// # Errors
/// Those of [`crate::segment_map`] and of [`plan_segment_map`]; the device's.
pub fn segment_map<T: Element + DeviceRepr>(
    problem: &Problem,
    k: TensorView<'_, T>,
    v: TensorView<'_, T>,
    before: &KeySums,
) -> Result<SegmentMap> {
    let device = &before.device;
    let options = device.prefill_options()?;
    let (plan, mirror) =
        plan_segment_map(problem, &k.tensor(), &v.tensor(), &before.mirror, &options)?;
    let map = SegmentMap::allocate(device, mirror)?;
    let mut operands = Operands::new(device)?;
    operands.read(Operand::K, &k)?;
    operands.read(Operand::V, &v)?;
    map.run(&plan, operands.addresses.clone().with(Operand::Before, before.data.address))
}

/// [`crate::compose`] on the maps' stream: the map of `first` followed by `second`.
///
/// # Errors
/// Those of [`crate::compose`]; [`Error::Value`] for another stream; the device's.
pub fn compose(first: &SegmentMap, second: &SegmentMap) -> Result<SegmentMap> {
    let (plan, mirror) = plan_compose(&first.mirror, &second.mirror)?;
    same_stream("second", &second.device, &first.device)?;
    let map = SegmentMap::allocate(&first.device, mirror)?;
    let addresses = Addresses::new()
        .with(Operand::First, first.data.address)
        .with(Operand::Second, second.data.address);
    map.run(&plan, addresses)
}

/// [`crate::apply`] on the state's stream.
///
/// # Errors
/// Those of [`crate::apply`]; [`Error::Value`] for another stream; the device's.
pub fn apply(map: &SegmentMap, state: &mut State) -> Result<()> {
    let plan = plan_apply(&map.mirror, state.mirror())?;
    same_stream("map", &map.device, state.device())?;
    state.device().refuse_capture("applying a map", "record the plan of plan_apply")?;
    state.mirror.check(&plan)?;
    let addresses =
        Addresses::new().with(Operand::Map, map.data.address).with(Operand::State, state.address());
    state.device().run(&plan, addresses)?;
    state.mirror.advance(&plan)
}

fn zeroed(device: &Device, bytes: u64, what: &str) -> Result<Buffer> {
    let data = device.allocate(bytes, what)?;
    if bytes > 0 {
        // SAFETY: the buffer was just made, with this size, on this stream.
        unsafe {
            let stream = device.stream().cu_stream();
            result::memset_d8_async(data.address, 0, bytes as usize, stream)
        }
        .map_err(|e| driver(format!("clearing {what}"), e))?;
    }
    Ok(data)
}

fn same_stream(argument: &str, got: &Device, expected: &Device) -> Result<()> {
    if got.stream() == expected.stream() {
        return Ok(());
    }
    Err(Error::value(argument, "of another stream", "of the same stream"))
}
