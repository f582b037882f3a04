//! Kernels to PTX and fatbins: in parallel, and only what changed.
//!
//! The front end runs once per file; cubins of every architecture are assembled from its PTX. So
//! the PTX that tests execute is the very PTX that devices run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, fs, thread};

use xxhash_rust::xxh3::Xxh3;

use crate::cuda::{Result, copy, read};
use crate::tools;

/// A folder of kernels: the architecture of its PTX, and those that get a cubin (devices between
/// them run the cubin of the last smaller minor version, all others the PTX).
struct Folder {
    name: &'static str,
    ptx: &'static str,
    cubins: &'static [&'static str],
}

const FOLDERS: [Folder; 1] =
    [Folder { name: "sm80", ptx: "80", cubins: &["80", "90a", "100", "120"] }];

struct Compiler<'a> {
    nvcc: &'a Path,
    /// Release and the variables that nvcc reads flags from.
    identity: String,
    /// Architectures asked for, without `sm_`; none: all that the toolkit knows.
    asked: Option<Vec<String>>,
    known: BTreeSet<String>,
    kernels: &'a Path,
    cache: PathBuf,
}

/// Compiles every file; names as `sm80/append`, sorted.
pub fn all(nvcc: &Path, kernels: &Path, out: &Path) -> Result<Vec<String>> {
    let compiler = Compiler::new(nvcc, kernels, out)?;
    let mut work = Vec::new();
    for folder in &FOLDERS {
        let entries = fs::read_dir(kernels.join(folder.name)).into_iter().flatten().flatten();
        let sources = entries.map(|entry| entry.path());
        let sources = sources.filter(|path| path.extension().is_some_and(|e| e == "cu"));
        work.extend(
            sources.filter_map(|path| Some((folder, path.file_stem()?.to_str()?.to_owned()))),
        );
    }
    work.sort_by(|(a, x), (b, y)| (a.name, x).cmp(&(b.name, y)));

    let next = AtomicUsize::new(0);
    let errors = Mutex::new(Vec::new());
    let workers = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..work.len().min(workers) {
            scope.spawn(|| {
                while let Some((folder, stem)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = compiler.file(folder, stem, out)
                        && let Ok(mut errors) = errors.lock()
                    {
                        errors.push(error);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().unwrap_or_default();
    if !errors.is_empty() {
        return Err(errors.join("\n"));
    }
    Ok(work.iter().map(|(folder, stem)| format!("{}/{stem}", folder.name)).collect())
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
        // Beside all build folders of the target folder, whose root Cargo marks.
        let marked = |folder: &&Path| folder.join("CACHEDIR.TAG").is_file();
        let target = out.ancestors().find(marked).unwrap_or(out);
        let cache = target.join("infini-attn-kernels");
        fs::create_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;
        Ok(Compiler { nvcc, identity, asked, known, kernels, cache })
    }

    /// PTX and fatbin of one file into `out`.
    fn file(&self, folder: &Folder, stem: &str, out: &Path) -> Result<()> {
        let started = Instant::now();
        let name = format!("{}/{stem}", folder.name);
        let source = self.kernels.join(&name).with_extension("cu");
        let mut content = Vec::new();
        self.sources(&source, &mut BTreeSet::new(), &mut content)?;
        let mut nvcc = Command::new(self.nvcc);
        nvcc.args(["-std=c++17", "-lineinfo", "-ptx", &format!("-arch=compute_{}", folder.ptx)]);
        let ptx =
            self.cached(nvcc.arg("-I").arg(self.kernels).arg(source), &content, &name, "ptx")?;

        let mut nvcc = Command::new(self.nvcc);
        nvcc.arg("-fatbin").args(self.codes(folder)).arg(&ptx);
        let fatbin = self.cached(&mut nvcc, &[read(&ptx)?], &name, "fatbin")?;

        copy(&ptx, &out.join(&name).with_extension("ptx"))?;
        copy(&fatbin, &out.join(&name).with_extension("fatbin"))?;
        println!("{name}: {:.1} s", started.elapsed().as_secs_f64());
        Ok(())
    }

    /// `-gencode` for every cubin and the PTX.
    fn codes(&self, folder: &Folder) -> Vec<String> {
        let ptx = folder.ptx;
        let cubins = match &self.asked {
            Some(asked) => asked.iter().map(String::as_str).collect(),
            None => folder.cubins.to_vec(),
        };
        cubins
            .iter()
            .filter(|arch| self.known.contains(base(arch)))
            .map(|arch| format!("-gencode=arch=compute_{ptx},code=sm_{arch}"))
            .chain([format!("-gencode=arch=compute_{ptx},code=compute_{ptx}")])
            .collect()
    }

    /// The output of nvcc, which only runs if it never ran like this on this content.
    fn cached(
        &self,
        nvcc: &mut Command,
        content: &[String],
        name: &str,
        extension: &str,
    ) -> Result<PathBuf> {
        let mut hasher = Xxh3::new();
        for text in content.iter().chain([&self.identity]) {
            hasher.update(&text.len().to_le_bytes());
            hasher.update(text.as_bytes());
        }
        for argument in nvcc.get_args() {
            hasher.update(argument.as_encoded_bytes());
            hasher.update(&[0]);
        }
        let stem = format!("{}-{:032x}", name.replace('/', "-"), hasher.digest128());
        let output = self.cache.join(format!("{stem}.{extension}"));
        if !output.exists() {
            // Another build may do the same: each writes its own, the last rename stays.
            let own = self.cache.join(format!("{stem}.{}.tmp", std::process::id()));
            let printed = tools::execute(nvcc.arg("-o").arg(&own))?;
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

/// `90a` is known where `90` is.
fn base(arch: &str) -> &str {
    arch.trim_end_matches(['a', 'f'])
}
