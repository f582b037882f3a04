//! Build script. It warns of a build without optimisation. With the feature `cuda` it leaves in
//! `OUT_DIR` what the crate includes:
//!
//! | file | content | made by |
//! |---|---|---|
//! | `kernels.rs` | the table of kernels, from the lines that kernels/describe.cpp prints | `table` |
//! | `kernels.md` | the same for its documentation | `table` |
//! | `table.txt` | the same for programs that replace kernels when they run | `table` |
//! | `<arch>/<file>.ptx`, `.fatbin` | every kernels/sm80/*.cu, kernels/sm90/*.cu | nvcc |
//! | `manifest` | which sources all that was made from | `prebuilt` |
//!
//! Or the same files out of `INFINI_ATTN_PREBUILT`. docs.rs has no nvcc and gets no kernels, only
//! their table.

#[cfg(feature = "cuda")]
#[path = "build/mod.rs"]
mod parts;

use std::env;
#[cfg(feature = "cuda")]
use std::path::PathBuf;
use std::process::ExitCode;

#[cfg(feature = "cuda")]
use parts::{Result, compile, prebuilt, table, tools, tools::Tools, write};

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    // Shown to those who depend on a path, not on a registry or git; README.md tells all.
    if env::var_os("OPT_LEVEL").is_some_and(|level| level == "0")
        && env::var_os("DOCS_RS").is_none()
    {
        println!(
            "cargo::warning=at opt-level 0 infini-attn is a hundred times slower; \
             `[profile.dev.package.\"*\"] opt-level = 3` in your Cargo.toml optimises what you depend on"
        );
    }
    #[cfg(feature = "cuda")]
    if let Err(message) = compile_kernels() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

#[cfg(feature = "cuda")]
fn compile_kernels() -> Result<()> {
    /// Everything that changes the outcome besides kernels/. (The search path is left out: it changes
    /// too often and too rarely matters.)
    const VARIABLES: [&str; 13] = [
        "NVCC",
        "CUDA_HOME",
        "CUDA_PATH",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "NVCC_CCBIN",
        "NVCC_PREPEND_FLAGS",
        "NVCC_APPEND_FLAGS",
        "INFINI_ATTN_CUDA_ARCHS",
        "INFINI_ATTN_KERNEL_CACHE",
        "INFINI_ATTN_PREBUILT",
        "INFINI_ATTN_WAIT_POLLS",
        "DOCS_RS",
    ];
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
