//! Records what the device computes where the rules of PTX leave it open, for the simulator to be
//! compared with (tests/ptxsim/golden).

#[path = "../../ptxsim/golden/probes.rs"]
mod probes;

use std::path::Path;

use crate::common::switches::note;
use anyhow::{Context, Result, ensure};
use cudarc::driver::{LaunchConfig, PushKernelArg, sys};
use cudarc::nvrtc::Ptx;
use infini_attn::cuda::Device;
use probes::file::{Recording, Results};
use probes::{PROBES, Probe, hash};

/// Runs every probe that the device can run, twice, and writes the results to a file of `folder`
/// named after its compute capability. A line for each probe.
pub fn record(device: &Device, folder: &Path) -> Result<Vec<String>> {
    let capability = device.capability();
    let (mut results, mut lines) = (vec![], vec![]);
    for probe in PROBES.iter().filter(|p| p.needs.met_by(capability)) {
        let words = run(device, probe).with_context(|| format!("probe {}", probe.entry))?;
        let again = run(device, probe).with_context(|| format!("probe {} again", probe.entry))?;
        let differ = words.iter().zip(&again).filter(|(a, b)| a != b).count();
        ensure!(differ == 0, "{}: {differ} words differ in a second run", probe.entry);
        let hash = hash(words.iter().flat_map(|w| w.to_le_bytes()));
        lines.push(format!("{}: {} words, hash {hash:016x}", probe.entry, words.len()));
        results.push(Results::new(probe, words));
    }
    let (name, driver) = (device.name()?, driver_version()?);
    let recording = Recording { device: name, driver, results, stale: vec![] };
    let (major, minor) = capability;
    let name = format!("golden-sm{major}{minor}.bin");
    let bytes = recording.encode();
    std::fs::write(folder.join(&name), &bytes).with_context(|| name.clone())?;
    lines.push(format!("{name}: {} bytes", bytes.len()));
    Ok(lines)
}

/// Results of one probe.
fn run(device: &Device, probe: &Probe) -> Result<Vec<u32>> {
    let stream = device.stream();
    let module = stream.context().load_module(Ptx::from_src(probe.ptx))?;
    let function = module.load_function(probe.entry)?;
    // An allocation of nothing is refused.
    let mut inputs = probe.words();
    inputs.push(0);
    let inputs = stream.clone_htod(&inputs)?;
    let mut outputs = stream.alloc_zeros::<u32>(probe.results())?;
    let config = LaunchConfig {
        grid_dim: (probe.blocks, 1, 1),
        block_dim: (probe.threads, 1, 1),
        shared_mem_bytes: probe.shared_bytes,
    };
    let mut launch = stream.launch_builder(&function);
    launch.arg(&inputs).arg(&mut outputs);
    note(&format!("golden {}", probe.entry));
    // SAFETY: each thread reads a row of `inputs` and writes one of `outputs`, which hold the rows
    // of all threads.
    unsafe { launch.launch(config) }?;
    let words = stream.clone_dtoh(&outputs)?;
    stream.synchronize()?;
    note("done");
    Ok(words)
}

/// The version of CUDA that the driver, which compiles the PTX, is of.
fn driver_version() -> Result<String> {
    let mut version = 0;
    // SAFETY: writes the one number.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}
