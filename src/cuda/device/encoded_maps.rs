//! Tensor maps as the driver encodes them, remembered: a launch has up to eleven, and those of one call
//! are mostly those of the call before.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::{DriverError, sys};

use crate::cuda::plan::tensor_map::{MAP_BYTES, TensorMap};
use crate::dtype::DType;

type Encoded = [u8; MAP_BYTES];

/// Maps that are remembered before all are forgotten: addresses of tensors that come and go. 256 KiB.
const MOST: usize = 1024;

/// What an encoding depends on is in the map, its address included; so nothing here grows old.
#[derive(Debug, Default)]
pub(super) struct EncodedMaps(Mutex<HashMap<TensorMap, Encoded>>);

impl EncodedMaps {
    /// The driver's encoding of a map.
    pub fn get(&self, map: &TensorMap) -> Result<Encoded, DriverError> {
        self.get_or(map, encode)
    }

    fn get_or<E>(
        &self,
        map: &TensorMap,
        encode: impl FnOnce(&TensorMap) -> Result<Encoded, E>,
    ) -> Result<Encoded, E> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(encoded) = known.get(map) {
            return Ok(*encoded);
        }
        let encoded = encode(map)?;
        if known.len() == MOST {
            known.clear();
        }
        known.insert(*map, encoded);
        Ok(encoded)
    }
}

/// A tensor map in the driver's encoding.
fn encode(map: &TensorMap) -> Result<Encoded, DriverError> {
    // SAFETY: plain numbers.
    let mut encoded: sys::CUtensorMap = unsafe { std::mem::zeroed() };
    let dtype = match map.dtype {
        DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let (extents, strides, boxes) = (map.extents, map.strides, map.box_extents());
    // SAFETY: the encoder only reads the arrays, of 4, 3, 4 and 4 entries, and writes the map.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut encoded,
            dtype,
            extents.len() as u32,
            map.data as *mut c_void,
            extents.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            [1; 4].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()?;
    let mut bytes = [0; MAP_BYTES];
    for (to, word) in bytes.chunks_exact_mut(8).zip(encoded.opaque) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(data: u64) -> TensorMap {
        let (extents, strides) = ([64, 1, 5, 1], [128; 3]);
        TensorMap { dtype: DType::F16, data, extents, strides, rows: 64 }
    }

    #[test]
    fn a_map_is_encoded_once() {
        let maps = EncodedMaps::default();
        let get = |data: u64, encode: &dyn Fn() -> Result<Encoded, ()>| {
            maps.get_or(&map(data), |_| encode())
        };
        let never = || -> Result<Encoded, ()> { panic!("encoded again") };
        assert_eq!(get(1, &|| Err(())), Err(()));
        assert_eq!(get(1, &|| Ok([1; MAP_BYTES])), Ok([1; MAP_BYTES]), "errors are not kept");
        assert_eq!(get(2, &|| Ok([2; MAP_BYTES])), Ok([2; MAP_BYTES]));
        assert_eq!(get(1, &never), Ok([1; MAP_BYTES]));
        // Another shape at the same address is another map.
        let taller = TensorMap { rows: 32, ..map(1) };
        assert_eq!(maps.get_or(&taller, |_| Ok::<_, ()>([3; MAP_BYTES])), Ok([3; MAP_BYTES]));
    }

    #[test]
    fn no_more_are_kept_than_the_limit() {
        let maps = EncodedMaps::default();
        for data in 0..=MOST as u64 {
            _ = maps.get_or(&map(data), |_| Ok::<_, ()>([0; MAP_BYTES]));
            assert!(maps.0.lock().expect("unpoisoned").len() <= MOST);
        }
    }
}
