//! The bytes of bulk copies on their way.

use std::sync::Arc;

use crate::access::Region;
use crate::gang::State;
use crate::launch::Grid;

/// Bytes to be moved.
pub struct Move {
    from: From,
    to: Region,
    bytes: u32,
}

enum From {
    Region(Region),
    /// The same bits in every element of `size` bytes.
    Fill {
        bits: u64,
        size: u32,
    },
}

/// An element-wise update instead of a plain write.
pub struct Reduction {
    /// Bytes of an element.
    pub bytes: u32,
    /// New value from old and given.
    pub f: Arc<dyn Fn(u64, u64, u64) -> u64 + Send + Sync>,
}

impl Move {
    /// From one region to another.
    pub fn between(from: Region, to: Region, bytes: u32) -> Self {
        Self { from: From::Region(from), to, bytes }
    }

    /// The same element over and over.
    pub fn fill(to: Region, bytes: u32, bits: u64, size: u32) -> Self {
        Self { from: From::Fill { bits, size }, to, bytes }
    }

    /// The bytes; `grid` is needed where they come from global memory.
    pub fn read(&self, state: &State, grid: Option<&Grid<'_>>) -> Vec<u8> {
        let mut data = vec![0; self.bytes as usize];
        match (&self.from, grid) {
            (From::Fill { bits, size }, _) => {
                let element = &bits.to_le_bytes()[..*size as usize];
                data.chunks_exact_mut(element.len()).for_each(|e| e.copy_from_slice(element));
            }
            (From::Region(Region::Global { buffer, offset }), Some(grid)) => {
                grid.existing(*buffer).copy_out(*offset, &mut data);
            }
            (From::Region(Region::Shared { block, address }), _) => {
                let shared = &state.blocks[*block].shared;
                let at = shared.index(*address);
                data.copy_from_slice(&shared.data[at..at + self.bytes as usize]);
            }
            _ => {}
        }
        data
    }

    /// Puts the bytes where they belong.
    pub fn write(
        &self,
        state: &mut State,
        grid: &Grid<'_>,
        bytes: &[u8],
        reduction: Option<&Reduction>,
    ) {
        match (self.to, reduction) {
            (Region::Global { buffer, offset }, None) => {
                grid.existing(buffer).copy_in(offset, bytes)
            }
            (Region::Global { buffer, offset }, Some(r)) => {
                grid.existing(buffer).update(offset, bytes.len(), |at, old| {
                    let given = &bytes[at..at + old.len()];
                    let size = r.bytes as usize;
                    for (old, given) in old.chunks_exact_mut(size).zip(given.chunks_exact(size)) {
                        let new = (r.f)(word(old), word(given), 0).to_le_bytes();
                        old.copy_from_slice(&new[..size]);
                    }
                });
            }
            (Region::Shared { block, address }, _) => {
                state.blocks[block].shared.write(address, bytes)
            }
            _ => {}
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Performs moves in order.
pub fn perform(state: &mut State, grid: &Grid<'_>, moves: &[Move]) {
    for m in moves {
        let bytes = m.read(state, Some(grid));
        m.write(state, grid, &bytes, None);
    }
}
