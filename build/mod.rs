//! The parts of the build script.

pub mod compile;
pub mod prebuilt;
pub mod table;
pub mod tools;

use std::fs;
use std::path::Path;

/// Errors are text for whoever builds the crate.
pub type Result<T> = std::result::Result<T, String>;

/// Reads a text file.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Writes a file.
pub fn write(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).map_err(|e| format!("{}: {e}", path.display()))
}

/// Copies a file and makes the folder it goes to.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    fs::copy(from, to).map(drop).map_err(|e| format!("{} to {}: {e}", from.display(), to.display()))
}
