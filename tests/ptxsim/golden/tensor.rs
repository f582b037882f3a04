//! Operands of the matrix products, and where they lie.

use super::inputs::Draw;

/// Type of a and b.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Element {
    F16,
    Bf16,
    Tf32,
}

/// d = a b + c with a of m × k, b of k × 8: mma.sync of a warp (m = 16), or wgmma (m = 64) with a and b
/// in shared memory; k is 16, of tf32 8.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    pub warpgroup: bool,
    pub element: Element,
    /// c and d of f16, not f32.
    pub half: bool,
}

/// Columns of b.
pub const N: usize = 8;

/// What the operands of a block are made to show; the block's number, modulo their count, chooses.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Class {
    /// Numbers around 1.
    Plain,
    /// Two large products cancel; the others spread over 27 binades below.
    Cancel,
    /// A large product and c cancel.
    CancelC,
    /// Exponents all over the place.
    Spread,
    /// a is subnormal.
    Subnormal,
    /// Infinities, NaN of several payloads, rows of negative zeros.
    Special,
    /// A large c, products of one sign below its last bit.
    Below,
    /// Multiples of 1/4 whose sums are exact; tf32 with bits that it does not have.
    Exact,
}

pub const CLASSES: [Class; 8] = [
    Class::Plain,
    Class::Cancel,
    Class::CancelC,
    Class::Spread,
    Class::Subnormal,
    Class::Special,
    Class::Below,
    Class::Exact,
];

impl Class {
    pub fn of(block: usize) -> Self {
        CLASSES[block % CLASSES.len()]
    }
}

/// Bits of exponent and mantissa.
#[derive(Clone, Copy)]
struct Format {
    exponent: u32,
    mantissa: u32,
}

/// ±1.fraction · 2^exponent, with 23 bits of fraction.
#[derive(Clone, Copy)]
struct Number {
    negative: bool,
    exponent: i32,
    fraction: u32,
}

const F16: Format = Format { exponent: 5, mantissa: 10 };
const F32: Format = Format { exponent: 8, mantissa: 23 };

impl Format {
    /// Exponent of the least normal number.
    fn least(self) -> i32 {
        2 - (1 << (self.exponent - 1))
    }

    fn sign(self, negative: bool) -> u32 {
        u32::from(negative) << (self.exponent + self.mantissa)
    }

    fn infinity(self) -> u32 {
        ((1 << self.exponent) - 1) << self.mantissa
    }

    /// Bits of a number, cut; it must not be too large.
    fn encode(self, x: Number) -> u32 {
        let fraction = x.fraction >> (23 - self.mantissa);
        let sign = self.sign(x.negative);
        match x.exponent - self.least() {
            above @ 0.. => sign | (above as u32 + 1) << self.mantissa | fraction,
            below => sign | (1 << self.mantissa | fraction).checked_shr(-below as u32).unwrap_or(0),
        }
    }
}

impl Draw {
    /// A number with an exponent up to `high`, one of `count`.
    fn number(&mut self, high: i32, count: u32) -> Number {
        let exponent = high - self.below(count) as i32;
        Number { negative: self.flag(), exponent, fraction: self.below(1 << 23) }
    }

    /// Infinity or NaN.
    fn special(&mut self, format: Format) -> u32 {
        let payload = if self.flag() { 0 } else { 1 + self.below((1 << format.mantissa) - 1) };
        format.sign(self.flag()) | format.infinity() | payload
    }
}

/// A word of a thread, and the half of it, of 16-bit elements.
struct Place {
    thread: usize,
    word: usize,
    half: usize,
}

const LARGE: i32 = 12;

impl Tensor {
    pub fn shape(self) -> [usize; 3] {
        let m = if self.warpgroup { 64 } else { 16 };
        [m, N, if self.element == Element::Tf32 { 8 } else { 16 }]
    }

    fn operand(self) -> Format {
        match self.element {
            Element::F16 => F16,
            Element::Bf16 => Format { exponent: 8, mantissa: 7 },
            Element::Tf32 => Format { exponent: 8, mantissa: 10 },
        }
    }

    fn sum(self) -> Format {
        if self.half { F16 } else { F32 }
    }

    fn threads(self) -> usize {
        if self.warpgroup { 128 } else { 32 }
    }

    /// Words of a thread that hold c or d.
    fn sums(self) -> usize {
        if self.half { 2 } else { 4 }
    }

    /// Words of a thread before c: a, then b.
    fn before_c(self) -> usize {
        if self.warpgroup { 8 } else { 6 }
    }

    /// Words of a thread.
    pub fn row(self) -> usize {
        self.before_c() + self.sums()
    }

    /// Element (row, k) of a, or (column, k) of b transposed.
    fn place(self, row: usize, k: usize, right: bool) -> Place {
        // Elements in a word.
        let per = if self.element == Element::Tf32 { 1 } else { 2 };
        let half = k % per;
        if self.warpgroup {
            // A thread has 8 words: a chunk of a row of a, and one of b.
            let (chunk, word) = (k / (4 * per), k / per % 4);
            let thread = row / 8 * 16 + chunk * 8 + row % 8;
            return Place { thread, word: word + if right { 4 } else { 0 }, half };
        }
        let (thread, high) = (row % 8 * 4 + k / per % 4, k / (4 * per));
        let word = if right { 4 + high } else { row / 8 + 2 * high };
        Place { thread, word, half }
    }

    /// Element of c or d.
    fn place_of_sum(self, row: usize, column: usize) -> Place {
        let thread = row / 16 * 32 + row % 8 * 4 + column / 2;
        let (high, odd) = (row % 16 / 8, column % 2);
        match self.half {
            true => Place { thread, word: high, half: odd },
            false => Place { thread, word: 2 * high + odd, half: 0 },
        }
    }

    /// The rows of a block's threads.
    pub fn words(self, block: u32) -> Vec<u32> {
        let [m, n, k] = self.shape();
        let mut words = vec![0; self.threads() * self.row()];
        let mut set = |at: Place, bits: u32| {
            words[at.thread * self.row() + at.word] |= bits << (16 * at.half);
        };
        let class = Class::of(block as usize);
        for row in 0..m {
            (0..k).for_each(|k| set(self.place(row, k, false), self.a(class, block, row, k)));
            for column in 0..n {
                let mut at = self.place_of_sum(row, column);
                at.word += self.before_c();
                set(at, self.c(class, block, row, column));
            }
        }
        for column in 0..n {
            (0..k).for_each(|k| set(self.place(column, k, true), self.b(class, block, column, k)));
        }
        words
    }

    /// Bits of a [m][k], b [n][k] and c [m][n] from the rows of a block's threads.
    pub fn operands(self, words: &[u32]) -> [Vec<u32>; 3] {
        let [m, n, k] = self.shape();
        let wide = self.element == Element::Tf32;
        let get = |at: Place| read(words, self.row(), at, wide);
        let matrix = |rows: usize, right: bool| {
            let at = (0..rows).flat_map(|row| (0..k).map(move |k| (row, k)));
            at.map(|(row, k)| get(self.place(row, k, right))).collect()
        };
        let c: Vec<u32> =
            words.chunks(self.row()).flat_map(|w| &w[self.before_c()..]).copied().collect();
        [matrix(m, false), matrix(n, true), self.results(&c)]
    }

    /// Bits of d [m][n] from the rows that a block's threads have written.
    pub fn results(self, words: &[u32]) -> Vec<u32> {
        let [m, n, _] = self.shape();
        let at = (0..m).flat_map(|row| (0..n).map(move |column| (row, column)));
        let get =
            |(row, column)| read(words, self.sums(), self.place_of_sum(row, column), !self.half);
        at.map(get).collect()
    }

    /// Rows of words that hold `d`: the reverse of [`Self::results`].
    pub fn rows(self, d: &[u32]) -> Vec<u32> {
        let mut words = vec![0; self.threads() * self.sums()];
        for (i, bits) in d.iter().enumerate() {
            let at = self.place_of_sum(i / N, i % N);
            words[at.thread * self.sums() + at.word] |= bits << (16 * at.half);
        }
        words
    }

    fn key(self, block: u32, matrix: u64, row: usize, column: usize) -> Draw {
        let (warpgroup, half) = (self.warpgroup.into(), self.half.into());
        let place = [block.into(), matrix, row as u64, column as u64];
        Draw::new(&[&[4, self.element as u64, warpgroup, half], &place[..]].concat())
    }

    /// Where the large products of a row are, and the first factor of the first.
    fn pivots(self, block: u32, row: usize) -> ([usize; 2], Number) {
        let mut draw = self.key(block, 3, row, 0);
        let k = self.shape()[2];
        let first = draw.below(k as u32) as usize;
        let second = (first + 1 + draw.below(k as u32 - 1) as usize) % k;
        let x = draw.number(LARGE, 1);
        let below = (1 << (23 - self.operand().mantissa)) - 1;
        ([first, second], Number { fraction: x.fraction & !below, ..x })
    }

    fn a(self, class: Class, block: u32, row: usize, k: usize) -> u32 {
        let (format, mut draw) = (self.operand(), self.key(block, 0, row, k));
        let ([first, second], large) = self.pivots(block, row);
        let number = match class {
            Class::Exact => return self.exact(&mut draw),
            Class::Special if row % 8 == 7 => return self.register(format.sign(true)),
            Class::Special if row.is_multiple_of(4) && k == first => {
                return self.register(draw.special(format));
            }
            Class::Cancel | Class::CancelC if k == first => large,
            Class::Cancel if k == second => Number { negative: !large.negative, ..large },
            Class::Plain | Class::Special => draw.number(0, 4),
            Class::Cancel | Class::CancelC => draw.number(LARGE - 1, 27),
            Class::Spread => draw.number(6, 17),
            Class::Subnormal => draw.number(format.least() - 1, format.mantissa),
            Class::Below => {
                let high = LARGE - self.sum().mantissa as i32 - 1;
                Number { negative: row % 2 == 1, ..draw.number(high, 3) }
            }
        };
        self.register(format.encode(number))
    }

    fn b(self, class: Class, block: u32, column: usize, k: usize) -> u32 {
        let (format, mut draw) = (self.operand(), self.key(block, 1, column, k));
        // The same along k, so that products cancel where a does.
        let mut same = self.key(block, 1, column, self.shape()[2]);
        let number = match class {
            Class::Exact => return self.exact(&mut draw),
            Class::Special if draw.below(8) == 0 => {
                return self.register(format.sign(draw.flag()));
            }
            Class::Plain | Class::Special => draw.number(0, 4),
            Class::Cancel => same.number(0, 2),
            Class::CancelC => Number { negative: false, exponent: 0, fraction: 0 },
            Class::Spread => draw.number(6, 17),
            Class::Subnormal => draw.number(11, 24),
            Class::Below => Number { negative: false, ..same.number(0, 1) },
        };
        self.register(format.encode(number))
    }

    fn c(self, class: Class, block: u32, row: usize, column: usize) -> u32 {
        let (format, mut draw) = (self.sum(), self.key(block, 2, row, column));
        let zero = format.sign(draw.flag());
        let number = match (class, draw.below(8)) {
            (Class::Special, _) if row % 8 == 7 => return zero,
            (Class::Special, 0) => return draw.special(format),
            (Class::Special, 1) | (Class::Cancel, ..4) => return zero,
            (Class::Plain | Class::Special, _) => draw.number(2, 6),
            (Class::Cancel, _) => draw.number(LARGE, 28),
            (Class::CancelC, _) => {
                let (_, large) = self.pivots(block, row);
                Number { negative: !large.negative, ..large }
            }
            (Class::Spread, _) => draw.number(LARGE, 33),
            (Class::Subnormal, _) => draw.number(self.operand().least() + 11, 32),
            (Class::Below, _) => draw.number(LARGE, 1),
            (Class::Exact, _) => Number { fraction: 0, ..draw.number(3, 5) },
        };
        format.encode(number)
    }

    /// ±1, ±3/2, ±2 or ±3.
    fn exact(self, draw: &mut Draw) -> u32 {
        let fraction = draw.below(2) << 22;
        let bits = self.operand().encode(Number { fraction, ..draw.number(1, 2) });
        let unread = if self.element == Element::Tf32 { draw.below(1 << 13) } else { 0 };
        self.register(bits) | unread
    }

    /// A number of tf32 lies in the upper bits of its register.
    fn register(self, bits: u32) -> u32 {
        if self.element == Element::Tf32 { bits << 13 } else { bits }
    }
}

fn read(words: &[u32], row: usize, at: Place, wide: bool) -> u32 {
    let word = words[at.thread * row + at.word];
    if wide { word } else { word >> (16 * at.half) & 0xFFFF }
}
