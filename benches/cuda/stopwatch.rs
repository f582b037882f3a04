//! Times on the device.

use std::time::Duration;

use anyhow::Result;
use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags;
use infini_attn::cuda::Device;

/// Time between two events on the stream.
pub struct Stopwatch {
    device: Device,
    events: [CudaEvent; 2],
}

impl Stopwatch {
    pub fn new(device: &Device) -> Result<Self> {
        let event = || device.stream().context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Self { device: device.clone(), events: [event()?, event()?] })
    }

    pub fn time(&self, run: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let [start, end] = &self.events;
        start.record(self.device.stream())?;
        run()?;
        end.record(self.device.stream())?;
        let ms = start.elapsed_ms(end)?;
        Ok(Duration::from_secs_f64(f64::from(ms) / 1e3))
    }
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
