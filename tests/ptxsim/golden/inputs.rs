//! Inputs of the probes without matrices, as bits: no arithmetic that could differ elsewhere.

/// Pseudo-random numbers (SplitMix64) that depend on the key alone.
pub struct Draw(u64);

impl Draw {
    pub fn new(key: &[u64]) -> Self {
        Self(key.iter().fold(0, |state, part| {
            let mut draw = Self(state ^ part);
            draw.next()
        }))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    /// One of 0 to n - 1.
    pub fn below(&mut self, n: u32) -> u32 {
        (((self.next() >> 32) * u64::from(n)) >> 32) as u32
    }

    pub fn flag(&mut self) -> bool {
        self.below(2) == 1
    }

    /// f32 of either sign with an exponent from `low` on, one of `count`.
    fn float(&mut self, low: i32, count: u32) -> u32 {
        let exponent = (low + 127) as u32 + self.below(count);
        self.below(2) << 31 | exponent << 23 | self.below(1 << 23)
    }

    /// f32 half-way between two numbers of `bits` mantissa bits.
    fn tie(&mut self, bits: u32) -> u32 {
        let unit = 1 << (23 - bits);
        self.float(-30, 60) & !(unit - 1) | unit >> 1
    }
}

/// Both ends, the middle and the second value of every binade of both signs; then random values, half
/// of them between 2^-12 and 2^7, some half-way between two tf32.
pub fn sweep(i: u64) -> u32 {
    let mut draw = Draw::new(&[1, i]);
    match i {
        ..2048 => {
            let mantissa = [0, 1, 0x40_0000, 0x7F_FFFF][i as usize & 3];
            (i as u32 >> 2) << 23 | mantissa
        }
        _ if i.is_multiple_of(2) => draw.float(-12, 19),
        _ if i % 8 == 1 => draw.tie(10),
        _ => draw.next() as u32,
    }
}

/// Numbers at the ends of f32 and of what it is converted to, NaN of several payloads.
const CORNERS: [u32; 24] = [
    0x0000_0000, // zeros
    0x8000_0000,
    0x0000_0001, // subnormals
    0x8000_0001,
    0x007F_FFFF,
    0x0080_0000, // the least normal number
    0x8080_0000,
    0x7F7F_FFFF, // the largest number
    0xFF7F_FFFF,
    0x7F80_0000, // infinities
    0xFF80_0000,
    0x7FC0_0000, // NaN: quiet, with a payload, signalling
    0x7FC1_2345,
    0xFFC0_0001,
    0x7F81_2345,
    0xFF80_0001,
    0x3F80_0000, // 1
    0xBF80_0001,
    0x477F_E000, // f16: the largest, half-way beyond it, the least, half of it
    0x477F_F000,
    0x3380_0000,
    0x3300_0000,
    0x7F7F_8000, // bf16: half-way beyond the largest
    0x7E80_0001, // beyond 2^126
];

/// A row of `n` operands. They are read as pairs of 16-bit floats as well.
pub fn operands(n: usize, i: u64) -> Vec<u32> {
    let mut draw = Draw::new(&[2, n as u64, i]);
    let mut row: Vec<u32> = (0..n)
        .map(|_| match i % 6 {
            0 => CORNERS[draw.below(CORNERS.len() as u32) as usize],
            1 | 2 => draw.next() as u32,
            3 => draw.float(-12, 24),
            4 => draw.float(-70, 8), // products are subnormal
            _ if draw.flag() => draw.tie(7),
            _ => draw.tie(10),
        })
        .collect();
    // In half of these the third operand is next to the product of the others, of the other sign.
    if let [x, y, z] = row[..]
        && i % 12 == 3
    {
        let product = -f32::from_bits(x) * f32::from_bits(y);
        row[2] = product.to_bits() ^ z & 3;
    }
    row
}

/// A mask of lanes, never empty: all, one, or any.
pub fn mask(block: u64) -> u32 {
    let mut draw = Draw::new(&[3, block]);
    match block {
        0 => u32::MAX,
        1..4 => 1 << draw.below(32),
        _ => (draw.next() as u32 & draw.next() as u32) | 1 << draw.below(32),
    }
}
