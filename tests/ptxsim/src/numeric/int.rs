//! Integer instructions on bits.

/// An integer type: 8, 16, 32 or 64 bits.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Int {
    /// Width.
    pub bits: u32,
    /// Two's complement.
    pub signed: bool,
}

impl Int {
    /// `.u8`, `.u16`, `.u32` or `.u64`.
    pub const fn unsigned(bits: u32) -> Self {
        Self { bits, signed: false }
    }

    /// `.s8`, `.s16`, `.s32` or `.s64`.
    pub const fn signed(bits: u32) -> Self {
        Self { bits, signed: true }
    }

    /// The low bits that belong to the type.
    pub fn mask(self, x: u64) -> u64 {
        if self.bits >= 64 { x } else { x & ((1 << self.bits) - 1) }
    }

    /// Value of the low bits.
    pub fn value(self, x: u64) -> i128 {
        let x = self.mask(x);
        let negative = self.signed && x >> (self.bits - 1) & 1 == 1;
        i128::from(x) - if negative { 1 << self.bits } else { 0 }
    }

    /// Bits of the value of the type nearest to `x`.
    pub fn saturate(self, x: i128) -> u64 {
        let (low, high) = match self.signed {
            true => (-(1i128 << (self.bits - 1)), (1i128 << (self.bits - 1)) - 1),
            false => (0, (1i128 << self.bits) - 1),
        };
        self.mask(x.clamp(low, high) as u64)
    }

    /// `mul.lo`.
    pub fn mul_lo(self, a: u64, b: u64) -> u64 {
        self.mask(a.wrapping_mul(b))
    }

    /// `mul.hi`: the upper half of the product.
    pub fn mul_hi(self, a: u64, b: u64) -> u64 {
        let product = match self.signed {
            true => (self.value(a).wrapping_mul(self.value(b)) >> self.bits) as u64,
            false => ((u128::from(self.mask(a)) * u128::from(self.mask(b))) >> self.bits) as u64,
        };
        self.mask(product)
    }

    /// `mul.wide`, of 16 or 32 bits: the whole product.
    pub fn mul_wide(self, a: u64, b: u64) -> u64 {
        Self { bits: self.bits * 2, ..self }.mask((self.value(a) * self.value(b)) as u64)
    }

    /// `mul24`: the 48-bit product of the low 24 bits, its low 32 bits or, `high`, bits 16 to 47.
    pub fn mul24(self, a: u64, b: u64, high: bool) -> u32 {
        let narrow = Self { bits: 24, ..self };
        ((narrow.value(a) * narrow.value(b)) >> if high { 16 } else { 0 }) as u32
    }

    /// `sad`: c + |a − b|.
    pub fn sad(self, a: u64, b: u64, c: u64) -> u64 {
        self.mask(c.wrapping_add((self.value(a) - self.value(b)).unsigned_abs() as u64))
    }

    /// `bfe` of 32 or 64 bits: `length` bits from `start`, extended with the field's sign.
    pub fn bfe(self, a: u64, start: u32, length: u32) -> u64 {
        let (start, length) = (start & 0xFF, length & 0xFF);
        if length == 0 {
            return 0;
        }
        let top = (start + length - 1).min(self.bits - 1);
        let a = u128::from(self.mask(a));
        let sign = self.signed && a >> top & 1 == 1;
        let field = a >> start.min(64) & ((1u128 << length.min(self.bits)) - 1);
        // Bits beyond the register or the field are copies of the sign.
        let inside = if start > top { 0 } else { top + 1 - start };
        let extension = if sign { u64::MAX.checked_shl(inside).unwrap_or(0) } else { 0 };
        self.mask(field as u64 | extension)
    }

    /// `bfi` of 32 or 64 bits: the low `length` bits of `a` put into `b` at `start`.
    pub fn bfi(self, a: u64, b: u64, start: u32, length: u32) -> u64 {
        let (start, length) = (start & 0xFF, length & 0xFF);
        if start >= self.bits {
            return self.mask(b);
        }
        let field = (((1u128 << length.min(64)) - 1) << start) as u64;
        let moved = (u128::from(a) << start) as u64;
        self.mask((b & !field) | (moved & field))
    }

    /// `bfind`: position of the highest bit that is not the sign; all ones when there is none.
    /// With `shift_amount` the left shift that brings it to the top.
    pub fn bfind(self, a: u64, shift_amount: bool) -> u32 {
        let value = self.value(a);
        let magnitude = if value < 0 { !value } else { value } as u64;
        match magnitude.checked_ilog2() {
            None => u32::MAX,
            Some(top) if shift_amount => self.bits - 1 - top,
            Some(top) => top,
        }
    }

    /// `clz`.
    pub fn clz(self, a: u64) -> u32 {
        self.mask(a).leading_zeros() - (64 - self.bits)
    }

    /// `popc`.
    pub fn popc(self, a: u64) -> u32 {
        self.mask(a).count_ones()
    }

    /// `brev`.
    pub fn brev(self, a: u64) -> u64 {
        self.mask(a).reverse_bits() >> (64 - self.bits)
    }

    /// `a + b + carry`, and the carry out (`add.cc`, `addc`, `addc.cc`).
    pub fn add_carry(self, a: u64, b: u64, carry: bool) -> (u64, bool) {
        let sum = u128::from(self.mask(a)) + u128::from(self.mask(b)) + u128::from(carry);
        (self.mask(sum as u64), sum >> self.bits != 0)
    }

    /// `a - b - borrow`, and the borrow out (`sub.cc`, `subc`, `subc.cc`).
    pub fn sub_borrow(self, a: u64, b: u64, borrow: bool) -> (u64, bool) {
        let (a, b) = (self.mask(a), u128::from(self.mask(b)) + u128::from(borrow));
        (self.mask(a.wrapping_sub(b as u64)), u128::from(a) < b)
    }

    /// `shl`: amounts beyond the width give 0.
    pub fn shl(self, a: u64, amount: u32) -> u64 {
        if amount >= self.bits { 0 } else { self.mask(a << amount) }
    }

    /// `shr`: amounts beyond the width give 0 or copies of the sign.
    pub fn shr(self, a: u64, amount: u32) -> u64 {
        self.mask((self.value(a) >> amount.min(self.bits)) as u64)
    }

    /// `szext`: the low `n` bits extended to 32; a width above 32 is clamped, or wraps.
    pub fn szext(self, a: u32, n: u32, wrap: bool) -> u32 {
        let n = if wrap { n & 31 } else { n.min(32) };
        if n == 0 { 0 } else { Self { bits: n, ..self }.value(a.into()) as u32 }
    }
}

/// Mode of `prmt`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are the instruction's
pub enum Permute {
    Default,
    F4e,
    B4e,
    Rc8,
    Ecl,
    Ecr,
    Rc16,
}

impl Permute {
    /// Mode of a modifier.
    pub fn parse(modifier: &str) -> Option<Self> {
        Some(match modifier {
            "f4e" => Self::F4e,
            "b4e" => Self::B4e,
            "rc8" => Self::Rc8,
            "ecl" => Self::Ecl,
            "ecr" => Self::Ecr,
            "rc16" => Self::Rc16,
            _ => return None,
        })
    }

    /// `prmt.b32`: four of the eight bytes of `b:a`; in the default mode bit 3 of a selector
    /// replicates the byte's sign.
    pub fn apply(self, a: u32, b: u32, selector: u32) -> u32 {
        let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
        let s = selector & 3;
        u32::from_le_bytes(std::array::from_fn(|i| {
            let i = i as u32;
            let index = match self {
                Self::Default => selector >> (4 * i) & 7,
                Self::F4e => s + i,
                Self::B4e => s.wrapping_sub(i) & 7,
                Self::Rc8 => s,
                Self::Ecl => s.max(i),
                Self::Ecr => s.min(i),
                Self::Rc16 => (s & 1) * 2 + (i & 1),
            };
            let byte = bytes[index as usize];
            let replicate = self == Self::Default && selector >> (4 * i + 3) & 1 == 1;
            if replicate { ((byte as i8) >> 7) as u8 } else { byte }
        }))
    }
}

/// `lop3.b32`: bit `4a + 2b + c` of `table` for each bit position.
pub fn lop3(a: u32, b: u32, c: u32, table: u8) -> u32 {
    (0..8).filter(|row| table >> row & 1 == 1).fold(0, |result, row| {
        let pick = |x: u32, bit: u32| if row >> bit & 1 == 1 { x } else { !x };
        result | (pick(a, 2) & pick(b, 1) & pick(c, 0))
    })
}

/// `shf.{l,r}.{wrap,clamp}.b32`: 32 bits of `b:a` shifted left (`left`) or right.
pub fn funnel_shift(a: u32, b: u32, amount: u32, left: bool, wrap: bool) -> u32 {
    let amount = if wrap { amount & 31 } else { amount.min(32) };
    let both = u64::from(b) << 32 | u64::from(a);
    if left { ((both << amount) >> 32) as u32 } else { (both >> amount) as u32 }
}

/// `dp4a`: c plus the dot product of four bytes; the flags are the signedness of `a` and `b`.
pub fn dp4a(a: u32, b: u32, c: u32, a_signed: bool, b_signed: bool) -> u32 {
    let (at, bt) = (Int { bits: 8, signed: a_signed }, Int { bits: 8, signed: b_signed });
    (0..4).fold(c, |sum, i| {
        let product = at.value(u64::from(a) >> (8 * i)) * bt.value(u64::from(b) >> (8 * i));
        sum.wrapping_add(product as u32)
    })
}

/// `dp2a`: c plus the dot product of two 16-bit elements of `a` with the low or `high` two bytes
/// of `b`.
pub fn dp2a(a: u32, b: u32, c: u32, a_signed: bool, b_signed: bool, high: bool) -> u32 {
    let (at, bt) = (Int { bits: 16, signed: a_signed }, Int { bits: 8, signed: b_signed });
    let b = b >> if high { 16 } else { 0 };
    (0..2).fold(c, |sum, i| {
        let product = at.value(u64::from(a) >> (16 * i)) * bt.value(u64::from(b) >> (8 * i));
        sum.wrapping_add(product as u32)
    })
}
