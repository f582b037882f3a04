//! A group of checks, and how one is run.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use infini_attn::cuda::{Device, Event, Kernel, Target};

use crate::common::backend::device::OnDevice;
use crate::common::backend::entry::Entry;
use crate::common::cases::Case;
use crate::common::driver::{Summary, run_cases};
use crate::common::say::say;
use crate::common::switches;
use crate::diagnose;

/// What runs in one process.
pub struct Group {
    pub name: String,
    /// The kernels that it is there for, of one architecture: each must run.
    pub kernels: Vec<&'static Kernel>,
    /// How many its calls are planned for, if not for the device's.
    pub multiprocessors: Option<usize>,
    pub work: Work,
}

/// The cases for a device.
type MakeCases = Box<dyn Fn(&Device) -> Result<Vec<Case>> + Send + Sync>;

pub enum Work {
    /// Cases against the float64 reference.
    Cases(Entry, MakeCases),
    /// Anything else.
    Check(fn(&Device) -> Result<()>),
}

impl Group {
    pub fn check(name: &str, check: fn(&Device) -> Result<()>) -> Self {
        Self { name: name.into(), kernels: vec![], multiprocessors: None, work: Work::Check(check) }
    }

    pub fn cases(
        name: String,
        entry: Entry,
        cases: impl Fn(&Device) -> Result<Vec<Case>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name,
            kernels: vec![],
            multiprocessors: None,
            work: Work::Cases(entry, Box::new(cases)),
        }
    }

    /// Runs it on a stream of its own; `tell`: says what it does.
    pub fn run(&self, tell: bool) -> Result<()> {
        let device = switches::device()?;
        let target = device.target()?;
        let arch = self.kernels.first().map_or(target.arch, |kernel| kernel.arch);
        if arch > device.arch() {
            say(format_args!("skipped {}: no kernel of {arch} runs on this device", self.name));
            return Ok(());
        }
        // Newer ones would be chosen otherwise, or for small shapes not these; older ones if the
        // environment wants them.
        let multiprocessors = self.multiprocessors.unwrap_or(target.multiprocessors);
        let arch = arch.min(target.arch);
        let device = device.with_target(Target { arch, multiprocessors, ..target })?;
        let diagnosing = std::env::var_os("INFINI_DIAGNOSE").is_some();
        let _told = GivenUp(&device);
        match &self.work {
            Work::Check(check) => {
                if tell {
                    say(format_args!("case {}", self.name));
                }
                match diagnosing {
                    true => diagnose::check(&device, &self.name, *check),
                    false => self.watched(&device, |device| {
                        let found = diagnose::attempt(device, &|device| failures(check(device)));
                        found.first().map_or(Ok(()), |failure| {
                            say(format_args!("failed {}: {failure}", self.name));
                            bail!("{failure}")
                        })
                    }),
                }
            }
            Work::Cases(entry, cases) => {
                let cases = self.chosen(cases(&device)?)?;
                match diagnosing {
                    true => diagnose::cases(&device, *entry, cases),
                    false => self.watched(&device, |device| run(device, *entry, &cases, tell)),
                }
            }
        }
    }

    /// The cases that `INFINI_CASE` leaves.
    fn chosen(&self, mut cases: Vec<Case>) -> Result<Vec<Case>> {
        if let Ok(name) = std::env::var("INFINI_CASE") {
            cases.retain(|case| case.name == name);
            ensure!(!cases.is_empty(), "INFINI_CASE: {name:?} given, a case of the group expected");
        }
        if cases.is_empty() {
            say(format_args!("skipped {}: none of its cases is run on this device", self.name));
        }
        Ok(cases)
    }

    /// Runs, and fails if one of the group's kernels did not; one case need not run them all.
    fn watched(&self, device: &Device, work: impl Fn(&Device) -> Result<()>) -> Result<()> {
        let seen: Arc<Mutex<BTreeSet<&str>>> = Arc::default();
        let own = seen.clone();
        let watched = device.observed_by(move |event| {
            if let Event::Launch(launch) = event {
                own.lock().unwrap_or_else(PoisonError::into_inner).insert(launch.kernel.symbol);
            }
        });
        work(&watched)?;
        if std::env::var_os("INFINI_CASE").is_some() {
            return Ok(());
        }
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let arch = device.target()?.arch;
        let mut own = self.kernels.iter().filter(|kernel| kernel.arch <= arch);
        let missing = own.find(|kernel| !seen.contains(kernel.symbol));
        missing.map_or(Ok(()), |k| bail!("{} was not launched, but {seen:?}", k.symbol))
    }
}

/// What went wrong, if anything.
pub fn failures(result: Result<()>) -> Vec<String> {
    result.err().map(|error| format!("{error:#}")).into_iter().collect()
}

/// Says at the end, also that of a panic, where a wait of a kernel gave up.
struct GivenUp<'a>(&'a Device);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        if let Some(report) = self.0.wait_report() {
            say(format_args!("diagnosis: {report}"));
        }
    }
}

/// Every case; all failures together.
fn run(device: &Device, entry: Entry, cases: &[Case], tell: bool) -> Result<()> {
    let backend = OnDevice { device: device.clone(), entry };
    let mut all = Summary::default();
    for case in cases {
        if tell {
            say(format_args!("case {}", case.name));
        }
        let summary = run_cases(&backend, std::slice::from_ref(case));
        for failure in &summary.failures {
            say(format_args!("failed {failure}"));
        }
        all.absorb(summary);
        device.synchronize().context("the device is lost to this process")?;
    }
    if tell {
        all.print(&format!("{entry:?}"));
    }
    match all.failures.len() {
        0 => Ok(()),
        failures => bail!("{failures} failures in {} cases", cases.len()),
    }
}
