//! What the crate includes from `OUT_DIR` under the feature `cuda`:
//!
//! | file | content | made by |
//! |---|---|---|
//! | `params.rs` | launch parameters of kernels/params.h | bindgen |
//! | `kernels.rs` | the table of kernels, from the lines that kernels/describe.cpp prints | `table` |
//! | `table.txt` | the same for programs that replace kernels when they run | `table` |
//! | `<arch>/<file>.ptx`, `.fatbin` | every kernels/sm80/*.cu, kernels/sm90/*.cu | nvcc |
//! | `manifest` | which sources all that was made from | `prebuilt` |
//!
//! Or the same files out of `INFINI_ATTN_PREBUILT`. docs.rs has no nvcc and gets no kernels, only
//! their table.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::tools::{self, Tools};
use crate::{bindings, compile, prebuilt, table};

/// Errors are text for whoever builds the crate.
pub type Result<T> = std::result::Result<T, String>;

/// Everything that changes the outcome besides kernels/. (The search path is left out: it changes
/// too often and too rarely matters.)
const VARIABLES: [&str; 14] = [
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "LIBCLANG_PATH",
    "NVCC_CCBIN",
    "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS",
    "INFINI_ATTN_CUDA_ARCHS",
    "INFINI_ATTN_KERNEL_CACHE",
    "INFINI_ATTN_PREBUILT",
    "INFINI_ATTN_WAIT_POLLS",
    "DOCS_RS",
];

pub fn run() -> Result<()> {
    println!("cargo::rerun-if-changed=kernels");
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // For tests: they run this program under other circumstances.
    let program = env::current_exe().map_err(|e| e.to_string())?;
    println!("cargo::rustc-env=INFINI_ATTN_BUILD_SCRIPT={}", program.display());

    let root = PathBuf::from(tools::variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(tools::variable("OUT_DIR")?);
    let kernels = root.join("kernels");

    if let Some(folder) = env::var_os("INFINI_ATTN_PREBUILT").filter(|folder| !folder.is_empty()) {
        return prebuilt::copy(&root.join(folder), &kernels, &out);
    }
    let tools = Tools::find(&root, &out)?;
    bindings::generate(&kernels, &out)?;
    if let Some(nvcc) = &tools.nvcc {
        println!("cargo::rustc-env=INFINI_ATTN_NVCC={}", nvcc.display());
    }
    let files = match &tools.nvcc {
        Some(nvcc) => compile::all(nvcc, &kernels, &out)?,
        None => Vec::new(),
    };
    let table = table::generate(&tools.host_compiler, &kernels, &out, &files)?;
    write(&out.join("kernels.rs"), &table)?;
    prebuilt::write_manifest(&kernels, &files, &out)
}

/// Reads a text file.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Writes a file.
pub fn write(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).map_err(|e| format!("{}: {e}", path.display()))
}

/// Copies a file and makes the folder it goes to.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    fs::copy(from, to).map(drop).map_err(|e| format!("{} to {}: {e}", from.display(), to.display()))
}
