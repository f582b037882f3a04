//! What ptxas assigns to every kernel of its file's own architecture: registers, stack, shared memory.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::{env, fs};

use infini_attn::cuda::{Arch, KERNELS, Kernel, ptx};
use rayon::prelude::*;

use crate::common::say::say;

/// The assembler's name of an architecture, and the shared memory of a block that every device which
/// runs its kernels grants.
fn limits(arch: Arch) -> (&'static str, u32) {
    match arch {
        Arch::Sm90 => ("sm_90a", 227 * 1024),
        _ => ("sm_80", 99 * 1024),
    }
}

/// What ptxas says of one function.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    registers: u32,
    /// Static shared memory; the table has the dynamic part.
    shared_bytes: u32,
    stack_bytes: u32,
    spill_bytes: u32,
}

#[test]
fn register_budgets() {
    let of = |threads, blocks_per_sm| Kernel { threads, blocks_per_sm, ..KERNELS[0] }.registers();
    assert_eq!([of(128, 2), of(256, 1), of(192, 2), of(1024, 1)], [255, 255, 168, 64]);
    assert_eq!(of(384, 1), 168);
}

/// Kernels whose warps pass registers to each other say with how many they begin.
#[test]
fn kernels_that_reallocate_registers_say_so() {
    for (file, _) in files() {
        let Some(text) = ptx(file) else { continue };
        let says = KERNELS.iter().any(|k| k.file == file && k.launch_registers > 0);
        assert_eq!(says, text.contains("setmaxnreg"), "{file}");
    }
}

#[test]
fn kernels_spill_nothing_and_keep_to_their_budgets() {
    let Some(nvcc) = nvcc() else {
        say("skipped: the crate was built from INFINI_ATTN_PREBUILT and NVCC is not set");
        return;
    };
    let messages: Vec<String> = files()
        .into_par_iter()
        .filter_map(|(file, arch)| Some(assemble(&nvcc, file, arch, ptx(file)?).0))
        .collect();
    let usages: BTreeMap<String, Usage> = messages.iter().flat_map(|text| parse(text)).collect();

    let lines = messages.iter().flat_map(|text| text.lines());
    let mut problems: Vec<String> = lines.filter(|l| serialises(l)).map(String::from).collect();
    for (function, usage) in &usages {
        if usage.stack_bytes + usage.spill_bytes > 0 {
            problems.push(format!("{function}: stack or spills: {usage:?}"));
        }
    }
    for kernel in KERNELS.iter().filter(|kernel| ptx(kernel.file).is_some()) {
        let Some(usage) = usages.get(kernel.symbol) else {
            problems.push(format!("{}: ptxas says nothing of it", kernel.symbol));
            continue;
        };
        let allowed = kernel.registers();
        if usage.registers > allowed {
            problems.push(format!(
                "{}: {} registers, at most {allowed} for {} blocks of {} threads",
                kernel.symbol, usage.registers, kernel.blocks_per_sm, kernel.threads
            ));
        }
        let wanted = kernel.launch_registers;
        if wanted > 0 && usage.registers != wanted {
            let (symbol, got) = (kernel.symbol, usage.registers);
            problems.push(format!("{symbol}: {got} registers, its warps count on {wanted}"));
        }
        let shared = usage.shared_bytes + kernel.shared_bytes;
        let most = limits(kernel.arch).1;
        if shared > most {
            let symbol = kernel.symbol;
            problems.push(format!("{symbol}: {shared} bytes of shared memory, at most {most}"));
        }
    }
    report_drift(&usages);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Files of the table with their architecture.
pub fn files() -> BTreeMap<&'static str, Arch> {
    KERNELS.iter().map(|kernel| (kernel.file, kernel.arch)).collect()
}

/// Whether a message (C7508 to C7519) tells that warpgroup products wait for each other, or that
/// registers stay where they are.
fn serialises(line: &str) -> bool {
    line.contains("(C75") || line.contains("wgmma") || line.contains("setmaxnreg")
}

/// The nvcc of the build, or NVCC.
pub fn nvcc() -> Option<PathBuf> {
    let built_with = option_env!("INFINI_ATTN_NVCC").map(PathBuf::from);
    built_with.or_else(|| env::var_os("NVCC").map(Into::into))
}

/// The messages of ptxas for a file, and its cubin; kept by its content.
pub fn assemble(nvcc: &Path, file: &'static str, arch: Arch, text: &str) -> (String, PathBuf) {
    let mut hasher = DefaultHasher::new();
    (nvcc, text).hash(&mut hasher);
    let name = format!("{}-{:016x}", file.replace('/', "-"), hasher.finish());
    let stem = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ptxas").join(name);
    let [source, cubin, log] = ["ptx", "cubin", "log"].map(|e| stem.with_extension(e));
    // Two tests ask for the files of sm90.
    static BUSY: Mutex<BTreeMap<&str, Arc<Mutex<()>>>> = Mutex::new(BTreeMap::new());
    let lock = BUSY.lock().unwrap_or_else(PoisonError::into_inner).entry(file).or_default().clone();
    let _held = lock.lock();
    if let Ok(known) = fs::read_to_string(&log) {
        return (known, cubin);
    }
    fs::create_dir_all(stem.parent().unwrap()).unwrap();
    fs::write(&source, text).unwrap();
    let mut command = Command::new(nvcc);
    command.arg("-cubin").arg(format!("-arch={}", limits(arch).0)).args(["-Xptxas", "-v"]);
    let output = command.arg(&source).arg("-o").arg(&cubin).output().unwrap();
    let messages = [output.stdout, output.stderr].concat();
    let messages = String::from_utf8_lossy(&messages).into_owned();
    assert!(output.status.success(), "{file}: {messages}");
    fs::remove_file(source).unwrap();
    fs::write(log, &messages).unwrap();
    (messages, cubin)
}

/// Every function in the messages of `ptxas -v`.
fn parse(messages: &str) -> BTreeMap<String, Usage> {
    let mut usages = BTreeMap::<String, Usage>::new();
    let mut function = String::new();
    for line in messages.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            function = name.trim().to_owned();
            usages.entry(function.clone()).or_default();
        } else if let Some(usage) = usages.get_mut(&function) {
            for part in line.rsplit("Used ").next().unwrap_or_default().split(',') {
                let mut words = part.split_whitespace();
                let number = words.next().and_then(|word| word.parse().ok());
                match (number, words.collect::<Vec<_>>().join(" ").as_str()) {
                    (Some(n), "registers") => usage.registers = n,
                    (Some(n), "bytes smem") => usage.shared_bytes = n,
                    (Some(n), "bytes stack frame") => usage.stack_bytes = n,
                    (Some(n), "bytes spill stores" | "bytes spill loads") => usage.spill_bytes += n,
                    _ => {}
                }
            }
        }
    }
    usages
}

#[test]
fn messages_of_ptxas_are_understood() {
    let usages = parse(
        "ptxas info    : 0 bytes gmem\n\
         ptxas info    : Compiling entry function 'f' for 'sm_80'\n\
         ptxas info    : Function properties for f\n\
         \x20   16 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads\n\
         ptxas info    : Used 170 registers, used 1 barriers, 1024 bytes smem, 396 bytes cmem[0]\n\
         ptxas info    : Function properties for g\n\
         \x20   8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n",
    );
    let slow = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are \
                serialized due to insufficient register resources in the function 'f'";
    assert!(serialises(slow) && parse(slow).is_empty());
    let f = usages["f"];
    assert_eq!((f.registers, f.shared_bytes, f.stack_bytes, f.spill_bytes), (170, 1024, 16, 52));
    assert_eq!(usages["g"].stack_bytes, 8);
}

/// Prints where registers or shared memory differ from tests/golden/ptxas.txt. Another release of
/// ptxas may well differ: nothing fails. `INFINI_ATTN_BLESS=1` writes the table anew.
fn report_drift(usages: &BTreeMap<String, Usage>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ptxas.txt");
    let header = "# symbol, registers per thread, shared bytes per block";
    let now: BTreeMap<&str, String> = KERNELS
        .iter()
        .filter_map(|kernel| Some((kernel.symbol, kernel.shared_bytes, usages.get(kernel.symbol)?)))
        .map(|(symbol, dynamic, usage)| {
            (symbol, format!("{} {}", usage.registers, usage.shared_bytes + dynamic))
        })
        .collect();
    if env::var_os("INFINI_ATTN_BLESS").is_some() {
        let lines: String = now.iter().map(|(symbol, line)| format!("{symbol} {line}\n")).collect();
        fs::write(&path, format!("{header}\n{lines}")).unwrap();
        return;
    }
    let golden = fs::read_to_string(&path).unwrap();
    let golden: BTreeMap<&str, &str> =
        golden.lines().skip(1).filter_map(|line| line.split_once(' ')).collect();
    for (symbol, now) in &now {
        let before = golden.get(symbol).copied().unwrap_or("nothing");
        if before != now {
            let line = format!("{symbol}: {before} before, {now} now (registers, shared bytes)");
            say(format_args!("drift: {line}"));
        }
    }
}
