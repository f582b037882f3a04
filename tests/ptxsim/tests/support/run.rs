//! Launches that must be clean.

use bytemuck::Pod;
use ptxsim::{Arch, Arg, Buffer, Device, Launch, Module, Report};

use super::tools;

/// How many schedules every launch runs under.
pub const SCHEDULES: u32 = 3;

/// The architecture of a name such as `sm_90a`.
pub fn arch(name: &str) -> Arch {
    match name {
        "sm_80" => Arch::Sm80,
        "sm_90a" => Arch::Sm90a,
        _ => panic!("no architecture {name}"),
    }
}

/// Parses PTX; a failure names the case.
#[track_caller]
pub fn parse(case: &str, ptx: &str) -> Module {
    Module::parse(ptx).unwrap_or_else(|e| panic!("{case}: {e}"))
}

/// A compiled file of `kernels/` and a device to run it on.
#[track_caller]
pub fn compiled(file: &str, arch_name: &str) -> (Module, Device) {
    let module = parse(file, &tools::kernel(file, arch_name));
    let mut device = Device::new(arch(arch_name));
    device.options.strict_proxies = true;
    (module, device)
}

/// Runs a kernel under several schedules; whatever is reported fails the test.
#[track_caller]
pub fn clean(
    device: &mut Device,
    module: &Module,
    kernel: &str,
    launch: Launch,
    args: &[Arg],
) -> Report {
    let report = device
        .explore(module, kernel, &launch, args, SCHEDULES)
        .unwrap_or_else(|e| panic!("{kernel}: {e}"));
    assert!(report.is_clean(), "{kernel}:\n{report}");
    report
}

/// A buffer of which every byte has been written.
#[track_caller]
pub fn read<T: Pod>(device: &Device, buffer: Buffer) -> Vec<T> {
    device.read(buffer).unwrap_or_else(|e| panic!("{e}"))
}
