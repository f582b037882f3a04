//! A state's tensors as the bytes of a file, piece by piece.

use std::io::{self, Write};

use crc32fast::Hasher;
use safetensors::SafeTensorError;

use super::header::{Header, Tensor, holds_rotated, open_rows};
use crate::memory::blocks::KeyBlocks;
use crate::memory::{Counters, State};

/// The file's first bytes. They hold the checksum, so all tensors are gone through.
pub(super) fn header(state: &State) -> Result<Vec<u8>, SafeTensorError> {
    let header = Header::of(state);
    let mut sum = Sum(Hasher::new());
    sum.0.update(header.description().as_bytes());
    for tensor in Tensor::ALL {
        write(state, tensor, &mut sum)?;
    }
    header.bytes(sum.0.finalize())
}

/// What follows the header.
pub(super) fn tensors(state: &State, out: &mut dyn Write) -> io::Result<()> {
    Tensor::STORED.into_iter().try_for_each(|tensor| write(state, tensor, out))
}

struct Sum(Hasher);

impl Write for Sum {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write(state: &State, tensor: Tensor, out: &mut dyn Write) -> io::Result<()> {
    let State { counters, m, z, open, .. } = state;
    match tensor {
        Tensor::Memory => floats(m, out),
        Tensor::Normalizer => floats(z, out),
        Tensor::Tokens => counts(counters, |c| c.tokens, out),
        Tensor::Committed => counts(counters, |c| c.committed, out),
        Tensor::OpenLen => counts(counters, |c| c.open_len as u64, out),
        Tensor::Rotated => {
            counters.iter().try_for_each(|c| out.write_all(&[u8::from(holds_rotated(c))]))
        }
        Tensor::OpenKeys => keys(state, &open.read().k, |_| true, out),
        Tensor::OpenKeysRotated => keys(state, &open.read().k_rotated, holds_rotated, out),
        Tensor::OpenValues => values(state, out),
    }
}

/// The file's byte order is little-endian.
fn floats(values: &[f32], out: &mut dyn Write) -> io::Result<()> {
    if cfg!(target_endian = "little") {
        return out.write_all(bytemuck::cast_slice(values));
    }
    values.iter().try_for_each(|x| out.write_all(&x.to_le_bytes()))
}

fn counts(
    counters: &[Counters],
    count: fn(&Counters) -> u64,
    out: &mut dyn Write,
) -> io::Result<()> {
    counters.iter().try_for_each(|c| out.write_all(&count(c).to_le_bytes()))
}

/// Rows of one of the buffers of keys.
fn keys(
    state: &State,
    buffer: &[f32],
    chosen: fn(&Counters) -> bool,
    out: &mut dyn Write,
) -> io::Result<()> {
    let (p, blocks) = (&state.problem, KeyBlocks::new(&state.problem));
    let mut key = vec![0.0; p.key_dim()];
    open_rows(&state.counters, p.kv_heads(), chosen).try_for_each(|(chunk, t)| {
        blocks.get(&buffer[chunk * blocks.len()..][..blocks.len()], t, &mut key);
        floats(&key, out)
    })
}

fn values(state: &State, out: &mut dyn Write) -> io::Result<()> {
    let (p, n, dv) = (&state.problem, state.problem.segment_len(), state.problem.value_dim());
    let open = state.open.read();
    open_rows(&state.counters, p.kv_heads(), |_| true)
        .try_for_each(|(chunk, t)| floats(&open.v[(chunk * n + t) * dv..][..dv], out))
}
