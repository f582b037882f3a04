//! Golden coordinates, descriptor constants, and operands fetched through every layout.
use super::*;
use proptest::prelude::*;

#[test]
fn golden_fragments() {
    let shape = MmaShape::M16n8k16;
    let a = |lane| (0..8).map(|i| shape.a(lane, i)).collect::<Vec<_>>();
    let b = |lane| (0..4).map(|i| shape.b(lane, i)).collect::<Vec<_>>();
    let c = |lane| (0..4).map(|i| shape.c(lane, i)).collect::<Vec<_>>();
    assert_eq!(a(5), [(1, 2), (1, 3), (9, 2), (9, 3), (1, 10), (1, 11), (9, 10), (9, 11)]);
    assert_eq!(b(5), [(2, 1), (3, 1), (10, 1), (11, 1)]);
    assert_eq!(a(17), [(4, 2), (4, 3), (12, 2), (12, 3), (4, 10), (4, 11), (12, 10), (12, 11)]);
    assert_eq!(b(17), [(2, 4), (3, 4), (10, 4), (11, 4)]);
    assert_eq!(c(31), [(7, 6), (7, 7), (15, 6), (15, 7)]);
    let d = |thread| (0..8).map(|i| wgmma_d(thread, i)).collect::<Vec<_>>();
    assert_eq!(d(33), [(16, 2), (16, 3), (24, 2), (24, 3), (16, 10), (16, 11), (24, 10), (24, 11)]);
    assert_eq!(
        d(127),
        [(55, 6), (55, 7), (63, 6), (63, 7), (55, 14), (55, 15), (63, 14), (63, 15)]
    );
}

#[test]
fn golden_swizzles() {
    let row = |kind, pitch: u64, r: u64| -> Vec<u64> {
        (0..pitch / 16).map(|c| swizzle(r * pitch + c * 16, kind) >> 4).collect()
    };
    assert_eq!(row(Swizzle::B128, 128, 2), [18, 19, 16, 17, 22, 23, 20, 21]);
    assert_eq!(row(Swizzle::B128, 128, 5), [45, 44, 47, 46, 41, 40, 43, 42]);
    assert_eq!(row(Swizzle::B64, 64, 3), [13, 12, 15, 14]);
    assert_eq!(row(Swizzle::B64, 64, 6), [27, 26, 25, 24]);
    assert_eq!(row(Swizzle::B32, 32, 4), [9, 8]);
}

#[test]
fn descriptor_constants_and_errors() {
    for (leading, stride, kind, bits) in [
        (16, 1024, Swizzle::B128, 0x4000004000010000),
        (16, 512, Swizzle::B64, 0x8000002000010000),
        (16, 256, Swizzle::B32, 0xc000001000010000),
        (1024, 128, Swizzle::None, 0x0000000800400000),
        (0, 1024, Swizzle::B128, 0x4000004000000000),
        (1024, 4096, Swizzle::B128, 0x4000010000400000),
        (512, 2048, Swizzle::B64, 0x8000008000200000),
        (256, 1024, Swizzle::B32, 0xc000004000100000),
    ] {
        let d = Descriptor::of(0, leading, stride, kind).unwrap();
        assert_eq!(d.bits(), bits);
        assert_eq!(Descriptor::new(bits), Ok(d));
        assert_eq!((d.leading(), d.stride(), d.swizzle()), (leading, stride, kind));
    }
    assert!(matches!(Descriptor::new(1 << 14), Err(DescriptorError::Reserved { .. })));
    let shifted = Descriptor::new(3 << 49);
    assert!(matches!(shifted, Err(DescriptorError::BaseOffset { offset: 3, .. })));
    let odd = Descriptor::of(8, 0, 0, Swizzle::None);
    assert!(matches!(odd, Err(DescriptorError::Unaligned { value: 8, .. })));
    let far = Descriptor::of(1 << 18, 0, 0, Swizzle::None);
    assert!(matches!(far, Err(DescriptorError::TooLarge { .. })));
}

proptest! {
    #[test]
    fn swizzle_is_an_involution(address in 0u64..1 << 18) {
        for kind in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128] {
            let moved = swizzle(address, kind);
            prop_assert_eq!(swizzle(moved, kind), address);
            prop_assert_eq!(moved / u64::from(kind.period()), address / u64::from(kind.period()));
        }
    }
}

/// Memory of 16-bit integers.
struct Memory(Vec<i16>);

impl Memory {
    fn filled(rows: usize, cols: usize, pitch: usize, value: impl Fn(usize, usize) -> i16) -> Self {
        let mut memory = Self(vec![i16::MAX; 32768]);
        for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
            memory.0[swizzle((r * pitch + c * 2) as u64, Swizzle::B128) as usize / 2] = value(r, c);
        }
        memory
    }

    /// Registers of `ldmatrix.x4`, as eight elements of each lane.
    fn ldmatrix(&self, row: impl Fn(usize) -> (usize, usize), trans: bool) -> Vec<[i16; 8]> {
        let element = |lane: usize, i: usize| {
            let (r, c) = matrix_element(lane, i & 1 == 1, trans);
            let (row, chunk) = row(8 * (i >> 1) + r);
            let start = swizzle((row * 128 + chunk * 16) as u64, Swizzle::B128) as usize;
            self.0[start / 2 + c]
        };
        (0..32).map(|lane| std::array::from_fn(|i| element(lane, i))).collect()
    }
}

fn value(r: usize, c: usize) -> i16 {
    ((r * 31 + c * 17 + r * c) % 23) as i16 - 11
}

/// Product of the fragments of a warp, summed over k by coordinates alone.
fn product(a: &[[i16; 8]], b: &[[i16; 8]], tile: usize) -> Vec<i32> {
    let shape = MmaShape::M16n8k16;
    let (mut am, mut bm) = ([[0; 16]; 16], [[0; 16]; 8]);
    for (lane, (a, b)) in a.iter().zip(b).enumerate() {
        for (i, &a) in a.iter().enumerate() {
            let (m, k) = shape.a(lane, i);
            am[m][k] = i32::from(a);
        }
        for i in 0..4 {
            let (k, n) = shape.b(lane, i);
            bm[n][k] = i32::from(b[4 * tile + i]);
        }
    }
    let entries = am.iter().flat_map(|a| bm.iter().map(move |b| (a, b)));
    entries.map(|(a, b)| a.iter().zip(b).map(|(x, y)| x * y).sum()).collect()
}

#[test]
fn ldmatrix_idioms_feed_mma() {
    let memory = Memory::filled(16, 64, 128, value);
    let chunked = |l: usize| (l % 16, l / 16);
    let crossed = |l: usize| ((l % 8) + 8 * (l / 16), l / 8 % 2);
    let plain: fn(usize, usize) -> i16 = value;
    let turned: fn(usize, usize) -> i16 = |r, c| value(c, r);
    let a = [(memory.ldmatrix(chunked, false), plain), (memory.ldmatrix(crossed, true), turned)];
    // The second function gives the element (n, k).
    let b = [(memory.ldmatrix(crossed, false), plain), (memory.ldmatrix(chunked, true), turned)];
    for ((af, ar), (bf, br)) in a.iter().flat_map(|a| b.iter().map(move |b| (a, b))) {
        for tile in 0..2 {
            let got = product(af, bf, tile);
            for (i, got) in got.into_iter().enumerate() {
                let (m, n) = (i / 8, i % 8 + 8 * tile);
                let terms = (0..16).map(|k| i32::from(ar(m, k)) * i32::from(br(n, k)));
                assert_eq!(got, terms.sum::<i32>());
            }
        }
    }
}

/// Strips of `row` bytes, each of `rows` rows: address of (row, column) as a tensor copy puts it.
fn strip(base: usize, rows: usize, row: usize, r: usize, c: usize, kind: Swizzle) -> usize {
    let elements = row / 2;
    let logical = base + c / elements * rows * row + r * row + c % elements * 2;
    swizzle(logical as u64, kind) as usize
}

#[test]
fn descriptors_fetch_what_copies_store() {
    for kind in [Swizzle::B32, Swizzle::B64, Swizzle::B128] {
        let row = 16 * kind.chunks() as usize;
        let mut memory = vec![i16::MAX; 1 << 16];
        let base = 4096;
        let cells = || (0..64).flat_map(|r| (0..128).map(move |c| (r, c)));
        for (r, c) in cells() {
            memory[strip(base, 64, row, r, c, kind) / 2] = value(r, c);
        }
        let fetch = |d: Descriptor, mn: usize, k: usize, major| {
            memory[d.operand_address(mn as u32, k as u32, major) as usize / 2]
        };
        for step in 0..4 {
            // Rows are m or n, columns k.
            let (s, inside) = (step * 32 / row, step * 32 % row);
            let start = (base + s * 64 * row + inside) as u32;
            let d = Descriptor::of(start, 16, 8 * row as u32, kind).unwrap();
            for (mn, k) in (0..64).flat_map(|mn| (0..16).map(move |k| (mn, k))) {
                assert_eq!(fetch(d, mn, k, Major::K), value(mn, step * 16 + k));
            }
            // Rows are k, columns m or n.
            let start = (base + step * 16 * row) as u32;
            let d = Descriptor::of(start, 64 * row as u32, 8 * row as u32, kind).unwrap();
            for (mn, k) in (0..128).flat_map(|mn| (0..16).map(move |k| (mn, k))) {
                assert_eq!(fetch(d, mn, k, Major::Mn), value(step * 16 + k, mn));
            }
        }
    }
}

#[test]
fn unswizzled_core_matrices() {
    // Core matrices of 8 rows of 16 bytes; those along the rows adjoin, columns are 1024 apart.
    let store = |r: usize, c: usize| r / 8 * 128 + r % 8 * 16 + c / 8 * 1024 + c % 8 * 2;
    let d = |step: usize| Descriptor::of(step as u32 * 2048, 1024, 128, Swizzle::None).unwrap();
    for (mn, k) in (0..64).flat_map(|mn| (0..64).map(move |k| (mn, k))) {
        let address = d(k / 16).operand_address(mn as u32, k as u32 % 16, Major::K);
        assert_eq!(address as usize, store(mn, k));
        // MN-major: the contiguous eight elements run along m or n.
        let address = d(k / 16).operand_address(mn as u32, k as u32 % 16, Major::Mn) as usize;
        assert_eq!(address, mn / 8 * 128 + mn % 8 * 2 + k / 8 * 1024 + k % 8 * 16);
    }
}

#[test]
fn chunks_hold_eight_neighbours() {
    for kind in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128] {
        let d = Descriptor::of(2048 + 32, 8192, 1024, kind).unwrap();
        let k_major = d.operand_chunks(64, Major::K);
        let mn_major = d.operand_chunks(64, Major::Mn);
        for (mn, k) in (0..64u32).flat_map(|mn| (0..16u32).map(move |k| (mn, k))) {
            let chunk = k_major[(mn * 2 + k / 8) as usize];
            assert_eq!(d.operand_address(mn, k, Major::K), chunk + k % 8 * 2);
            let chunk = mn_major[(k * 8 + mn / 8) as usize];
            assert_eq!(d.operand_address(mn, k, Major::Mn), chunk + mn % 8 * 2);
        }
    }
}
