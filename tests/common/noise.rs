//! Long tensors of normal numbers, on the host piece by piece and on a device as a whole.

use std::ops::Range;

use cudarc::driver::{CudaSlice, DriverError};
use half::bf16;
use infini_attn::cuda::Device;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, StandardNormal};

/// N(0, 1) rounded to bf16: a block of numbers, over and over. Its length is prime, so rows of a tensor
/// are alike only after as many rows.
pub struct Noise {
    block: Vec<bf16>,
}

impl Noise {
    const BLOCK: usize = 1_000_003;

    pub fn new(seed: u64) -> Self {
        let rng = SmallRng::seed_from_u64(seed);
        let numbers = StandardNormal.sample_iter(rng).take(Self::BLOCK);
        Self { block: numbers.map(|x: f32| bf16::from_f32(x)).collect() }
    }

    /// Elements `range` of a tensor.
    pub fn host(&self, range: Range<usize>) -> Vec<bf16> {
        let mut all = Vec::with_capacity(range.len());
        while all.len() < range.len() {
            let from = &self.block[(range.start + all.len()) % Self::BLOCK..];
            all.extend_from_slice(&from[..from.len().min(range.len() - all.len())]);
        }
        all
    }

    /// The first `count` elements, in device memory.
    pub fn upload(&self, device: &Device, count: usize) -> Result<CudaSlice<bf16>, DriverError> {
        let stream = device.stream();
        let mut all = stream.alloc_zeros::<bf16>(count)?;
        let mut filled = Self::BLOCK.min(count);
        stream.memcpy_htod(&self.block[..filled], &mut all.slice_mut(..filled))?;
        while filled < count {
            let more = filled.min(count - filled);
            let (from, mut to) = all.split_at_mut(filled);
            stream.memcpy_dtod(&from.slice(..more), &mut to.slice_mut(..more))?;
            filled += more;
        }
        stream.synchronize()?;
        Ok(all)
    }
}
