//! Several states in one file: safetensors, with a tensor `layers.I` of bytes (U8) per state, each of
//! them a state file of its own. The metadata has one entry, `infini_attn`: `format=1 layers=L`.

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};

use super::header::{Header, Reason};
use super::read::{self, Fault};
use super::{open, replace, write};
use crate::error::{Error, Result};
use crate::memory::State;
use crate::problem::Problem;

const METADATA: &str = "infini_attn";

/// Longest header read: of more layers than models have.
const MAX_HEADER: u64 = 1 << 20;

/// Writes the states to a file, as [`State::save`] does.
pub(crate) fn save(layers: &[State], path: &Path) -> Result<()> {
    let name = || path.display().to_string();
    let headers = || -> std::result::Result<(Vec<u8>, Vec<Vec<u8>>), SafeTensorError> {
        let each = layers.iter().map(write::header).collect::<std::result::Result<Vec<_>, _>>()?;
        let lens = (layers.iter().zip(&each))
            .map(|(state, header)| header.len() + Header::of(state).data_len());
        Ok((bytes(&lens.collect::<Vec<_>>())?, each))
    };
    let (header, each) =
        headers().map_err(|e| Error::Format { path: name(), reason: e.to_string() })?;
    let contents = |out: &mut dyn Write| {
        out.write_all(&header)?;
        layers.iter().zip(&each).try_for_each(|(state, header)| {
            out.write_all(header)?;
            write::tensors(state, out)
        })
    };
    replace::write(path, &contents).map_err(|source| Error::Io { path: name(), source })
}

/// Reads what [`save`] wrote, unless the problem of a layer is refused.
pub(crate) fn load(
    path: &Path,
    accept: impl Fn(usize, usize, &Problem) -> Result<()>,
) -> Result<Vec<State>> {
    let load = || match open(path)? {
        (input, Some(len)) => states(input, len, accept),
        (input, None) => stream(input, accept),
    };
    load().map_err(|fault: Fault| fault.about(&path.display().to_string()))
}

/// The file's first bytes: length and header, for state files of these lengths.
fn bytes(lens: &[usize]) -> std::result::Result<Vec<u8>, SafeTensorError> {
    let mut end = 0usize;
    let tensors = lens.iter().enumerate().map(|(i, &len)| {
        let data_offsets = (end, end.saturating_add(len));
        end = data_offsets.1;
        (format!("layers.{i}"), TensorInfo { dtype: Dtype::U8, shape: vec![len], data_offsets })
    });
    let tensors = tensors.collect();
    let metadata =
        HashMap::from([(METADATA.to_string(), format!("format=1 layers={}", lens.len()))]);
    let mut json = serde_json::to_vec(&Metadata::new(Some(metadata), tensors)?)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

/// The inverse of [`bytes`], without the length. Takes nothing that it does not give.
fn parse(json: &[u8]) -> std::result::Result<Vec<usize>, Reason> {
    let metadata: Metadata =
        serde_json::from_slice(json).map_err(|e| format!("not a safetensors file: header: {e}"))?;
    let text = (metadata.metadata().as_ref())
        .and_then(|entries| entries.get(METADATA))
        .ok_or_else(|| format!("no `{METADATA}` entry in the metadata"))?;
    let layers: usize = (text.strip_prefix("format=1 layers="))
        .and_then(|count| count.parse().ok())
        .ok_or_else(|| format!("metadata: \"{text}\", \"format=1 layers=COUNT\" expected"))?;
    let len = |i: usize| {
        let info = metadata.info(&format!("layers.{i}"));
        info.and_then(|t| t.shape.first().copied()).ok_or(format!("no tensor `layers.{i}`"))
    };
    let lens = (0..layers).map(len).collect::<std::result::Result<Vec<_>, _>>()?;
    match bytes(&lens) {
        Ok(bytes) if bytes[8..] == *json => Ok(lens),
        Ok(_) => Err("header: another order or spelling than `save` gives it".into()),
        Err(e) => Err(format!("header: {e}")),
    }
}

/// The states of a file of `len` bytes.
fn states<R: Read + Seek>(
    mut input: R,
    len: u64,
    accept: impl Fn(usize, usize, &Problem) -> Result<()>,
) -> std::result::Result<Vec<State>, Fault> {
    let lens = parse(&read::read_json(&mut input, MAX_HEADER)?)?;
    let start = input.stream_position()?;
    read::check_data(total(&lens), len.saturating_sub(start))?;
    each(input, start, &lens, accept)
}

/// The same from what cannot be read twice. A layer at a time is held as a whole.
fn stream(
    mut input: impl Read,
    accept: impl Fn(usize, usize, &Problem) -> Result<()>,
) -> std::result::Result<Vec<State>, Fault> {
    let lens = parse(&read::read_json(&mut input, MAX_HEADER)?)?;
    let one = |(i, &len): (usize, &usize)| {
        let mut layer = input.by_ref().take(len as u64);
        let state = read::stream(&mut layer, |problem| accept(i, lens.len(), problem))?;
        read::check_data(0, layer.limit())?;
        Ok(state)
    };
    let layers = lens.iter().enumerate().map(one).collect::<std::result::Result<_, Fault>>()?;
    read::check_data(0, input.take(1).read_to_end(&mut Vec::new())? as u64)?;
    Ok(layers)
}

/// No overflow: the container has them one after another.
fn total(lens: &[usize]) -> u64 {
    lens.iter().map(|&len| len as u64).sum()
}

fn each<R: Read + Seek>(
    mut input: R,
    mut start: u64,
    lens: &[usize],
    accept: impl Fn(usize, usize, &Problem) -> Result<()>,
) -> std::result::Result<Vec<State>, Fault> {
    let one = |(i, &len): (usize, &usize)| {
        input.seek(SeekFrom::Start(start))?;
        start += len as u64;
        read::state(&mut input, start, |problem| accept(i, lens.len(), problem))
    };
    lens.iter().enumerate().map(one).collect()
}
