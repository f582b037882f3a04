//! A device and its kernels.
//!
//! Nothing here touches the driver before [`Device::new`] or [`Device::from_stream`]: the crate
//! starts on machines without one.

pub mod borrowed;
pub mod buffers;
mod encoded_maps;
mod error;
pub mod gate;
mod host_tables;
pub mod launcher;
mod library;
mod loaded;
mod loading;
pub mod maps;
pub mod merge;
pub mod observer;
pub mod operator;
mod ranges;
mod slots;
pub mod state;
pub mod table;
mod target;
mod transfer;
mod wait_report;

use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::sys::{CUdevice_attribute, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError};

use crate::cuda::plan::kernel::Arch;
use crate::cuda::plan::target::Target;
use crate::cuda::plan::tensor_map::{MAP_BYTES, TensorMap};
use crate::error::{Error, Result};
use error::{driver, no_device, reason};
use host_tables::HostTables;
use loaded::Loaded;
use observer::{Event, Observers};

/// Least compute capability the kernels run on.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// Compute capability of the devices that run the kernels of [`Arch::Sm90`].
const SM90_CAPABILITY: (i32, i32) = (9, 0);

/// A CUDA device and a stream on it. All work of a `Device` goes to its stream, in order, and is
/// asynchronous: a call returns when everything is enqueued. A clone uses the same stream;
/// [`Self::on`] another one. Loaded kernels are shared by all of them.
///
/// Kernels are loaded when they are first needed, and the workspace that the calls on a stream share
/// grows to what the largest needs. A stream that captures a graph allows neither: what is to be
/// captured goes through [`Self::prepare`] before. A captured graph runs in that
/// workspace: it must be replayed on the device's stream, and not outlive the device.
#[derive(Clone, Debug)]
pub struct Device {
    stream: Arc<CudaStream>,
    loaded: Arc<Loaded>,
    workspace: Arc<Mutex<Workspace>>,
    /// In place of the device's own.
    target: Option<Target>,
    observers: Observers,
}

/// Memory that calls on one stream use one after another.
#[derive(Debug, Default)]
struct Workspace {
    current: Option<Buffer>,
    /// Whether a graph was captured with `current`.
    captured: bool,
    /// Smaller ones that captured graphs still use.
    retired: Vec<Buffer>,
}

/// A buffer that only its own stream uses. Its address is kept, for cudarc may wait for events when
/// asked for it, which would spoil a capture.
#[derive(Debug)]
struct Buffer {
    pub address: u64,
    data: CudaSlice<u8>,
}

impl Buffer {
    pub fn len(&self) -> usize {
        self.data.len()
    }
}

impl Device {
    /// The device of the given ordinal, with a stream of its own. The stream does not wait for the
    /// legacy default stream, nor that for it.
    ///
    /// # Errors
    /// [`Error::NoDevice`] that says what is missing: the driver's library, the device, or compute
    /// capability 8.0.
    pub fn new(ordinal: usize) -> Result<Self> {
        let context = open(ordinal)?;
        let stream = context.new_stream().map_err(|e| no_device(ordinal, e))?;
        Self::from_stream(stream)
    }

    /// A device whose work goes to the given stream of an application that uses cudarc itself. Buffers
    /// that calls read and write come from the stream's own context object, whose events order them.
    ///
    /// # Errors
    /// [`Error::NoDevice`] when the device's compute capability is below 8.0; [`Error::Value`] for the
    /// per-thread default stream, which is another stream in every thread.
    pub fn from_stream(stream: Arc<CudaStream>) -> Result<Self> {
        refuse_per_thread(&stream)?;
        let context = stream.context().clone();
        let ordinal = context.ordinal();
        let capability = context.compute_capability().map_err(|e| no_device(ordinal, e))?;
        if capability < LEAST_CAPABILITY {
            let name = context.name().unwrap_or_else(|_| "unnamed".into());
            return Err(Error::NoDevice { reason: too_old(ordinal, &name, capability) });
        }
        let (loaded, workspace) = (Loaded::of(&context, capability), Arc::default());
        Ok(Self { stream, loaded, workspace, target: None, observers: Observers::default() })
    }

    /// The same device, its loaded kernels included, with another stream.
    ///
    /// # Errors
    /// [`Error::Value`] when the stream belongs to another context or context object, and for the
    /// per-thread default stream.
    pub fn on(&self, stream: Arc<CudaStream>) -> Result<Self> {
        refuse_per_thread(&stream)?;
        if !Arc::ptr_eq(stream.context(), self.stream.context()) {
            let expected = "a stream of the device's own context object";
            return Err(Error::value("stream", "a stream of another context object", expected));
        }
        Ok(Self { stream, workspace: Arc::default(), ..self.clone() })
    }

    /// The same device, whose calls are planned for another target: to leave multiprocessors to other
    /// work, or to measure how work is best cut.
    ///
    /// # Errors
    /// [`Error::Value`] for kernels that the device does not run, and those of [`Target::check`].
    pub fn with_target(&self, target: Target) -> Result<Self> {
        if target.arch > self.arch() {
            let expected = format!("{} at most", self.arch());
            return Err(Error::value("target.arch", target.arch, expected));
        }
        target.check()?;
        Ok(Self { target: Some(target), ..self.clone() })
    }

    /// The same device with one more observer, who is told of every launch before it is enqueued, and
    /// when [`Self::synchronize`] or a download of a state has waited for all: for logs that still
    /// name the kernel when the device hangs. What a captured graph replays is not told.
    pub fn observed_by(&self, observer: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Self {
        let mut observed = self.clone();
        observed.observers.0.push(Arc::new(observer));
        observed
    }

    fn tell(&self, event: Event<'_>) {
        self.observers.tell(event);
    }

    /// The stream that all work goes to.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The device's ordinal.
    pub fn ordinal(&self) -> usize {
        self.loaded.context.ordinal()
    }

    /// Compute capability, (major, minor).
    pub fn capability(&self) -> (i32, i32) {
        self.loaded.capability
    }

    /// The device's name.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver does not tell.
    pub fn name(&self) -> Result<String> {
        self.loaded.context.name().map_err(|e| driver("name of the device", e))
    }

    /// An attribute of the device, in the driver's own units.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver does not know it.
    pub fn attribute(&self, attribute: CUdevice_attribute) -> Result<usize> {
        let value = self.loaded.context.attribute(attribute);
        let value = value.map_err(|e| driver(format!("{attribute:?}"), e))?;
        Ok(usize::try_from(value).unwrap_or(0))
    }

    /// The newest kernels it runs, whatever calls are planned for.
    pub fn arch(&self) -> Arch {
        if self.capability() == SM90_CAPABILITY { Arch::Sm90 } else { Arch::Sm80 }
    }

    /// Waits until everything enqueued so far is done.
    ///
    /// # Errors
    /// [`Error::Capturing`], and [`Error::Driver`] with what went wrong on the device since the last
    /// wait.
    pub fn synchronize(&self) -> Result<()> {
        self.refuse_capture("waiting for the device", "wait after the capture has ended")?;
        self.stream.synchronize().map_err(|e| self.failed("synchronize", e))?;
        self.tell(Event::Waited);
        Ok(())
    }

    /// Where a wait of the kernels gave up, which ended the context: file, block, warp, barrier. Only
    /// builds with `INFINI_ATTN_WAIT_POLLS` have waits that give up, for the search for deadlocks;
    /// none: no wait has. Errors of the calls that wait for the device say the same.
    pub fn wait_report(&self) -> Option<String> {
        self.loaded.wait_report()
    }

    /// The driver's own words, and where a wait gave up.
    fn reason(&self, error: DriverError) -> String {
        let reason = reason(error);
        self.wait_report().map_or_else(|| reason.clone(), |wait| format!("{reason}; {wait}"))
    }

    /// An error of work on the device.
    fn failed(&self, what: impl Into<String>, error: DriverError) -> Error {
        Error::Driver { what: what.into(), reason: self.reason(error) }
    }

    fn workspace(&self, bytes: u64) -> Result<MutexGuard<'_, Workspace>> {
        let mut workspace = self.workspace.lock().unwrap_or_else(|e| e.into_inner());
        let capturing = self.is_capturing()?;
        if workspace.current.as_ref().is_none_or(|w| (w.len() as u64) < bytes) && bytes > 0 {
            let grown = self.allocate(bytes, "a larger workspace")?;
            let old = workspace.current.replace(grown);
            if std::mem::take(&mut workspace.captured) {
                workspace.retired.extend(old);
            }
        }
        workspace.captured |= capturing;
        Ok(workspace)
    }

    /// A buffer of unspecified content; at least one byte.
    fn allocate(&self, bytes: u64, what: &str) -> Result<Buffer> {
        let what = format!("allocating {what} of {bytes} B");
        self.refuse_capture(&what, "call Device::prepare before the capture")?;
        self.bind()?;
        // SAFETY: bytes of any content are valid, and every plan writes what it reads.
        let data = unsafe { self.stream.alloc((bytes as usize).max(1)) };
        let data = data.map_err(|e| driver(what, e))?;
        let address = data.device_ptr(&self.stream).0;
        Ok(Buffer { address, data })
    }

    /// Whether the stream captures a graph.
    ///
    /// # Errors
    /// [`Error::Driver`], also where a capture was invalidated, or where something that gives no
    /// result (the end of a buffer, an event) went wrong since the last call.
    pub fn is_capturing(&self) -> Result<bool> {
        self.pending("what an earlier call has left")?;
        let status = self.stream.capture_status();
        let status = status.map_err(|e| self.failed("capture status", e))?;
        match status {
            CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(false),
            CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE => Ok(true),
            CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED => Err(Error::Driver {
                what: "capture status".into(),
                reason: "an earlier error has invalidated the capture; end it first".into(),
            }),
        }
    }

    /// What went wrong where cudarc gives no result.
    fn pending(&self, what: &str) -> Result<()> {
        self.stream.context().check_err().map_err(|e| self.failed(what, e))
    }

    fn refuse_capture(&self, what: &str, instead: &'static str) -> Result<()> {
        if self.is_capturing()? {
            return Err(Error::Capturing { what: what.into(), instead });
        }
        Ok(())
    }

    fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(|e| driver("binding the context", e))
    }

    fn host_tables(&self) -> &HostTables {
        &self.loaded.host_tables
    }

    fn encoded(&self, map: &TensorMap) -> std::result::Result<[u8; MAP_BYTES], DriverError> {
        self.loaded.maps.get(map)
    }
}

/// The context of a device, or why there is none.
fn open(ordinal: usize) -> Result<Arc<CudaContext>> {
    let missing = |reason: String| Err(Error::NoDevice { reason });
    library::check()?;
    match CudaContext::device_count() {
        Err(e) => missing(format!("the driver does not start: {}", reason(e))),
        Ok(count) if count <= 0 => missing("the driver finds no device".into()),
        Ok(count) if ordinal >= count as usize => {
            missing(format!("device {ordinal} asked for, the driver finds {count}"))
        }
        Ok(_) => CudaContext::new(ordinal).map_err(|e| no_device(ordinal, e)),
    }
}

/// Handle 2 is a stream of the thread that uses it: work of two threads on what is one stream to
/// everybody else would not be in order.
fn refuse_per_thread(stream: &CudaStream) -> Result<()> {
    if stream.cu_stream() as usize != 2 {
        return Ok(());
    }
    let got = "the per-thread default stream";
    let expected = "one stream for all threads: CudaContext::new_stream or default_stream";
    Err(Error::value("stream", got, expected))
}

fn too_old(ordinal: usize, name: &str, (major, minor): (i32, i32)) -> String {
    let (least, zero) = LEAST_CAPABILITY;
    format!(
        "device {ordinal} ({name}) has compute capability {major}.{minor}, {least}.{zero} or later \
         expected"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_driver_is_told_so() {
        if library::check().is_ok() {
            println!("skipped: this machine has a driver");
            return;
        }
        let text = Device::new(0).expect_err("no driver").to_string();
        assert!(
            text.starts_with("no usable CUDA device: the CUDA driver is not installed"),
            "{text}"
        );
    }

    #[test]
    fn an_old_device_is_named() {
        let text = too_old(1, "GPU", (7, 5));
        assert_eq!(text, "device 1 (GPU) has compute capability 7.5, 8.0 or later expected");
    }
}
