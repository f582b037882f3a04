//! Arguments of a launch file.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;

use crate::device::{Arg, Buffer, Device};
use crate::tensor_map::TensorMap;

/// Where a tensor map must begin.
const MAP_ALIGN: usize = 64;

/// An argument as it is written: the fields of all sorts, so that errors name what is there.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Argument {
    buffer: Option<String>,
    file: Option<PathBuf>,
    bytes: Option<u64>,
    out: Option<PathBuf>,
    i32: Option<i32>,
    u32: Option<u32>,
    i64: Option<i64>,
    u64: Option<u64>,
    f32: Option<f32>,
    bytes_hex: Option<String>,
    patches: Option<Vec<PatchArgument>>,
    tensor_map: Option<MapArgument>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BufferArgument {
    #[serde(rename = "buffer")]
    pub name: String,
    pub file: Option<PathBuf>,
    pub bytes: Option<u64>,
    pub out: Option<PathBuf>,
}

/// What stands at some place of a structure.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PatchArgument {
    offset: usize,
    buffer: Option<String>,
    tensor_map: Option<MapArgument>,
}

/// The fields of a tensor map, and `buffer`.
type MapArgument = serde_json::Map<String, serde_json::Value>;

/// An argument whose buffers may not exist yet.
pub enum Value {
    Buffer(BufferArgument),
    Plain(Arg),
    TensorMap(Map),
    Struct { bytes: Vec<u8>, patches: Vec<(usize, Patch)> },
}

/// A tensor map of a buffer.
pub struct Map {
    buffer: String,
    map: TensorMap,
}

/// What a structure holds besides plain bytes.
pub enum Patch {
    /// The address of a buffer.
    Address(String),
    TensorMap(Map),
}

impl Argument {
    /// What it means.
    pub fn value(self) -> Result<Value> {
        let Self { file, bytes, out, .. } = self;
        let stray = file.is_some() || bytes.is_some() || out.is_some();
        let buffer = self.buffer.map(|name| BufferArgument { name, file, bytes, out });
        ensure!(buffer.is_some() || !stray, "file, bytes and out need the name of a buffer");
        ensure!(self.bytes_hex.is_some() || self.patches.is_none(), "patches need bytes_hex");
        let values = [
            buffer.map(|b| Ok(Value::Buffer(b))),
            self.i32.map(|v| Ok(Value::Plain(Arg::I32(v)))),
            self.u32.map(|v| Ok(Value::Plain(Arg::U32(v)))),
            self.i64.map(|v| Ok(Value::Plain(Arg::I64(v)))),
            self.u64.map(|v| Ok(Value::Plain(Arg::U64(v)))),
            self.f32.map(|v| Ok(Value::Plain(Arg::F32(v)))),
            self.bytes_hex.map(|text| structure(&text, self.patches.unwrap_or_default())),
            self.tensor_map.map(|map| Ok(Value::TensorMap(Map::new(map)?))),
        ];
        let mut values = values.into_iter().flatten();
        match (values.next(), values.next()) {
            (Some(value), None) => value,
            _ => bail!(
                "exactly one of buffer, i32, u32, i64, u64, f32, bytes_hex and tensor_map is needed"
            ),
        }
    }
}

impl Value {
    /// The argument, now that the buffers exist.
    pub fn resolve(self, device: &Device, made: &HashMap<String, Buffer>) -> Result<Arg> {
        Ok(match self {
            Self::Buffer(b) => Arg::Buffer(made[&b.name]),
            Self::Plain(arg) => arg,
            Self::TensorMap(map) => Arg::TensorMap(map.resolve(device, made)?),
            Self::Struct { mut bytes, patches } => {
                for (offset, patch) in patches {
                    let value = patch.resolve(device, made);
                    let value = value.with_context(|| format!("patch at {offset}"))?;
                    bytes[offset..][..value.len()].copy_from_slice(&value);
                }
                Arg::Bytes(bytes)
            }
        })
    }
}

impl Map {
    fn new(mut fields: MapArgument) -> Result<Self> {
        let Some(serde_json::Value::String(buffer)) = fields.remove("buffer") else {
            bail!("tensor_map: the name of a buffer is needed");
        };
        let map = serde_json::from_value(fields.into()).context("tensor_map")?;
        Ok(Self { buffer, map })
    }

    fn resolve(self, device: &Device, made: &HashMap<String, Buffer>) -> Result<TensorMap> {
        let address = address(&self.buffer, device, made).context("tensor_map")?;
        Ok(TensorMap { address, ..self.map })
    }
}

impl Patch {
    fn bytes(&self) -> usize {
        match self {
            Self::Address(_) => size_of::<u64>(),
            Self::TensorMap(_) => crate::tensor_map::ENCODED_BYTES,
        }
    }

    fn resolve(self, device: &Device, made: &HashMap<String, Buffer>) -> Result<Vec<u8>> {
        match self {
            Self::Address(buffer) => Ok(address(&buffer, device, made)?.to_le_bytes().to_vec()),
            Self::TensorMap(map) => Ok(map.resolve(device, made)?.encode()?.to_vec()),
        }
    }
}

fn address(buffer: &str, device: &Device, made: &HashMap<String, Buffer>) -> Result<u64> {
    let found = made.get(buffer);
    let found = found.ok_or_else(|| anyhow!("no argument and no entry of buffers is {buffer}"))?;
    Ok(device.address(*found))
}

/// A structure with its patches in place, none of which may leave it or overlap another.
fn structure(text: &str, patches: Vec<PatchArgument>) -> Result<Value> {
    let bytes = hex(text)?;
    let patch = |PatchArgument { offset, buffer, tensor_map }| {
        let patch = match (buffer, tensor_map) {
            (Some(buffer), None) => Patch::Address(buffer),
            (None, Some(map)) => {
                ensure!(offset.is_multiple_of(MAP_ALIGN), "a tensor map needs a multiple of 64");
                Patch::TensorMap(Map::new(map)?)
            }
            _ => bail!("exactly one of buffer and tensor_map is needed"),
        };
        let end = offset.checked_add(patch.bytes()).filter(|end| *end <= bytes.len());
        ensure!(end.is_some(), "its {} bytes leave the {} given", patch.bytes(), bytes.len());
        Ok((offset, patch))
    };
    let placed = patches.into_iter().map(|p| {
        let offset = p.offset;
        patch(p).with_context(|| format!("patch at {offset}"))
    });
    let mut patches = placed.collect::<Result<Vec<_>>>()?;
    patches.sort_by_key(|(offset, _)| *offset);
    for pair in patches.windows(2) {
        let [(first, patch), (second, _)] = pair else { continue };
        ensure!(first + patch.bytes() <= *second, "patches at {first} and {second} overlap");
    }
    Ok(Value::Struct { bytes, patches })
}

fn hex(text: &str) -> Result<Vec<u8>> {
    let digit = |c: &u8| char::from(*c).to_digit(16).map(|d| d as u8);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let byte = |[high, low]: &[u8; 2]| Some(digit(high)? << 4 | digit(low)?);
    let bytes = pairs.iter().map(byte).collect::<Option<_>>().filter(|_| rest.is_empty());
    bytes.ok_or_else(|| anyhow!("bytes_hex: pairs of hexadecimal digits are needed"))
}
