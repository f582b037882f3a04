//! The machine code of kernels of compute capability 9.0 has the instructions that they are there for,
//! and touches no local memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use infini_attn::cuda::{Arch, ptx};

use super::ptxas::{assemble, files, nvcc};
use super::say::say;

/// Warpgroup products and tensor loads; each file of sm90 has both.
const WANTED: [&str; 2] = ["HGMMA", "UTMALDG"];

/// Loads and stores of local memory.
const LOCAL: [&str; 2] = ["LDL", "STL"];

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
        let has = |opcode: &str| functions.values().any(|all| all.contains(&opcode.to_owned()));
        let missing = WANTED.iter().filter(|opcode| !has(opcode));
        problems.extend(missing.map(|opcode| format!("{file}: no {opcode}")));
        for (function, opcodes) in &functions {
            let local = opcodes.iter().find(|opcode| LOCAL.contains(&opcode.as_str()));
            problems.extend(local.map(|opcode| format!("{function}: {opcode}")));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The instructions of every function of a cubin.
fn disassemble(program: &Path, cubin: &Path) -> BTreeMap<String, Vec<String>> {
    let output = Command::new(program).arg("-c").arg(cubin).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    opcodes(&String::from_utf8_lossy(&output.stdout))
}

/// Opcodes, without their modifiers, by function.
fn opcodes(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut functions = BTreeMap::<String, Vec<String>>::new();
    let mut function = String::new();
    for line in text.lines() {
        if let Some((_, section)) = line.split_once(".section\t.text.") {
            function = section.split(',').next().unwrap_or_default().to_owned();
        } else if let Some((_, instruction)) = line.trim_start().split_once("*/") {
            let mut words = instruction.split_whitespace().filter(|word| !word.starts_with('@'));
            let opcode = words.next().and_then(|word| word.split(['.', ';']).next());
            functions.entry(function.clone()).or_default().extend(opcode.map(Into::into));
        }
    }
    functions
}

#[test]
fn instructions_are_told_by_function() {
    let found = opcodes(
        "\t.section\t.text.f,\"ax\",@progbits\n\
         f:\n\
         .text.f:\n\
         \x20       /*0000*/                   LDC R1, c[0x0][0x28] ;\n\
         \x20       /*0010*/              @!P0 STL.64 [R1+0x8], R2 ;\n\
         .L_x_0:\n\
         \t.section\t.text.g,\"ax\",@progbits\n\
         \x20       /*0000*/                   EXIT ;\n",
    );
    assert_eq!(found["f"], ["LDC", "STL"]);
    assert_eq!(found["g"], ["EXIT"]);
}
