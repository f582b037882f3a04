//! What the build makes under the feature `cuda`: the table, the compiled files, the resources that
//! ptxas assigns, and the build script itself under other circumstances.

mod ptxas;
mod sass;
mod script;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use infini_attn::cuda::{Arch, Device, KERNELS, Kernel, MAP_BYTES, fatbin, find, params, ptx};
use infini_attn::{DType, Error, Problem};

/// Files of the table that were compiled.
fn compiled() -> BTreeSet<&'static str> {
    KERNELS.iter().map(|kernel| kernel.file).filter(|file| ptx(file).is_some()).collect()
}

/// Entry functions of a PTX text, with the bytes of their parameter.
fn entries(text: &str) -> BTreeMap<&str, usize> {
    let functions = text.split(".entry ").skip(1);
    functions
        .map(|function| {
            let (name, rest) = function.split_once('(').expect("a parameter list");
            let parameters = rest.split_once(')').expect("its end").0;
            let bytes = parameters.rsplit_once('[').and_then(|(_, size)| size.split(']').next());
            (name.trim(), bytes.and_then(|size| size.parse().ok()).unwrap_or(0))
        })
        .collect()
}

#[test]
fn every_kernel_of_the_table_is_compiled() {
    let missing: BTreeSet<_> = KERNELS.iter().map(|k| k.file).collect();
    let missing: Vec<_> = missing.difference(&compiled()).copied().collect();
    assert!(missing.is_empty(), "no kernels/*.cu for {missing:?}");
}

#[test]
fn every_file_has_the_symbols_of_the_table_and_no_others() {
    for file in compiled() {
        let table: BTreeSet<&str> =
            KERNELS.iter().filter(|k| k.file == file).map(|k| k.symbol).collect();
        let found: BTreeSet<&str> = entries(ptx(file).unwrap()).into_keys().collect();
        assert_eq!(found, table, "{file}");
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    for arch in ["sm80", "sm90"] {
        let entries = std::fs::read_dir(kernels.join(arch)).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path());
        for path in paths.filter(|path| path.extension().is_some_and(|e| e == "cu")) {
            let file = format!("{arch}/{}", path.file_stem().unwrap().display());
            assert!(compiled().contains(&*file), "{file}.cu is in no row of the table");
        }
    }
}

/// Bytes of the parameter structure of every operation.
fn parameter_bytes() -> BTreeMap<&'static str, usize> {
    macro_rules! sizes {
        ($($operation:literal: $type:ident),+ $(,)?) => {
            BTreeMap::from([$(($operation, size_of::<params::$type>())),+])
        };
    }
    sizes! {
        "append": InfiniAppend,
        "clear_padding": InfiniClearPadding,
        "commit": InfiniCommit,
        "compose": InfiniCompose,
        "decode": InfiniDecode,
        "memory_scan": InfiniMemoryScan,
        "merge_partials": InfiniMergePartials,
        "normaliser_scan": InfiniNormaliserScan,
        "copy_slots": InfiniCopySlots,
        "rotate_keys": InfiniRotateKeys,
        "segment": InfiniSegment,
        "segment_attention": InfiniSegmentAttention,
        "segment_state": InfiniSegmentState,
        "segment_transition": InfiniSegmentTransition,
        "snapshot": InfiniSnapshot,
        "sum": InfiniSum,
        "table": InfiniTable,
    }
}

/// Tensor maps in front of a kernel's structure.
fn tensor_maps(kernel: &Kernel) -> usize {
    match (kernel.arch, kernel.operation) {
        (Arch::Sm80, _) | (_, "memory_scan" | "normaliser_scan") => 0,
        (_, "segment") => 11,
        (_, "segment_attention") => 9,
        (_, "segment_state") => 4,
        (_, "segment_transition") => 2,
        (arch, operation) => panic!("{operation} of {arch}"),
    }
}

#[test]
fn kernels_take_the_structures_that_the_host_passes() {
    let bytes = parameter_bytes();
    let operations: BTreeSet<&str> = KERNELS.iter().map(|k| k.operation).collect();
    assert_eq!(operations, bytes.keys().copied().collect());
    for kernel in KERNELS.iter().filter(|kernel| compiled().contains(kernel.file)) {
        let declared = entries(ptx(kernel.file).unwrap())[kernel.symbol];
        let structure = bytes[kernel.operation];
        let expected = match tensor_maps(kernel) {
            0 => structure,
            maps => (MAP_BYTES * maps + structure).next_multiple_of(128),
        };
        assert_eq!(declared, expected, "{}", kernel.symbol);
        assert!(declared <= 4096, "{}: {declared} bytes of parameters", kernel.symbol);
    }
}

#[test]
fn fatbins_are_loadable_images() {
    for file in compiled() {
        let image = fatbin(file).expect("a fatbin beside the PTX");
        assert_eq!(image[..4], 0xBA55_ED50_u32.to_le_bytes(), "{file}");
        assert!(image.as_ptr().addr().is_multiple_of(16), "{file}");
    }
    assert!(fatbin("sm80/nothing").is_none() && ptx("sm80/nothing").is_none());
}

fn problem(dtype: DType, key_dim: usize, value_dim: usize) -> Problem {
    Problem::builder().dtype(dtype).key_dim(key_dim).value_dim(value_dim).build().unwrap()
}

#[test]
fn every_kernel_is_found() {
    for kernel in KERNELS.iter() {
        // Where a kernel takes anything: something it was not compiled for by name.
        let or_any = |dim| if dim == 0 { 80 } else { dim };
        let dims = (or_any(kernel.key_dim), or_any(kernel.value_dim));
        let problem = problem(kernel.dtype.unwrap_or(DType::F32), dims.0, dims.1);
        let found: &Kernel = find(kernel.operation, &problem, kernel.arch).unwrap();
        assert_eq!(found, kernel);
    }
}

#[test]
fn what_is_not_compiled_is_refused_with_what_is() {
    let refused =
        |operation, dtype, dk, dv| match find(operation, &problem(dtype, dk, dv), Arch::Sm90) {
            Err(Error::Unsupported { argument, got, accepted }) => (argument, got, accepted),
            other => panic!("{operation} {dtype} {dk} {dv}: {other:?}"),
        };
    let dims =
        "(32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (64, 128), (128, 64), (192, 128)";
    for operation in ["segment_attention", "segment", "decode", "segment_state", "commit"] {
        let (argument, got, accepted) = refused(operation, DType::BF16, 80, 96);
        assert_eq!((argument, &*got), ("(key_dim, value_dim)", "(80, 96)"), "{operation}");
        assert_eq!(accepted, dims, "{operation}");
    }
    let (argument, got, accepted) = refused("memory_scan", DType::F16, 80, 80);
    assert_eq!((argument, &*got, &*accepted), ("key_dim", "80", "32, 64, 96, 128, 192, 256"));
    let (argument, got, accepted) = refused("append", DType::F32, 64, 64);
    assert_eq!((argument, &*got, &*accepted), ("dtype", "f32", "bf16, f16"));
    let (argument, _, accepted) = refused("sgement", DType::F16, 64, 64);
    assert!(argument == "operation" && accepted.contains("segment_attention"), "{accepted}");
}

/// libcuda is opened when it is first called; nothing of CUDA is linked.
#[test]
fn the_binary_starts_without_cuda() {
    let program = std::env::current_exe().unwrap();
    let output = Command::new("readelf").arg("-d").arg(program).output().expect("readelf");
    let dynamic = String::from_utf8_lossy(&output.stdout);
    assert!(dynamic.contains("NEEDED") && dynamic.contains("libc.so"), "{dynamic}");
    assert!(!dynamic.contains("cuda") && !dynamic.contains("nvrtc"), "{dynamic}");
}

/// A library that is there and is not the driver, or one too old, is an error and not a panic.
#[test]
fn a_library_that_is_not_the_driver_is_told() {
    const CHILD: &str = "INFINI_ATTN_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        println!("{}", Device::new(0).expect_err("no driver"));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (source, missing) in [("", "cuCtxGetCurrent"), ("int cuCtxGetCurrent;", "cuCtxSetCurrent")]
    {
        std::fs::write(folder.path().join("library.c"), source).unwrap();
        let mut compiler = Command::new("g++");
        compiler.current_dir(&folder).args([
            "-shared",
            "-fPIC",
            "-xc",
            "library.c",
            "-o",
            "libcuda.so",
        ]);
        assert!(compiler.status().expect("g++").success());
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "build::a_library_that_is_not_the_driver_is_told", "--nocapture"]);
        child.env("LD_LIBRARY_PATH", folder.path()).env(CHILD, "1");
        let output = child.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains(&format!("the CUDA driver's library has no {missing}")), "{text}");
    }
}

/// Packages that the crate is built from, without dependencies of tests.
fn packages(features: &[&str]) -> BTreeSet<String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["tree", "--locked", "--offline", "-e", "normal,build", "--prefix", "none"]);
    let output = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(features).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter_map(|line| line.split(' ').next()).map(Into::into).collect()
}

#[test]
fn without_the_feature_nothing_of_cuda_is_built() {
    let (without, with) = (packages(&[]), packages(&["--features", "cuda"]));
    for package in ["cudarc", "xxhash-rust"] {
        assert!(with.contains(package) && !without.contains(package), "{package}");
    }
    // Neither is libclang asked for: what bindgen makes is kept in the repository.
    assert!(!with.contains("bindgen") && !with.contains("clang-sys"), "{with:?}");
}
