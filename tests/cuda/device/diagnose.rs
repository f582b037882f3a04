//! What a failure looks like: whether it repeats, and how far it depends on kernels and on how work
//! is cut.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Result, bail};
use infini_attn::cuda::{Arch, Device};

use crate::common::backend::device::OnDevice;
use crate::common::backend::entry::Entry;
use crate::common::cases::Case;
use crate::common::driver::run_cases;
use crate::common::say::say;
use crate::common::switches::target;
use crate::common::tensor_cases::work;
use crate::groups::failures;

/// The smallest case that fails.
pub fn cases(device: &Device, entry: Entry, mut cases: Vec<Case>) -> Result<()> {
    cases.sort_by_key(work);
    for case in cases {
        say(format_args!("case {}", case.name));
        let run = |device: &Device| {
            let backend = OnDevice { device: device.clone(), entry };
            run_cases(&backend, std::slice::from_ref(&case)).failures
        };
        look(device, "", &run)?;
    }
    say(format_args!("diagnosis: no case fails when they run by themselves, the smallest first"));
    Ok(())
}

/// A check that is one case, of the group's name.
pub fn check(device: &Device, name: &str, check: fn(&Device) -> Result<()>) -> Result<()> {
    look(device, &format!("{name}: "), &|device| failures(check(device)))?;
    say(format_args!("diagnosis: it passes when it runs again"));
    Ok(())
}

/// Runs once; if that fails, again and in other ways, and says how they differ. `case` stands before
/// failures that do not name it themselves.
fn look(device: &Device, case: &str, run: &dyn Fn(&Device) -> Vec<String>) -> Result<()> {
    let first = attempt(device, run);
    let Some(sentence) = first.first() else { return Ok(()) };
    first.iter().for_each(|failure| say(format_args!("failed {case}{failure}")));
    let own = device.target()?;
    let mut ways = vec![("again", "")];
    if own.arch > Arch::Sm80 {
        ways.push(("on the portable kernels", "arch=sm80"));
        ways.push(("without pairs of blocks", "shared_by=1"));
    }
    ways.push(("planned for one multiprocessor", "multiprocessors=1"));
    for (way, switches) in ways {
        if let Err(error) = device.synchronize() {
            say(format_args!("diagnosis: the device is lost to this process: {error}"));
            break;
        }
        let other = match switches {
            "" => device.clone(),
            _ => device.with_target(target(own, switches)?)?,
        };
        let result = match &*attempt(&other, run) {
            [] => "it passes".to_string(),
            same if same == first => "it fails in the same way".into(),
            [other, ..] => format!("it fails otherwise: {other}"),
        };
        say(format_args!("diagnosis: {way}: {result}"));
    }
    bail!("{sentence}")
}

/// Failures of a run; a panic is one.
pub fn attempt(device: &Device, run: &dyn Fn(&Device) -> Vec<String>) -> Vec<String> {
    catch_unwind(AssertUnwindSafe(|| run(device))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).into()));
        vec![text.unwrap_or_else(|| "a panic without words".into())]
    })
}
