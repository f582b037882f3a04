//! Kernels of a folder in place of those compiled in: for measuring variants of a kernel with one
//! executable.

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

use super::kernel::{EMBEDDED, Kernel, PARAMS};
use crate::error::{Error, Result};

/// Set once: by [`replace_kernels`], or to nothing when the table is first read.
static REPLACED: OnceLock<Replaced> = OnceLock::new();

#[derive(Debug, Default)]
struct Replaced {
    /// The whole table; empty: as embedded.
    kernels: Vec<Kernel>,
    /// By file.
    fatbins: HashMap<&'static str, Vec<u8>>,
}

/// Takes kernels from a folder, in place of those that were compiled into the program. The folder holds
/// `table.txt`, as `scripts/prebuild` writes it, and `<arch>/<operation>.fatbin` for every file that
/// is replaced. Symbols and launch parameters must be the program's own; threads, shared memory and
/// tile shapes are the folder's.
///
/// For the whole process, once, before anything else of this module is called.
///
/// # Errors
/// [`Error::Value`] when kernels were looked up or replaced before, and for a table that is not of this
/// program's kernels; [`Error::Io`] for a file that cannot be read. The embedded kernels stay then.
///
/// # Safety
/// The device runs what the folder holds: kernels that read and write only what those they replace
/// do.
pub unsafe fn replace_kernels(folder: &Path) -> Result<()> {
    let read = |path: &Path| {
        let failed = |source| Error::Io { path: path.display().to_string(), source };
        std::fs::read(path).map_err(failed)
    };
    let table = folder.join("table.txt");
    let text = String::from_utf8_lossy(&read(&table)?).into_owned();
    let kernels = parse(&text)
        .map_err(|(got, expected)| Error::value(table.display().to_string(), got, expected))?;
    let mut fatbins = HashMap::new();
    for kernel in &kernels {
        let path = folder.join(kernel.file).with_extension("fatbin");
        if !fatbins.contains_key(kernel.file) && path.exists() {
            fatbins.insert(kernel.file, read(&path)?);
        }
    }
    REPLACED.set(Replaced { kernels, fatbins }).map_err(|_| {
        let expected = "a call before any kernel was looked up";
        Error::value("folder", folder.display(), expected)
    })
}

/// The embedded kernels with the numbers of a `table.txt`; else what it holds, and what it should.
fn parse(text: &str) -> std::result::Result<Vec<Kernel>, (String, String)> {
    let (mut kernels, params) = (EMBEDDED.to_vec(), PARAMS);
    let mut lines = text.lines();
    let given = lines.next().and_then(|line| line.strip_prefix("params ")).unwrap_or("nothing");
    if given != params {
        return Err((format!("launch parameters {given}"), params.into()));
    }
    for line in lines {
        let bad = || (format!("{line:?}"), "a symbol of this program and seven numbers".into());
        let (symbol, numbers) = line.split_once(' ').ok_or_else(bad)?;
        let kernel = kernels.iter_mut().find(|k| k.symbol == symbol).ok_or_else(bad)?;
        let numbers =
            numbers.split(' ').map(str::parse).collect::<std::result::Result<Vec<u32>, _>>();
        let numbers = numbers.map_err(|_| bad())?;
        let [threads, shared_bytes, blocks_per_sm, rows, columns, keys, launch_registers] =
            numbers[..]
        else {
            return Err(bad());
        };
        if threads == 0 || blocks_per_sm == 0 {
            return Err(bad());
        }
        let [rows, columns, keys] = [rows, columns, keys].map(|n| n as usize);
        let shape = Kernel { threads, shared_bytes, blocks_per_sm, ..*kernel };
        *kernel = Kernel { rows, columns, keys, launch_registers, ..shape };
    }
    Ok(kernels)
}

/// The table that is in force.
pub(super) fn table(embedded: &'static [Kernel]) -> &'static [Kernel] {
    match &*REPLACED.get_or_init(Replaced::default).kernels {
        [] => embedded,
        kernels => kernels,
    }
}

/// The fatbin that stands in for an embedded one.
pub(super) fn replaced(file: &str) -> Option<&'static [u8]> {
    let replaced = REPLACED.get_or_init(Replaced::default);
    replaced.fatbins.get(file).map(Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(k: &Kernel, threads: u32) -> String {
        let Kernel { symbol, shared_bytes, blocks_per_sm, rows, columns, keys, .. } = *k;
        let (tile, registers) = (format!("{rows} {columns} {keys}"), k.launch_registers);
        format!("{symbol} {threads} {shared_bytes} {blocks_per_sm} {tile} {registers}")
    }

    #[test]
    fn a_table_of_the_same_kernels_is_taken() {
        let (kernels, params) = (EMBEDDED, PARAMS);
        let last = kernels.last().expect("kernels");
        let text = format!("params {params}\n{}\n", line(last, last.threads + 32));
        let parsed = parse(&text).expect("a table");
        assert_eq!(parsed[..parsed.len() - 1], kernels[..kernels.len() - 1]);
        assert_eq!(parsed.last(), Some(&Kernel { threads: last.threads + 32, ..*last }));
    }

    #[test]
    fn other_kernels_are_refused() {
        let (kernels, params) = (EMBEDDED, PARAMS);
        let good = line(&kernels[0], 128);
        for (text, wanted) in [
            (String::new(), "launch parameters nothing"),
            (format!("params 00\n{good}"), "launch parameters 00"),
            (format!("params {params}\ninfini_other 1 2 3 4 5 6 7"), "infini_other"),
            (format!("params {params}\n{good} 8"), "seven numbers"),
            (format!("params {params}\n{good} more"), "seven numbers"),
            (format!("params {params}\n{}", line(&kernels[0], 0)), "seven numbers"),
            (format!("params {params}\n{}", kernels[0].symbol), "seven numbers"),
        ] {
            let (got, expected) = parse(&text).expect_err(&text);
            assert!(format!("{got} given, {expected}").contains(wanted), "{got}, {expected}");
        }
    }
}
