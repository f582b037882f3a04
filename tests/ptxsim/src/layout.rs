//! Where elements live: fragments of the tensor-core instructions, shared-memory swizzles and
//! operands named by a matrix descriptor. Rows and columns of A are (m, k), of B (k, n), of C
//! and D (m, n).
use thiserror::Error;

/// Shape of `mma.sync`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum MmaShape {
    /// 16-bit elements, k = 16.
    M16n8k16,
    /// 16-bit elements, k = 8.
    M16n8k8,
    /// `tf32`, one element a register, k = 8.
    M16n8k8Tf32,
}

#[inline]
fn group(lane: usize) -> (usize, usize) {
    (lane >> 2 & 7, lane & 3)
}

impl MmaShape {
    /// Depth k.
    pub fn k(self) -> usize {
        if self == Self::M16n8k16 { 16 } else { 8 }
    }

    /// (m, k) of element `i` of A.
    pub fn a(self, lane: usize, i: usize) -> (usize, usize) {
        let (g, t) = group(lane);
        match self {
            Self::M16n8k16 => (g + 8 * (i >> 1 & 1), 2 * t + (i & 1) + 8 * (i >> 2)),
            Self::M16n8k8 => (g + 8 * (i >> 1), 2 * t + (i & 1)),
            Self::M16n8k8Tf32 => (g + 8 * (i & 1), t + 4 * (i >> 1)),
        }
    }

    /// (k, n) of element `i` of B.
    pub fn b(self, lane: usize, i: usize) -> (usize, usize) {
        let (g, t) = group(lane);
        match self {
            Self::M16n8k16 => (2 * t + (i & 1) + 8 * (i >> 1), g),
            Self::M16n8k8 => (2 * t + i, g),
            Self::M16n8k8Tf32 => (t + 4 * i, g),
        }
    }

    /// (m, n) of element `i` of C and D, the same for every shape.
    pub fn c(self, lane: usize, i: usize) -> (usize, usize) {
        let (g, t) = group(lane);
        (g + 8 * (i >> 1), 2 * t + (i & 1))
    }
}

/// (m, n) of accumulator `i` of thread 0 to 127 of a `wgmma` warpgroup.
pub fn wgmma_d(thread: usize, i: usize) -> (usize, usize) {
    let (g, t) = group(thread);
    (16 * (thread >> 5 & 3) + g + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * t + (i & 1))
}

/// (m, k) of element `i` of A in registers of thread 0 to 127.
pub fn wgmma_a(thread: usize, i: usize) -> (usize, usize) {
    let (row, col) = MmaShape::M16n8k16.a(thread, i);
    (16 * (thread >> 5 & 3) + row, col)
}

/// (row, column) in an 8 × 8 matrix of the `high` or low half of a register of `ldmatrix`,
/// `stmatrix` or `movmatrix`.
#[inline]
pub fn matrix_element(lane: usize, high: bool, trans: bool) -> (usize, usize) {
    let (g, t) = group(lane);
    let element = 2 * t + usize::from(high);
    if trans { (element, g) } else { (g, element) }
}

pub(crate) const SWIZZLES: [Swizzle; 4] =
    [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];

/// Permutation of 16-byte granules of shared memory.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Swizzle {
    /// Addresses as they are.
    #[default]
    None,
    /// Rows of 32 bytes, repeating every 256.
    B32,
    /// Rows of 64 bytes, repeating every 512.
    B64,
    /// Rows of 128 bytes, repeating every 1024.
    B128,
}

impl From<Swizzle> for u32 {
    fn from(swizzle: Swizzle) -> u32 {
        match swizzle {
            Swizzle::None => 0,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }
}

impl TryFrom<u32> for Swizzle {
    type Error = String;
    fn try_from(width: u32) -> Result<Self, String> {
        let found = SWIZZLES.into_iter().find(|swizzle| u32::from(*swizzle) == width);
        found.ok_or_else(|| format!("swizzle {width}; 0, 32, 64 and 128 are possible"))
    }
}

impl Swizzle {
    fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::B32 => 1,
            Self::B64 => 2,
            Self::B128 => 3,
        }
    }

    /// 16-byte chunks of a row: 1, 2, 4 or 8.
    pub fn chunks(self) -> u32 {
        1 << self.bits()
    }

    /// Alignment at which the pattern starts over.
    pub fn period(self) -> u32 {
        128 << self.bits()
    }

    fn mode(self) -> u64 {
        (4 - u64::from(self.bits())) & 3
    }

    fn from_mode(mode: u64) -> Self {
        [Self::None, Self::B128, Self::B64, Self::B32][(mode & 3) as usize]
    }
}

/// Physical address of a logical one: bits from 4 on are changed by bits from 7 on.
pub fn swizzle(address: u64, swizzle: Swizzle) -> u64 {
    let mask = u64::from(swizzle.chunks() - 1) << 7;
    address ^ (address & mask) >> 3
}

/// Which index of an operand is contiguous in memory.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Major {
    /// k (trans = 0).
    K,
    /// m or n (trans = 1).
    Mn,
}

/// A matrix descriptor that cannot be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DescriptorError {
    /// Bits that have no meaning on this architecture.
    #[error("descriptor {bits:#018x} sets reserved bits {reserved:#x}")]
    Reserved {
        /// The descriptor.
        bits: u64,
        /// Those of its bits that must be zero.
        reserved: u64,
    },
    /// A pattern that does not start at its period.
    #[error("descriptor {bits:#018x} has base offset {offset}; only 0 is supported")]
    BaseOffset {
        /// The descriptor.
        bits: u64,
        /// Its bits 49 to 51.
        offset: u32,
    },
    /// A field that is no multiple of 16.
    #[error("{field} {value:#x} of a descriptor is not a multiple of 16")]
    Unaligned {
        /// Name of the field.
        field: &'static str,
        /// Bytes given.
        value: u32,
    },
    /// A field of more than 18 bits.
    #[error("{field} {value:#x} of a descriptor exceeds 0x3ffff")]
    TooLarge {
        /// Name of the field.
        field: &'static str,
        /// Bytes given.
        value: u32,
    },
}

/// Bits 14–15, 30–31, 46–48 and 52–61.
const RESERVED: u64 = 3 << 14 | 3 << 30 | 7 << 46 | 0x3FF << 52;

/// Matrix descriptor of `wgmma`: a checked 64-bit value.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Descriptor(u64);

impl Descriptor {
    /// Checks the bits of a register.
    pub fn new(bits: u64) -> Result<Self, DescriptorError> {
        if bits & RESERVED != 0 {
            return Err(DescriptorError::Reserved { bits, reserved: bits & RESERVED });
        }
        let offset = (bits >> 49 & 7) as u32;
        if offset != 0 {
            return Err(DescriptorError::BaseOffset { bits, offset });
        }
        Ok(Self(bits))
    }

    /// Descriptor of a start address and of leading and stride dimension offsets, in bytes.
    pub fn of(
        start: u32,
        leading: u32,
        stride: u32,
        swizzle: Swizzle,
    ) -> Result<Self, DescriptorError> {
        let encode = |field, value: u32| match value {
            _ if !value.is_multiple_of(16) => Err(DescriptorError::Unaligned { field, value }),
            _ if value > 0x3FFFF => Err(DescriptorError::TooLarge { field, value }),
            _ => Ok(u64::from(value >> 4)),
        };
        Ok(Self(
            encode("start address", start)?
                | encode("leading dimension offset", leading)? << 16
                | encode("stride dimension offset", stride)? << 32
                | swizzle.mode() << 62,
        ))
    }

    /// The 64 bits.
    pub fn bits(self) -> u64 {
        self.0
    }

    fn field(self, shift: u32) -> u32 {
        ((self.0 >> shift & 0x3FFF) << 4) as u32
    }

    /// Start address in shared memory.
    pub fn start(self) -> u32 {
        self.field(0)
    }

    /// Leading dimension byte offset.
    pub fn leading(self) -> u32 {
        self.field(16)
    }

    /// Stride dimension byte offset.
    pub fn stride(self) -> u32 {
        self.field(32)
    }

    /// Swizzle.
    pub fn swizzle(self) -> Swizzle {
        Swizzle::from_mode(self.0 >> 62)
    }

    /// Byte address in shared memory of the 16-bit element (`mn`, `k`).
    pub fn operand_address(self, mn: u32, k: u32, major: Major) -> u32 {
        let (leading, stride) = (self.leading(), self.stride());
        let w = self.swizzle().chunks();
        let offset = match (major, self.swizzle()) {
            (Major::K, Swizzle::None) => {
                mn % 8 * 16 + mn / 8 * stride + k % 8 * 2 + k / 8 * leading
            }
            (Major::K, _) => mn % 8 * 16 * w + mn / 8 * stride + k * 2,
            (Major::Mn, Swizzle::None) => {
                mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading
            }
            (Major::Mn, _) => {
                let chunk = mn / 8;
                mn % 8 * 2 + chunk % w * 16 + chunk / w * leading + k % 8 * 16 * w + k / 8 * stride
            }
        };
        swizzle((self.start() + offset).into(), self.swizzle()) as u32
    }

    /// Addresses of the 16-byte chunks, eight elements each, of an operand of `mn` × 16: for
    /// K-major [mn][k / 8], for MN-major [k][mn / 8].
    pub fn operand_chunks(self, mn: u32, major: Major) -> Vec<u32> {
        let (rows, chunks) = if major == Major::K { (mn, 2) } else { (16, mn / 8) };
        let cells = (0..rows).flat_map(|row| (0..chunks).map(move |chunk| (row, chunk * 8)));
        cells
            .map(|(row, first)| match major {
                Major::K => self.operand_address(row, first, major),
                Major::Mn => self.operand_address(first, row, major),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
