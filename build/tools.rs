//! The tools that the build needs, and where they are looked for.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::cuda::Result;

const INSTALL_NVCC: &str = "Install it into a Python environment (no root, no GPU needed):
  python3 -m venv target/cuda-venv
  target/cuda-venv/bin/pip install nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
or set INFINI_ATTN_PREBUILT to a folder of compiled kernels (docs/building.md).";

const INSTALL_LIBCLANG: &str = "Install it into a Python environment (no root needed):
  python3 -m venv target/cuda-venv
  target/cuda-venv/bin/pip install libclang==18.1.1
or set INFINI_ATTN_PREBUILT to a folder of compiled kernels (docs/building.md).";

const INSTALL_HOST_COMPILER: &str = "Install one (for example `apt-get install g++`), or name it in \
NVCC_CCBIN, or set INFINI_ATTN_PREBUILT to a folder of compiled kernels (docs/building.md).";

/// Folders in which tools may lie.
pub struct Environment {
    /// `site-packages` of the active Python environment and of target/cuda-venv.
    site_packages: Vec<PathBuf>,
    /// Cargo's target folder: what is kept there serves every profile.
    pub target: PathBuf,
}

impl Environment {
    pub fn new(root: &Path, out: &Path) -> Self {
        // Cargo marks the root of its target folder.
        let marked = |folder: &&Path| folder.join("CACHEDIR.TAG").is_file();
        let target = out.ancestors().find(marked).unwrap_or(out).to_owned();
        let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].map(|name| env::var_os(name).map(Into::into));
        let own = [root.join("target/cuda-venv"), target.join("cuda-venv")].map(Some);
        let libs = active.into_iter().chain(own).flatten().map(|env: PathBuf| env.join("lib"));
        let site_packages = libs
            .flat_map(|lib| fs::read_dir(lib).into_iter().flatten().flatten())
            .map(|python| python.path().join("site-packages"))
            .filter(|folder| folder.is_dir())
            .collect();
        Environment { site_packages, target }
    }

    /// The CUDA compiler.
    pub fn nvcc(&self) -> Result<PathBuf> {
        let mut candidates: Vec<PathBuf> =
            env::var_os("NVCC").map(Into::into).into_iter().collect();
        for name in ["CUDA_HOME", "CUDA_PATH"] {
            candidates.extend(env::var_os(name).map(|home| Path::new(&home).join("bin/nvcc")));
        }
        candidates.extend(on_path("nvcc"));
        candidates.push("/usr/local/cuda/bin/nvcc".into());
        // One folder per major release: cu13 and later.
        for folder in self.site_packages.iter().map(|folder| folder.join("nvidia")) {
            let releases = fs::read_dir(folder).into_iter().flatten().flatten();
            candidates.extend(releases.map(|release| release.path().join("bin/nvcc")));
        }
        candidates.into_iter().find(|candidate| candidate.is_file()).ok_or_else(|| {
            self.missing(
                "nvcc",
                "$NVCC, $CUDA_HOME/bin, $CUDA_PATH/bin, $PATH, /usr/local/cuda/bin",
                "nvidia/cu*/bin",
                INSTALL_NVCC,
            )
        })
    }

    /// Loads libclang: the system's, or the one of a Python environment.
    pub fn load_libclang(&self) -> Result<()> {
        if clang_sys::load().is_ok() {
            return Ok(());
        }
        let folders = self.site_packages.iter().map(|folder| folder.join("clang/native"));
        for folder in folders.filter(|folder| folder.is_dir()) {
            // SAFETY: the build script has no other thread yet.
            unsafe { env::set_var("LIBCLANG_PATH", &folder) };
            if clang_sys::load().is_ok() {
                return Ok(());
            }
        }
        Err(self.missing(
            "libclang",
            "$LIBCLANG_PATH, llvm-config, the system's library folders",
            "clang/native",
            INSTALL_LIBCLANG,
        ))
    }

    fn missing(&self, what: &str, places: &str, inside: &str, install: &str) -> String {
        let mut message = format!("{what} not found; looked in {places}");
        for folder in &self.site_packages {
            message += &format!(", {}", folder.join(inside).display());
        }
        if self.site_packages.is_empty() {
            message += ", the Python environments $VIRTUAL_ENV, $CONDA_PREFIX and target/cuda-venv";
        }
        format!("{message}.\n{install}")
    }
}

/// The C++ compiler of this machine, which nvcc calls too.
pub fn host_compiler() -> Result<PathBuf> {
    let named = env::var_os("NVCC_CCBIN").map(PathBuf::from);
    // nvcc takes a folder as well.
    let named = named.map(|path| if path.is_dir() { path.join("g++") } else { path });
    let on_path = on_path("g++");
    named
        .into_iter()
        .flat_map(|path| if path.components().count() == 1 { find_on_path(&path) } else { vec![path] })
        .chain(on_path)
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| {
            format!("C++ compiler not found; looked for $NVCC_CCBIN and g++ on $PATH.\n{INSTALL_HOST_COMPILER}")
        })
}

fn on_path(name: &str) -> Vec<PathBuf> {
    find_on_path(Path::new(name))
}

fn find_on_path(name: &Path) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|folder| folder.join(name)).collect()
}

/// An environment variable that Cargo sets.
pub fn variable(name: &str) -> Result<String> {
    env::var(name).map_err(|e| format!("{name}: {e}"))
}

/// Runs a command; its output if it succeeded, else an error with all it printed.
pub fn execute(command: &mut Command) -> Result<Output> {
    let name = command.get_program().display().to_string();
    let output = command.output().map_err(|e| format!("{name}: {e}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let arguments: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    Err(format!("{name} {}: {}\n{out}{err}", arguments.join(" "), output.status))
}
