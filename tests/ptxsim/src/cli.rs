//! The command line: a launch described by a JSON file.
//!
//! Paths are relative to the file. A buffer is described where it is first named, as an argument or
//! in the optional list `buffers`: with `file` it holds that file, with `bytes` alone nobody has
//! written it yet. The same name again is the same buffer. `out` names a file for what the first
//! schedule left in it. A structure is given by its bytes, with the places where addresses of buffers
//! and tensor maps stand:
//!
//! ```json
//! {"bytes_hex": "00000000000000002a000000", "patches": [{"offset": 0, "buffer": "data"}]}
//! ```
//!
//! All of a launch:
//!
//! ```
//! # fn main() -> anyhow::Result<()> {
//! let dir = tempfile::tempdir()?;
//! std::fs::write(
//!     dir.path().join("double.ptx"),
//!     ".version 8.0
//!     .target sm_80
//!     .address_size 64
//!     .visible .entry double(.param .u64 data, .param .u32 n) {
//!         .reg .pred %p;
//!         .reg .b32 %r<3>;
//!         .reg .b64 %rd<3>;
//!         mov.u32 %r0, %tid.x;
//!         ld.param.u32 %r1, [n];
//!         setp.ge.u32 %p, %r0, %r1;
//!         @%p ret;
//!         ld.param.u64 %rd0, [data];
//!         cvta.to.global.u64 %rd1, %rd0;
//!         mad.wide.u32 %rd2, %r0, 4, %rd1;
//!         ld.global.u32 %r2, [%rd2];
//!         add.u32 %r2, %r2, %r2;
//!         st.global.u32 [%rd2], %r2;
//!         ret;
//!     }",
//! )?;
//! std::fs::write(dir.path().join("data.bin"), [1, 0, 0, 0, 2, 0, 0, 0])?;
//! let json = r#"{
//!     "ptx": "double.ptx", "kernel": "double", "arch": "sm_80",
//!     "grid": [1, 1, 1], "block": [32, 1, 1], "schedules": 3,
//!     "args": [{"buffer": "data", "file": "data.bin", "out": "doubled.bin"}, {"u32": 2}]
//! }"#;
//! let launch = dir.path().join("launch.json");
//! std::fs::write(&launch, json)?;
//!
//! let outcome = ptxsim::cli::run(&ptxsim::cli::Command::new(launch))?;
//! assert!(outcome.report.is_clean());
//! assert_eq!(std::fs::read(dir.path().join("doubled.bin"))?, [2, 0, 0, 0, 4, 0, 0, 0]);
//! # Ok(())
//! # }
//! ```

mod argument;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Parser;
use serde::Deserialize;

use crate::device::{Buffer, Device};
use crate::launch::{Launch, LaunchError, Options, Residency, Timing};
use crate::module::Module;
use crate::numeric::tensor::Accumulation;
use crate::report::Report;
use argument::{Argument, BufferArgument, Value};

/// All buffers together; more than any test of a kernel needs, and less than stops a machine.
const MOST_BYTES: u64 = 4 << 30;

/// Runs a CUDA kernel from its PTX on the CPU and reports what it does wrong.
///
/// The report is printed as JSON on stdout, in words on stderr. The exit status is 0 when nothing
/// was reported, 1 when something was, and 2 when the input is bad.
#[derive(Clone, Debug, Parser)]
#[command(name = "ptxsim", version)]
pub struct Command {
    /// The launch: a JSON file with ptx, kernel, arch, grid, block and args, and perhaps cluster,
    /// shared, schedules, buffers, seed, timing (eager or lazy), residency (sequential or
    /// co-resident), early, checks, strict_proxies, perturb, accumulation (exact or chain),
    /// weak_alignment, max_instructions and registers.
    #[arg(value_name = "LAUNCH.JSON")]
    pub launch: PathBuf,
    /// Break the JSON into lines.
    #[arg(long)]
    pub pretty: bool,
    /// Look for no races and no uninitialised values, whatever the file says; bounds and alignment
    /// are always checked.
    #[arg(long)]
    pub no_checks: bool,
}

impl Command {
    /// The command without options.
    pub fn new(launch: impl Into<PathBuf>) -> Self {
        Self { launch: launch.into(), pretty: false, no_checks: false }
    }
}

/// What a run has left besides its files.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The report.
    pub report: Report,
    /// Remarks on the files written.
    pub notes: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    ptx: PathBuf,
    kernel: String,
    arch: String,
    grid: [u32; 3],
    block: [u32; 3],
    #[serde(default = "ones")]
    cluster: [u32; 3],
    #[serde(default)]
    shared: u32,
    registers: Option<u32>,
    schedules: Option<u32>,
    args: Vec<Argument>,
    #[serde(default)]
    buffers: Vec<BufferArgument>,
    seed: Option<u64>,
    timing: Option<Timing>,
    residency: Option<Residency>,
    early: Option<bool>,
    checks: Option<bool>,
    strict_proxies: Option<bool>,
    perturb: Option<u64>,
    accumulation: Option<Accumulation>,
    weak_alignment: Option<bool>,
    max_instructions: Option<u64>,
}

fn ones() -> [u32; 3] {
    [1; 3]
}

impl Description {
    fn launch(&self) -> Launch {
        Launch {
            grid: self.grid,
            block: self.block,
            cluster: self.cluster,
            shared_bytes: self.shared,
            registers: self.registers,
        }
    }

    fn options(&self) -> Options {
        let o = Options::default();
        Options {
            seed: self.seed.unwrap_or(o.seed),
            timing: self.timing.unwrap_or(o.timing),
            residency: self.residency.unwrap_or(o.residency),
            early: self.early.unwrap_or(o.early),
            checks: self.checks.unwrap_or(o.checks),
            strict_proxies: self.strict_proxies.unwrap_or(o.strict_proxies),
            perturb: self.perturb.or(o.perturb),
            accumulation: self.accumulation.unwrap_or(o.accumulation),
            weak_alignment: self.weak_alignment.unwrap_or(o.weak_alignment),
            max_instructions: self.max_instructions.unwrap_or(o.max_instructions),
        }
    }
}

/// The buffers of a launch, in the order they are named in.
#[derive(Default)]
struct Buffers {
    described: Vec<BufferArgument>,
    outs: Vec<(String, PathBuf)>,
}

impl Buffers {
    /// Adds what one mention says.
    fn mention(&mut self, mut b: BufferArgument) -> Result<()> {
        self.outs.extend(b.out.take().map(|out| (b.name.clone(), out)));
        let Some(first) = self.described.iter_mut().find(|x| x.name == b.name) else {
            self.described.push(b);
            return Ok(());
        };
        let same_file = first.file.is_none() || b.file.is_none() || first.file == b.file;
        let same_bytes = first.bytes.is_none() || b.bytes.is_none() || first.bytes == b.bytes;
        ensure!(same_file && same_bytes, "buffer {} is described twice, differently", b.name);
        first.file = first.file.take().or(b.file);
        first.bytes = first.bytes.or(b.bytes);
        Ok(())
    }

    /// Makes them on the device, with the contents of their files.
    fn create(&self, device: &mut Device, dir: &Path) -> Result<HashMap<String, Buffer>> {
        let mut made = HashMap::new();
        let mut room = MOST_BYTES;
        for b in &self.described {
            let name = &b.name;
            let file = b.file.as_ref().map(|f| dir.join(f));
            let size = match &file {
                Some(f) => Some(fs::metadata(f).with_context(|| cannot_read(f, name))?.len()),
                None => None,
            };
            if let (Some(size), Some(bytes), Some(f)) = (size, b.bytes, &file)
                && size != bytes
            {
                bail!("buffer {name}: {} has {size} bytes, not {bytes}", f.display());
            }
            let size = size.or(b.bytes);
            let size = size.ok_or_else(|| anyhow!("buffer {name} needs file or bytes"))?;
            room = room.checked_sub(size).ok_or_else(|| {
                anyhow!("buffer {name}: the buffers have more than {MOST_BYTES} bytes")
            })?;
            let buffer = match &file {
                Some(f) => {
                    let bytes = fs::read(f).with_context(|| cannot_read(f, name))?;
                    device.upload(name, &bytes)
                }
                None => device.uninitialised_bytes(name, size),
            };
            made.insert(name.clone(), buffer);
        }
        Ok(made)
    }
}

fn cannot_read(file: &Path, buffer: &str) -> String {
    format!("cannot read {} (buffer {buffer})", file.display())
}

/// Reads a launch, runs it under its schedules and writes its output files.
///
/// # Errors
/// When the input is bad: nothing has run. What the kernel does wrong is in the report.
pub fn run(command: &Command) -> Result<Outcome> {
    let path = &command.launch;
    let text = read_text(path)?;
    let mut description: Description =
        serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let dir = path.parent().unwrap_or(Path::new(""));
    let ptx = dir.join(&description.ptx);
    let module =
        Module::parse(&read_text(&ptx)?).map_err(|error| anyhow!("{}:{error}", ptx.display()))?;

    let arch = description.arch.parse()?;
    let schedules = description.schedules.unwrap_or(1);
    ensure!(schedules > 0, "schedules is 0, at least 1 is needed");
    let mut device = Device::new(arch);
    device.options = description.options();
    device.options.checks &= !command.no_checks;

    let mut buffers = Buffers::default();
    description.buffers.drain(..).try_for_each(|b| buffers.mention(b))?;
    let mut values = Vec::new();
    for (i, argument) in description.args.drain(..).enumerate() {
        let value = argument.value().with_context(|| format!("argument {i}"))?;
        if let Value::Buffer(b) = &value {
            buffers.mention(b.clone()).with_context(|| format!("argument {i}"))?;
        }
        values.push(value);
    }
    for (name, out) in &buffers.outs {
        let folder = dir.join(out).parent().map_or_else(PathBuf::new, Path::to_path_buf);
        let exists = folder.as_os_str().is_empty() || folder.is_dir();
        ensure!(exists, "no folder {} for the output of buffer {name}", folder.display());
    }
    let made = buffers.create(&mut device, dir)?;
    let args = values
        .into_iter()
        .enumerate()
        .map(|(i, value)| value.resolve(&device, &made).with_context(|| format!("argument {i}")));
    let args: Vec<_> = args.collect::<Result<_>>()?;

    let launch = description.launch();
    let report = device
        .explore(&module, &description.kernel, &launch, &args, schedules)
        .map_err(|error| located(&ptx, error))?;
    let notes = write_outs(&buffers, &made, &device, dir)?;
    Ok(Outcome { report, notes })
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A launch error; those in the text say in which file.
fn located(ptx: &Path, error: LaunchError) -> anyhow::Error {
    match error {
        LaunchError::Decode { kernel, error } => {
            anyhow!("{}:{error} (kernel {kernel})", ptx.display())
        }
        error => error.into(),
    }
}

fn write_outs(
    buffers: &Buffers,
    made: &HashMap<String, Buffer>,
    device: &Device,
    dir: &Path,
) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for (name, out) in &buffers.outs {
        let path = dir.join(out);
        fs::write(&path, device.contents(made[name]))
            .with_context(|| format!("cannot write {} (buffer {name})", path.display()))?;
        let unwritten = device.unwritten(made[name]);
        if unwritten > 0 {
            let file = path.display();
            notes.push(format!(
                "{unwritten} bytes of buffer {name} were never written; they are 0 in {file}"
            ));
        }
    }
    Ok(notes)
}
