//! Rust structures of kernels/params.h.

use std::path::Path;

use bindgen::callbacks::{DeriveInfo, ParseCallbacks};

use super::Result;

/// Derives `Pod`, which also proves at compile time that there is no padding.
#[derive(Debug)]
struct Plain;

impl ParseCallbacks for Plain {
    fn add_derives(&self, _: &DeriveInfo<'_>) -> Vec<String> {
        ["::bytemuck::Pod", "::bytemuck::Zeroable"].map(String::from).into()
    }
}

/// Writes `params.rs`; libclang is loaded.
pub fn generate(kernels: &Path, out: &Path) -> Result<()> {
    let header = kernels.join("params.h");
    let bindings = bindgen::Builder::default()
        .header(header.display().to_string())
        .allowlist_file(".*params[.]h")
        .prepend_enum_name(false)
        .translate_enum_integer_types(true)
        .derive_default(true)
        .layout_tests(true)
        .generate_comments(false)
        .parse_callbacks(Box::new(Plain))
        .generate()
        .map_err(|e| format!("{}: {e}", header.display()))?;
    let path = out.join("params.rs");
    bindings.write_to_file(&path).map_err(|e| format!("{}: {e}", path.display()))
}
