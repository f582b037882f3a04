//! What is asked of the driver. Only the simulator's counts its calls and refuses one.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char};

use anyhow::{Result, ensure};
use candle_core::{DType, Device};
use infini_attn_candle::{Batch, Slots, State, infini_attention};
use libloading::os::unix::{Library, Symbol};

use crate::data::{Scale, close, expected, gate, on, refused, tolerance};

struct Counter {
    refuse: Symbol<unsafe extern "C" fn(*const c_char, u64)>,
    calls: Symbol<unsafe extern "C" fn(*mut c_char, usize)>,
}

impl Counter {
    /// None, and it is said so, where the driver is another.
    fn new(group: &str) -> Option<Self> {
        let program = Library::this();
        // SAFETY: the simulator's driver declares them so (tests/ptxsim/driver/src/refusals.rs).
        let found =
            unsafe { (program.get(b"ptxsim_refuse").ok(), program.get(b"ptxsim_calls").ok()) };
        match found {
            (Some(refuse), Some(calls)) => Some(Self { refuse, calls }),
            _ => {
                eprintln!("skipped {group}: only the simulator's driver counts calls");
                None
            }
        }
    }

    /// Counts from here on; the first call of a function is refused.
    fn begin(&self, refused: Option<&str>) {
        let name = refused.map(|name| CString::new(name).expect("no NUL"));
        // SAFETY: null or a C string.
        unsafe { (self.refuse)(name.as_ref().map_or(std::ptr::null(), |name| name.as_ptr()), 1) };
    }

    /// The functions that were called.
    fn called(&self) -> BTreeSet<String> {
        let mut text = vec![0u8; 1 << 16];
        // SAFETY: as many bytes as are told.
        unsafe { (self.calls)(text.as_mut_ptr().cast(), text.len()) };
        let text = CStr::from_bytes_until_nul(&text).expect("it ends with NUL").to_string_lossy();
        text.lines().filter_map(|line| Some(line.split_once(' ')?.0.to_owned())).collect()
    }
}

/// Of tensors by strides, once kernels are loaded and the workspace is there.
pub fn nothing_is_waited_for(device: &Device) -> Result<()> {
    let Some(counter) = Counter::new("candle::waits") else { return Ok(()) };
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::BF16)?;
    let inputs = scale.inputs(2, scale.tokens, DType::BF16)?;
    let [q, k, v] = on(device, &inputs)?;
    let q = q.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    let gate = gate(device)?;
    let mut state = State::new(&problem, 2, false, device)?;
    infini_attention(&q, &k, &v, &gate, &mut state, &Batch::new())?;
    state.reset(&[0, 1])?;
    counter.begin(None);
    let o = infini_attention(&q, &k, &v, &gate, &mut state, &Batch::new())?;
    let called = counter.called();
    let waits = |name: &&String| {
        name.contains("Synchronize") || name.contains("DtoH") || name.contains("MemAlloc_v2")
    };
    let waited: Vec<_> = called.iter().filter(waits).collect();
    ensure!(called.contains("cuLaunchKernel") && waited.is_empty(), "{waited:?} of {called:?}");
    close("o", &o, &expected(&problem, &inputs)?.o, tolerance(DType::BF16))
}

/// Memory for the output that is not there: an error, and nothing was taken in.
pub fn what_the_driver_refuses_leaves_the_state(device: &Device) -> Result<()> {
    let Some(counter) = Counter::new("candle::refused_memory") else { return Ok(()) };
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::BF16)?;
    let inputs = scale.inputs(1, scale.tokens, DType::BF16)?;
    let [q, k, v] = on(device, &inputs)?;
    let gate = gate(device)?;
    let mut state = State::new(&problem, 1, false, device)?;
    counter.begin(Some("cuMemAllocAsync"));
    let failed = infini_attention(&q, &k, &v, &gate, &mut state, &Batch::new());
    counter.begin(None);
    refused(failed.map_err(Into::into), "out of memory")?;
    ensure!(state.tokens(0) == 0);
    let o = infini_attention(&q, &k, &v, &gate, &mut state, &Batch::new())?;
    close("o", &o, &expected(&problem, &inputs)?.o, tolerance(DType::BF16))
}
