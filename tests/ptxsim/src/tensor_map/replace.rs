//! Tensor maps written by the device: `tensormap.replace` changes one field of the encoded form,
//! which holds together only once all of them have been written.

use super::{DTYPES, Dtype, ENCODED_BYTES, MAGIC, MAX_RANK, TensorMapError, checksum};

/// A field of an encoded tensor map.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Field {
    /// Address of element 0.
    GlobalAddress,
    /// Number of dimensions minus one.
    Rank,
    /// Elements of the box in a dimension.
    BoxDim(usize),
    /// Elements of a dimension.
    GlobalDim(usize),
    /// Bytes between neighbours in dimension n + 1.
    GlobalStride(usize),
    /// Steps between elements of a box in a dimension.
    ElementStride(usize),
    /// Element type, by the instruction's own numbers.
    ElementType,
    /// Interleaving; only 0, none, is possible.
    Interleave,
    /// 0 none, 1, 2, 3: 32, 64, 128 bytes.
    Swizzle,
    /// 0 zeros, 1 NaN.
    Fill,
}

/// Element types by the instruction's numbers; the flushing ones count as their plain ones.
const ELEMENT_TYPES: [Dtype; 13] = [
    Dtype::U8,
    Dtype::U16,
    Dtype::U32,
    Dtype::S32,
    Dtype::U64,
    Dtype::S64,
    Dtype::F16,
    Dtype::F32,
    Dtype::F32,
    Dtype::F64,
    Dtype::Bf16,
    Dtype::Tf32,
    Dtype::Tf32,
];

impl Field {
    /// Where the field lies in the encoded form, and its bytes.
    fn place(self) -> (usize, usize) {
        match self {
            Self::GlobalAddress => (8, 8),
            Self::GlobalDim(d) => (16 + 8 * d, 8),
            Self::GlobalStride(d) => (56 + 8 * d, 8),
            Self::BoxDim(d) => (88 + 2 * d, 2),
            Self::ElementStride(d) => (98 + d, 1),
            Self::Rank => (103, 1),
            Self::ElementType => (104, 1),
            Self::Swizzle => (105, 1),
            Self::Fill => (106, 1),
            Self::Interleave => (107, 1),
        }
    }

    /// The field's value in the encoded form.
    fn encode(self, value: u64) -> Result<u64, TensorMapError> {
        let range = |field, index, min, max| match (min..=max).contains(&value) {
            true => Ok(value),
            false => Err(TensorMapError::Range { field, index, value, min, max }),
        };
        let dimension = |d: usize, last: usize| {
            let (value, max) = (d as u64, last as u64);
            let error = TensorMapError::Range { field: "dimension", index: 0, value, min: 0, max };
            if d > last { Err(error) } else { Ok(()) }
        };
        match self {
            Self::GlobalAddress => Ok(value),
            Self::Rank => range("rank", 0, 0, MAX_RANK as u64 - 1).map(|rank| rank + 1),
            Self::GlobalDim(d) => dimension(d, MAX_RANK - 1).map(|()| value),
            Self::GlobalStride(d) => dimension(d, MAX_RANK - 2).map(|()| value),
            Self::BoxDim(d) => dimension(d, MAX_RANK - 1).and_then(|()| range("box", d, 1, 256)),
            Self::ElementStride(d) => {
                dimension(d, MAX_RANK - 1).and_then(|()| range("element_strides", d, 1, 8))
            }
            Self::ElementType => {
                let last = ELEMENT_TYPES.len() as u64 - 1;
                let dtype = ELEMENT_TYPES[range("dtype", 0, 0, last)? as usize];
                Ok(DTYPES.iter().position(|d| *d == dtype).unwrap_or_default() as u64)
            }
            // Numbered 0 to 3 here as there.
            Self::Swizzle => range("swizzle", 0, 0, 3),
            Self::Fill => range("oob", 0, 0, 1),
            Self::Interleave => range("interleave", 0, 0, 0),
        }
    }
}

/// Writes a field. Bytes that were no tensor map become one, whose other fields are what they were.
///
/// # Errors
/// A value or dimension that is not possible; whether the fields go together is found when the map
/// is used.
pub fn replace(
    bytes: &mut [u8; ENCODED_BYTES],
    field: Field,
    value: u64,
) -> Result<(), TensorMapError> {
    let value = field.encode(value)?;
    let (at, n) = field.place();
    bytes[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
    bytes[..8].copy_from_slice(&MAGIC);
    let sum = checksum(&bytes[..ENCODED_BYTES - 8]);
    bytes[ENCODED_BYTES - 8..].copy_from_slice(&sum.to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{OobFill, TensorMap};
    use super::*;
    use crate::layout::Swizzle;

    #[test]
    fn all_fields_make_a_map() {
        let mut want = TensorMap::dense(Dtype::Bf16, vec![96, 40], vec![64, 8]);
        want.swizzle = Swizzle::B128;
        want.address = 0x1000_0000;
        want.oob = OobFill::Nan;
        want.element_strides = vec![1, 2];
        let mut bytes = [0; ENCODED_BYTES];
        let fields = [
            (Field::GlobalAddress, 0x1000_0000),
            (Field::Rank, 1),
            (Field::BoxDim(0), 64),
            (Field::BoxDim(1), 8),
            (Field::GlobalDim(0), 96),
            (Field::GlobalDim(1), 40),
            (Field::GlobalStride(0), 192),
            (Field::ElementStride(0), 1),
            (Field::ElementStride(1), 2),
            (Field::ElementType, 10),
            (Field::Interleave, 0),
            (Field::Swizzle, 3),
            (Field::Fill, 1),
        ];
        for (field, value) in fields {
            replace(&mut bytes, field, value).expect("it is possible");
        }
        assert_eq!(TensorMap::decode(&bytes).expect("a map"), want);
        assert_eq!(bytes, want.encode().expect("a map"));
    }

    #[test]
    fn an_unfinished_map_is_refused() {
        let mut bytes = [0; ENCODED_BYTES];
        replace(&mut bytes, Field::GlobalAddress, 64).expect("it is possible");
        assert!(TensorMap::decode(&bytes).is_err());
    }

    #[test]
    fn impossible_values_are_refused() {
        let mut bytes = [0; ENCODED_BYTES];
        for (field, value) in [
            (Field::Rank, 5),
            (Field::BoxDim(0), 257),
            (Field::BoxDim(5), 8),
            (Field::GlobalStride(4), 16),
            (Field::ElementStride(0), 9),
            (Field::ElementType, 13),
            (Field::Swizzle, 4),
            (Field::Interleave, 1),
            (Field::Fill, 2),
        ] {
            assert!(replace(&mut bytes, field, value).is_err(), "{field:?} {value}");
            assert_eq!(bytes, [0; ENCODED_BYTES]);
        }
    }
}
