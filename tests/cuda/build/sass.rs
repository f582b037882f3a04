//! The machine code of kernels of compute capability 9.0 has the instructions that they are there for,
//! in the order that lets them overlap, and touches no local memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use infini_attn::cuda::{Arch, KERNELS, Kernel, ptx};

use super::ptxas::{assemble, files, nvcc};
use crate::common::say::say;

/// Warpgroup products and tensor loads, of which each file of sm90 has both; or, of scans, the wait for
/// the launch before and the word that the next may begin.
const WANTED: [&str; 2] = ["HGMMA", "UTMALDG"];
const WANTED_OF_SCANS: [&str; 2] = ["ACQBULK", "PREEXIT"];

/// Loads and stores of local memory.
const LOCAL: [&str; 2] = ["LDL", "STL"];

/// Operations whose main loops weigh the scores of a block while products of another run; each has a
/// loop with a mask and one without.
const ATTENTION: [&str; 2] = ["segment_attention", "segment"];
const MAIN_LOOPS: usize = 2;

#[test]
fn kernels_of_sm90_use_its_instructions_and_no_local_memory() {
    let Some(nvcc) = nvcc() else {
        say("skipped: the crate was built from INFINI_ATTN_PREBUILT and NVCC is not set");
        return;
    };
    let disassembler = nvcc.with_file_name("nvdisasm");
    if !disassembler.is_file() {
        say(format_args!(
            "skipped: no {} (see tests/ptxsim/requirements.txt)",
            disassembler.display()
        ));
        return;
    }
    let mut problems = Vec::new();
    for (file, arch) in files().into_iter().filter(|(_, arch)| *arch == Arch::Sm90) {
        let Some(text) = ptx(file) else { continue };
        let functions = disassemble(&disassembler, &assemble(&nvcc, file, arch, text).1);
        let has = |wanted: &str| functions.values().flatten().any(|i| opcode(i) == wanted);
        let wanted = if file.ends_with("_scan") { WANTED_OF_SCANS } else { WANTED };
        let missing = wanted.iter().filter(|opcode| !has(opcode));
        problems.extend(missing.map(|opcode| format!("{file}: no {opcode}")));
        for (function, instructions) in &functions {
            let local = instructions.iter().find(|i| LOCAL.contains(&opcode(i)));
            problems.extend(local.map(|i| format!("{function}: {i}")));
        }
        let attention = |k: &&Kernel| k.file == file && ATTENTION.contains(&k.operation);
        for kernel in KERNELS.iter().filter(attention) {
            let mut found = overlapped(&functions[kernel.symbol]);
            if kernel.operation == "segment" {
                // The update's, last, maps the keys of a tile.
                found.pop();
            }
            // A thread weighs half as many scores between two products as a block has keys.
            let wanted = kernel.keys / 2;
            if found.len() < MAIN_LOOPS || found.iter().any(|exponentials| *exponentials < wanted) {
                problems.push(format!(
                    "{}: {found:?} exponentials while products run; {MAIN_LOOPS} loops or more, \
                     {wanted} or more in each",
                    kernel.symbol
                ));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The exponentials behind every wait for all products but the youngest, up to the wait for that one:
/// what the tensor cores compute beneath.
fn overlapped(instructions: &[String]) -> Vec<usize> {
    let (mut found, mut open) = (Vec::new(), None);
    for instruction in instructions {
        match (instruction.strip_prefix("WARPGROUP.DEPBAR.LE gsb0, "), &mut open) {
            (Some("0x0"), _) => found.extend(open.take()),
            (Some(_), _) => open = Some(0),
            (None, Some(count)) => *count += usize::from(instruction.starts_with("MUFU.EX2")),
            (None, None) => {}
        }
    }
    found
}

/// The instructions of every function of a cubin.
fn disassemble(program: &Path, cubin: &Path) -> BTreeMap<String, Vec<String>> {
    let output = Command::new(program).arg("-c").arg(cubin).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    instructions(&String::from_utf8_lossy(&output.stdout))
}

/// Instructions, without their predicates, by function.
fn instructions(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut functions = BTreeMap::<String, Vec<String>>::new();
    let mut function = String::new();
    for line in text.lines() {
        if let Some((_, section)) = line.split_once(".section\t.text.") {
            function = section.split(',').next().unwrap_or_default().to_owned();
        } else if let Some((_, instruction)) = line.trim_start().split_once("*/") {
            let words = instruction.trim_end().trim_end_matches(';').split_whitespace();
            let words: Vec<_> = words.skip_while(|word| word.starts_with('@')).collect();
            functions.entry(function.clone()).or_default().push(words.join(" "));
        }
    }
    functions
}

/// An instruction's name, without modifiers.
fn opcode(instruction: &str) -> &str {
    instruction.split(['.', ' ']).next().unwrap_or_default()
}

#[test]
fn instructions_are_told_by_function() {
    let found = instructions(
        "\t.section\t.text.f,\"ax\",@progbits\n\
         f:\n\
         .text.f:\n\
         \x20       /*0000*/                   LDC R1, c[0x0][0x28] ;\n\
         \x20       /*0010*/              @!P0 STL.64 [R1+0x8], R2 ;\n\
         .L_x_0:\n\
         \t.section\t.text.g,\"ax\",@progbits\n\
         \x20       /*0000*/                   EXIT ;\n",
    );
    assert_eq!(found["f"], ["LDC R1, c[0x0][0x28]", "STL.64 [R1+0x8], R2"]);
    assert_eq!(found["f"].iter().map(|i| opcode(i)).collect::<Vec<_>>(), ["LDC", "STL"]);
    assert_eq!(found["g"], ["EXIT"]);
}

#[test]
fn exponentials_beneath_products_are_counted() {
    let [early, late] = ["0x1", "0x0"].map(|left| format!("WARPGROUP.DEPBAR.LE gsb0, {left}"));
    let exponential = "MUFU.EX2 R5, R5".to_owned();
    let count = |program: &[&String]| {
        overlapped(&program.iter().map(|i| i.to_string()).collect::<Vec<_>>())
    };
    let (early, late, exp) = (&early, &late, &exponential);
    assert_eq!(count(&[exp, late, exp, early, exp, exp, late, exp, late]), [2]);
    // Moved up, the second wait leaves nothing to overlap.
    assert_eq!(count(&[early, late, exp, exp, early, exp, late]), [0, 1]);
    assert_eq!(count(&[early, exp]), [0; 0]);
}
