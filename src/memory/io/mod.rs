//! State files: safetensors, with the problem in the metadata.
//!
//! | tensor | dtype | shape | |
//! |---|---|---|---|
//! | `memory` | F32 | [S, Hkv, Dk, Dv] | M |
//! | `normalizer` | F32 | [S, Hkv, Dk] | z |
//! | `tokens`, `committed`, `open_len` | U64 | `[S]` | counters |
//! | `rotated` | U8 | `[S]` | 1 where the open segment came with rotation, else 0 |
//! | `open_keys` | F32 | [Σ open_len, Hkv, Dk] | open segments of all slots, one after another |
//! | `open_values` | F32 | [Σ open_len, Hkv, Dv] | alike |
//! | `open_keys_rotated` | F32 | [Σ open_len where rotated, Hkv, Dk] | alike |
//!
//! The metadata has one entry, `infini_attn`: `format=1 heads=8 … dtype=f32 sequences=4
//! crc32=89abcdef`. The checksum runs over the text before it and over all tensors, in table order.
//! There is one way to write a state: equal states give equal bytes, and what is written in another
//! way is refused.

mod header;
pub(crate) mod layers;
mod read;
mod replace;
mod write;

use std::fs::File;
use std::io::{BufReader, Cursor, Write};
use std::path::Path;

use super::State;
use crate::error::{Error, Result};
use crate::problem::Problem;
use read::Fault;

/// Stands for the path in errors about bytes that came from no file.
const BYTES: &str = "<bytes>";
/// Of readers and writers: rows of keys and values are shorter than what one asks the system for.
const BUFFER: usize = 1 << 16;

impl State {
    /// Writes the state to `path` as a safetensors file with the problem in its metadata. Besides
    /// the state this takes 64 KiB of memory.
    ///
    /// A file that is there is replaced in one step, once the new one is complete and on the disk:
    /// whoever reads the path, also after a crash, finds the old state or the new one, whole.
    /// Several may save to one path at once; one of their states stays. After an error the old file
    /// is there and nothing else.
    ///
    /// The new file has the mode of the old one and, where the system permits, its owner and group;
    /// a first one follows the umask. Through a symbolic link the file that it leads to is replaced
    /// or made, and the link stays; another hard link keeps the old state. What is no file (a pipe,
    /// a device) is written into.
    ///
    /// A save that is killed leaves nothing on Linux, or, in the instant before it is done, a file
    /// `.NAME.infini-attn.tmp` beside `path` that the next save removes. On other systems, and on
    /// file systems without unnamed files (NFS), it leaves a file `.infini-attn-*.tmp`.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let name = || path.display().to_string();
        let header = write::header(self)
            .map_err(|e| Error::Format { path: name(), reason: e.to_string() })?;
        let contents = |out: &mut dyn Write| {
            out.write_all(&header)?;
            write::tensors(self, out)
        };
        replace::write(path, &contents).map_err(|source| Error::Io { path: name(), source })
    }

    /// Reads a state that [`Self::save`] wrote. It continues bit for bit where the saved one
    /// stood. Besides the state this takes 64 KiB of memory; from a pipe, once the file's length.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is not a state file,
    /// is of another format version, truncated, corrupt, inconsistent, or not written as
    /// [`Self::save`] does, [`Error::OutOfMemory`].
    pub fn load(path: impl AsRef<Path>) -> Result<State> {
        load(path.as_ref(), |_| Ok(()))
    }

    /// Reads a state and refuses it unless it was made for `problem`, which is compared before
    /// anything else of the file is read.
    ///
    /// # Errors
    /// Those of [`Self::load`], and [`Error::Problem`] naming the first field that differs.
    pub fn load_for(problem: &Problem, path: impl AsRef<Path>) -> Result<State> {
        load(path.as_ref(), |found| problem.check_same(found))
    }

    /// What [`Self::save`] writes, as bytes. Equal states give equal bytes.
    ///
    /// # Errors
    /// [`Error::Format`] should the container refuse a tensor, [`Error::OutOfMemory`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let refuse = |reason| Error::Format { path: BYTES.into(), reason };
        let mut bytes = write::header(self).map_err(|e| refuse(e.to_string()))?;
        let len = header::Header::of(self).data_len();
        bytes
            .try_reserve_exact(len)
            .map_err(|_| Error::out_of_memory("a state's bytes", len as u128))?;
        write::tensors(self, &mut bytes).map_err(|e| refuse(e.to_string()))?;
        Ok(bytes)
    }

    /// Reads what [`Self::to_bytes`] gave.
    ///
    /// # Errors
    /// [`Error::Format`], as [`Self::load`].
    pub fn from_bytes(bytes: &[u8]) -> Result<State> {
        read::state(Cursor::new(bytes), bytes.len() as u64, |_| Ok(()))
            .map_err(|fault| fault.about(BYTES))
    }
}

/// Reads a file whose problem is accepted.
fn load(path: &Path, accept: impl Fn(&Problem) -> Result<()>) -> Result<State> {
    let load = || match open(path)? {
        (input, Some(len)) => read::state(input, len, accept),
        (input, None) => read::stream(input, accept),
    };
    load().map_err(|fault: Fault| fault.about(&path.display().to_string()))
}

/// What is at the path, and its length if it is a file, which can be read in any order.
fn open(path: &Path) -> std::io::Result<(BufReader<File>, Option<u64>)> {
    let file = File::open(path)?;
    let found = file.metadata()?;
    let len = found.is_file().then_some(found.len());
    Ok((BufReader::with_capacity(BUFFER, file), len))
}
