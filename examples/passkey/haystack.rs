//! The text in which the passkey is hidden: real files, read only as far as needed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// A stream of bytes without end: the text of some files, over and over if there is too little.
pub struct Haystack {
    text: Vec<u8>,
    files: usize,
    named: bool,
    /// Lines left out because they held the phrase.
    left_out: usize,
    phrase: String,
}

impl Haystack {
    /// `length` bytes (or all there are) of the named files; without names, of the Rust and
    /// Markdown files of this repository and of cargo's registry. Lines holding `phrase` are left
    /// out: the text must not answer the question by itself.
    pub fn read(named: &[PathBuf], length: usize, phrase: &str) -> Result<Self> {
        let (named_any, phrase) = (!named.is_empty(), phrase.into());
        let mut all = Self { text: vec![], files: 0, named: named_any, left_out: 0, phrase };
        for path in named {
            let text = read_text(path, length).with_context(|| path.display().to_string())?;
            all.add(&text);
        }
        if named.is_empty() {
            for root in roots() {
                all.add_tree(&root, length);
            }
        }
        ensure!(!all.text.is_empty(), "no text found: name files on the command line");
        all.text.truncate(length);
        Ok(all)
    }

    /// One line for the report.
    pub fn describe(&self, length: usize) -> String {
        let origin = if self.named {
            "named files"
        } else {
            "files found on this machine (this repository, then cargo's registry)"
        };
        let mut line = format!("{} bytes of {} {origin}", self.text.len(), self.files);
        if self.left_out > 0 {
            line += &format!(", {} lines left out that hold the phrase", self.left_out);
        }
        if self.text.len() < length {
            let times = length as f64 / self.text.len() as f64;
            line += &format!("; too little: repeated {times:.1} times to {length} bytes");
        }
        line
    }

    /// Appends bytes `start..start + count` of the stream; there are zeros before its beginning.
    pub fn extend(&self, start: isize, count: usize, bytes: &mut Vec<u8>) {
        let n = self.text.len() as isize;
        bytes.extend((start..start + count as isize).map(|at| match at {
            ..0 => 0,
            _ => self.text[(at % n) as usize],
        }));
    }

    fn add(&mut self, text: &str) {
        self.files += 1;
        for line in text.split_inclusive('\n') {
            if line.contains(&self.phrase) {
                self.left_out += 1;
            } else {
                self.text.extend_from_slice(line.as_bytes());
            }
        }
    }

    /// Adds the readable text files below `root`, in the order of their names, until there are
    /// `length` bytes. What cannot be read is not ours to complain about: it was not asked for.
    fn add_tree(&mut self, root: &Path, length: usize) {
        let Ok(entries) = std::fs::read_dir(root) else { return };
        let mut entries: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        entries.sort();
        for path in entries {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if self.text.len() >= length || name.starts_with('.') || name == "target" {
                continue;
            }
            if path.is_dir() && !path.is_symlink() {
                self.add_tree(&path, length);
            } else if matches!(path.extension().and_then(|e| e.to_str()), Some("rs" | "md"))
                && let Ok(text) = read_text(&path, length)
            {
                self.add(&text);
            }
        }
    }
}

/// This repository, then the registry sources of cargo's home.
fn roots() -> Vec<PathBuf> {
    let home = std::env::home_dir().map(|home| home.join(".cargo"));
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from).or(home);
    let registry = cargo.map(|cargo| cargo.join("registry").join("src"));
    std::iter::once(env!("CARGO_MANIFEST_DIR").into()).chain(registry).collect()
}

/// The text file, or enough of it for `length` bytes: twice as many, for some lines may be left
/// out. Cut at a whole character.
fn read_text(path: &Path, length: usize) -> Result<String> {
    let most = 2 * length;
    ensure!(!path.is_dir(), "is a directory, a text file is expected");
    let mut bytes = vec![];
    File::open(path)?.take(most as u64).read_to_end(&mut bytes)?;
    ensure!(!bytes.is_empty(), "is empty, a text file is expected");
    if let Some(at) = bytes.iter().position(|&b| b == 0) {
        bail!("is binary (byte {at} is zero), a text file is expected");
    }
    if let Err(e) = std::str::from_utf8(&bytes) {
        let cut = e.error_len().is_none() && bytes.len() == most;
        ensure!(cut, "is not UTF-8 (byte {}), a text file is expected", e.valid_up_to());
        bytes.truncate(e.valid_up_to());
    }
    Ok(String::from_utf8(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is gone when the test is over.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str, bytes: &[u8]) -> Self {
            let name = format!("infini-attn-passkey-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::write(&path, bytes).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn unusable_files_are_refused_by_name() {
        let refuse = |path: &Path, reason: &str| {
            let error = Haystack::read(&[path.into()], 100, "phrase").err().expect(reason);
            let message = format!("{error:#}");
            assert!(message.contains(reason), "{message}");
            assert!(message.contains(path.to_str().unwrap()), "{message}");
        };
        refuse(&Scratch::new("empty", b"").0, "is empty");
        refuse(&Scratch::new("zero", b"text\0text").0, "byte 4 is zero");
        refuse(&Scratch::new("latin", b"caf\xe9").0, "not UTF-8 (byte 3)");
        refuse(&std::env::temp_dir(), "is a directory");
        refuse(Path::new("no/such/file.txt"), "No such file");
        refuse(&Scratch::new("cut", "caf\u{e9}".as_bytes().split_last().unwrap().1).0, "(byte 3)");
        let only = Scratch::new("only", b"the phrase\n");
        assert!(Haystack::read(std::slice::from_ref(&only.0), 100, "phrase").is_err());
    }

    #[test]
    fn phrase_left_out_and_text_repeated() {
        let file = Scratch::new("lines", b"abc\nthe phrase\nde");
        let hay = Haystack::read(std::slice::from_ref(&file.0), 10, "phrase").unwrap();
        let mut bytes = vec![];
        hay.extend(-2, 10, &mut bytes);
        assert_eq!(bytes, b"\0\0abc\ndeab");
        let line = hay.describe(12);
        assert!(line.contains("1 lines left out") && line.contains("repeated 2.0 times"), "{line}");
    }

    #[test]
    fn reads_no_further_than_needed() {
        let file = Scratch::new("long", "caf\u{e9} noir\0".as_bytes());
        let hay = Haystack::read(std::slice::from_ref(&file.0), 2, "phrase").unwrap();
        assert_eq!(hay.text, b"ca");
    }

    #[test]
    fn sources_of_this_machine() {
        let hay = Haystack::read(&[], 20_000, "The pass key is ").unwrap();
        assert_eq!(hay.text.len(), 20_000);
        let again = Haystack::read(&[], 20_000, "The pass key is ").unwrap();
        assert!(hay.text == again.text);
    }
}
