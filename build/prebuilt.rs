//! Folders of compiled kernels (`INFINI_ATTN_PREBUILT`): the files of `OUT_DIR` as they are, and a
//! manifest that ties them to the sources they were made from.

use std::fs;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::{Result, read, write};

const MANIFEST: &str = "manifest";

/// Lists what was generated: a line with the sources' hash, then a line per file.
pub fn write_manifest(kernels: &Path, files: &[String], out: &Path) -> Result<()> {
    let mut text = sources(kernels)? + "\nkernels.rs\nkernels.md\ntable.txt\n";
    for file in files {
        text += &format!("{file}.ptx\n{file}.fatbin\n");
    }
    write(&out.join(MANIFEST), &text)
}

/// Copies a prebuilt folder to `out`, if it was made from these kernels.
pub fn copy(folder: &Path, kernels: &Path, out: &Path) -> Result<()> {
    let manifest = folder.join(MANIFEST);
    println!("cargo::rerun-if-changed={}", manifest.display());
    let text = read(&manifest).map_err(|error| {
        format!("INFINI_ATTN_PREBUILT: {error}; make the folder with `scripts/prebuild <folder>`")
    })?;
    let mut lines = text.lines();
    let (made_from, expected) = (lines.next().unwrap_or_default(), sources(kernels)?);
    if made_from != expected {
        return Err(format!(
            "INFINI_ATTN_PREBUILT: {} was made from `{made_from}`, this is `{expected}`; \
             make it again with `scripts/prebuild <folder>`",
            folder.display()
        ));
    }
    for file in lines.chain([MANIFEST]) {
        super::copy(&folder.join(file), &out.join(file))?;
    }
    Ok(())
}

/// Version of the crate and a hash of everything under kernels/.
fn sources(kernels: &Path) -> Result<String> {
    let mut files = Vec::new();
    list(kernels, &mut files)?;
    files.sort();
    let mut hasher = Xxh3::new();
    for file in files {
        let name = file.strip_prefix(kernels).unwrap_or(&file).to_string_lossy().replace('\\', "/");
        let text = read(&file)?;
        hasher.update(format!("{name} {}\n", text.len()).as_bytes());
        hasher.update(text.as_bytes());
    }
    Ok(format!("infini-attn {} {:032x}", env!("CARGO_PKG_VERSION"), hasher.digest128()))
}

/// Sources of kernels below a folder; an editor's files do not count.
fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            list(&path, files)?;
        } else if path
            .extension()
            .is_some_and(|e| e == "cu" || e == "cuh" || e == "h" || e == "cpp")
        {
            files.push(path);
        }
    }
    Ok(())
}
