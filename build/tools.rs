//! The tools that the build needs, and where they are looked for.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::Result;

/// nvcc as Python packages, a line each.
const REQUIREMENTS: &str = include_str!("requirements.txt");

const PREBUILT: &str = "To build without these tools, set INFINI_ATTN_PREBUILT to a folder of \
compiled kernels (docs/building.md).";

/// What was found.
pub struct Tools {
    /// None on docs.rs, which compiles no kernels.
    pub nvcc: Option<PathBuf>,
    /// The C++ compiler of this machine, which nvcc calls too.
    pub host_compiler: PathBuf,
}

impl Tools {
    /// Finds nvcc and the host compiler. One message names all that is missing.
    pub fn find(root: &Path, out: &Path) -> Result<Self> {
        let site_packages = site_packages(root, out);
        let nvcc = match env::var_os("DOCS_RS") {
            Some(_) => Ok(None),
            None => nvcc(&site_packages).map(Some),
        };
        match (nvcc, host_compiler()) {
            (Ok(nvcc), Ok(host_compiler)) => Ok(Tools { nvcc, host_compiler }),
            (nvcc, host_compiler) => {
                let errors = [nvcc.err(), host_compiler.err(), Some(PREBUILT.to_owned())];
                Err(errors.into_iter().flatten().collect::<Vec<_>>().join("\n"))
            }
        }
    }
}

/// Cargo's target folder. Cargo marks it if it makes it; where somebody else did, `out` is
/// `<profile>/build/<package>/out` in it. Otherwise `out` itself.
pub fn target_folder(out: &Path) -> &Path {
    let marked = out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    let build = out.ancestors().nth(2).filter(|folder| folder.ends_with("build"));
    marked.or(build.and_then(|folder| folder.ancestors().nth(2))).unwrap_or(out)
}

/// `site-packages` of the active Python environment and of target/cuda-venv, in the target folder of
/// this build or of the repository.
fn site_packages(root: &Path, out: &Path) -> Vec<PathBuf> {
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].map(env::var_os).into_iter().flatten();
    let environments = active
        .map(PathBuf::from)
        .chain([target_folder(out).join("cuda-venv"), root.join("target/cuda-venv")]);
    environments
        .flat_map(|environment| entries(&environment.join("lib")))
        .map(|python| python.join("site-packages"))
        .filter(|folder| folder.is_dir())
        .collect()
}

fn nvcc(site_packages: &[PathBuf]) -> Result<PathBuf> {
    let mut candidates: Vec<PathBuf> = env::var_os("NVCC").map(Into::into).into_iter().collect();
    let homes = ["CUDA_HOME", "CUDA_PATH"].map(env::var_os).into_iter().flatten();
    candidates.extend(homes.map(|home| Path::new(&home).join("bin/nvcc")));
    candidates.extend(on_path(Path::new("nvcc")));
    candidates.push("/usr/local/cuda/bin/nvcc".into());
    // The packages have a folder per major release: cu13, later cu14.
    let releases = site_packages.iter().flat_map(|folder| entries(&folder.join("nvidia")));
    candidates.extend(releases.map(|release| release.join("bin/nvcc")));
    candidates.into_iter().find(|candidate| candidate.is_file()).ok_or_else(|| {
        let found: String =
            site_packages.iter().map(|folder| format!("\n  {}", folder.display())).collect();
        format!(
            "nvcc not found; looked in $NVCC, $CUDA_HOME/bin, $CUDA_PATH/bin, $PATH, \
             /usr/local/cuda/bin, and the Python environments $VIRTUAL_ENV, $CONDA_PREFIX and \
             target/cuda-venv{found}\n{}",
            install_packages()
        )
    })
}

fn host_compiler() -> Result<PathBuf> {
    let named = env::var_os("NVCC_CCBIN").map(PathBuf::from);
    // nvcc takes a folder as well.
    let named = named.map(|path| if path.is_dir() { path.join("g++") } else { path });
    let candidates = named.into_iter().chain(["g++".into()]).flat_map(|path| on_path(&path));
    candidates.into_iter().find(|candidate| candidate.is_file()).ok_or_else(|| {
        let places = "$NVCC_CCBIN and g++ in $PATH";
        format!("C++ compiler not found; looked for {places} (`apt-get install g++`)")
    })
}

fn install_packages() -> String {
    let packages = REQUIREMENTS.lines().filter(|line| !line.starts_with('#'));
    let packages = packages.collect::<Vec<_>>().join(" ");
    format!(
        "nvcc comes as Python packages (no root, no GPU needed):\n  \
         python3 -m venv target/cuda-venv\n  \
         target/cuda-venv/bin/pip install {packages}"
    )
}

/// Where a program may be: in every folder of the search path, or where its path says.
fn on_path(program: &Path) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|folder| folder.join(program)).collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
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
