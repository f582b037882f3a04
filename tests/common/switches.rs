//! What the environment asks of programs that test and measure on a device; the library itself reads
//! no variable.
//!
//! | variable | |
//! |---|---|
//! | `INFINI_KERNELS` | folder of kernels in place of those compiled in |
//! | `INFINI_TARGET` | how work is cut: `arch`, `multiprocessors`, `pairs`, `cluster_blocks`, `shared_by`, `l2_bytes`, `split_len`, `segment_fill`, `early`, such as `arch=sm80,shared_by=1` |
//! | `INFINI_LAUNCHES` | file that every launch is written to before it is enqueued |

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use cudarc::driver::DriverError;
use infini_attn::cuda::{Arch, Device, Event, Target, replace_kernels};
use infini_attn::{Error, Result};

/// Takes kernels from the folder that is named, if any. Before anything else is done with CUDA.
pub fn kernels() -> Result<()> {
    match std::env::var_os("INFINI_KERNELS") {
        // SAFETY: whoever names the folder wants to run what it holds.
        Some(folder) if !folder.is_empty() => unsafe { replace_kernels(Path::new(&folder)) },
        _ => Ok(()),
    }
}

/// The first device, as the environment wants it, with a stream of its own; kernels are loaded once.
pub fn device() -> Result<Device> {
    static FIRST: Mutex<Option<Device>> = Mutex::new(None);
    let mut first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    let device = match &*first {
        Some(first) => {
            let stream = first.stream().context().new_stream();
            let reason = |e: DriverError| format!("a further stream: {e}");
            first.on(stream.map_err(|e| Error::NoDevice { reason: reason(e) })?)?
        }
        None => first.insert(Device::new(0)?).clone(),
    };
    let device = match std::env::var("INFINI_TARGET") {
        Ok(text) if !text.is_empty() => device.with_target(target(device.target()?, &text)?)?,
        _ => device,
    };
    Ok(match &*RING {
        Some(ring) => device.observed_by(|event| ring.tell(event)),
        None => device,
    })
}

/// Whether the driver is the simulator's (tests/ptxsim/driver).
pub fn is_simulated(device: &Device) -> Result<bool> {
    Ok(device.name()? == "PTX simulator")
}

/// Writes down what is enqueued past the library: launches of one's own, replays of graphs; `done`
/// once the host has waited for it.
pub fn note(text: &str) {
    if let Some(ring) = &*RING {
        ring.write(text);
    }
}

/// A target with some of its fields changed: `shared_by=1,split_len=512`.
pub fn target(mut target: Target, text: &str) -> Result<Target> {
    for part in text.split(',') {
        let bad = || {
            let expected = "arch=sm80 or sm90, early=0 or 1, or a number for multiprocessors, pairs, \
                            cluster_blocks, shared_by, l2_bytes, split_len or segment_fill";
            Error::Value {
                argument: "INFINI_TARGET".into(),
                got: part.into(),
                expected: expected.into(),
            }
        };
        let (key, value) = part.split_once('=').ok_or_else(bad)?;
        let number = || value.parse::<usize>().map_err(|_| bad());
        match key {
            "arch" => {
                let mut known = [Arch::Sm80, Arch::Sm90].into_iter();
                target.arch = known.find(|a| a.to_string() == value).ok_or_else(bad)?;
            }
            "multiprocessors" => target.multiprocessors = number()?,
            "pairs" => target.pairs = number()?,
            "cluster_blocks" => target.cluster_blocks = number()?,
            "shared_by" => target.shared_by = number()?,
            "l2_bytes" => target.l2_bytes = number()?,
            "split_len" => target.split_len = number()?,
            "segment_fill" => target.segment_fill = number()?,
            "early" => {
                target.early = value.parse::<u8>().ok().filter(|n| *n < 2).ok_or_else(bad)? == 1
            }
            _ => return Err(bad()),
        }
    }
    Ok(target)
}

/// The file of the last launches, for whoever finds this process hanging or gone.
static RING: LazyLock<Option<Arc<Ring>>> = LazyLock::new(|| {
    let path = std::env::var_os("INFINI_LAUNCHES").filter(|path| !path.is_empty())?;
    let file = File::create(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Some(Arc::new(Ring { file, next: AtomicU64::new(0) }))
});

/// Records of [`Ring::BYTES`] bytes, each a line: a number, and what was enqueued, or `done` where the
/// host has waited for all before. The largest number is the last.
struct Ring {
    file: File,
    next: AtomicU64,
}

impl Ring {
    const RECORDS: u64 = 64;
    const BYTES: usize = 256;

    fn tell(&self, event: &Event<'_>) {
        match event {
            Event::Launch(launch) => {
                let cluster = match launch.cluster {
                    1 => String::new(),
                    blocks => format!(", cluster {blocks}"),
                };
                let (kernel, what) = (launch.kernel, launch.what);
                let (symbol, grid, threads) = (kernel.symbol, launch.grid, kernel.threads);
                self.write(&format!("{symbol} {grid:?} x {threads}{cluster}: {what}"));
            }
            _ => self.write("done"),
        }
    }

    fn write(&self, text: &str) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut line = format!("{number} {text}").into_bytes();
        line.resize(Self::BYTES - 1, b' ');
        line.push(b'\n');
        // A log that fails must not fail the test.
        let _ = self.file.write_all_at(&line, number % Self::RECORDS * Self::BYTES as u64);
    }
}
