//! What stands before the tensors: which ones, where, and the problem in text.

use std::collections::HashMap;
use std::ops::Range;

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};

use crate::memory::{Counters, State};
use crate::problem::Problem;

const METADATA: &str = "infini_attn";
const FORMAT: &str = "1";

/// Why bytes are not a state; the caller knows the path.
pub(super) type Reason = String;

/// A tensor of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tensor {
    Memory,
    Normalizer,
    Tokens,
    Committed,
    OpenLen,
    Rotated,
    OpenKeys,
    OpenValues,
    OpenKeysRotated,
}
use Tensor::*;

impl Tensor {
    /// In the order of the checksum, which is that of the declaration.
    pub const ALL: [Tensor; 9] = [
        Memory,
        Normalizer,
        Tokens,
        Committed,
        OpenLen,
        Rotated,
        OpenKeys,
        OpenValues,
        OpenKeysRotated,
    ];

    /// In the order of the file. The container has the widest elements first (each tensor is
    /// aligned then), and then goes by name.
    pub const STORED: [Tensor; 9] = [
        Committed,
        OpenLen,
        Tokens,
        Memory,
        Normalizer,
        OpenKeys,
        OpenKeysRotated,
        OpenValues,
        Rotated,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Memory => "memory",
            Normalizer => "normalizer",
            Tokens => "tokens",
            Committed => "committed",
            OpenLen => "open_len",
            Rotated => "rotated",
            OpenKeys => "open_keys",
            OpenValues => "open_values",
            OpenKeysRotated => "open_keys_rotated",
        }
    }
}

/// What a header says, but for the checksum.
pub(super) struct Header {
    pub problem: Problem,
    pub sequences: usize,
    /// Tokens in the open segments of all slots.
    pub open: usize,
    /// Those of them that have rotated keys.
    pub rotated: usize,
}

impl Header {
    pub fn of(state: &State) -> Self {
        Self {
            problem: state.problem,
            sequences: state.sequences(),
            open: count_open(&state.counters, |_| true),
            rotated: count_open(&state.counters, holds_rotated),
        }
    }

    /// The metadata before its checksum.
    pub fn description(&self) -> String {
        let fields = self.problem.fields().map(|(name, value)| format!("{name}={value}"));
        format!("format={FORMAT} {} sequences={}", fields.join(" "), self.sequences)
    }

    fn shape(&self, tensor: Tensor) -> (Dtype, Vec<usize>) {
        let (p, s) = (&self.problem, self.sequences);
        let (h, dk, dv) = (p.kv_heads(), p.key_dim(), p.value_dim());
        match tensor {
            Memory => (Dtype::F32, vec![s, h, dk, dv]),
            Normalizer => (Dtype::F32, vec![s, h, dk]),
            Tokens | Committed | OpenLen => (Dtype::U64, vec![s]),
            Rotated => (Dtype::U8, vec![s]),
            OpenKeys => (Dtype::F32, vec![self.open, h, dk]),
            OpenValues => (Dtype::F32, vec![self.open, h, dv]),
            OpenKeysRotated => (Dtype::F32, vec![self.rotated, h, dk]),
        }
    }

    fn len(&self, tensor: Tensor) -> usize {
        let (dtype, shape) = self.shape(tensor);
        shape.iter().product::<usize>() * dtype.bitsize() / 8
    }

    /// Bytes of all tensors.
    pub fn data_len(&self) -> usize {
        Tensor::ALL.iter().map(|&tensor| self.len(tensor)).sum()
    }

    /// Where a tensor stands, from the end of the header.
    pub fn place(&self, tensor: Tensor) -> Range<usize> {
        let before = Tensor::STORED.iter().take_while(|&&other| other != tensor);
        let start = before.map(|&other| self.len(other)).sum();
        start..start + self.len(tensor)
    }

    /// The file's first bytes: length and header.
    pub fn bytes(&self, crc: u32) -> Result<Vec<u8>, SafeTensorError> {
        let tensors = Tensor::STORED.map(|tensor| {
            let ((dtype, shape), place) = (self.shape(tensor), self.place(tensor));
            let data_offsets = (place.start, place.end);
            (tensor.name().to_string(), TensorInfo { dtype, shape, data_offsets })
        });
        // One entry: the container writes several in random order.
        let text = format!("{} crc32={crc:08x}", self.description());
        let metadata = HashMap::from([(METADATA.to_string(), text)]);
        let mut json = serde_json::to_vec(&Metadata::new(Some(metadata), tensors.into())?)?;
        json.resize(json.len().next_multiple_of(8), b' ');
        Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
    }

    /// The inverse of [`Self::bytes`], without the length. Takes nothing that it does not give.
    pub fn parse(json: &[u8]) -> Result<(Header, u32), Reason> {
        let metadata: Metadata = serde_json::from_slice(json)
            .map_err(|e| format!("not a safetensors file: header: {e}"))?;
        let text = (metadata.metadata().as_ref())
            .and_then(|entries| entries.get(METADATA))
            .ok_or_else(|| format!("no `{METADATA}` entry in the metadata"))?;
        let (problem, sequences, crc) = read_description(text)?;
        let rows = |t: Tensor| metadata.info(t.name()).and_then(|t| t.shape.first().copied());
        let (open, rotated) = (rows(OpenKeys).unwrap_or(0), rows(OpenKeysRotated).unwrap_or(0));
        let header = Header { problem, sequences, open, rotated };
        header.check_tensors(&metadata)?;
        match header.bytes(crc) {
            Ok(bytes) if bytes[8..] == *json => Ok((header, crc)),
            Ok(_) => Err("header: a name twice, or another order or spelling than `save` \
                          gives it"
                .into()),
            Err(e) => Err(format!("header: {e}")),
        }
    }

    /// The file has the tensors it should, each of the right type and shape.
    fn check_tensors(&self, metadata: &Metadata) -> Result<(), Reason> {
        let known = |name: &String| Tensor::ALL.iter().any(|t| t.name() == name);
        if let Some(name) = metadata.tensors().keys().find(|name| !known(name)) {
            return Err(format!("unexpected tensor `{name}`"));
        }
        for tensor in Tensor::ALL {
            let name = tensor.name();
            let info = metadata.info(name).ok_or_else(|| format!("no tensor `{name}`"))?;
            let (dtype, shape) = self.shape(tensor);
            if info.dtype != dtype || info.shape != shape {
                let (got, had) = (&info.shape, info.dtype);
                return Err(format!("{name}: {had} {got:?}, {dtype} {shape:?} expected"));
            }
        }
        Ok(())
    }
}

/// Problem, number of slots and checksum.
fn read_description(text: &str) -> Result<(Problem, usize, u32), Reason> {
    let fields: HashMap<_, _> =
        text.split_ascii_whitespace().filter_map(|f| f.split_once('=')).collect();
    let get = |name: &str| {
        fields.get(name).copied().ok_or_else(|| format!("metadata: no `{name}` in \"{text}\""))
    };
    let format = get("format")?;
    if format != FORMAT {
        return Err(format!("metadata: format = {format}, {FORMAT} expected"));
    }
    let problem = Problem::from_fields(|name| fields.get(name).copied())
        .map_err(|e| format!("metadata: {e}"))?;
    let bad = |name: &str, value: &str| format!("metadata: {name} = {value} is not a number");
    let (sequences, crc) = (get("sequences")?, get("crc32")?);
    Ok((
        problem,
        sequences.parse().map_err(|_| bad("sequences", sequences))?,
        u32::from_str_radix(crc, 16).map_err(|_| bad("crc32", crc))?,
    ))
}

/// Whether the slot's open segment has rotated keys.
pub(super) fn holds_rotated(c: &Counters) -> bool {
    c.rotated && c.open_len > 0
}

/// Tokens in the open segments of the slots chosen. Each is below 2^24: `Counters::check`.
pub(super) fn count_open(counters: &[Counters], chosen: impl Fn(&Counters) -> bool) -> usize {
    counters.iter().filter(|c| chosen(c)).map(|c| c.open_len).sum()
}

/// Every token of the chosen slots' open segments and every KV head, in file order: the index of
/// its (slot, head) chunk and of the token in it.
pub(super) fn open_rows(
    counters: &[Counters],
    kv_heads: usize,
    chosen: impl Fn(&Counters) -> bool,
) -> impl Iterator<Item = (usize, usize)> {
    let slots = counters.iter().enumerate().filter(move |(_, c)| chosen(c));
    slots.flat_map(move |(slot, c)| {
        let chunks = slot * kv_heads..(slot + 1) * kv_heads;
        (0..c.open_len).flat_map(move |t| chunks.clone().map(move |chunk| (chunk, t)))
    })
}
