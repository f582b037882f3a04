//! The simulator against what real devices have computed (tests/ptxsim/golden). A file that nobody
//! has recorded yet is named and skipped.

#[path = "../../../golden/probes.rs"]
mod probes;
mod rehearsal;
mod scalar;
mod sums;

use std::io::Write;
use std::path::Path;

use probes::file::Recording;
use probes::{Capability, Inputs, PROBES, Probe};
use ptxsim::numeric::tensor::Accumulation;
use ptxsim::{Arch, Arg, Device, Launch, Options};

use crate::run::parse;

/// Devices whose results are wanted; those of others are compared as well.
const WANTED: [&str; 2] = ["golden-sm80.bin", "golden-sm90.bin"];

/// Results of one probe in the simulator.
fn simulate(probe: &Probe, accumulation: Accumulation) -> Vec<u32> {
    simulate_as(probe, Options { accumulation, ..Options::default() })
}

fn simulate_as(probe: &Probe, options: Options) -> Vec<u32> {
    let arch = match probe.needs {
        Capability::From80 => Arch::Sm80,
        Capability::Only90 => Arch::Sm90a,
    };
    let mut device = Device::new(arch);
    device.options = options;
    let inputs = device.buffer("inputs", &probe.words());
    let outputs = device.uninitialised::<u32>("outputs", probe.results());
    let launch = Launch::linear(probe.blocks, probe.threads).shared(probe.shared_bytes);
    let args = [Arg::Buffer(inputs), Arg::Buffer(outputs)];
    let report = device.launch(&parse(probe.ptx), probe.entry, &launch, &args).expect(probe.entry);
    assert!(report.is_clean(), "{}: {report}", probe.entry);
    device.read(outputs).expect("all threads have stored")
}

/// What a comparison says.
#[derive(Default)]
struct Comparison {
    /// For the reader.
    lines: Vec<String>,
    /// Results that the rules do not allow.
    failures: Vec<String>,
}

/// Compares every probe that was recorded.
fn compare(recording: &Recording) -> Comparison {
    let mut comparison = Comparison::default();
    for probe in PROBES {
        let Some(card) = recording.words(probe) else {
            comparison.lines.push(format!("{}: not recorded", probe.entry));
            continue;
        };
        match probe.inputs {
            Inputs::Tensor(tensor) => sums::compare(probe, tensor, card, &mut comparison),
            _ => scalar::compare(probe, card, &mut comparison),
        }
    }
    comparison
}

/// A line on stderr, past the test harness.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[test]
fn recorded_results_agree_with_the_simulator() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let files = std::fs::read_dir(&folder).expect("the folder").map(|f| f.expect("a file"));
    let names = files.map(|f| f.file_name().to_string_lossy().into_owned());
    let names: Vec<String> = names.filter(|name| name.ends_with(".bin")).collect();
    for missing in WANTED.iter().filter(|w| !names.iter().any(|name| name == *w)) {
        say(&format!("skipped {missing}: not recorded yet"));
    }
    let mut failures = vec![];
    for name in names {
        let bytes = std::fs::read(folder.join(&name)).expect("a file that can be read");
        let recording = Recording::decode(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let Recording { device, driver, .. } = &recording;
        assert_ne!(device, "PTX simulator", "{name} was recorded without a card");
        say(&format!("{name}: {device}, driver {driver}"));
        recording.stale.iter().for_each(|reason| say(&format!("  skipped: {reason}")));
        let comparison = compare(&recording);
        comparison.lines.iter().for_each(|line| say(&format!("  {line}")));
        failures.extend(comparison.failures.into_iter().map(|f| format!("{name}: {f}")));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
