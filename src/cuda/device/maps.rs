//! Affine maps of disjoint token runs, with device memory of their own.
//!
//! What the CPU functions of the same names are for the host. Results live on the stream of what
//! they were made from; sums, maps and states of another stream are refused.

use cudarc::driver::{DeviceRepr, result};

use super::buffers::{Operands, TensorView};
use super::error::driver;
use super::state::State;
use super::{Buffer, Device};
use crate::cuda::operations::maps::{
    KeySumsMirror, MapAddresses, SegmentMapMirror, plan_add_key_sums, plan_apply, plan_compose,
    plan_key_sums, plan_segment_map,
};
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Addresses, Operand};
use crate::dtype::Element;
use crate::error::Result;
use crate::problem::Problem;
use crate::trace::span;

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
    /// [`crate::Error::Driver`] when the device's memory does not suffice, [`crate::Error::Capturing`].
    pub fn zero(device: &Device, problem: &Problem, batch: usize) -> Result<Self> {
        Self::allocate(device, KeySumsMirror::zero(problem, batch))
    }

    /// What a run that continues `state` finds: its z and its committed tokens, slot by slot.
    ///
    /// # Errors
    /// As [`Self::zero`], and [`crate::Error::Unfinished`].
    pub fn from_state(state: &State) -> Result<Self> {
        state.mirror().check_finished(0..state.sequences())?;
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
    /// Those of [`crate::KeySums::add`]; [`crate::Error::Value`] for another stream; the device's.
    pub fn add(&self, other: &KeySums) -> Result<KeySums> {
        let (plan, mirror) = plan_add_key_sums(&self.mirror, &other.mirror)?;
        self.device.check_stream("other", &other.device)?;
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
    let span = span!("key_sums", problem.shapes());
    span.run(|| {
        let (plan, mirror) = plan_key_sums(problem, &k.tensor())?;
        plan.note(&span);
        let sums = KeySums::allocate(device, mirror)?;
        let mut operands = Operands::new(device)?;
        operands.read(Operand::K, &k)?;
        operands.ordered()?;
        let addresses = operands.addresses.clone().with(Operand::KeySums, sums.data.address);
        device.run(&plan, addresses)?;
        operands.finish()?;
        Ok(sums)
    })
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
    let span = span!("segment_map", problem.shapes());
    span.run(|| {
        let device = &before.device;
        let options = device.prefill_options()?;
        let (plan, mirror) =
            plan_segment_map(problem, &k.tensor(), &v.tensor(), &before.mirror, &options)?;
        plan.note(&span);
        let map = SegmentMap::allocate(device, mirror)?;
        let mut operands = Operands::new(device)?;
        operands.read(Operand::K, &k)?;
        operands.read(Operand::V, &v)?;
        operands.ordered()?;
        let addresses = operands.addresses.clone().with(Operand::Before, before.data.address);
        let map = map.run(&plan, addresses)?;
        operands.finish()?;
        Ok(map)
    })
}

/// [`crate::compose`] on the maps' stream: the map of `first` followed by `second`.
///
/// # Errors
/// Those of [`crate::compose`]; [`crate::Error::Value`] for another stream; the device's.
pub fn compose(first: &SegmentMap, second: &SegmentMap) -> Result<SegmentMap> {
    let span = span!("compose", format_args!("{} maps", first.tokens().len()));
    span.run(|| {
        let (plan, mirror) = plan_compose(&first.mirror, &second.mirror)?;
        plan.note(&span);
        first.device.check_stream("second", &second.device)?;
        let map = SegmentMap::allocate(&first.device, mirror)?;
        let addresses = Addresses::new()
            .with(Operand::First, first.data.address)
            .with(Operand::Second, second.data.address);
        map.run(&plan, addresses)
    })
}

/// [`crate::apply`] on the state's stream.
///
/// # Errors
/// Those of [`crate::apply`]; [`crate::Error::Value`] for another stream; the device's.
pub fn apply(map: &SegmentMap, state: &mut State) -> Result<()> {
    let span = span!("apply", state.problem().shapes());
    span.run(|| {
        let plan = plan_apply(&map.mirror, state.mirror())?;
        plan.note(&span);
        state.device().check_stream("map", &map.device)?;
        state.device().refuse_capture("applying a map", "record the plan of plan_apply")?;
        state.advance_with(&plan, Addresses::new().with(Operand::Map, map.data.address))
    })
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
