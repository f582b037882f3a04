//! Kernels to PTX and fatbins: in parallel, and only what changed.
//!
//! The front end runs once per file; cubins of every architecture are assembled from its PTX. So
//! the PTX that tests execute is the very PTX that devices run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use std::{env, fs, thread};

use xxhash_rust::xxh3::Xxh3;

use super::{Result, copy, read, tools, write};

/// A folder of kernels: the architecture of its PTX, and those that get a cubin (devices between
/// them run the cubin of the last smaller minor version, all others the PTX). PTX of an architecture
/// with an `a` serves that one alone.
struct Folder {
    name: &'static str,
    ptx: &'static str,
    cubins: &'static [&'static str],
}

const FOLDERS: [Folder; 2] = [
    Folder { name: "sm80", ptx: "80", cubins: &["80", "90a", "100", "120"] },
    Folder { name: "sm90", ptx: "90a", cubins: &["90a"] },
];

impl Folder {
    /// The cubin for an architecture that was asked for.
    fn cubin<'a>(&self, arch: &'a str) -> Option<&'a str> {
        match self.ptx.strip_suffix('a') {
            None => Some(arch),
            Some(own) => (base(arch) == own).then_some(self.ptx),
        }
    }
}

struct Compiler<'a> {
    nvcc: &'a Path,
    /// Release and the variables that nvcc reads flags from.
    identity: String,
    /// Architectures asked for, without `sm_`; none: all that the toolkit knows.
    asked: Option<Vec<String>>,
    known: BTreeSet<String>,
    /// After how many polls waits give up.
    polls: Option<u32>,
    kernels: &'a Path,
    cache: PathBuf,
}

/// A source file.
struct File {
    folder: &'static Folder,
    /// As in the table: `sm80/append`.
    name: String,
}

/// Compiles every file; their names, sorted.
pub fn all(nvcc: &Path, kernels: &Path, out: &Path) -> Result<Vec<String>> {
    let compiler = Compiler::new(nvcc, kernels, out)?;
    let mut files = Vec::new();
    for folder in &FOLDERS {
        let entries = fs::read_dir(kernels.join(folder.name)).into_iter().flatten().flatten();
        let sources = entries.map(|entry| entry.path());
        let sources = sources.filter(|path| path.extension().is_some_and(|e| e == "cu"));
        let stems = sources.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()));
        files.extend(stems.map(|stem| File { folder, name: format!("{}/{stem}", folder.name) }));
    }
    let texts = parallel(&files, |file| compiler.ptx(file, out))?;
    // The longest first, so that none is left for the end.
    let mut assembly: Vec<(&File, &String)> = files.iter().zip(&texts).collect();
    assembly.sort_by_key(|(_, text)| std::cmp::Reverse(text.len()));
    parallel(&assembly, |(file, text)| compiler.fatbin(file, text, out))?;
    let mut names: Vec<String> = files.into_iter().map(|file| file.name).collect();
    names.sort();
    Ok(names)
}

/// `work` on every item, on as many threads as Cargo allows; all errors together.
fn parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let threads = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..items.len().min(threads) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { break };
                    let result = work(item);
                    results.lock().unwrap_or_else(PoisonError::into_inner).insert(index, result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner).into_values();
    let (done, failed): (Vec<_>, Vec<_>) = results.partition(Result::is_ok);
    let errors: Vec<String> = failed.into_iter().filter_map(Result::err).collect();
    if errors.is_empty() {
        Ok(done.into_iter().flatten().collect())
    } else {
        Err(errors.join("\n"))
    }
}

impl<'a> Compiler<'a> {
    fn new(nvcc: &'a Path, kernels: &'a Path, out: &Path) -> Result<Self> {
        let ask = |flag| -> Result<String> {
            let output = tools::execute(Command::new(nvcc).arg(flag))?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let mut identity = ask("--version")?;
        for name in ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"] {
            identity += &format!("{name}={}\n", env::var(name).unwrap_or_default());
        }
        let known = ask("--list-gpu-code")?;
        let known = known.split_whitespace().filter_map(|code| code.strip_prefix("sm_"));
        let known: BTreeSet<String> = known.map(Into::into).collect();
        let asked = asked(&known)?;
        let polls = wait_polls()?;
        let cache = match env::var_os("INFINI_ATTN_KERNEL_CACHE") {
            Some(folder) => folder.into(),
            None => tools::target_folder(out).join("infini-attn-kernels"),
        };
        fs::create_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;
        Ok(Compiler { nvcc, identity, asked, known, polls, kernels, cache })
    }

    /// Writes the PTX of a file, with line numbers for whoever reads it; returns it without them.
    fn ptx(&self, file: &File, out: &Path) -> Result<String> {
        let source = self.kernels.join(&file.name).with_extension("cu");
        let mut content = Vec::new();
        self.sources(&source, &mut BTreeSet::new(), &mut content)?;
        let arch = format!("-arch=compute_{}", file.folder.ptx);
        let flags = ["-std=c++17", "-lineinfo", "-ptx", &arch].map(String::from);
        // Files that wait for nothing are what they are without.
        let waits = content.iter().any(|text| text.contains("INFINI_WAIT_POLLS"));
        let polls = self.polls.filter(|_| waits);
        let flags: Vec<_> =
            flags.into_iter().chain(polls.map(|n| format!("-DINFINI_WAIT_POLLS={n}"))).collect();
        let ptx = self.cached(&file.name, "ptx", &flags, &source, content)?;
        copy(&ptx, &out.join(&file.name).with_extension("ptx"))?;
        Ok(without_lines(&read(&ptx)?))
    }

    /// Writes the fatbin of a file.
    fn fatbin(&self, file: &File, text: &str, out: &Path) -> Result<()> {
        let plain = out.join(&file.name).with_extension("plain.ptx");
        write(&plain, text)?;
        let flags = ["-fatbin", "-Xfatbin=-compress-all", "--threads=4"].map(String::from);
        let flags = [&flags[..], &self.codes(file.folder)].concat();
        let fatbin = self.cached(&file.name, "fatbin", &flags, &plain, vec![text.to_owned()])?;
        copy(&fatbin, &out.join(&file.name).with_extension("fatbin"))
    }

    /// `-gencode` for every cubin and the PTX.
    fn codes(&self, folder: &Folder) -> Vec<String> {
        let ptx = folder.ptx;
        let mut cubins: Vec<&str> = match &self.asked {
            Some(asked) => asked.iter().filter_map(|arch| folder.cubin(arch)).collect(),
            None => folder.cubins.to_vec(),
        };
        cubins.dedup();
        cubins
            .iter()
            .filter(|arch| self.known.contains(base(arch)))
            .map(|arch| format!("-gencode=arch=compute_{ptx},code=sm_{arch}"))
            .chain([format!("-gencode=arch=compute_{ptx},code=compute_{ptx}")])
            .collect()
    }

    /// What nvcc makes of `source`; it only runs if it never ran with these flags on this content.
    fn cached(
        &self,
        name: &str,
        extension: &str,
        flags: &[String],
        source: &Path,
        content: Vec<String>,
    ) -> Result<PathBuf> {
        let mut hasher = Xxh3::new();
        for text in content.iter().chain(flags).chain([&self.identity]) {
            hasher.update(&text.len().to_le_bytes());
            hasher.update(text.as_bytes());
        }
        let stem = format!("{}-{:032x}", name.replace('/', "-"), hasher.digest128());
        let output = self.cache.join(format!("{stem}.{extension}"));
        if !output.exists() {
            // Another build may do the same: each writes its own, the last rename stays.
            let own = self.cache.join(format!("{stem}.{}.tmp", std::process::id()));
            let started = Instant::now();
            let mut nvcc = Command::new(self.nvcc);
            nvcc.args(flags).arg("-I").arg(self.kernels).arg(source).arg("-o").arg(&own);
            let printed = tools::execute(&mut nvcc)?;
            if extension == "ptx" {
                // Names of source files from the root of the repository on: the same everywhere.
                let root = self.kernels.parent().unwrap_or(self.kernels);
                write(&own, &read(&own)?.replace(&format!("\"{}/", root.display()), "\""))?;
            }
            println!("{name}.{extension}: {:.1} s", started.elapsed().as_secs_f64());
            for line in String::from_utf8_lossy(&printed.stderr).lines() {
                println!("cargo::warning={line}");
            }
            fs::rename(&own, &output).map_err(|e| format!("{}: {e}", output.display()))?;
        }
        Ok(output)
    }

    /// Texts of a file and of the headers of ours that it includes, directly or not.
    fn sources(
        &self,
        path: &Path,
        seen: &mut BTreeSet<PathBuf>,
        texts: &mut Vec<String>,
    ) -> Result<()> {
        if !seen.insert(path.to_owned()) {
            return Ok(());
        }
        let text = read(path)?;
        for include in text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")) {
            let include = include.split('"').next().unwrap_or_default();
            let beside = path.with_file_name(include);
            let header = if beside.is_file() { beside } else { self.kernels.join(include) };
            if header.is_file() {
                self.sources(&header, seen, texts)?;
            }
        }
        texts.push(text);
        Ok(())
    }
}

/// `INFINI_ATTN_CUDA_ARCHS`: architectures separated by commas, or `ptx` for none.
fn asked(known: &BTreeSet<String>) -> Result<Option<Vec<String>>> {
    let text = env::var("INFINI_ATTN_CUDA_ARCHS").unwrap_or_default();
    let words = text.split(',').map(|word| word.trim().trim_start_matches("sm_"));
    let words: Vec<String> = words.filter(|word| !word.is_empty()).map(Into::into).collect();
    let mut asked = Vec::new();
    for arch in words.iter().filter(|word| *word != "ptx") {
        let number = base(arch).parse::<u32>();
        let supported = number.is_ok_and(|number| number >= 80) && known.contains(base(arch));
        if !supported {
            let known: Vec<&str> = known.iter().map(String::as_str).collect();
            return Err(format!(
                "INFINI_ATTN_CUDA_ARCHS: {arch} given; `ptx`, or architectures from 80 on that \
                 this nvcc knows expected ({})",
                known.join(", ")
            ));
        }
        asked.push(arch.clone());
    }
    Ok((!words.is_empty()).then_some(asked))
}

/// `INFINI_ATTN_WAIT_POLLS`: after how many failed polls a wait of the kernels gives up.
fn wait_polls() -> Result<Option<u32>> {
    let text = env::var("INFINI_ATTN_WAIT_POLLS").unwrap_or_default();
    match text.parse() {
        _ if text.is_empty() => Ok(None),
        Ok(polls) if polls > 0 => Ok(Some(polls)),
        _ => Err(format!(
            "INFINI_ATTN_WAIT_POLLS: {text} given; how often a wait polls before it gives up, 1 to \
             {}, expected",
            u32::MAX
        )),
    }
}

/// PTX without line numbers and the names of source files: devices need neither.
fn without_lines(ptx: &str) -> String {
    let mut in_section = false;
    let mut plain = String::with_capacity(ptx.len());
    for line in ptx.lines() {
        let word = line.split_whitespace().next().unwrap_or_default();
        in_section |= word == ".section";
        if !in_section && word != ".loc" && word != ".file" {
            plain += line;
            plain.push('\n');
        }
        in_section &= word != "}";
    }
    plain
}

/// `90a` is known where `90` is.
fn base(arch: &str) -> &str {
    arch.trim_end_matches(['a', 'f'])
}
