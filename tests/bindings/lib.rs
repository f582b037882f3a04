//! kernels/params.rs is what bindgen makes of kernels/params.h. A package of its own: it tells and
//! mends that also while the crate does not compile, for want of the new structures.
#![cfg(test)]

use std::path::{Path, PathBuf};
use std::{env, fs};

use bindgen::callbacks::{DeriveInfo, ParseCallbacks};

const HEADER: &str = "\
// Made by bindgen of params.h; `INFINI_ATTN_BLESS=1 cargo test -p bindings` makes it anew.
";

/// Derives `Pod`, which also proves at compile time that there is no padding.
#[derive(Debug)]
struct Plain;

impl ParseCallbacks for Plain {
    fn add_derives(&self, _: &DeriveInfo<'_>) -> Vec<String> {
        ["::bytemuck::Pod", "::bytemuck::Zeroable"].map(String::from).into()
    }
}

/// `clang/native` of target/cuda-venv, for the system's libclang may be missing.
fn libclang(root: &Path) -> Option<PathBuf> {
    let pythons = fs::read_dir(root.join("target/cuda-venv/lib")).ok()?.flatten();
    let mut folders = pythons.map(|python| python.path().join("site-packages/clang/native"));
    folders.find(|folder| folder.is_dir())
}

fn generate(root: &Path) -> String {
    if env::var_os("LIBCLANG_PATH").is_none()
        && let Some(folder) = libclang(root)
    {
        // SAFETY: the one test of this program; nobody else reads the environment.
        unsafe { env::set_var("LIBCLANG_PATH", folder) };
    }
    let bindings = bindgen::Builder::default()
        .header(root.join("kernels/params.h").display().to_string())
        .allowlist_file(".*params[.]h")
        .prepend_enum_name(false)
        .translate_enum_integer_types(true)
        .derive_default(true)
        .layout_tests(true)
        .generate_comments(false)
        .disable_header_comment()
        .rustfmt_configuration_file(Some(root.join("rustfmt.toml")))
        .parse_callbacks(Box::new(Plain))
        .generate();
    HEADER.to_owned() + &bindings.expect("Rust of kernels/params.h").to_string()
}

#[test]
fn the_structures_are_those_of_the_header() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (path, made) = (root.join("kernels/params.rs"), generate(&root));
    if env::var_os("INFINI_ATTN_BLESS").is_some() {
        fs::write(path, made).expect("kernels/params.rs");
        return;
    }
    let kept = fs::read_to_string(path).expect("kernels/params.rs");
    let lines = kept.lines().zip(made.lines());
    let differ = lines.enumerate().find(|(_, (kept, made))| kept != made);
    assert!(
        kept == made,
        "kernels/params.rs is not of this params.h, first in {differ:?}; \
         INFINI_ATTN_BLESS=1 makes it anew"
    );
}
