//! Tensor maps: what the copy engine of compute capability 9.0 must know of a tensor to copy boxes
//! of it.
//!
//! All of them have one form: 16-bit elements, four dimensions, boxes of [`MAP_CHANNELS`] channels
//! of one head in a number of rows, swizzled in 128 bytes; zeros outside of the tensor.

use super::address::Addresses;
use super::params::{InfiniState, InfiniTensor};
use crate::dtype::DType;
use crate::problem::Problem;

/// Bytes of an encoded tensor map.
pub const MAP_BYTES: usize = 128;

/// Channels of a box: 128 bytes.
pub const MAP_CHANNELS: u32 = 64;

/// Strides are below this, in bytes, and multiples of [`STRIDE_ALIGN`].
const STRIDE_END: i64 = 1 << 40;
const STRIDE_ALIGN: i64 = 16;

/// The largest extent: coordinates are 32-bit integers.
const MAX_EXTENT: u64 = i32::MAX as u64;

/// A 16-bit tensor that a kernel copies in boxes of [`MAP_CHANNELS`] channels × 1 head × `rows` rows
/// × 1 batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorMap {
    /// Element type.
    pub dtype: DType,
    /// Address of element (0, …, 0); in a plan a symbol that a run replaces.
    pub data: u64,
    /// Channels (contiguous), heads, rows and batches.
    pub extents: [u64; 4],
    /// Bytes from a head, a row and a batch to the next.
    pub strides: [u64; 3],
    /// Rows of a box.
    pub rows: u32,
}

impl TensorMap {
    /// Channels, heads, rows and batches of a box.
    pub fn box_extents(&self) -> [u32; 4] {
        [MAP_CHANNELS, 1, self.rows, 1]
    }

    /// The map of a run.
    pub(crate) fn resolve(self, addresses: &Addresses) -> Self {
        Self { data: addresses.resolve(self.data), ..self }
    }
}

/// A tensor that may get a map.
#[derive(Clone, Copy)]
pub(crate) struct Source {
    /// For messages.
    name: &'static str,
    tensor: InfiniTensor,
    /// As in [`TensorMap`].
    extents: [usize; 4],
}

impl Source {
    /// A tensor of a call: [B, T, H, D], or packed with B = 1.
    pub fn of_call(name: &'static str, tensor: InfiniTensor, shape: [usize; 4]) -> Self {
        let [batches, tokens, heads, channels] = shape;
        Self { name, tensor, extents: [channels, heads, tokens, batches] }
    }

    /// An array [batches, heads, rows, channels] of the state or the workspace.
    pub fn array(name: &'static str, data: u64, shape: [usize; 4]) -> Self {
        let [batches, heads, rows, channels] = shape;
        let token = channels as i64;
        let head = rows as i64 * token;
        let tensor = InfiniTensor { data, batch: heads as i64 * head, token, head };
        Self { name, tensor, extents: [channels, heads, rows, batches] }
    }

    /// A part of the state's open segments: [slots, Hkv, N, channels].
    pub fn open(p: &Problem, state: &InfiniState, part: u64, channels: usize) -> Self {
        let shape = [state.slots as usize, p.kv_heads(), p.segment_len(), channels];
        Self::array("the open segments", part, shape)
    }

    /// Its map, or why the copy engine does not reach it.
    pub fn map(&self, dtype: DType, rows: usize) -> Result<TensorMap, String> {
        let InfiniTensor { data, batch, token, head } = self.tensor;
        let extents = self.extents.map(|extent| extent as u64);
        let refused = |reason| format!("{} has {reason}", self.name);
        if extents.contains(&0) {
            return Err(refused("an empty dimension"));
        }
        if extents.iter().any(|extent| *extent > MAX_EXTENT) {
            return Err(refused("a dimension of 2^31 or more"));
        }
        let row = extents[0] * dtype.bytes() as u64;
        let mut strides = [row; 3];
        let steps = [head, token, batch].into_iter().zip(&extents[1..]);
        for (stride, (step, extent)) in strides.iter_mut().zip(steps) {
            // Along a dimension of one entry nothing steps: any stride will do.
            if *extent > 1 {
                *stride = bytes(step, dtype).map_err(refused)?;
            }
        }
        Ok(TensorMap { dtype, data, extents, strides, rows: rows as u32 })
    }
}

/// A stride in bytes, or what is wrong with it.
fn bytes(step: i64, dtype: DType) -> Result<u64, &'static str> {
    match step.saturating_mul(dtype.bytes() as i64) {
        ..0 => Err("a negative stride"),
        0 => Err("a stride of 0"),
        STRIDE_END.. => Err("a stride of 2^40 bytes or more"),
        stride if stride % STRIDE_ALIGN != 0 => Err("a stride that is no multiple of 16 bytes"),
        stride => Ok(stride as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(strides: [i64; 3], [batches, tokens, heads]: [usize; 3]) -> Result<TensorMap, String> {
        let [batch, token, head] = strides;
        let tensor = InfiniTensor { data: 7 << 48, batch, token, head };
        Source::of_call("q", tensor, [batches, tokens, heads, 64]).map(DType::F16, 32)
    }

    #[test]
    fn extents_and_strides_go_from_heads_to_batches() {
        let expected = TensorMap {
            dtype: DType::F16,
            data: 7 << 48,
            extents: [64, 3, 5, 2],
            strides: [128, 400, 4000],
            rows: 32,
        };
        assert_eq!(map([2000, 200, 64], [2, 5, 3]), Ok(expected));
        assert_eq!(expected.box_extents(), [64, 1, 32, 1]);
        let array = Source::array("open", 1 << 48, [2, 3, 5, 64]).map(DType::BF16, 64);
        let array = array.expect("dense");
        assert_eq!((array.extents, array.strides), ([64, 3, 5, 2], [640, 128, 1920]));
    }

    #[test]
    fn strides_that_are_never_taken_are_valid_ones() {
        let single = map([0, -64, 1 << 60], [1, 1, 1]).expect("one row");
        assert_eq!(single.strides, [128; 3]);
    }

    #[test]
    fn what_the_copy_engine_does_not_reach_is_named() {
        let most = (1i64 << 39) - 8;
        assert!(map([most, 200, 64], [2, 5, 3]).is_ok());
        for (strides, reason) in [
            ([2000, -200, 64], "q has a negative stride"),
            ([2000, 200, 0], "q has a stride of 0"),
            ([1 << 39, 200, 64], "q has a stride of 2^40 bytes or more"),
            ([1 << 62, 200, 64], "q has a stride of 2^40 bytes or more"),
            ([2000, 204, 64], "q has a stride that is no multiple of 16 bytes"),
        ] {
            assert_eq!(map(strides, [2, 5, 3]), Err(reason.to_owned()));
        }
        let strides = [2000, 200, 64];
        let empty = Err("q has an empty dimension".to_owned());
        assert_eq!(map(strides, [2, 0, 3]), empty);
        assert!(map(strides, [1, (1 << 31) - 1, 3]).is_ok());
        assert_eq!(map(strides, [1, 1 << 31, 3]), Err("q has a dimension of 2^31 or more".into()));
    }
}
