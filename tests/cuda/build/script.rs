//! The build script, run on copies of the sources: tools missing, prebuilt folders, docs.rs, what is
//! compiled again.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use tempfile::TempDir;

use crate::common::say::say;

/// A kernel that every device runs.
const KERNEL: &str = r#"
#include "params.h"
#include "common/ptx.cuh"
extern "C" __global__ void infini_table_sm80(const __grid_constant__ InfiniTable p) {
  *reinterpret_cast<uint32_t*>(p.to) = p.data[0];
}
"#;

/// A kernel that needs compute capability 9.0 exactly.
const HOPPER: &str = r#"
extern "C" __global__ void infini_wait_sm90() { asm volatile("wgmma.fence.sync.aligned;"); }
"#;

/// Where Cargo puts what the script makes. The target folder has no mark of Cargo's: somebody else made
/// it.
const OUT: &str = "target/debug/build/infini-attn-1/out";

/// A crate of its own with one small kernel.
struct Sandbox {
    folder: TempDir,
}

impl Sandbox {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let to = folder.path().join("kernels");
        for part in ["common", "sm80", "sm90"] {
            fs::create_dir_all(to.join(part)).unwrap();
        }
        for file in ["params.h", "describe.cpp", "sm90/tiles.h"] {
            fs::copy(from.join(file), to.join(file)).unwrap();
        }
        for header in fs::read_dir(from.join("common")).unwrap().flatten() {
            fs::copy(header.path(), to.join("common").join(header.file_name())).unwrap();
        }
        fs::write(to.join("sm80/table.cu"), KERNEL).unwrap();
        fs::create_dir_all(folder.path().join(OUT)).unwrap();
        Sandbox { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The build script, without any variable of this process but those given.
    fn run(&self, variables: &[(&str, &Path)]) -> Output {
        let mut script = Command::new(env!("INFINI_ATTN_BUILD_SCRIPT"));
        script.env_clear().env("NUM_JOBS", "2").env("CARGO_MANIFEST_DIR", self.folder.path());
        script.env("OUT_DIR", self.path(OUT)).envs(variables.iter().copied());
        script.output().unwrap()
    }

    /// The same with the search path and the tools of this build.
    fn run_with_tools(&self, variables: &[(&str, &Path)]) -> Output {
        let inherited = ["PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "NVCC_CCBIN"];
        let mut all: Vec<(&str, PathBuf)> =
            inherited.iter().filter_map(|name| Some((*name, env::var_os(name)?.into()))).collect();
        let environment = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/cuda-venv");
        if env::var_os("CONDA_PREFIX").is_none() && environment.exists() {
            all.push(("CONDA_PREFIX", environment));
        }
        all.extend(variables.iter().map(|(name, value)| (*name, value.to_path_buf())));
        let all: Vec<_> = all.iter().map(|(name, value)| (*name, value.as_path())).collect();
        self.run(&all)
    }

    /// Everything generated, by name; the program that describes the kernels is not included.
    fn generated(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let out = self.path(OUT);
        let manifest = fs::read_to_string(out.join("manifest")).unwrap();
        let files = manifest.lines().skip(1).chain(["manifest"]);
        files.map(|file| (file.into(), fs::read(out.join(file)).unwrap())).collect()
    }
}

fn text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    format!("{out}{err}")
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", text(output));
}

fn nvcc() -> Option<&'static Path> {
    option_env!("INFINI_ATTN_NVCC").map(Path::new)
}

#[test]
fn missing_tools_are_named_with_the_commands_that_install_them() {
    let sandbox = Sandbox::new();
    let nowhere = sandbox.path("nowhere");
    fs::create_dir(&nowhere).unwrap();
    let output = sandbox.run(&[("PATH", &nowhere)]);
    let text = text(&output);
    assert!(!output.status.success());
    assert!(text.lines().any(|line| line.starts_with("cargo::error=C++ compiler not found")));
    // The one place that cannot be hidden.
    if !Path::new("/usr/local/cuda/bin/nvcc").exists() {
        let install = text.lines().find(|line| line.contains("pip install ")).expect("a command");
        assert!(install.contains("nvidia-cuda-nvcc=="), "{install}");
        let line = text.lines().find(|line| line.starts_with("cargo::error=nvcc not found"));
        let line = line.expect("nvcc named");
        for place in ["$NVCC", "$CUDA_HOME", "$CUDA_PATH", "$PATH", "$VIRTUAL_ENV"] {
            assert!(line.contains(place), "{line}");
        }
    }
}

#[test]
fn a_build_without_optimisation_is_warned_of() {
    let sandbox = Sandbox::new();
    let warnings = |variables: &[(&str, &Path)]| {
        let text = text(&sandbox.run(variables));
        text.lines().filter(|line| line.starts_with("cargo::warning=at opt-level 0")).count()
    };
    let [zero, two] = ["0", "2"].map(|level| ("OPT_LEVEL", Path::new(level)));
    assert_eq!([warnings(&[zero]), warnings(&[two]), warnings(&[])], [1, 0, 0]);
    assert_eq!(warnings(&[zero, ("DOCS_RS", Path::new("1"))]), 0);
}

#[test]
fn docs_need_no_nvcc() {
    let sandbox = Sandbox::new();
    succeeded(&sandbox.run_with_tools(&[("DOCS_RS", Path::new("1"))]));
    let files: Vec<_> = sandbox.generated().into_keys().collect();
    let expected = ["kernels.md", "kernels.rs", "manifest", "table.txt"];
    assert_eq!(files, expected.map(PathBuf::from));
}

/// A folder made once gives the same files where there is no tool at all.
#[test]
fn prebuilt_folders_stand_in_for_every_tool() {
    let Some(nvcc) = nvcc() else {
        say("skipped: this build is itself from a prebuilt folder");
        return;
    };
    let here = Sandbox::new();
    succeeded(&here.run_with_tools(&[("NVCC", nvcc)]));
    let elsewhere = Sandbox::new();
    let prebuilt = here.path(OUT);
    let variables = [("INFINI_ATTN_PREBUILT", &*prebuilt), ("PATH", Path::new(""))];
    succeeded(&elsewhere.run(&variables));
    assert_eq!(here.generated(), elsewhere.generated());
    assert_eq!(here.generated().len(), 6);

    // Kernels of other sources are refused.
    let header = elsewhere.path("kernels/common/tiles.h");
    let other = fs::read_to_string(&header).unwrap() + "\n";
    fs::write(&header, other).unwrap();
    let output = elsewhere.run(&variables);
    assert!(!output.status.success() && text(&output).contains("was made from"), "{output:?}");

    let nothing = elsewhere.path("nothing");
    let output = elsewhere.run(&[("INFINI_ATTN_PREBUILT", &nothing), ("PATH", Path::new(""))]);
    assert!(!output.status.success() && text(&output).contains("scripts/prebuild"), "{output:?}");
}

/// An nvcc that writes down how it was called.
fn recording_nvcc(sandbox: &Sandbox, nvcc: &Path) -> (PathBuf, PathBuf) {
    let (program, log) = (sandbox.path("nvcc"), sandbox.path("calls"));
    let script = format!("#!/bin/sh\necho \"$@\" >> {log:?}\nexec {nvcc:?} \"$@\"\n");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    (program, log)
}

#[test]
fn only_what_changed_is_compiled_and_only_what_was_asked() {
    let Some(nvcc) = nvcc() else {
        say("skipped: this build is from a prebuilt folder");
        return;
    };
    let sandbox = Sandbox::new();
    let (recorder, log) = recording_nvcc(&sandbox, nvcc);
    let build_to = |out: &str, archs: &str| {
        _ = fs::remove_file(&log);
        let (archs, out) = (("INFINI_ATTN_CUDA_ARCHS", Path::new(archs)), sandbox.path(out));
        succeeded(&sandbox.run_with_tools(&[("NVCC", &recorder), archs, ("OUT_DIR", &out)]));
        let calls = fs::read_to_string(&log).unwrap();
        calls.lines().filter(|call| call.contains(" -o ")).map(String::from).collect::<Vec<_>>()
    };
    let build = |archs: &str| build_to(OUT, archs);

    let calls = build("ptx");
    assert_eq!(calls.len(), 2, "{calls:?}");
    assert!(calls[0].starts_with("-std=c++17 ") && calls[0].contains(" -ptx -arch=compute_80 -I "));
    assert!(calls.iter().all(|call| !call.contains("-D")), "{calls:?}");
    assert!(!calls[1].contains("code=sm_") && calls[1].contains("code=compute_80"), "{calls:?}");
    assert_eq!(build("ptx").len(), 0);
    // As clippy and other profiles do.
    let other = "target/release/build/infini-attn-2/out";
    fs::create_dir_all(sandbox.path(other)).unwrap();
    assert_eq!(build_to(other, "ptx").len(), 0);

    // Other architectures: the PTX stays.
    let calls = build("80,90a");
    assert_eq!(calls.len(), 1, "{calls:?}");
    for code in ["code=sm_80 ", "code=sm_90a ", "code=compute_80 "] {
        assert!(calls[0].contains(code), "{calls:?}");
    }

    // A header that the kernel includes, and one that it does not.
    let touch = |header: &str, line: &str| {
        let path = sandbox.path("kernels").join(header);
        let other = fs::read_to_string(&path).unwrap() + line;
        fs::write(path, other).unwrap();
    };
    touch("common/tile.cuh", "// other\n");
    assert_eq!(build("80,90a").len(), 0);
    touch("common/element.cuh", "namespace infini { __device__ int other; }\n");
    assert_eq!(build("80,90a").len(), 2);
}

#[test]
fn files_of_sm90_get_no_other_code() {
    let Some(nvcc) = nvcc() else {
        say("skipped: this build is from a prebuilt folder");
        return;
    };
    let sandbox = Sandbox::new();
    fs::remove_file(sandbox.path("kernels/sm80/table.cu")).unwrap();
    fs::write(sandbox.path("kernels/sm90/wait.cu"), HOPPER).unwrap();
    let (recorder, log) = recording_nvcc(&sandbox, nvcc);
    for (asked, cubins) in [("", 1), ("80", 0), ("90", 1), ("80,90a,90", 1), ("ptx", 0)] {
        let archs = ("INFINI_ATTN_CUDA_ARCHS", Path::new(asked));
        // No cache: what another choice made is not looked for.
        _ = fs::remove_dir_all(sandbox.path("target/infini-attn-kernels"));
        _ = fs::remove_file(&log);
        succeeded(&sandbox.run_with_tools(&[("NVCC", &recorder), archs]));
        let calls = fs::read_to_string(&log).unwrap();
        assert!(calls.contains(" -ptx -arch=compute_90a "), "{asked}: {calls}");
        let count = |text| calls.matches(text).count();
        let codes = ["code=sm_90a ", "code=sm_", "code=compute_90a "].map(count);
        assert_eq!(codes, [cubins, cubins, 1], "{asked}: {calls}");
    }
    let names: Vec<_> = sandbox.generated().into_keys().collect();
    let expected =
        ["kernels.md", "kernels.rs", "manifest", "sm90/wait.fatbin", "sm90/wait.ptx", "table.txt"];
    assert_eq!(names, expected.map(PathBuf::from));
}

#[test]
fn architectures_that_do_not_exist_are_refused() {
    let Some(nvcc) = nvcc() else {
        say("skipped: this build is from a prebuilt folder");
        return;
    };
    let sandbox = Sandbox::new();
    for wrong in ["75", "81", "ninety"] {
        let archs = ("INFINI_ATTN_CUDA_ARCHS", Path::new(wrong));
        let output = sandbox.run_with_tools(&[("NVCC", nvcc), archs]);
        let text = text(&output);
        assert!(!output.status.success(), "{wrong}: {text}");
        assert!(text.contains(&format!("INFINI_ATTN_CUDA_ARCHS: {wrong} given")), "{text}");
    }
}

/// The macro that bounds the waits of kernels, and is defined for files that have some.
#[test]
fn waits_give_up_after_a_positive_number_of_polls() {
    let Some(nvcc) = nvcc() else {
        say("skipped: this build is from a prebuilt folder");
        return;
    };
    let sandbox = Sandbox::new();
    let (recorder, log) = recording_nvcc(&sandbox, nvcc);
    let build = |polls: &str| {
        let variables = [("NVCC", &*recorder), ("INFINI_ATTN_WAIT_POLLS", Path::new(polls))];
        let archs = ("INFINI_ATTN_CUDA_ARCHS", Path::new("ptx"));
        sandbox.run_with_tools(&[&variables[..], &[archs]].concat())
    };
    for wrong in ["0", "-1", "many", "4294967296"] {
        let output = build(wrong);
        let text = text(&output);
        assert!(!output.status.success(), "{wrong}: {text}");
        let expected = format!("cargo::error=INFINI_ATTN_WAIT_POLLS: {wrong} given");
        assert!(text.lines().any(|line| line.starts_with(&expected)), "{text}");
    }

    // A file that waits for nothing is what it was.
    succeeded(&build(""));
    _ = fs::remove_file(&log);
    succeeded(&build("7"));
    let made = fs::read_to_string(&log).unwrap();
    assert!(!made.contains(" -o "), "{made}");

    let waiting = format!("// INFINI_WAIT_POLLS\n{KERNEL}");
    fs::write(sandbox.path("kernels/sm80/table.cu"), waiting).unwrap();
    // Other polls are another file in the cache; the fatbin is made of what it was made of before.
    for (polls, calls) in [("", 1), ("7", 1), ("8", 1), ("7", 0)] {
        _ = fs::remove_file(&log);
        succeeded(&build(polls));
        let made = fs::read_to_string(&log).unwrap();
        assert_eq!(made.matches(" -o ").count(), calls, "{polls}: {made}");
        let defined = format!(" -DINFINI_WAIT_POLLS={polls} ");
        let defines = !polls.is_empty() && calls > 0;
        assert_eq!(made.contains(&defined), defines, "{polls}: {made}");
    }
}

#[test]
fn errors_of_the_compiler_come_through() {
    let Some(nvcc) = nvcc() else {
        say("skipped: this build is from a prebuilt folder");
        return;
    };
    let sandbox = Sandbox::new();
    fs::write(sandbox.path("kernels/sm80/table.cu"), "__global__ void broken( {}\n").unwrap();
    let output = sandbox.run_with_tools(&[("NVCC", nvcc)]);
    let text = text(&output);
    assert!(!output.status.success());
    assert!(
        text.lines().any(|line| line.starts_with("cargo::error=") && line.contains("table.cu(1)")),
        "{text}"
    );
}
