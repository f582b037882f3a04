//! Where the parts of one allocation lie.

use super::address::Operand;
use crate::error::{Error, Result};

/// Alignment of the parts of an allocation, and of the allocation itself: what cudaMalloc gives.
pub(crate) const PART_ALIGN: u64 = 256;

/// Largest allocation: offsets must fit a symbol.
const MAX_BYTES: u128 = 1 << 47;

/// Lays out one allocation, part by part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allocation {
    operand: Operand,
    end: u128,
}

impl Allocation {
    pub fn new(operand: Operand) -> Self {
        Self { operand, end: 0 }
    }

    /// The symbol of a further part of `extents` elements of `size` bytes; 0 when that is nothing.
    ///
    /// # Errors
    /// [`Error::Value`] when the whole exceeds 2^47 bytes.
    pub fn part(&mut self, extents: &[usize], size: usize) -> Result<u64> {
        let start = self.end.next_multiple_of(PART_ALIGN.into());
        let bytes = extents
            .iter()
            .try_fold(size as u128, |bytes, &extent| bytes.checked_mul(extent as u128))
            .filter(|bytes| start + bytes.min(&MAX_BYTES) <= MAX_BYTES && *bytes <= MAX_BYTES);
        let Some(bytes) = bytes else {
            let argument = format!("bytes of {}", self.operand);
            let got = format!("{start} + {extents:?} × {size}");
            return Err(Error::value(argument, got, format!("at most {MAX_BYTES}")));
        };
        if bytes == 0 {
            return Ok(0);
        }
        self.end = start + bytes;
        Ok(self.operand.at(start as u64))
    }

    /// Bytes of the whole.
    pub fn bytes(&self) -> u64 {
        self.end as u64
    }
}
