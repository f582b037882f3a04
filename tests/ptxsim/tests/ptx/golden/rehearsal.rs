//! The comparison without a card: recordings of the simulator, and of what a card might do.

use ptxsim::Options;
use ptxsim::numeric::Rounding;
use ptxsim::numeric::tensor::Accumulation;

use super::probes::file::{FileError, Recording, Results};
use super::probes::{Inputs, PROBES, Probe};
use super::sums::{self, Model};
use super::{compare, simulate, simulate_as};

fn record(probes: &[&Probe], accumulation: Accumulation) -> Recording {
    let results = probes.iter().map(|p| Results::new(p, simulate(p, accumulation))).collect();
    Recording { device: "PTX simulator".into(), driver: "none".into(), results, stale: vec![] }
}

fn probe(entry: &str) -> &'static Probe {
    PROBES.iter().find(|p| p.entry == entry).expect(entry)
}

fn products() -> Vec<&'static Probe> {
    PROBES.iter().filter(|p| matches!(p.inputs, Inputs::Tensor(_))).collect()
}

#[test]
fn the_simulator_agrees_with_itself() {
    let recording = record(&PROBES.iter().collect::<Vec<_>>(), Accumulation::Exact);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("golden-sm90.bin");
    std::fs::write(&path, recording.encode()).expect("room");
    let bytes = std::fs::read(&path).expect("what was written");
    // Twice, for files of two architectures.
    assert!(2 * bytes.len() < 1_000_000, "{} bytes", bytes.len());
    let read = Recording::decode(&bytes).expect("a file of these probes");
    assert_eq!(read, recording);
    let comparison = compare(&read);
    assert!(comparison.failures.is_empty(), "{}", comparison.failures.join("\n"));
    for line in &comparison.lines {
        println!("{line}");
        let numbers: Vec<&str> = line.split(' ').filter(|w| w.parse::<u32>().is_ok()).collect();
        assert!(numbers.len() >= 2 && numbers[0] == numbers[1], "{line}");
    }
}

#[test]
fn sums_in_another_order_are_within_bounds() {
    let comparison = compare(&record(&products(), Accumulation::Chain));
    assert!(comparison.failures.is_empty(), "{}", comparison.failures.join("\n"));
    let lines = comparison.lines.iter().filter(|line| line.contains(" as Chain"));
    for (line, probe) in lines.zip(products()) {
        let count = probe.results() * if probe.columns.len() == 2 { 2 } else { 1 };
        assert!(line.contains(&format!(" {count} as Chain")), "{line}");
        assert!(!line.contains(&format!(" {count} equal")), "{line}");
    }
}

#[test]
fn approximations_within_their_bounds_are_told_only() {
    let options = || Options { perturb: Some(1), ..Options::default() };
    let probes = ["unary", "binary", "halves", "bf16_halves"].map(probe);
    let results = probes.map(|p| Results::new(p, simulate_as(p, options()))).to_vec();
    let comparison = compare(&Recording { results, ..record(&[], Accumulation::Exact) });
    assert!(comparison.failures.is_empty(), "{}", comparison.failures.join("\n"));
    // Each with the inputs and both results of the first that differs.
    let differ = comparison.lines.iter().filter(|line| line.contains(", in the simulator "));
    assert_eq!(differ.count(), 19, "{}", comparison.lines.join("\n"));
}

#[test]
fn a_device_that_cuts_is_recognised() {
    let model = Model { group: 8, extra: 1, rounding: Rounding::Zero, aligned: true, once: false };
    for probe in products() {
        let Inputs::Tensor(tensor) = probe.inputs else { continue };
        let model = if tensor.warpgroup { Model { group: 16, extra: 2, ..model } } else { model };
        let model = Model { group: model.group.min(tensor.shape()[2]), ..model };
        let results = vec![Results::new(probe, sums::imitate(probe, tensor, model))];
        let comparison = compare(&Recording { results, ..record(&[], Accumulation::Exact) });
        assert!(comparison.failures.is_empty(), "{}", comparison.failures.join("\n"));
        let line = comparison.lines.iter().find(|line| line.contains("as Exact")).expect("a line");
        println!("{line}");
        let (_, found) = line.split_once("explained by: ").expect(line);
        // f16 shows less of what was cut.
        let alone = found.len() == model.describe().len();
        assert!(found.starts_with(&model.describe()) && (alone || tensor.half), "{line}");
    }
}

/// A recording with one bit of a word flipped.
fn flipped(entry: &str, word: usize, bit: u32) -> Recording {
    let mut recording = record(&[probe(entry)], Accumulation::Exact);
    recording.results[0].words[word] ^= 1 << bit;
    recording
}

#[test]
fn a_flipped_bit_is_reported() {
    // The last column of thread 100, a conversion; ex2 of thread 600; a sum that is rounded, and one that is not.
    for (entry, word, bit, told) in [
        ("unary", 100 * 14 + 13, 13, "unary cvt.rna.tf32.f32: thread 100: "),
        ("unary", 600 * 14, 2, "unary ex2.approx.f32: thread 600: "),
        ("mma_bf16", 3 * 128, 20, "mma_bf16: 1 sums of class Spread out of bounds"),
        ("wgmma_f16", 8 * 512 - 1, 0, "wgmma_f16: 1 sums of class Exact out of bounds"),
    ] {
        let comparison = compare(&flipped(entry, word, bit));
        let [failure] = &comparison.failures[..] else { panic!("{:?}", comparison.failures) };
        assert!(failure.starts_with(told), "{failure}");
    }
    let mut recording = record(&[probe("mma_tf32")], Accumulation::Exact);
    let mut words = recording.results[0].words.iter_mut();
    *words.find(|w| f32::from_bits(**w).is_nan()).expect("a NaN") = 0;
    let failures = compare(&recording).failures;
    assert!(failures[0].starts_with("mma_tf32: 1 sums of class Special out"), "{failures:?}");
    // What nobody promises is told, and fails nothing.
    let comparison = compare(&flipped("elect", 0, 0));
    assert!(comparison.failures.is_empty(), "{:?}", comparison.failures);
    assert!(comparison.lines.iter().any(|line| line.starts_with("elect elect.sync: 511 of 512")));
}

#[test]
fn damaged_files_are_refused_and_stale_probes_are_named() {
    let recording = record(&[probe("halves")], Accumulation::Exact);
    let bytes = recording.encode();
    for end in [8, 11, 20, bytes.len() - 1] {
        assert_eq!(Recording::decode(&bytes[..end]), Err(FileError::Truncated), "{end} bytes");
    }
    let error = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        Recording::decode(&bytes).expect_err("refused")
    };
    assert_eq!(error(&|bytes| bytes[0] = 0), FileError::Foreign);
    assert_eq!(error(&|bytes| bytes[8] = 2), FileError::Version(2));
    assert_eq!(error(&|bytes| bytes.push(0)), FileError::Trailing(1));

    let decoded = |change: &dyn Fn(&mut Results)| {
        let mut recording = recording.clone();
        change(&mut recording.results[0]);
        Recording::decode(&recording.encode())
    };
    let stale = |change: &dyn Fn(&mut Results)| {
        let decoded = decoded(change).expect("a file");
        assert!(decoded.results.is_empty(), "{decoded:?}");
        decoded.stale
    };
    assert_eq!(stale(&|r| r.key ^= 1), ["halves was recorded with other inputs or PTX"]);
    assert_eq!(stale(&|r| r.entry = "thirds".into()), ["there is no probe thirds"]);
    let short = decoded(&|r| r.words.truncate(9)).expect_err("refused").to_string();
    assert_eq!(short, "9 words of halves, 4096 expected");
}

#[test]
fn keys_stand_for_text_launch_and_inputs() {
    let probe = probe("halves");
    let ptx = probe.ptx.replace("tanh.approx.f16x2 %d1", "tanh.approx.f16x2 %d0");
    let other = |change: Probe| assert_ne!(change.key(), probe.key());
    let same = || Probe { columns: probe.columns, ..*probe };
    assert_eq!(same().key(), probe.key());
    other(Probe { ptx: ptx.leak(), ..same() });
    other(Probe { shared_bytes: 16, ..same() });
    other(Probe { inputs: Inputs::Sweep, ..same() });
    // An entry's own text only.
    let ptx = probe.ptx.replace("rcp.approx.f32 %f4", "rcp.approx.f32 %f5");
    assert_eq!(Probe { ptx: ptx.leak(), ..same() }.key(), probe.key());
}
