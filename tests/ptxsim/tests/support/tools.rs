//! The compilers: found at test time, their output kept in the target folder by content.
//!
//! A missing compiler fails the test with the command that installs it; nothing is skipped.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{env, fs};

/// How to get the compilers; part of every message about a missing one.
const INSTALL: &str = "install the compilers of the test kernels with `scripts/test`, or with \
    `python3 -m venv target/cuda-venv && target/cuda-venv/bin/pip install -r \
    tests/ptxsim/requirements.txt` in the root of the repository";

/// The folder of the kernels' sources.
pub fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// The folder of what is built and installed.
pub fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target")
}

/// The folder of the crate's own kernels, whose headers the test kernels include.
fn crate_kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels")
}

fn venv() -> PathBuf {
    target().join("cuda-venv")
}

/// One compiler run at a time: tests run side by side, and many want the same file.
fn lock() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// PTX of `kernels/<name>.cu` for an architecture such as `sm_90a`.
pub fn kernel(name: &str, arch: &str) -> String {
    nvcc(&kernels().join(name).with_extension("cu"), arch)
}

/// PTX of a CUDA C++ file. The cache knows the file, the headers beside it and those of the crate.
pub fn nvcc(source: &Path, arch: &str) -> String {
    let compiler = compiler();
    let arch = format!("-arch={arch}");
    let flags = ["-ptx", "-std=c++17", "-lineinfo", &arch];

    let mut hasher = DefaultHasher::new();
    (&compiler, flags, read(source)).hash(&mut hasher);
    for header in headers(source) {
        (&header, read(&header)).hash(&mut hasher);
    }
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    let cache = target().join("ptxsim");
    let output = cache.join(format!("{stem}-{:016x}.ptx", hasher.finish()));

    let _guard = lock();
    if !output.exists() {
        create(&cache);
        // Another process may compile the same file: each writes its own, the last rename stays.
        let own = cache.join(format!("{stem}-{}.tmp", std::process::id()));
        let mut command = Command::new(&compiler);
        execute(command.args(flags).arg("-I").arg(crate_kernels()).arg(source).arg("-o").arg(&own));
        rename(&own, &output);
    }
    read(&output)
}

/// nvcc.
pub fn compiler() -> PathBuf {
    find_nvcc().unwrap_or_else(|tried| {
        panic!("nvcc not found (looked for {}); {INSTALL}", tried.join(", "))
    })
}

/// The folder with the PTX files and the manifest that `triton_kernels.py` writes.
pub fn triton() -> PathBuf {
    let script = kernels().join("triton_kernels.py");
    let python = env::var_os("PTXSIM_PYTHON").map_or(venv().join("bin/python"), PathBuf::from);
    if !python.exists() {
        panic!("{} not found; {INSTALL}, or set PTXSIM_PYTHON", python.display());
    }
    let mut hasher = DefaultHasher::new();
    (&python, read(&script)).hash(&mut hasher);
    let requirements = Path::new(env!("CARGO_MANIFEST_DIR")).join("requirements.txt");
    read(&requirements).hash(&mut hasher);
    let output = target().join(format!("ptxsim/triton-{:016x}", hasher.finish()));

    let _guard = lock();
    if !output.join("manifest.json").exists() {
        let own = output.with_extension(format!("{}.tmp", std::process::id()));
        create(&own);
        execute(Command::new(&python).arg(&script).arg(&own));
        if !output.exists() {
            rename(&own, &output);
        }
    }
    output
}

fn headers(source: &Path) -> Vec<PathBuf> {
    let beside = source.parent().unwrap_or(Path::new(".")).to_owned();
    let mut headers = Vec::new();
    let of_crate = ["", "common", "sm90"].map(|folder| crate_kernels().join(folder));
    for folder in of_crate.into_iter().chain([beside]) {
        let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
        headers
            .extend(paths.filter(|path| path.extension().is_some_and(|e| e == "cuh" || e == "h")));
    }
    headers.sort();
    headers
}

/// The pinned compiler first, so that results do not depend on what else is installed.
fn find_nvcc() -> Result<PathBuf, Vec<String>> {
    let mut candidates = Vec::new();
    candidates.extend(env::var_os("NVCC").map(PathBuf::from));
    let python = fs::read_dir(venv().join("lib")).into_iter().flatten().flatten();
    candidates.extend(python.map(|p| p.path().join("site-packages/nvidia/cu13/bin/nvcc")));
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        candidates.extend(env::var_os(variable).map(|home| PathBuf::from(home).join("bin/nvcc")));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    candidates.extend(env::split_paths(&path).map(|folder| folder.join("nvcc")));
    candidates.push("/usr/local/cuda/bin/nvcc".into());
    candidates.iter().find(|candidate| candidate.is_file()).cloned().ok_or_else(|| {
        let places = [
            "$NVCC",
            "target/cuda-venv",
            "$CUDA_HOME/bin",
            "$CUDA_PATH/bin",
            "$PATH",
            "/usr/local/cuda/bin",
        ];
        places.iter().map(|place| (*place).into()).collect()
    })
}

/// Runs a compiler; panics with its words when it fails.
pub fn execute(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    if !output.status.success() {
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        panic!("{command:?}: {}\n{out}{err}", output.status);
    }
}

/// A file of text.
pub fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A folder, with those above it.
pub fn create(path: &Path) {
    fs::create_dir_all(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Moves a finished file or folder to its name.
pub fn rename(from: &Path, to: &Path) {
    fs::rename(from, to).unwrap_or_else(|e| panic!("{} to {}: {e}", from.display(), to.display()));
}
