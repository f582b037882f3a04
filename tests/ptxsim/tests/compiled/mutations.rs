//! Mutated compiler output: whatever it becomes, it is refused or runs to an end with a report;
//! nothing panics.

use ptxsim::{Arch, Arg, Device, Launch, Module, Options, Timing};
use rand::prelude::*;

use crate::support::tools;

/// Pieces of a text that keep it printable PTX-like: words, numbers, punctuation.
fn tokens(text: &str) -> Vec<&str> {
    let class = |c: char| match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '%' | '$' | '.' | ':' => 0,
        '\n' => 1,
        ' ' | '\t' => 2,
        _ => 3,
    };
    let mut out = Vec::new();
    let mut start = 0;
    for (i, c) in text.char_indices().skip(1) {
        let before = text[..i].chars().next_back().unwrap_or(' ');
        if class(before) != class(c) || class(c) == 3 {
            out.push(&text[start..i]);
            start = i;
        }
    }
    out.push(&text[start..]);
    out
}

/// Replaces a few tokens by others of the same file, or drops or doubles them.
fn mutate(tokens: &[&str], rng: &mut StdRng) -> String {
    let mut out: Vec<&str> = tokens.to_vec();
    for _ in 0..rng.random_range(1..6) {
        let at = rng.random_range(0..out.len());
        let other = out[rng.random_range(0..out.len())];
        match rng.random_range(0..8) {
            0 => drop(out.remove(at)),
            1 => out.insert(at, other),
            _ => out[at] = other,
        }
    }
    out.concat()
}

/// Runs every kernel of a text that still decodes.
fn run(text: &str, rng: &mut StdRng) -> u32 {
    let Ok(module) = Module::parse(text) else { return 0 };
    let names: Vec<String> = module.kernels().map(String::from).collect();
    let mut launched = 0;
    for name in names {
        let Ok(kernel) = module.kernel(&name) else { continue };
        let mut device = Device::new(Arch::Sm90a);
        device.options = Options {
            seed: rng.random(),
            timing: if rng.random() { Timing::Eager } else { Timing::Lazy },
            max_instructions: 20_000,
            ..Options::default()
        };
        let buffer = device.buffer("data", &[1u32; 1024]);
        let args: Vec<Arg> = (kernel.params.iter())
            .map(|p| match p.bytes {
                8 if rng.random_ratio(9, 10) => Arg::Buffer(buffer),
                4 => Arg::I32(rng.random_range(0..64)),
                bytes => Arg::Bytes(vec![rng.random(); bytes as usize]),
            })
            .collect();
        let launch = Launch { cluster: [1; 3], ..Launch::linear(2, 128) }.shared(8192);
        if let Ok(report) = device.launch(&module, &name, &launch, &args) {
            launched += 1;
            // The text forms must hold for any report.
            assert!(!report.to_string().is_empty());
            assert!(serde_json::to_string(&report).is_ok());
        }
    }
    launched
}

fn mutations(file: &str, count: usize) {
    let text = tools::kernel(file, "sm_90a");
    let tokens = tokens(&text);
    let mut rng = StdRng::seed_from_u64(count as u64 + file.len() as u64);
    assert!(run(&text, &mut rng) > 0, "{file} itself must run");
    let mut launched = 0;
    for _ in 0..count {
        let mutant = mutate(&tokens, &mut rng);
        launched += run(&mutant, &mut rng);
    }
    assert!(launched > 0, "{file}: no mutant got as far as a launch");
}

#[test]
fn mutated_warp_operations() {
    mutations("warp", 300);
}

#[test]
fn mutated_barriers_and_atomics() {
    mutations("block", 300);
}

#[test]
fn mutated_arithmetic() {
    mutations("math", 60);
}

#[test]
fn mutated_tensor_copies() {
    mutations("tensor_copies", 300);
}

#[test]
fn mutated_clusters() {
    mutations("cluster", 300);
}

#[test]
fn mutated_tensor_cores() {
    mutations("matrices", 300);
    mutations("wgmma", 100);
}
