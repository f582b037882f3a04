//! The operator on a CUDA device, in groups that can each have a process of its own (`--exact NAME`):
//!
//! | group | |
//! |---|---|
//! | `kernel::<operation>_<arch>::<dims>` | every kernel, at its smallest shape |
//! | `table::<entry>::<dims>` | the shared table of cases |
//! | `full::<what>` | full shapes, and what surrounds a call: graphs, streams, maps, the host |
//! | `refusals::<operation>` | a driver that refuses a call; only on the simulator's |
//! | `golden::record` | what the device computes where PTX leaves it open, to a file in `INFINI_RESULTS` |
//!
//! Variables: those of `common::switches`; `INFINI_CASE` runs one case of a group alone;
//! `INFINI_DIAGNOSE` looks into the first that fails; `INFINI_SMALL` makes shapes as small as they are
//! where the driver is the simulator's (tests/ptxsim/driver). Without a device all groups are
//! skipped, and it is said so.

#[path = "../../common/mod.rs"]
mod common;

mod calls;
mod diagnose;
mod full;
mod golden;
mod groups;
mod kernels;
mod pool;
mod refusals;
mod sequences;
mod slots;
mod table;
#[cfg(all(feature = "tracing", feature = "nvtx", target_os = "linux"))]
mod watching;

use std::path::PathBuf;
use std::process::ExitCode;

use common::say::say;
use common::switches;
use groups::Group;
use infini_attn::Error;
use infini_attn::cuda::Device;
use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if let Err(error) = switches::kernels() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    let golden = vec![Group::check("golden::record", record_golden)];
    let all = [
        kernels::groups(),
        table::groups(),
        full::groups(),
        slots::groups(),
        pool::groups(),
        sequences::groups(),
        refusals::groups(),
        golden,
    ];
    let all = all.into_iter().flatten();
    #[cfg(all(feature = "tracing", feature = "nvtx", target_os = "linux"))]
    let all = all.chain(watching::groups());
    let all: Vec<_> = all.collect();
    let skipped = match arguments.list {
        true => false,
        false => match switches::device() {
            Ok(_) => false,
            Err(error @ Error::NoDevice { .. }) => {
                say(format_args!("skipped {} groups: {error}", all.len()));
                true
            }
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::FAILURE;
            }
        },
    };
    let tell = arguments.nocapture;
    let trials = all.into_iter().map(|group| {
        let name = group.name.clone();
        Trial::test(name, move || Ok(group.run(tell)?)).with_ignored_flag(skipped)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// To a folder that is forgotten, where none is named.
fn record_golden(device: &Device) -> anyhow::Result<()> {
    let forgotten = tempfile::tempdir()?;
    let folder = std::env::var_os("INFINI_RESULTS").map_or(forgotten.path().into(), PathBuf::from);
    golden::record(device, &folder)?.into_iter().for_each(say);
    Ok(())
}
