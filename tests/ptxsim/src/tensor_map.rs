//! Tensor maps: the description of a tensor in global memory that bulk tensor copies use.

pub mod replace;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::layout::{SWIZZLES, Swizzle};

/// Bytes of an encoded tensor map.
pub const ENCODED_BYTES: usize = 128;

const MAGIC: [u8; 8] = *b"ptxsimTM";
const MAX_RANK: usize = 5;
/// Shared memory a block can have.
const MAX_BOX_BYTES: u64 = 227 << 10;
/// All element types; the first ten in the order of the driver's numbers.
pub const DTYPES: [Dtype; 11] = [
    Dtype::U8,
    Dtype::U16,
    Dtype::U32,
    Dtype::S32,
    Dtype::U64,
    Dtype::S64,
    Dtype::F16,
    Dtype::F32,
    Dtype::F64,
    Dtype::Bf16,
    Dtype::Tf32,
];

/// What is wrong with a tensor map or its use.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
#[allow(missing_docs)] // the fields are what the messages name
pub enum TensorMapError {
    /// The rank is none of 1 to 5.
    #[error("dims: {rank} dimensions given; 1 to 5 are possible")]
    Rank { rank: usize },
    /// A list has the wrong length.
    #[error("{field}: {got} values given; rank {rank} needs {expected}")]
    Length { field: &'static str, got: usize, expected: usize, rank: usize },
    /// A value is out of its range.
    #[error("{field}[{index}] is {value}; {min} to {max} are possible")]
    Range { field: &'static str, index: usize, value: u64, min: u64, max: u64 },
    /// A value is not aligned.
    #[error("{field} is {value}; it must be a multiple of {multiple}")]
    Multiple { field: String, value: u64, multiple: u64 },
    /// The row of the box is not the width of the swizzle.
    #[error("swizzle: the box row has {row} bytes; the swizzle needs {width}")]
    SwizzleWidth { row: u64, width: u64 },
    /// The box cannot fit in shared memory.
    #[error("box: {bytes} bytes; at most {max} fit in shared memory")]
    BoxBytes { bytes: u64, max: u64 },
    /// NaN fill of integers.
    #[error("oob: fill with nan needs a floating-point dtype, not {dtype:?}")]
    NanOfInteger { dtype: Dtype },
    /// The tensor passes the end of the address space.
    #[error("strides: the tensor at {address:#x} ends at {end:#x}, beyond the address space")]
    Extent { address: u64, end: u128 },
    /// The im2col mode.
    #[error("mode im2col is not supported; only tile is")]
    Im2col,
    /// A copy gave the wrong number of coordinates.
    #[error("{got} coordinates given for a tensor map of rank {rank}")]
    Coordinates { got: usize, rank: usize },
    /// The encoded form has the wrong size.
    #[error("a tensor map has {ENCODED_BYTES} bytes, not {got}")]
    EncodedSize { got: usize },
    /// The bytes are not an encoded tensor map.
    #[error("not a tensor map: {what} is {got:#x}, expected {expected:#x}")]
    NotATensorMap { what: &'static str, got: u64, expected: u64 },
}

/// Element types.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Dtype {
    U8,
    U16,
    U32,
    S32,
    U64,
    S64,
    F16,
    F32,
    F64,
    Bf16,
    Tf32,
}

impl Dtype {
    /// Size of an element.
    pub fn bytes(self) -> u32 {
        match self {
            Self::U8 => 1,
            Self::U16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::S32 | Self::F32 | Self::Tf32 => 4,
            Self::U64 | Self::S64 | Self::F64 => 8,
        }
    }

    /// The bits of the canonical NaN; `None` for integers.
    pub fn nan(self) -> Option<u64> {
        match self {
            Self::F16 | Self::Bf16 => Some(0x7fff),
            Self::F32 | Self::Tf32 => Some(0x7fff_ffff),
            Self::F64 => Some(0x7fff_ffff_ffff_ffff),
            _ => None,
        }
    }
}

/// What loads put in place of elements outside the tensor.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OobFill {
    /// Zeros.
    #[default]
    Zero,
    /// The canonical NaN of the element type.
    Nan,
}

/// How boxes are cut from the tensor.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Boxes of the tensor's own dimensions.
    #[default]
    Tile,
    /// Convolution windows; not supported.
    Im2col,
}

/// A tensor map. Dimension 0 is the innermost.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(from = "Description")]
pub struct TensorMap {
    /// Element type.
    pub dtype: Dtype,
    /// Elements of each dimension.
    pub dims: Vec<u64>,
    /// Bytes between neighbours in dimension 1 and up.
    pub strides: Vec<u64>,
    /// Elements of the box in each dimension.
    #[serde(rename = "box")]
    pub box_dims: Vec<u32>,
    /// Steps between the elements of a box in each dimension.
    pub element_strides: Vec<u32>,
    /// Placement in shared memory.
    pub swizzle: Swizzle,
    /// Values outside the tensor.
    pub oob: OobFill,
    /// Tile or im2col.
    pub mode: Mode,
    /// Address of element 0; not part of the JSON form.
    #[serde(skip)]
    pub address: u64,
}

/// The JSON form, in which a dense tensor needs no strides.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    dtype: Dtype,
    dims: Vec<u64>,
    strides: Option<Vec<u64>>,
    #[serde(rename = "box")]
    box_dims: Vec<u32>,
    element_strides: Option<Vec<u32>>,
    #[serde(default)]
    swizzle: Swizzle,
    #[serde(default)]
    oob: OobFill,
    #[serde(default)]
    mode: Mode,
}

impl From<Description> for TensorMap {
    fn from(d: Description) -> Self {
        let mut map = Self::dense(d.dtype, d.dims, d.box_dims);
        map.strides = d.strides.unwrap_or(map.strides);
        map.element_strides = d.element_strides.unwrap_or(map.element_strides);
        Self { swizzle: d.swizzle, oob: d.oob, mode: d.mode, ..map }
    }
}

/// Neighbouring bytes of a box that lie together in the tensor and in the tile.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Run {
    /// Offset from the map's address; `None` outside the tensor.
    pub global: Option<u64>,
    /// Length in bytes.
    pub bytes: u32,
    /// Offset in the dense tile, before the swizzle.
    pub tile: u32,
}

impl Run {
    /// Where the run lies in shared memory when its tile starts at `base`: pieces (address, offset
    /// in the run, bytes), none across a 16-byte granule, which `swizzle` moves as a whole.
    pub fn place<F: Fn(u64) -> u64>(
        self,
        base: u64,
        swizzle: F,
    ) -> impl Iterator<Item = (u64, u32, u32)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let linear = base + u64::from(self.tile) + u64::from(done);
            let bytes = (16 - (linear % 16) as u32).min(self.bytes - done);
            let piece = (swizzle(linear), done, bytes);
            done += bytes;
            (bytes > 0).then_some(piece)
        })
    }
}

impl TensorMap {
    /// The map of a dense tensor, without swizzle, filled with zeros outside.
    pub fn dense(dtype: Dtype, dims: Vec<u64>, box_dims: Vec<u32>) -> Self {
        let outer = dims.iter().take(dims.len().saturating_sub(1));
        let strides = outer.scan(u64::from(dtype.bytes()), |bytes, dim| {
            *bytes = bytes.saturating_mul(*dim);
            Some(*bytes)
        });
        Self {
            dtype,
            strides: strides.collect(),
            element_strides: vec![1; dims.len()],
            dims,
            box_dims,
            swizzle: Swizzle::None,
            oob: OobFill::Zero,
            mode: Mode::Tile,
            address: 0,
        }
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Bytes of a full box, which a load reports complete even where it is outside the tensor.
    pub fn box_bytes(&self) -> u64 {
        (0..self.rank())
            .fold(u64::from(self.dtype.bytes()), |b, d| b.saturating_mul(self.count(d).into()))
    }

    /// Elements of a tile in dimension `d`: every `element_strides[d]`-th of the box. The driver
    /// ignores the stride of dimension 0.
    fn count(&self, d: usize) -> u32 {
        if d == 0 { self.box_dims[0] } else { self.box_dims[d].div_ceil(self.element_strides[d]) }
    }

    /// The bits of an element outside the tensor.
    pub fn fill_bits(&self) -> u64 {
        if self.oob == OobFill::Nan { self.dtype.nan().unwrap_or(0) } else { 0 }
    }

    /// Checks every constraint of the driver's encoding.
    pub fn validate(&self) -> Result<(), TensorMapError> {
        use TensorMapError as E;
        if self.mode == Mode::Im2col {
            return Err(E::Im2col);
        }
        let rank = self.rank();
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(E::Rank { rank });
        }
        length("strides", self.strides.len(), rank - 1, rank)?;
        length("box", self.box_dims.len(), rank, rank)?;
        length("element_strides", self.element_strides.len(), rank, rank)?;
        multiple("address", self.address, 16)?;
        range("dims", self.dims.iter().copied(), 1, 1 << 32)?;
        range("strides", self.strides.iter().copied(), 0, (1 << 40) - 1)?;
        for (i, stride) in self.strides.iter().enumerate() {
            multiple(&format!("strides[{i}]"), *stride, 16)?;
        }
        range("box", self.box_dims.iter().map(|n| u64::from(*n)), 1, 256)?;
        range("element_strides", self.element_strides.iter().map(|n| u64::from(*n)), 1, 8)?;
        let row = u64::from(self.box_dims[0] * self.dtype.bytes());
        multiple("bytes of the box row", row, 16)?;
        let (bytes, max) = (self.box_bytes(), MAX_BOX_BYTES);
        if bytes > max {
            return Err(E::BoxBytes { bytes, max });
        }
        let width = u64::from(u32::from(self.swizzle));
        if width > 0 && row != width {
            return Err(E::SwizzleWidth { row, width });
        }
        if self.oob == OobFill::Nan && self.dtype.nan().is_none() {
            return Err(E::NanOfInteger { dtype: self.dtype });
        }
        self.check_extent()
    }

    /// A doubtful property that the driver accepts.
    pub fn lint(&self) -> Option<String> {
        let doubtful = self.swizzle != Swizzle::None && !self.address.is_multiple_of(128);
        doubtful.then(|| {
            format!("address {:#x} of a swizzled tensor map is not a multiple of 128", self.address)
        })
    }

    fn check_extent(&self) -> Result<(), TensorMapError> {
        let size = u128::from(self.dtype.bytes());
        let steps = std::iter::once(size).chain(self.strides.iter().map(|s| u128::from(*s)));
        let last: u128 = self.dims.iter().zip(steps).map(|(d, s)| u128::from(d - 1) * s).sum();
        let end = u128::from(self.address) + last + size;
        if end > 1 << 64 {
            return Err(TensorMapError::Extent { address: self.address, end });
        }
        Ok(())
    }

    /// The runs of the box at these coordinates, in the order of the tile.
    ///
    /// Element `i` of a tile lies at `coordinate + i * element stride`; every element of the tile
    /// has its place in it, inside the tensor or not.
    pub fn runs(&self, coordinates: &[i32]) -> Result<Vec<Run>, TensorMapError> {
        self.validate()?;
        let (got, rank) = (coordinates.len(), self.rank());
        if got != rank {
            return Err(TensorMapError::Coordinates { got, rank });
        }
        let row_bytes = self.box_dims[0] * self.dtype.bytes();
        let rows: u32 = (1..rank).map(|d| self.count(d)).product();
        let mut runs = Vec::new();
        for row in 0..rows {
            let offset = self.row_offset(coordinates, row);
            self.row_runs(offset, row * row_bytes, coordinates[0], &mut runs);
        }
        Ok(runs)
    }

    /// Offset of a row of the box in the tensor; `None` outside.
    fn row_offset(&self, coordinates: &[i32], row: u32) -> Option<u64> {
        let (mut rest, mut offset) = (row, 0);
        for (d, coordinate) in coordinates.iter().enumerate().skip(1) {
            let i = rest % self.count(d);
            rest /= self.count(d);
            offset += self.position(*coordinate, i, d)? * self.strides[d - 1];
        }
        Some(offset)
    }

    /// Position of element `i` of the box in dimension `d`; `None` outside the tensor.
    fn position(&self, coordinate: i32, i: u32, d: usize) -> Option<u64> {
        let step = if d == 0 { 1 } else { self.element_strides[d] };
        let x = i64::from(coordinate) + i64::from(i) * i64::from(step);
        u64::try_from(x).ok().filter(|x| *x < self.dims[d])
    }

    /// Appends the runs of the row at offset `row` of the tensor and `tile` of the tile: what lies
    /// before the tensor, in it, behind it.
    fn row_runs(&self, row: Option<u64>, tile: u32, coordinate: i32, runs: &mut Vec<Run>) {
        let (size, count) = (self.dtype.bytes(), i64::from(self.box_dims[0]));
        let (start, end) = (i64::from(coordinate), self.dims[0] as i64);
        let cuts = match row {
            Some(_) => [0, (-start).clamp(0, count), (end - start).clamp(0, count), count],
            None => [0, count, count, count],
        };
        for (part, cut) in cuts.windows(2).enumerate() {
            if let (first, bytes @ 1..) = (cut[0] as u32, (cut[1] - cut[0]) as u32 * size) {
                let inside = row.filter(|_| part == 1);
                let global = inside.map(|row| row + (start + cut[0]) as u64 * u64::from(size));
                runs.push(Run { global, bytes, tile: tile + first * size });
            }
        }
    }

    /// The 128-byte form kernels hold, in the simulator's own layout.
    pub fn encode(&self) -> Result<[u8; ENCODED_BYTES], TensorMapError> {
        self.validate()?;
        let mut bytes = Vec::with_capacity(ENCODED_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(self.address.to_le_bytes());
        for i in 0..MAX_RANK {
            bytes.extend(self.dims.get(i).copied().unwrap_or(0).to_le_bytes());
        }
        for i in 0..MAX_RANK - 1 {
            bytes.extend(self.strides.get(i).copied().unwrap_or(0).to_le_bytes());
        }
        for i in 0..MAX_RANK {
            bytes.extend((self.box_dims.get(i).copied().unwrap_or(0) as u16).to_le_bytes());
        }
        bytes
            .extend((0..MAX_RANK).map(|i| self.element_strides.get(i).copied().unwrap_or(0) as u8));
        bytes.extend([self.rank() as u8, self.dtype as u8, self.swizzle as u8, self.oob as u8]);
        bytes.resize(ENCODED_BYTES - 8, 0);
        bytes.extend(checksum(&bytes).to_le_bytes());
        let got = bytes.len();
        bytes.try_into().map_err(|_| TensorMapError::EncodedSize { got })
    }

    /// Reads the 128-byte form back; anything else is refused.
    pub fn decode(bytes: &[u8]) -> Result<Self, TensorMapError> {
        use TensorMapError as E;
        if bytes.len() != ENCODED_BYTES {
            return Err(E::EncodedSize { got: bytes.len() });
        }
        let word = |at: usize| (0..8).rev().fold(0, |w, i| w << 8 | u64::from(bytes[at + i]));
        let equal = |what, got, expected| {
            if got == expected { Ok(()) } else { Err(E::NotATensorMap { what, got, expected }) }
        };
        equal("the magic", word(0), u64::from_le_bytes(MAGIC))?;
        equal("the checksum", word(120), checksum(&bytes[..120]))?;
        let rank = usize::from(bytes[103]);
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(E::Rank { rank });
        }
        let code = |index: usize, values: usize| {
            let (value, max) = (u64::from(bytes[index]), values as u64 - 1);
            let error = E::Range { field: "code", index, value, min: 0, max };
            if value > max { Err(error) } else { Ok(value as usize) }
        };
        let half = |at: usize| u32::from(bytes[at]) | u32::from(bytes[at + 1]) << 8;
        let map = Self {
            dtype: DTYPES[code(104, DTYPES.len())?],
            dims: (0..rank).map(|i| word(16 + 8 * i)).collect(),
            strides: (0..rank - 1).map(|i| word(56 + 8 * i)).collect(),
            box_dims: (0..rank).map(|i| half(88 + 2 * i)).collect(),
            element_strides: (0..rank).map(|i| bytes[98 + i].into()).collect(),
            swizzle: SWIZZLES[code(105, SWIZZLES.len())?],
            oob: [OobFill::Zero, OobFill::Nan][code(106, 2)?],
            mode: Mode::Tile,
            address: word(8),
        };
        map.validate()?;
        Ok(map)
    }
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

fn length(
    field: &'static str,
    got: usize,
    expected: usize,
    rank: usize,
) -> Result<(), TensorMapError> {
    let error = TensorMapError::Length { field, got, expected, rank };
    if got == expected { Ok(()) } else { Err(error) }
}

fn multiple(field: &str, value: u64, multiple: u64) -> Result<(), TensorMapError> {
    let error = || TensorMapError::Multiple { field: field.to_string(), value, multiple };
    if value.is_multiple_of(multiple) { Ok(()) } else { Err(error()) }
}

fn range(
    field: &'static str,
    values: impl Iterator<Item = u64>,
    min: u64,
    max: u64,
) -> Result<(), TensorMapError> {
    for (index, value) in values.enumerate() {
        if !(min..=max).contains(&value) {
            return Err(TensorMapError::Range { field, index, value, min, max });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
