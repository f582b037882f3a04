//! Compiles the programs, from sources of installed wheels, and runs them on the simulator's driver.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::{env, fs};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::compare::{Element, values};
use crate::support::tools::{compiler, create, execute, read, rename, target};

/// How to get the wheels; part of every message about a missing one.
const INSTALL: &str = "install the sources with `scripts/test`, or with `python3 -m venv \
    target/external-venv && target/external-venv/bin/pip install --no-deps -r \
    tests/ptxsim/tests/external/requirements.txt` in the root of the repository";

/// PTX of the device's code.
const FLAGS: [&str; 5] = [
    "-std=c++17",
    "-gencode=arch=compute_90a,code=compute_90a",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-cudart=none",
];

/// The seeds and timings every program runs under.
pub const SCHEDULES: [(u32, &str); 4] = [(1, "eager"), (1, "lazy"), (2, "eager"), (2, "lazy")];

/// Folders of a wheel's headers, from site-packages.
pub type Headers = &'static [&'static str];
/// Those of CUTLASS and its attention.
pub const CUTLASS: Headers = &[
    "cutlass_library/source/include",
    "cutlass_library/source/tools/util/include",
    "cutlass_library/source/examples/88_hopper_fmha",
];
/// Those of FlashInfer, and of CUTLASS for it.
pub const FLASHINFER: Headers = &["flashinfer/data/include", "flashinfer/data/cutlass/include"];

/// A compiled program.
pub struct Program {
    executable: PathBuf,
}

/// What a run left.
pub struct Outcome {
    folder: TempDir,
    /// The report of every launch.
    launches: Vec<Value>,
}

impl Program {
    /// Compiles `<name>.cu`, unless that has been done; `macros` are defined.
    pub fn new(name: &str, headers: Headers, macros: &[&str]) -> Self {
        let (compiler, source) = (compiler(), here().join(name).with_extension("cu"));
        let runtime = here().join("cudart.cpp");
        let mut hasher = DefaultHasher::new();
        (&compiler, FLAGS, macros).hash(&mut hasher);
        for file in ["host.h", "gemm.cuh", "requirements.txt"].map(|name| here().join(name)) {
            read(&file).hash(&mut hasher);
        }
        (read(&source), read(&runtime)).hash(&mut hasher);
        let cache = target().join("ptxsim");
        let executable = cache.join(format!("{name}-{:016x}", hasher.finish()));
        if !executable.exists() {
            create(&cache);
            // Another process may compile the same program: each writes its own.
            let own = cache.join(format!("{name}-{:016x}-{}", hasher.finish(), process::id()));
            let mut command = Command::new(&compiler);
            command.args(FLAGS).args(macros.iter().map(|name| format!("-D{name}")));
            command.args(headers.iter().flat_map(|name| ["-I".into(), installed(name)]));
            command.args([&source, &runtime]).arg("-L").arg(driver()).arg("-lcuda");
            execute(command.arg("-o").arg(&own));
            rename(&own, &executable);
        }
        Self { executable }
    }

    /// Runs it under a schedule, in a folder with these files; findings do not end it.
    pub fn run(
        &self,
        (seed, timing): (u32, &str),
        args: &[usize],
        inputs: &[(&str, &[u8])],
    ) -> Outcome {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, bytes) in inputs {
            fs::write(folder.path().join(name), bytes).expect("an input");
        }
        // By the name that the library has for those who are linked with it.
        let library = driver().join("libcuda.so");
        symlink(library, folder.path().join("libcuda.so.1")).expect("a link");
        let report = folder.path().join("report");
        let mut command = Command::new(&self.executable);
        command.args(args.iter().map(ToString::to_string)).current_dir(folder.path());
        command.env("LD_LIBRARY_PATH", folder.path()).env("PTXSIM_ARCH", "sm_90a");
        command.env("PTXSIM_SEED", seed.to_string()).env("PTXSIM_TIMING", timing);
        command.env("PTXSIM_RESIDENCY", "co-resident");
        command.env("PTXSIM_FINDINGS", "tell").env("PTXSIM_REPORT", &report);
        execute(&mut command);
        let line = |line: &str| serde_json::from_str(line).expect("a report in JSON");
        let launches = read(&report).lines().map(line).collect();
        Outcome { folder, launches }
    }
}

impl Outcome {
    /// The elements of a file that the program has written.
    pub fn output<T: Element>(&self, name: &str) -> Vec<f64> {
        let path = self.folder.path().join(name);
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        values::<T>(&bytemuck::pod_collect_to_vec(&bytes))
    }

    /// Everything that was found.
    pub fn findings(&self) -> Vec<&Value> {
        assert!(!self.launches.is_empty(), "no launch");
        let lists =
            self.launches.iter().flat_map(|l| [&l["report"]["errors"], &l["report"]["races"]]);
        lists.flat_map(|list| list.as_array().expect("a list of findings")).collect()
    }

    /// How often instructions that begin so were executed.
    pub fn executed(&self, mnemonic: &str) -> u64 {
        let lines = |launch: &Value| launch["report"]["counts"]["lines"].as_array().cloned();
        let lines = self.launches.iter().flat_map(|l| lines(l).expect("counts of lines"));
        let named =
            lines.filter(|l| l["mnemonic"].as_str().is_some_and(|m| m.starts_with(mnemonic)));
        named.filter_map(|line| line["executed"].as_u64()).sum()
    }
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/external")
}

/// A folder of an installed wheel.
fn installed(name: &str) -> PathBuf {
    let python = fs::read_dir(target().join("external-venv/lib")).into_iter().flatten().flatten();
    let mut folders = python.map(|p| p.path().join("site-packages").join(name));
    folders.find(|folder| folder.is_dir()).unwrap_or_else(|| panic!("{name} not found; {INSTALL}"))
}

/// The folder of libcuda.so, that of the executables that Cargo builds.
fn driver() -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    let folder = test.ancestors().nth(2).expect("a folder above deps").to_owned();
    let library = folder.join("libcuda.so");
    assert!(library.exists(), "{} not found; `cargo build -p ptxsim-driver`", library.display());
    folder
}
