//! How the CPU holds the keys of one segment: transposed, in blocks.

use crate::problem::Problem;

/// Layout of one segment's keys for one KV head: blocks of `width` keys, each block [Dk, width], so
/// that a product with a tile of queries reads whole vectors of keys. Key j, channel d stands at
/// `(j / width) · Dk · width + d · width + j % width`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyBlocks {
    /// Channels of a key, Dk.
    pub dim: usize,
    /// Keys per block.
    pub width: usize,
    blocks: usize,
}

/// Widest block: 256 keys × 128 channels of f32 are 128 KiB, resident in L2 next to a query tile
/// (docs/cpu.md).
const MAX_WIDTH: usize = 256;

impl KeyBlocks {
    pub fn new(problem: &Problem) -> Self {
        let width = problem.segment_len().min(MAX_WIDTH);
        Self { dim: problem.key_dim(), width, blocks: problem.segment_len().div_ceil(width) }
    }

    /// Blocks of a full segment.
    pub fn count(&self) -> usize {
        self.blocks
    }

    /// Elements of a full segment's buffer.
    pub fn len(&self) -> usize {
        self.blocks * self.block_len()
    }

    fn block_len(&self) -> usize {
        self.dim * self.width
    }

    /// Elements of the blocks that hold the first `keys` keys.
    pub fn prefix_len(&self, keys: usize) -> usize {
        keys.div_ceil(self.width) * self.block_len()
    }

    /// Block `b` of a buffer, [Dk, width].
    pub fn block<'a>(&self, buffer: &'a [f32], b: usize) -> &'a [f32] {
        &buffer[b * self.block_len()..][..self.block_len()]
    }

    /// Stores consecutive keys, rows of Dk, from key `j` on.
    pub fn put(&self, buffer: &mut [f32], j: usize, keys: &[f32]) {
        // Groups of rows that stay within a block: each channel is then one short contiguous run.
        let mut j = j;
        let mut keys = keys;
        while !keys.is_empty() {
            let at = j % self.width;
            let rows = (keys.len() / self.dim).min(self.width - at).min(16);
            let block = &mut buffer[(j / self.width) * self.block_len()..][..self.block_len()];
            for (d, channel) in block.chunks_exact_mut(self.width).enumerate() {
                for (x, row) in channel[at..at + rows].iter_mut().zip(keys.chunks_exact(self.dim)) {
                    *x = row[d];
                }
            }
            keys = &keys[rows * self.dim..];
            j += rows;
        }
    }

    /// Reads key `j`.
    pub fn get(&self, buffer: &[f32], j: usize, key: &mut [f32]) {
        let block = self.block(buffer, j / self.width);
        for (column, x) in block.chunks_exact(self.width).zip(key) {
            *x = column[j % self.width];
        }
    }
}
