//! What the device could do: bandwidth of a copy, and tensor-core peak from its attributes.

use anyhow::Result;
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use infini_attn::cuda::Device;
use serde_json::{Value, json};

use crate::stopwatch::{Stopwatch, median};
use crate::switches::is_simulated;

/// Dense 16-bit flops with f32 accumulation, per multiprocessor and clock.
const FLOPS_PER_CLOCK: [((i32, i32), f64); 6] = [
    ((8, 0), 2048.0),
    ((8, 6), 512.0),
    ((8, 9), 512.0),
    ((9, 0), 4096.0),
    ((10, 0), 8192.0),
    ((12, 0), 512.0),
];

pub struct Roofline {
    name: String,
    capability: (i32, i32),
    multiprocessors: usize,
    /// Bytes per second, read and written.
    pub bandwidth: f64,
    /// Flops per second at the highest clock; none for a device that is not in the table.
    pub peak: Option<f64>,
    pub l2_bytes: usize,
}

impl Roofline {
    pub fn measure(device: &Device) -> Result<Self> {
        let l2_bytes = device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        let hertz = 1e3 * device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)? as f64;
        let multiprocessors =
            device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let capability = device.capability();
        let known = FLOPS_PER_CLOCK.iter().find(|(known, _)| *known == capability);
        let peak = known.map(|(_, flops)| flops * hertz * multiprocessors as f64);
        let bandwidth = copy_bandwidth(device)?;
        let name = device.name()?;
        Ok(Self { name, capability, multiprocessors, bandwidth, peak, l2_bytes })
    }

    pub fn json(&self) -> Value {
        let (major, minor) = self.capability;
        json!({
            "device": self.name,
            "capability": format!("{major}.{minor}"),
            "multiprocessors": self.multiprocessors,
            "copy_gbs": self.bandwidth / 1e9,
            "peak_tflops": self.peak.map(|p| p / 1e12),
            "l2_mib": self.l2_bytes >> 20,
        })
    }

    pub fn describe(&self) -> String {
        let peak = self.peak.map_or("unknown".into(), |p| format!("{:.0} TFLOP/s", p / 1e12));
        let (major, minor) = self.capability;
        let copy = self.bandwidth / 1e9;
        format!(
            "{}, compute capability {major}.{minor}: a copy moves {copy:.0} GB/s, peak {peak}, L2 \
             {} MiB",
            self.name,
            self.l2_bytes >> 20
        )
    }

    /// Least seconds for these flops and bytes.
    fn floor(&self, flops: f64, bytes: f64) -> Option<f64> {
        Some((flops / self.peak?).max(bytes / self.bandwidth))
    }
}

/// The median over copies of 512 MiB, much more than any L2.
fn copy_bandwidth(device: &Device) -> Result<f64> {
    let bytes = if is_simulated(device)? { 1 << 20 } else { 512 << 20 };
    let from = device.stream().alloc_zeros::<u8>(bytes)?;
    let mut to = device.stream().alloc_zeros::<u8>(bytes)?;
    let watch = Stopwatch::new(device)?;
    let mut times = vec![];
    for _ in 0..12 {
        let time = watch.time(|| Ok(device.stream().memcpy_dtod(&from, &mut to)?))?;
        times.push(time.as_secs_f64());
    }
    Ok(2.0 * bytes as f64 / median(times.split_off(2)))
}

/// What was measured of one operation.
pub struct Figures {
    pub name: String,
    pub seconds: f64,
    pub flops: f64,
    pub bytes: f64,
}

impl Figures {
    fn share(&self, roofline: &Roofline) -> Option<f64> {
        Some(roofline.floor(self.flops, self.bytes)? / self.seconds)
    }

    pub fn markdown(&self, roofline: &Roofline) -> String {
        let share =
            self.share(roofline).map_or("unknown".into(), |s| format!("{:.0} %", 100.0 * s));
        let (us, tflops) = (1e6 * self.seconds, self.flops / self.seconds / 1e12);
        let gbs = self.bytes / self.seconds / 1e9;
        format!("| {} | {us:.1} | {tflops:.1} | {gbs:.0} | {share} |", self.name)
    }

    pub fn json(&self, roofline: &Roofline) -> Value {
        json!({
            "operation": self.name,
            "us": 1e6 * self.seconds,
            "tflops": self.flops / self.seconds / 1e12,
            "gbs": self.bytes / self.seconds / 1e9,
            "roofline": self.share(roofline),
            "copy_gbs": roofline.bandwidth / 1e9,
            "peak_tflops": roofline.peak.map(|p| p / 1e12),
            "device": roofline.name,
        })
    }
}
