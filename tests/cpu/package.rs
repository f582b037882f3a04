//! What `cargo package` packs: all that builds and documents the crate, and nothing else.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Files below a folder, named from the root.
fn files(folder: &str, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(Path::new(ROOT).join(folder)).expect("a folder").flatten() {
        let path = format!("{folder}/{}", entry.file_name().display());
        if entry.path().is_dir() {
            files(&path, found);
        } else {
            found.insert(path);
        }
    }
}

#[test]
fn the_crate_holds_what_builds_it_and_no_more() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["package", "-p", "infini-attn", "--list", "--allow-dirty", "--offline"]);
    let output = cargo.current_dir(ROOT).output().expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let packed = String::from_utf8(output.stdout).expect("names");
    // These Cargo makes.
    let made = [".cargo_vcs_info.json", "Cargo.toml.orig", "Cargo.lock", "Cargo.toml"];
    let packed: BTreeSet<_> =
        packed.lines().filter(|name| !made.contains(name)).map(String::from).collect();

    let alone = "CHANGELOG.md LICENSE-APACHE LICENSE-MIT README.md build.rs scripts/prebuild";
    let mut expected: BTreeSet<_> = alone.split(' ').map(String::from).collect();
    for folder in ["build", "docs", "examples", "kernels", "src"] {
        files(folder, &mut expected);
    }
    let differ: Vec<_> = packed.symmetric_difference(&expected).collect();
    assert!(differ.is_empty(), "in one of package and expectation: {differ:?}");
}
