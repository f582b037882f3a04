//! Waits of the crate's kernels in a build with INFINI_ATTN_WAIT_POLLS.

use ptxsim::diagnostic::Kind;
use ptxsim::{Arg, Buffer, Device, Launch, Module, Report};

use crate::support::run::compiled;

/// The words of `InfiniWaitReport`.
const WORDS: usize = 8;
const POLLS: u32 = 40;
const NOBODY: i32 = -1;

/// A kernel of whose waits that of `warp` in `block` is never over; where the barrier lies in that
/// block.
fn run(device: &mut Device, module: &Module, [block, warp]: [i32; 2]) -> (Report, u32) {
    let out: Buffer = device.buffer("out", &[0u32; 4]);
    let args = [out.into(), Arg::I32(block), Arg::I32(warp)];
    let launch = Launch::linear(4, 96);
    let report = device.launch(module, "wait_plain", &launch, &args).expect("it runs");
    let barriers = device.read::<u32>(out).expect("written");
    (report, barriers.get(block as usize).copied().unwrap_or(0))
}

#[test]
fn a_wait_that_never_ends_says_where_and_traps() {
    for (place, seed) in [([0, 0], 0), ([2, 1], 1), ([3, 2], 2)] {
        let (mut module, mut device) = compiled("bounded_wait", "sm_90a");
        device.options.seed = seed;
        let record = device.buffer("record", &[0u32; WORDS]);
        let pointer = device.address(record).to_le_bytes();
        assert!(module.set_variable("infini_wait_report", &pointer));
        let (report, barrier) = run(&mut device, &module, place);
        assert!(report.diagnostics().map(|d| d.kind).eq([Kind::Trap]), "{report}");
        let [block, warp] = place.map(|number| number as u32);
        let words = device.read::<u32>(record).expect("written");
        assert_eq!(words[4] / 32, warp, "{words:?}");
        assert_eq!(words, [1, block, 0, 0, words[4], barrier, 1, POLLS]);
    }
}

#[test]
fn without_a_record_it_traps() {
    let (module, mut device) = compiled("bounded_wait", "sm_90a");
    let (report, _) = run(&mut device, &module, [1, 1]);
    assert!(report.diagnostics().map(|d| d.kind).eq([Kind::Trap]), "{report}");
}

#[test]
fn waits_that_end_leave_nothing() {
    let (mut module, mut device) = compiled("bounded_wait", "sm_90a");
    let record = device.buffer("record", &[0u32; WORDS]);
    assert!(module.set_variable("infini_wait_report", &device.address(record).to_le_bytes()));
    let (report, _) = run(&mut device, &module, [NOBODY; 2]);
    assert!(report.is_clean(), "{report}");
    assert_eq!(device.read::<u32>(record).expect("written"), [0; WORDS]);
}
