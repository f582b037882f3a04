use proptest::prelude::*;

use super::TensorMapError as E;
use super::*;

fn matrix() -> TensorMap {
    TensorMap {
        swizzle: Swizzle::B128,
        ..TensorMap::dense(Dtype::Bf16, vec![256, 100], vec![64, 8])
    }
}

fn broken(change: impl Fn(&mut TensorMap)) -> TensorMapError {
    let mut map = matrix();
    assert_eq!(map.validate(), Ok(()));
    change(&mut map);
    let error = map.validate().unwrap_err();
    assert_eq!(map.encode().unwrap_err(), error);
    error
}

#[test]
fn json_has_defaults_for_dense_tensors() {
    let text = r#"{"dtype": "bf16", "dims": [256, 100], "box": [64, 8], "swizzle": 128}"#;
    assert_eq!(serde_json::from_str::<TensorMap>(text).unwrap(), matrix());
    let text = r#"{"dtype": "tf32", "dims": [8, 4, 2], "strides": [64, 512], "box": [4, 1, 1],
                   "element_strides": [1, 2, 1], "oob": "nan"}"#;
    let map: TensorMap = serde_json::from_str(text).unwrap();
    assert_eq!((&map.strides[..], &map.element_strides[..]), (&[64, 512][..], &[1, 2, 1][..]));
    assert_eq!((map.dtype, map.oob, map.swizzle), (Dtype::Tf32, OobFill::Nan, Swizzle::None));
    let written = serde_json::to_string(&map).unwrap();
    assert_eq!(serde_json::from_str::<TensorMap>(&written).unwrap(), map);
}

#[test]
fn json_names_a_wrong_swizzle() {
    let text = r#"{"dtype": "u8", "dims": [16], "box": [16], "swizzle": 96}"#;
    let error = serde_json::from_str::<TensorMap>(text).unwrap_err().to_string();
    assert!(error.contains("swizzle 96; 0, 32, 64 and 128"), "{error}");
}

#[test]
fn dense_strides_are_products() {
    let map = TensorMap::dense(Dtype::F32, vec![8, 3, 5], vec![4, 1, 1]);
    assert_eq!(map.strides, [32, 96]);
    assert_eq!(map.box_bytes(), 16);
}

#[test]
fn every_constraint_is_checked() {
    let range = |field, index, value, min, max| E::Range { field, index, value, min, max };
    let multiple =
        |field: &str, value, multiple| E::Multiple { field: field.into(), value, multiple };
    let length = |field, got, expected| E::Length { field, got, expected, rank: 2 };
    assert_eq!(broken(|m| m.dims = vec![]), E::Rank { rank: 0 });
    assert_eq!(broken(|m| m.dims = vec![1; 6]), E::Rank { rank: 6 });
    assert_eq!(broken(|m| m.strides.push(16)), length("strides", 2, 1));
    assert_eq!(broken(|m| m.box_dims.push(1)), length("box", 3, 2));
    assert_eq!(broken(|m| m.element_strides = vec![1]), length("element_strides", 1, 2));
    assert_eq!(broken(|m| m.address = 8), multiple("address", 8, 16));
    assert_eq!(broken(|m| m.dims[1] = 0), range("dims", 1, 0, 1, 1 << 32));
    assert_eq!(broken(|m| m.dims[0] = 1 << 33), range("dims", 0, 1 << 33, 1, 1 << 32));
    assert_eq!(broken(|m| m.strides[0] = 24), multiple("strides[0]", 24, 16));
    let large = range("strides", 0, 1 << 40, 0, (1 << 40) - 1);
    assert_eq!(broken(|m| m.strides[0] = 1 << 40), large);
    assert_eq!(broken(|m| m.box_dims[1] = 0), range("box", 1, 0, 1, 256));
    assert_eq!(broken(|m| m.box_dims[1] = 257), range("box", 1, 257, 1, 256));
    assert_eq!(broken(|m| m.element_strides[1] = 0), range("element_strides", 1, 0, 1, 8));
    assert_eq!(broken(|m| m.element_strides[1] = 9), range("element_strides", 1, 9, 1, 8));
    assert_eq!(broken(|m| m.box_dims[0] = 4), multiple("bytes of the box row", 8, 16));
    assert_eq!(broken(|m| m.box_dims[0] = 128), E::SwizzleWidth { row: 256, width: 128 });
    assert_eq!(broken(|m| m.box_dims[0] = 32), E::SwizzleWidth { row: 64, width: 128 });
    assert_eq!(
        broken(|m| (m.dtype, m.oob) = (Dtype::U16, OobFill::Nan)),
        E::NanOfInteger { dtype: Dtype::U16 }
    );
    assert_eq!(broken(|m| m.mode = Mode::Im2col), E::Im2col);
    assert!(matches!(broken(|m| m.address = u64::MAX - 15), E::Extent { .. }));
    let large = TensorMap::dense(Dtype::F64, vec![256; 5], vec![256; 5]);
    let bytes = 8 << 40;
    assert_eq!(large.validate(), Err(E::BoxBytes { bytes, max: 232448 }));
}

#[test]
fn swizzled_maps_should_start_at_128_bytes() {
    assert_eq!(matrix().lint(), None);
    assert!(TensorMap { address: 16, ..matrix() }.lint().unwrap().contains("0x10"));
    assert_eq!(TensorMap { address: 16, swizzle: Swizzle::None, ..matrix() }.lint(), None);
}

#[test]
fn the_encoded_form_is_read_back_and_nothing_else() {
    for dtype in DTYPES {
        let mut map = TensorMap::dense(dtype, vec![64, 5, 4, 3, 1 << 20], vec![16, 2, 3, 1, 1]);
        map.address = 0x7f00_0000_1230;
        map.element_strides = vec![1, 2, 8, 3, 4];
        map.oob = if dtype.nan().is_some() { OobFill::Nan } else { OobFill::Zero };
        assert_eq!(TensorMap::decode(&map.encode().unwrap()), Ok(map));
    }
    let bytes = matrix().encode().unwrap();
    assert_eq!(TensorMap::decode(&bytes), Ok(matrix()));
    assert_eq!(TensorMap::decode(&bytes[..64]), Err(E::EncodedSize { got: 64 }));
    for at in 0..ENCODED_BYTES {
        let mut bad = bytes;
        bad[at] ^= 1;
        assert!(matches!(TensorMap::decode(&bad), Err(E::NotATensorMap { .. })), "byte {at}");
    }
}

#[test]
fn fill_is_zero_or_the_nan_of_the_type() {
    let fill = |dtype| TensorMap { oob: OobFill::Nan, dtype, ..matrix() }.fill_bits();
    assert_eq!(matrix().fill_bits(), 0);
    assert!(half::bf16::from_bits(fill(Dtype::Bf16) as u16).is_nan());
    assert!(half::f16::from_bits(fill(Dtype::F16) as u16).is_nan());
    assert!(f32::from_bits(fill(Dtype::F32) as u32).is_nan());
    assert!(f64::from_bits(fill(Dtype::F64)).is_nan());
}

#[test]
fn rows_are_moved_whole_and_clipped() {
    let map = matrix();
    let run = |global, bytes, tile| Run { global, bytes, tile };
    let runs = map.runs(&[64, 10]).unwrap();
    assert_eq!((runs.len(), runs[1]), (8, run(Some(11 * 512 + 128), 128, 128)));
    let runs = map.runs(&[-3, 99]).unwrap();
    assert_eq!(runs[..2], [run(None, 6, 0), run(Some(99 * 512), 122, 6)]);
    assert_eq!(runs[2], run(None, 128, 128));
    assert_eq!(map.runs(&[0]), Err(E::Coordinates { got: 1, rank: 2 }));
}

#[test]
fn placement_follows_the_swizzle_of_each_granule() {
    let swizzle = |address: u64| address ^ (address & 0x380) >> 3;
    let run = Run { global: None, bytes: 26, tile: 134 };
    let pieces: Vec<_> = run.place(1024, swizzle).collect();
    assert_eq!(pieces, [(1024 + 150, 0, 10), (1024 + 128, 10, 16)]);
}

fn cases() -> impl Strategy<Value = (TensorMap, Vec<i32>)> {
    let dimension = (1u64..9, 1u32..5, 1u32..9, -12i32..14, 0u64..3);
    (prop::sample::select(DTYPES.to_vec()), prop::collection::vec(dimension, 1..=5)).prop_map(
        |(dtype, list)| {
            let mut map = TensorMap::dense(
                dtype,
                list.iter().map(|d| d.0).collect(),
                list.iter().map(|d| d.1).collect(),
            );
            map.box_dims[0] = 16 / dtype.bytes() * list[0].1.min(2);
            map.dims[0] += 4;
            let mut stride = map.dims[0] * u64::from(dtype.bytes());
            for (d, dimension) in list.iter().enumerate().skip(1) {
                stride = stride.next_multiple_of(16) + 16 * dimension.4;
                map.strides[d - 1] = stride;
                stride *= map.dims[d];
            }
            map.element_strides = list.iter().map(|d| d.2).collect();
            (map, list.iter().map(|d| d.3).collect())
        },
    )
}

/// Offset in the tensor of each element of the tile, one by one.
fn naive(map: &TensorMap, coordinates: &[i32]) -> Vec<Option<u64>> {
    let step = |d: usize| if d == 0 { 1 } else { map.element_strides[d] };
    let count = |d: usize| map.box_dims[d].div_ceil(step(d));
    let total: u32 = (0..map.rank()).map(count).product();
    let element = |linear: u32| {
        let (mut rest, mut offset, mut inside) = (linear, 0, true);
        for (d, coordinate) in coordinates.iter().enumerate() {
            let i = rest % count(d);
            rest /= count(d);
            let x = i64::from(*coordinate) + i64::from(i * step(d));
            let stride = if d == 0 { map.dtype.bytes().into() } else { map.strides[d - 1] };
            inside &= x >= 0 && x < map.dims[d] as i64;
            offset += x * stride as i64;
        }
        inside.then_some(offset as u64)
    };
    (0..total).map(element).collect()
}

proptest! {
    #[test]
    fn the_walk_equals_a_loop_over_elements((map, coordinates) in cases()) {
        let size = map.dtype.bytes();
        let runs = map.runs(&coordinates).unwrap();
        let mut walked = Vec::new();
        for run in &runs {
            prop_assert_eq!(run.tile, walked.len() as u32 * size);
            prop_assert!(run.bytes > 0 && run.bytes % size == 0);
            for i in 0..run.bytes / size {
                walked.push(run.global.map(|g| g + u64::from(i * size)));
            }
        }
        prop_assert_eq!(walked, naive(&map, &coordinates));
    }

    #[test]
    fn placed_pieces_are_the_swizzled_bytes(tile in 0u32..2048, bytes in 1u32..300) {
        let swizzle = |address: u64| address ^ (address & 0x380) >> 3;
        let run = Run { global: None, bytes, tile };
        let mut next = 0;
        for (address, offset, length) in run.place(4096, swizzle) {
            prop_assert_eq!(offset, next);
            for i in 0..u64::from(length) {
                let linear = 4096 + u64::from(tile + offset) + i;
                prop_assert_eq!(address + i, swizzle(linear));
            }
            next += length;
        }
        prop_assert_eq!(next, bytes);
    }

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(TensorMap::decode(&bytes).is_err());
    }
}
