//! A state from the bytes of a file, piece by piece, each straight into its place.
//!
//! The file is read and not mapped: what others do to a mapped file changes memory that Rust takes
//! for constant, and shortening it ends the process.

use std::io::{self, Cursor, ErrorKind, Read, Seek, SeekFrom};

use crc32fast::Hasher;

use super::header::{Header, Reason, Tensor, count_open, holds_rotated, open_rows};
use crate::alloc;
use crate::error::{Error, Result};
use crate::memory::blocks::KeyBlocks;
use crate::memory::{Counters, State};
use crate::problem::Problem;

/// Longest header of the container.
const CONTAINER_HEADER: u64 = 100_000_000;
/// Longest header read of one state. Those stay below 4 KiB.
const MAX_HEADER: u64 = 1 << 14;

/// Why there is no state; the caller knows the path.
pub(super) enum Fault {
    Io(io::Error),
    Format(Reason),
    Refused(Error),
}

impl Fault {
    pub fn about(self, path: &str) -> Error {
        match self {
            Fault::Io(source) => Error::Io { path: path.into(), source },
            Fault::Format(reason) => Error::Format { path: path.into(), reason },
            Fault::Refused(error) => error,
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::UnexpectedEof => Fault::Format("truncated while it was read".into()),
            _ => Fault::Io(error),
        }
    }
}

impl From<Reason> for Fault {
    fn from(reason: Reason) -> Self {
        Fault::Format(reason)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match error {
            // About a value that stands in the file.
            Error::Value { .. } => Fault::Format(error.to_string()),
            _ => Fault::Refused(error),
        }
    }
}

/// A state whose bytes reach from here to byte `len` of the file, unless its problem is refused.
pub(super) fn state<R: Read + Seek>(
    mut input: R,
    len: u64,
    accept: impl Fn(&Problem) -> Result<()>,
) -> std::result::Result<State, Fault> {
    let (header, crc) = read_header(&mut input)?;
    accept(&header.problem)?;
    let start = input.stream_position()?;
    let rest = len
        .checked_sub(start)
        .ok_or(Reason::from("truncated: the header goes on beyond the end"))?;
    check_len(&header, rest)?;
    Tensors { input, start, header, sums: Default::default() }.state(crc)
}

/// The same from what cannot be read twice. It is held as a whole, for the last tensor says how to
/// read others.
pub(super) fn stream(
    mut input: impl Read,
    accept: impl Fn(&Problem) -> Result<()>,
) -> std::result::Result<State, Fault> {
    let (header, crc) = read_header(&mut input)?;
    accept(&header.problem)?;
    let mut data = alloc::reserved(&[header.data_len()], "the tensors of a state file")?;
    input.take((header.data_len() as u64).saturating_add(1)).read_to_end(&mut data)?;
    check_len(&header, data.len() as u64)?;
    Tensors { input: Cursor::new(data), start: 0, header, sums: Default::default() }.state(crc)
}

/// The header and the checksum it names.
fn read_header(input: &mut impl Read) -> std::result::Result<(Header, u32), Fault> {
    Ok(Header::parse(&read_json(input, MAX_HEADER)?)?)
}

/// The header of a container, of `most` bytes at most.
pub(super) fn read_json(input: &mut impl Read, most: u64) -> std::result::Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    input.take(8).read_to_end(&mut bytes)?;
    let Some(&length) = bytes.first_chunk::<8>() else {
        let got = bytes.len();
        return Err(format!("truncated, or not a safetensors file: {got} bytes").into());
    };
    let length = u64::from_le_bytes(length);
    if length > CONTAINER_HEADER {
        return Err(format!("not a safetensors file: a header of {length} bytes").into());
    }
    bytes.clear();
    input.take(length.min(most)).read_to_end(&mut bytes)?;
    if length == 0 || bytes.first().is_some_and(|&byte| byte != b'{') {
        return Err(Reason::from("not a safetensors file: the header is no JSON object").into());
    }
    if length > most {
        return Err(format!("header: {length} bytes, at most {most} expected").into());
    }
    if (bytes.len() as u64) < length {
        let got = bytes.len();
        return Err(format!("truncated: {got} bytes of header, {length} expected").into());
    }
    Ok(bytes)
}

/// As many bytes follow the header as it says.
fn check_len(header: &Header, got: u64) -> std::result::Result<(), Reason> {
    check_data(header.data_len() as u64, got)
}

pub(super) fn check_data(expected: u64, got: u64) -> std::result::Result<(), Reason> {
    if got == expected {
        return Ok(());
    }
    let problem = if got < expected { "truncated" } else { "too long" };
    Err(format!("{problem}: {got} bytes of tensors, {expected} expected"))
}

struct Tensors<R> {
    input: R,
    /// Where they begin.
    start: u64,
    header: Header,
    /// Checksums of those read.
    sums: [Hasher; 9],
}

impl<R: Read + Seek> Tensors<R> {
    fn state(mut self, crc: u32) -> std::result::Result<State, Fault> {
        let state = match self.read_state() {
            // A damaged file is called that, whatever the damage led to.
            Err(Fault::Format(reason)) => {
                for tensor in Tensor::ALL {
                    self.read(tensor, |input| io::copy(input, &mut io::sink()).map(drop))?;
                }
                Err(Fault::Format(reason))
            }
            other => Ok(other?),
        };
        let mut sum = Hasher::new();
        sum.update(self.header.description().as_bytes());
        self.sums.iter().for_each(|part| sum.combine(part));
        let got = sum.finalize();
        if got != crc {
            return Err(format!("corrupt: checksum {got:08x}, {crc:08x} expected").into());
        }
        state
    }

    /// Gives the bytes of a tensor to `read` and sums them up.
    fn read(
        &mut self,
        tensor: Tensor,
        read: impl FnOnce(&mut dyn Read) -> io::Result<()>,
    ) -> io::Result<()> {
        let place = self.header.place(tensor);
        self.input.seek(SeekFrom::Start(self.start + place.start as u64))?;
        let input = (&mut self.input).take(place.len() as u64);
        let mut input = Summed { input, sum: Hasher::new() };
        read(&mut input)?;
        self.sums[tensor as usize] = input.sum;
        Ok(())
    }

    fn read_state(&mut self) -> std::result::Result<State, Fault> {
        let counters = self.read_counters()?;
        let problem = self.header.problem;
        let (h, dk, dv) = (problem.kv_heads(), problem.key_dim(), problem.value_dim());
        let slots = counters.len();
        let what = format!("the state of {slots} slots in the file");
        let mut m = alloc::zeroed(&[slots, h, dk, dv], &what)?;
        let mut z = alloc::zeroed(&[slots, h, dk], &what)?;
        self.read(Tensor::Memory, |input| floats(&mut m, input))?;
        self.read(Tensor::Normalizer, |input| floats(&mut z, input))?;

        let mut state = State::assemble(&problem, m, z, counters)?;
        let (counters, open) = state.assembled();
        let (blocks, mut key) = (KeyBlocks::new(&problem), alloc::zeroed(&[dk], what)?);
        self.read(Tensor::OpenKeys, |input| {
            keys(blocks, &mut open.k, open_rows(counters, h, |_| true), &mut key, input)
        })?;
        self.read(Tensor::OpenKeysRotated, |input| {
            let rows = open_rows(counters, h, holds_rotated);
            keys(blocks, &mut open.k_rotated, rows, &mut key, input)
        })?;
        self.read(Tensor::OpenValues, |input| {
            open_rows(counters, h, |_| true).try_for_each(|(chunk, t)| {
                let at = (chunk * problem.segment_len() + t) * dv;
                floats(&mut open.v[at..][..dv], input)
            })
        })?;
        Ok(state)
    }

    /// Counters that go with each other and with the rows that the file has.
    fn read_counters(&mut self) -> std::result::Result<Vec<Counters>, Fault> {
        let slots = self.header.sequences;
        let mut counters = alloc::reserved(&[slots], format!("counters of {slots} slots"))?;
        counters.resize(slots, Counters::default());
        let all = &mut counters;
        self.read(Tensor::Tokens, |input| counts(all, |c, n| c.tokens = n, input))?;
        self.read(Tensor::Committed, |input| counts(all, |c, n| c.committed = n, input))?;
        self.read(Tensor::OpenLen, |input| {
            counts(all, |c, n| c.open_len = usize::try_from(n).unwrap_or(usize::MAX), input)
        })?;
        let mut rotated = alloc::reserved(&[slots], format!("counters of {slots} slots"))?;
        self.read(Tensor::Rotated, |input| input.read_to_end(&mut rotated).map(drop))?;

        for (slot, (c, &rotated)) in counters.iter_mut().zip(&rotated).enumerate() {
            if rotated > u8::from(c.open_len > 0) {
                let open_len = c.open_len;
                return Err(format!("rotated[{slot}]: {rotated} with open_len = {open_len}").into());
            }
            c.rotated = rotated == 1;
            c.check(&self.header.problem, slot)?;
        }
        for (tensor, rows, needed) in [
            (Tensor::OpenKeys, self.header.open, count_open(&counters, |_| true)),
            (Tensor::OpenKeysRotated, self.header.rotated, count_open(&counters, holds_rotated)),
        ] {
            if rows != needed {
                let name = tensor.name();
                return Err(format!("{name}: {rows} rows, {needed} expected by open_len").into());
            }
        }
        Ok(counters)
    }
}

/// A reader that sums up what is read.
struct Summed<R> {
    input: R,
    sum: Hasher,
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(bytes)?;
        self.sum.update(&bytes[..n]);
        Ok(n)
    }
}

/// The file's byte order is little-endian.
fn floats(values: &mut [f32], input: &mut dyn Read) -> io::Result<()> {
    // What is summed up has just been read: parts stay in a cache.
    for part in values.chunks_mut(super::BUFFER) {
        input.read_exact(bytemuck::cast_slice_mut(part))?;
        if cfg!(target_endian = "big") {
            part.iter_mut().for_each(|x| *x = f32::from_bits(x.to_bits().swap_bytes()));
        }
    }
    Ok(())
}

fn counts(
    counters: &mut [Counters],
    set: fn(&mut Counters, u64),
    input: &mut dyn Read,
) -> io::Result<()> {
    let mut count = [0; 8];
    for c in counters {
        input.read_exact(&mut count)?;
        set(c, u64::from_le_bytes(count));
    }
    Ok(())
}

/// Rows of one of the buffers of keys, each by way of `key`.
fn keys(
    blocks: KeyBlocks,
    buffer: &mut [f32],
    mut rows: impl Iterator<Item = (usize, usize)>,
    key: &mut [f32],
    input: &mut dyn Read,
) -> io::Result<()> {
    rows.try_for_each(|(chunk, t)| {
        floats(key, input)?;
        blocks.put(&mut buffer[chunk * blocks.len()..][..blocks.len()], t, key);
        Ok(())
    })
}
