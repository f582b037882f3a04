//! What executes a plan: a CUDA stream, or the simulator of the tests.

use std::borrow::Cow;

use super::kernel::Kernel;
use super::tensor_map::{MAP_BYTES, TensorMap};
use crate::error::{Error, Result};

/// The kernel's parameter, where it begins with maps, has this alignment, and its size is a multiple
/// of it.
const MAP_ALIGN: usize = 128;

/// Executes the steps of a plan, in order, each after the one before has taken effect.
///
/// Nothing here allocates device memory or waits for the device.
pub trait Launcher {
    /// Enqueues a launch.
    ///
    /// # Errors
    /// [`Launch::error`] with the device's reason.
    fn launch(&mut self, launch: &Launch<'_>) -> Result<()>;

    /// Sets `bytes` bytes from the device address `to` on to `value`.
    ///
    /// # Errors
    /// [`Error::Driver`] with the device's reason.
    fn fill(&mut self, to: u64, bytes: u64, value: u8) -> Result<()>;

    /// Copies `from` to the device address `to`. The bytes are read before this returns; under
    /// capture every replay writes them again.
    ///
    /// # Errors
    /// [`Error::Driver`] with the device's reason.
    fn copy(&mut self, to: u64, from: &[u8]) -> Result<()>;
}

/// One launch, complete.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel; its table entry has block size and shared memory.
    pub kernel: &'static Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Blocks of a cluster along x; 1: no clusters.
    pub cluster: u32,
    /// It may begin while the launch before ends: the kernel waits for that one itself.
    pub early: bool,
    /// Tensor maps in front of the parameter structure, addresses filled in.
    pub maps: &'a [TensorMap],
    /// Bytes of the parameter structure, addresses filled in.
    pub params: &'a [u8],
    /// The shapes it works on, for messages.
    pub what: &'a str,
}

impl<'a> Launch<'a> {
    /// Bytes of the kernel's one parameter: the maps, each as `encode` gives it, then the parameter
    /// structure; where there are maps, zeros up to a multiple of 128.
    ///
    /// # Errors
    /// [`Launch::error`] with the reason of `encode`.
    pub fn parameter<E: std::fmt::Display>(
        &self,
        encode: impl Fn(&TensorMap) -> std::result::Result<[u8; MAP_BYTES], E>,
    ) -> Result<Cow<'a, [u8]>> {
        if self.maps.is_empty() {
            return Ok(Cow::Borrowed(self.params));
        }
        let mut bytes = Vec::new();
        for (i, map) in self.maps.iter().enumerate() {
            let encoded = encode(map);
            bytes.extend(encoded.map_err(|e| self.error(format_args!("tensor map {i}: {e}")))?);
        }
        bytes.extend(self.params);
        bytes.resize(bytes.len().next_multiple_of(MAP_ALIGN), 0);
        Ok(Cow::Owned(bytes))
    }

    /// The error of a launch that the device refused.
    pub fn error(&self, reason: impl std::fmt::Display) -> Error {
        Error::Launch {
            kernel: self.kernel.symbol,
            grid: self.grid,
            threads: self.kernel.threads,
            what: self.what.to_owned(),
            reason: reason.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::plan::kernels::KERNELS;
    use crate::dtype::DType;

    fn launch<'a>(maps: &'a [TensorMap], params: &'a [u8]) -> Launch<'a> {
        let (grid, cluster, what) = ([2, 1, 1], 1, "a test");
        Launch { kernel: &KERNELS[0], grid, cluster, early: false, maps, params, what }
    }

    fn map(data: u64) -> TensorMap {
        let (extents, strides) = ([64, 1, 5, 1], [128; 3]);
        TensorMap { dtype: DType::F16, data, extents, strides, rows: 64 }
    }

    #[test]
    fn maps_come_before_the_structure_and_the_whole_is_padded() {
        let encode = |map: &TensorMap| Ok::<_, String>([map.data as u8; MAP_BYTES]);
        let plain = launch(&[], &[9; 40]).parameter(encode).expect("encoded");
        assert_eq!(*plain, [9; 40]);
        let maps = [map(3), map(4)];
        let bytes = launch(&maps, &[9; 8]).parameter(encode).expect("encoded");
        let expected = [vec![3; 128], vec![4; 128], vec![9; 8], vec![0; 120]].concat();
        assert_eq!(*bytes, expected);
        assert_eq!(launch(&maps, &[9; 128]).parameter(encode).expect("encoded").len(), 384);
    }

    #[test]
    fn a_map_that_is_refused_fails_the_launch() {
        let refuse = |map: &TensorMap| match map.data {
            3 => Ok([0; MAP_BYTES]),
            data => Err(format!("no {data}")),
        };
        let error = launch(&[map(3), map(4)], &[]).parameter(refuse).expect_err("refused");
        assert!(error.to_string().contains("tensor map 1: no 4"), "{error}");
    }
}
