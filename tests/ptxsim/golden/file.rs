//! The file of a device's results: little-endian, strings and lists with their length before them.

use std::fmt;

use super::{PROBES, Probe};

const MAGIC: &[u8; 8] = b"ptxgold\0";
const VERSION: u32 = 1;

/// What a device has computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    pub device: String,
    /// Version of the driver, which compiles the PTX.
    pub driver: String,
    pub results: Vec<Results>,
    /// Entries of a file that are of no use, each with why: recorded with what has changed since.
    pub stale: Vec<String>,
}

/// The words of a probe.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    pub entry: String,
    /// [`Probe::key`] at the time.
    pub key: u64,
    pub words: Vec<u32>,
}

impl Results {
    pub fn new(probe: &Probe, words: Vec<u32>) -> Self {
        Self { entry: probe.entry.into(), key: probe.key(), words }
    }
}

/// Why a file is of no use.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FileError {
    Foreign,
    Version(u32),
    Truncated,
    Trailing(usize),
    Count { entry: String, words: usize, expected: usize },
}

impl std::error::Error for FileError {}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => write!(f, "no file of golden vectors"),
            Self::Version(found) => write!(f, "version {found}, {VERSION} expected"),
            Self::Truncated => write!(f, "the file ends early"),
            Self::Trailing(bytes) => write!(f, "{bytes} bytes after the last probe"),
            Self::Count { entry, words, expected } => {
                write!(f, "{words} words of {entry}, {expected} expected")
            }
        }
    }
}

impl Recording {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        let length = |n: usize| (n as u32).to_le_bytes();
        let text = |s: &str| [&length(s.len())[..], s.as_bytes()].concat();
        out.extend(VERSION.to_le_bytes());
        out.extend(text(&self.device));
        out.extend(text(&self.driver));
        out.extend(length(self.results.len()));
        for Results { entry, key, words } in &self.results {
            out.extend(text(entry));
            out.extend(key.to_le_bytes());
            out.extend(length(words.len()));
            out.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        }
        out
    }

    /// Reads a file of the probes as they are now.
    pub fn decode(bytes: &[u8]) -> Result<Self, FileError> {
        let mut reader = Reader(bytes);
        if reader.take(MAGIC.len()).ok() != Some(MAGIC) {
            return Err(FileError::Foreign);
        }
        match reader.length()? as u32 {
            VERSION => {}
            other => return Err(FileError::Version(other)),
        }
        let (device, driver) = (reader.text()?, reader.text()?);
        let count = reader.length()?;
        let (mut results, mut stale) = (vec![], vec![]);
        for _ in 0..count {
            match reader.results()? {
                Ok(own) => results.push(own),
                Err(reason) => stale.push(reason),
            }
        }
        match reader.0.len() {
            0 => Ok(Self { device, driver, results, stale }),
            rest => Err(FileError::Trailing(rest)),
        }
    }

    /// Results of a probe, where they were recorded.
    pub fn words(&self, probe: &Probe) -> Option<&[u32]> {
        let found = self.results.iter().find(|r| r.entry == probe.entry);
        found.map(|r| &r.words[..])
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], FileError> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(FileError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FileError> {
        self.take(N)?.try_into().map_err(|_| FileError::Truncated)
    }

    fn length(&mut self) -> Result<usize, FileError> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn text(&mut self) -> Result<String, FileError> {
        let n = self.length()?;
        Ok(String::from_utf8_lossy(self.take(n)?).into_owned())
    }

    /// Results of a probe as it is now; else why they are not.
    fn results(&mut self) -> Result<Result<Results, String>, FileError> {
        let entry = self.text()?;
        let key = u64::from_le_bytes(self.array()?);
        let count = self.length()?;
        let bytes = self.take(count.saturating_mul(4))?;
        let words: Vec<u32> =
            bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let Some(probe) = PROBES.iter().find(|p| p.entry == entry) else {
            return Ok(Err(format!("there is no probe {entry}")));
        };
        if key != probe.key() {
            return Ok(Err(format!("{entry} was recorded with other inputs or PTX")));
        }
        if words.len() != probe.results() {
            let expected = probe.results();
            return Err(FileError::Count { entry, words: words.len(), expected });
        }
        Ok(Ok(Results { entry, key, words }))
    }
}
