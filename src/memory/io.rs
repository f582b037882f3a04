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
//! crc32=89abcdef`. One entry, because several would be written in random order: equal states give
//! equal bytes. The checksum runs over the text before it and over all tensors, in table order.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, serialize};

use super::blocks::KeyBlocks;
use super::{Counters, State};
use crate::error::{Error, Result};
use crate::problem::Problem;

const METADATA: &str = "infini_attn";
const FORMAT: &str = "1";
/// Stands for the path in errors about bytes that came from no file.
const BYTES: &str = "<bytes>";

impl State {
    /// Writes the state to `path` as a safetensors file with the problem in its metadata. A file
    /// that is there already is replaced in one step once the new one is complete and on the disk;
    /// after any failure it is still whole.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = self.to_bytes()?;
        replace_file(path, &bytes)
            .map_err(|source| Error::Io { path: path.display().to_string(), source })
    }

    /// Reads a state that [`Self::save`] wrote. It continues bit for bit where the saved one
    /// stood.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is not a state file,
    /// is of another format version, truncated, corrupt or inconsistent.
    pub fn load(path: impl AsRef<Path>) -> Result<State> {
        let path = path.as_ref();
        let name = || path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| Error::Io { path: name(), source })?;
        parse(&bytes).map_err(|reason| Error::Format { path: name(), reason })
    }

    /// Reads a state and refuses it unless it was made for `problem`.
    ///
    /// # Errors
    /// Those of [`Self::load`], and [`Error::Problem`] naming the first field that differs.
    pub fn load_for(problem: &Problem, path: impl AsRef<Path>) -> Result<State> {
        let state = Self::load(path)?;
        problem.check_same(&state.problem)?;
        Ok(state)
    }

    /// What [`Self::save`] writes, as bytes. Equal states give equal bytes.
    ///
    /// # Errors
    /// [`Error::Format`] should the container refuse a tensor.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let p = &self.problem;
        let [keys, values, keys_rotated] = open_rows(self);
        let counts = |count: fn(&Counters) -> u64| {
            self.counters.iter().flat_map(|c| count(c).to_le_bytes()).collect()
        };
        let data: [Cow<'_, [u8]>; 9] = [
            le_bytes(&self.m),
            le_bytes(&self.z),
            counts(|c| c.tokens),
            counts(|c| c.committed),
            counts(|c| c.open_len as u64),
            self.counters.iter().map(|c| u8::from(holds_rotated(c))).collect(),
            le_bytes(&keys),
            le_bytes(&values),
            le_bytes(&keys_rotated),
        ];
        let rows = |keys: &[f32]| keys.len() / (p.kv_heads() * p.key_dim());
        let table = tensors(p, self.sequences(), rows(&keys), rows(&keys_rotated));
        let description = describe(p, self.sequences());
        let crc = checksum(&description, data.iter().map(|bytes| &**bytes));
        let metadata = HashMap::from([(METADATA.into(), format!("{description} crc32={crc:08x}"))]);
        let views: std::result::Result<Vec<_>, _> = (table.into_iter().zip(&data))
            .map(|((name, dtype, shape), bytes)| Ok((name, TensorView::new(dtype, shape, bytes)?)))
            .collect();
        views
            .and_then(|views| serialize(views, Some(metadata)))
            .map_err(|e| Error::Format { path: BYTES.into(), reason: e.to_string() })
    }

    /// Reads what [`Self::to_bytes`] gave.
    ///
    /// # Errors
    /// [`Error::Format`], as [`Self::load`].
    pub fn from_bytes(bytes: &[u8]) -> Result<State> {
        parse(bytes).map_err(|reason| Error::Format { path: BYTES.into(), reason })
    }
}

/// A temporary file beside the target, written, synced, then renamed over it.
fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    // Rights like those of any new file (the umask applies), not the private default.
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.prefix(".infini-attn-").suffix(".tmp").tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    // The rename lasts once the folder is synced. Some file systems refuse that; the file is whole
    // either way.
    #[cfg(unix)]
    let _ = std::fs::File::open(folder).and_then(|f| f.sync_all());
    Ok(())
}

/// The metadata before its checksum.
fn describe(problem: &Problem, sequences: usize) -> String {
    let fields = problem.fields().map(|(name, value)| format!("{name}={value}")).join(" ");
    format!("format={FORMAT} {fields} sequences={sequences}")
}

fn checksum<'a>(description: &str, tensors: impl Iterator<Item = &'a [u8]>) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(description.as_bytes());
    tensors.for_each(|bytes| crc.update(bytes));
    crc.finalize()
}

/// Names, types and shapes of a file's tensors, for `open` tokens in open segments, `rotated` of
/// them with rotated keys.
fn tensors(
    p: &Problem,
    sequences: usize,
    open: usize,
    rotated: usize,
) -> [(&'static str, Dtype, Vec<usize>); 9] {
    let (s, h, dk, dv) = (sequences, p.kv_heads(), p.key_dim(), p.value_dim());
    [
        ("memory", Dtype::F32, vec![s, h, dk, dv]),
        ("normalizer", Dtype::F32, vec![s, h, dk]),
        ("tokens", Dtype::U64, vec![s]),
        ("committed", Dtype::U64, vec![s]),
        ("open_len", Dtype::U64, vec![s]),
        ("rotated", Dtype::U8, vec![s]),
        ("open_keys", Dtype::F32, vec![open, h, dk]),
        ("open_values", Dtype::F32, vec![open, h, dv]),
        ("open_keys_rotated", Dtype::F32, vec![rotated, h, dk]),
    ]
}

/// Whether the slot's open segment has rotated keys.
fn holds_rotated(c: &Counters) -> bool {
    c.rotated && c.open_len > 0
}

/// Visits every token of the open segments and every KV head in file order, with the index of its
/// (slot, head) chunk and of the token in it.
fn for_open(
    counters: &[Counters],
    kv_heads: usize,
    mut visit: impl FnMut(&Counters, usize, usize),
) {
    for (slot, c) in counters.iter().enumerate() {
        for t in 0..c.open_len {
            (0..kv_heads).for_each(|h| visit(c, slot * kv_heads + h, t));
        }
    }
}

/// Keys, values and rotated keys of all open segments, in file order.
fn open_rows(state: &State) -> [Vec<f32>; 3] {
    let (p, open, blocks) = (&state.problem, &state.open, KeyBlocks::new(&state.problem));
    let [mut keys, mut values, mut keys_rotated] = [const { Vec::new() }; 3];
    let mut key = vec![0.0; p.key_dim()];
    for_open(&state.counters, p.kv_heads(), |c, chunk, t| {
        let at = chunk * blocks.len();
        blocks.get(&open.k[at..][..blocks.len()], t, &mut key);
        keys.extend_from_slice(&key);
        if holds_rotated(c) {
            blocks.get(&open.k_rotated[at..][..blocks.len()], t, &mut key);
            keys_rotated.extend_from_slice(&key);
        }
        let value = (chunk * p.segment_len() + t) * p.value_dim();
        values.extend_from_slice(&open.v[value..][..p.value_dim()]);
    });
    [keys, values, keys_rotated]
}

/// The inverse of [`open_rows`], into a state whose counters are set. The three hold exactly the
/// rows that the counters ask for.
fn put_open_rows(state: &mut State, [keys, values, keys_rotated]: [&[f32]; 3]) {
    let (p, open, blocks) = (&state.problem, &mut state.open, KeyBlocks::new(&state.problem));
    let mut keys = keys.chunks_exact(p.key_dim());
    let mut keys_rotated = keys_rotated.chunks_exact(p.key_dim());
    let mut values = values.chunks_exact(p.value_dim());
    for_open(&state.counters, p.kv_heads(), |c, chunk, t| {
        let at = chunk * blocks.len();
        if let Some(key) = keys.next() {
            blocks.put(&mut open.k[at..][..blocks.len()], t, key);
        }
        if let Some(key) = holds_rotated(c).then(|| keys_rotated.next()).flatten() {
            blocks.put(&mut open.k_rotated[at..][..blocks.len()], t, key);
        }
        if let Some(value) = values.next() {
            let at = (chunk * p.segment_len() + t) * p.value_dim();
            open.v[at..][..p.value_dim()].copy_from_slice(value);
        }
    });
}

/// Why bytes are not a state; the caller knows the path.
type Reason = String;

fn parse(bytes: &[u8]) -> std::result::Result<State, Reason> {
    let (header, data) = split(bytes)?;
    let text = (header.metadata().as_ref())
        .and_then(|entries| entries.get(METADATA))
        .ok_or_else(|| format!("no `{METADATA}` entry in the metadata"))?;
    let (problem, sequences, crc) = read_description(text)?;

    let claimed = |name| header.info(name).and_then(|t| t.shape.first().copied()).unwrap_or(0);
    let (open, rotated) = (claimed("open_keys"), claimed("open_keys_rotated"));
    let table = tensors(&problem, sequences, open, rotated);
    let names = header.tensors();
    if let Some(name) = names.keys().find(|n| table.iter().all(|(known, ..)| known != n)) {
        return Err(format!("unexpected tensor `{name}`"));
    }
    let mut contents = [&data[..0]; 9];
    for ((name, dtype, shape), content) in table.iter().zip(&mut contents) {
        *content = tensor(&header, data, name, *dtype, shape)?;
    }
    let got = checksum(&describe(&problem, sequences), contents.into_iter());
    if got != crc {
        return Err(format!("corrupt: checksum {got:08x}, {crc:08x} expected"));
    }

    let [m, z, tokens, committed, open_len, is_rotated, keys, values, keys_rotated] = contents;
    let counters = read_counters(&problem, [tokens, committed, open_len], is_rotated)?;
    for (name, rows, needed) in [
        ("open_keys", open, count_open(&counters, |_| true)),
        ("open_keys_rotated", rotated, count_open(&counters, holds_rotated)),
    ] {
        if rows != needed {
            return Err(format!("{name}: {rows} rows, {needed} expected by open_len"));
        }
    }
    let mut state =
        State::assemble(&problem, floats(m), floats(z), counters).map_err(|e| e.to_string())?;
    put_open_rows(&mut state, [&floats(keys), &floats(values), &floats(keys_rotated)]);
    Ok(state)
}

/// Header and tensor bytes. Frames by hand because `SafeTensors::deserialize` adds up lengths from
/// the header without a check for overflow.
fn split(bytes: &[u8]) -> std::result::Result<(Metadata, &[u8]), Reason> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("{} bytes, too short for a safetensors file", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    let Some((header, data)) = usize::try_from(length).ok().and_then(|n| rest.split_at_checked(n))
    else {
        return Err(format!("truncated: header of {length} bytes in a file of {}", bytes.len()));
    };
    let header: Metadata = serde_json::from_slice(header).map_err(|e| format!("header: {e}"))?;
    if header.data_len() != data.len() {
        let (got, expected) = (data.len(), header.data_len());
        return Err(format!("truncated: {got} bytes of tensors, {expected} expected"));
    }
    Ok((header, data))
}

/// Problem, number of slots and checksum.
fn read_description(text: &str) -> std::result::Result<(Problem, usize, u32), Reason> {
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

/// The bytes of one tensor, once its type and shape are the expected ones.
fn tensor<'a>(
    header: &Metadata,
    data: &'a [u8],
    name: &str,
    dtype: Dtype,
    shape: &[usize],
) -> std::result::Result<&'a [u8], Reason> {
    let info = header.info(name).ok_or_else(|| format!("no tensor `{name}`"))?;
    if info.dtype != dtype || info.shape != shape {
        let (got, had) = (&info.shape, info.dtype);
        return Err(format!("{name}: {had} {got:?}, {dtype} {shape:?} expected"));
    }
    data.get(info.data_offsets.0..info.data_offsets.1)
        .ok_or_else(|| format!("{name}: offsets outside the file"))
}

fn read_counters(
    problem: &Problem,
    [tokens, committed, open_len]: [&[u8]; 3],
    rotated: &[u8],
) -> std::result::Result<Vec<Counters>, Reason> {
    let (tokens, committed, open_len) = (integers(tokens), integers(committed), integers(open_len));
    let slots = tokens.zip(committed).zip(open_len).zip(rotated).enumerate();
    slots
        .map(|(slot, (((tokens, committed), open_len), &rotated))| {
            if rotated > u8::from(open_len > 0) {
                return Err(format!("rotated[{slot}]: {rotated} with open_len = {open_len}"));
            }
            let open_len = usize::try_from(open_len).unwrap_or(usize::MAX);
            let counters = Counters { tokens, committed, open_len, rotated: rotated == 1 };
            counters.check(problem, slot).map_err(|e| e.to_string())?;
            Ok(counters)
        })
        .collect()
}

/// Tokens in the open segments of the slots chosen. Each is below 2^24: `Counters::check`.
fn count_open(counters: &[Counters], chosen: impl Fn(&Counters) -> bool) -> usize {
    counters.iter().filter(|c| chosen(c)).map(|c| c.open_len).sum()
}

/// The file's byte order is little-endian.
fn le_bytes(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        bytemuck::cast_slice(values).into()
    } else {
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn integers(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|&b| u64::from_le_bytes(b))
}
