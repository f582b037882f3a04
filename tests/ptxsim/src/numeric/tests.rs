//! Directed rounding against exact integers, corner cases and bit-level tables.
use super::convert::*;
use super::half::{Half, pair2};
use super::int::*;
use super::*;
use proptest::prelude::*;

const MODES: [Rounding; 4] = [Rounding::Nearest, Rounding::Zero, Rounding::Down, Rounding::Up];
/// Exact values are integers times 2^-GRID.
const GRID: i32 = 100;

/// A float whose products and sums lie on the grid.
fn float() -> impl Strategy<Value = f32> {
    (any::<bool>(), 0u32..1 << 23, 118u32..132)
        .prop_map(|(sign, m, e)| f32::from_bits(u32::from(sign) << 31 | e << 23 | m))
}

fn grid(x: f64) -> i128 {
    let scaled = x * 2f64.powi(GRID);
    assert!(scaled.abs() < 2f64.powi(126));
    scaled as i128
}

/// `got` must be the neighbour of `exact` that `rounding` names.
fn check(got: f32, exact: i128, rounding: Rounding) {
    let [below, value, above] = [got.next_down(), got, got.next_up()].map(|x| grid(f64::from(x)));
    if value == exact {
        return;
    }
    let distance = (value - exact).abs();
    let ok = match rounding {
        Rounding::Down => value < exact && exact < above,
        Rounding::Up => below < exact && exact < value,
        Rounding::Zero if exact > 0 => value < exact && exact < above,
        Rounding::Zero => below < exact && exact < value,
        _ => {
            let other = (above - exact).abs().min((below - exact).abs());
            distance < other || (distance == other && got.to_bits() & 1 == 0)
        }
    };
    assert!(ok, "{got:e} for {exact} / 2^{GRID}, {rounding:?}");
}

proptest! {
    #[test]
    fn sums_and_products(a in float(), b in float(), c in float()) {
        let [x, y, z] = [a, b, c].map(f64::from);
        for mode in MODES {
            check(add_f32(a, b, mode), grid(x) + grid(y), mode);
            check(sub_f32(a, b, mode), grid(x) - grid(y), mode);
            check(mul_f32(a, b, mode), grid(x * y), mode);
            check(fma_f32(a, b, c, mode), grid(x * y) + grid(z), mode);
        }
    }

    #[test]
    fn quotients_and_roots(a in float(), b in float()) {
        let a = a.abs();
        for mode in MODES {
            // q ≤ a / b exactly when q · b ≤ a for b > 0; products of two f32 are exact in f64.
            let b = b.abs();
            let at_most = |q: f32| f64::from(q) * f64::from(b) <= f64::from(a);
            let q = div_f32(a, b, mode);
            let root_at_most = |s: f32| f64::from(s) * f64::from(s) <= f64::from(a);
            let s = sqrt_f32(a, mode);
            match mode {
                Rounding::Up => {
                    prop_assert!(f64::from(q.next_down()) * f64::from(b) < f64::from(a));
                    prop_assert!(f64::from(q) * f64::from(b) >= f64::from(a));
                    prop_assert!(f64::from(s.next_down()).powi(2) < f64::from(a));
                    prop_assert!(f64::from(s) * f64::from(s) >= f64::from(a));
                }
                Rounding::Zero | Rounding::Down => {
                    prop_assert!(at_most(q));
                    prop_assert!(!at_most(q.next_up()));
                    prop_assert!(root_at_most(s) && !root_at_most(s.next_up()));
                }
                _ => prop_assert_eq!((q, s), (a / b, a.sqrt())),
            }
            let negative = div_f32(-a, b, match mode {
                Rounding::Up => Rounding::Down,
                Rounding::Down => Rounding::Up,
                same => same,
            });
            prop_assert_eq!(negative, -q);
        }
    }

    #[test]
    fn generic_rounding_equals_hardware(bits in any::<u64>()) {
        let x = f64::from_bits(bits);
        let narrow = f64::from(f32::from_bits(bits as u32)) * (1.0 + 2f64.powi(-30));
        for x in [x, narrow] {
            let got = Format::F32.round(x, Rounding::Nearest);
            prop_assert!(x.is_nan() || got == (x as f32).to_bits());
        }
    }

    #[test]
    fn half_conversions_equal_the_half_crate(bits in any::<u32>()) {
        let x = f32::from_bits(bits);
        prop_assume!(!x.is_nan());
        let [f, b] = [Half::F16, Half::Bf16].map(|kind| kind.from_f32(x, Rounding::Nearest));
        prop_assert_eq!(f, ::half::f16::from_f32(x).to_bits());
        prop_assert_eq!(b, ::half::bf16::from_f32(x).to_bits());
    }

    #[test]
    fn half_fma_rounds_once(a in any::<u16>(), b in any::<u16>(), c in any::<u16>()) {
        // Every finite f16 is an integer times 2^-24, so products lie on 2^-48.
        let [x, y, z] = [a, b, c].map(|h| f64::from(Half::F16.to_f32(h)));
        prop_assume!([x, y, z].iter().all(|v| v.is_finite()));
        let exact = (x * y * 2f64.powi(48)) as i128 + (z * 2f64.powi(48)) as i128;
        let got = Half::F16.fma(a, b, c);
        let distance = |h: u16| {
            let value = f64::from(Half::F16.to_f32(h)) * 2f64.powi(48);
            (value as i128 - exact).abs()
        };
        if got & 0x7FFF == 0x7C00 {
            prop_assert!(exact.abs() >= 65520i128 << 48);
        } else {
            let magnitude = got & 0x7FFF;
            let up = distance(got + 1);
            if magnitude < 0x7BFF {
                prop_assert!(distance(got) <= up && (distance(got) < up || got & 1 == 0));
            }
            if magnitude > 0 {
                let down = distance(got - 1);
                prop_assert!(distance(got) <= down && (distance(got) < down || got & 1 == 0));
            }
        }
    }

    #[test]
    fn fields_bit_by_bit(a in any::<u64>(), b in any::<u64>(), start in 0u32..256, length in 0u32..256, wide: bool) {
        let bits = if wide { 64 } else { 32 };
        for signed in [false, true] {
            let ty = Int { bits, signed };
            let msb = bits - 1;
            let sign = if !signed || length == 0 { 0 } else { a >> (start + length - 1).min(msb) & 1 };
            let expected = (0..bits).fold(0u64, |r, i| {
                let inside = i < length && i + start <= msb;
                r | (if inside { a >> (i + start) & 1 } else { sign }) << i
            });
            prop_assert_eq!(ty.bfe(a, start, length), expected);
        }
        let ty = Int::unsigned(bits);
        let expected = (0..bits).fold(0u64, |r, i| {
            let inside = i >= start && i < start + length;
            r | (if inside { a >> (i - start) & 1 } else { b >> i & 1 }) << i
        });
        prop_assert_eq!(ty.bfi(a, b, start, length), expected);
    }

    #[test]
    fn integers_at_width_64(a: u64, b: u64, t: u8) {
        let [s, u] = [Int::signed(64), Int::unsigned(64)];
        let wide = i128::from(a as i64) * i128::from(b as i64);
        prop_assert_eq!(s.mul_hi(a, b), (wide >> 64) as u64);
        prop_assert_eq!(u.mul_hi(a, b), ((u128::from(a) * u128::from(b)) >> 64) as u64);
        prop_assert_eq!(u.add_carry(a, b, false), a.overflowing_add(b));
        prop_assert_eq!(u.sub_borrow(a, b, false), a.overflowing_sub(b));
        prop_assert_eq!(u.brev(a), a.reverse_bits());
        let (x, y, z) = (a as u32, b as u32, (a >> 32) as u32);
        let bit = |v: u32, i: u32| v >> i & 1;
        let expected = (0..32)
            .fold(0, |r, i| r | (u32::from(t) >> (bit(x, i) * 4 + bit(y, i) * 2 + bit(z, i)) & 1) << i);
        prop_assert_eq!(lop3(x, y, z, t), expected);
    }
}

#[test]
fn zeros_overflow_and_subnormals_follow_the_mode() {
    use Rounding::*;
    let bits = |x: f32| x.to_bits();
    assert_eq!(bits(add_f32(1.0, -1.0, Down)), 0x8000_0000);
    assert_eq!(bits(add_f32(1.0, -1.0, Up)), 0);
    assert_eq!(bits(add_f32(0.0, 0.0, Down)), 0);
    assert_eq!(mul_f32(f32::MAX, 2.0, Down), f32::MAX);
    assert_eq!(mul_f32(f32::MAX, 2.0, Up), f32::INFINITY);
    assert_eq!(mul_f32(f32::MAX, -2.0, Zero), f32::MIN);
    let tiny = f32::from_bits(1);
    assert_eq!(bits(mul_f32(tiny, 0.25, Up)), 1);
    assert_eq!(bits(mul_f32(tiny, -0.25, Down)), 0x8000_0001);
    assert_eq!(bits(mul_f32(tiny, -0.25, Up)), 0x8000_0000);
    assert_eq!(bits(fma_f32(f32::INFINITY, 0.0, 1.0, Nearest)), 0x7FFF_FFFF);
    assert_eq!(bits(ftz(f32::from_bits(0x8000_0001))), 0x8000_0000);
    assert_eq!(bits(rcp_f32(-0.0, Zero)), bits(f32::NEG_INFINITY));
}

#[test]
fn minimum_maximum_and_comparisons() {
    assert_eq!(min_f32(0.0, -0.0, false).to_bits(), 0x8000_0000);
    assert_eq!(max_f32(-0.0, 0.0, false).to_bits(), 0);
    assert_eq!(min_f32(f32::NAN, 2.0, false), 2.0);
    assert_eq!(max_f32(2.0, f32::NAN, true).to_bits(), 0x7FFF_FFFF);
    assert_eq!(Half::F16.min(0x7E01, 0x3C00, true), 0x7FFF);
    assert_eq!(Half::Bf16.max(0x7FC1, 0x3F80, false), 0x3F80);
    for (name, ordered, unordered) in [
        ("eq", [false, true, false], false),
        ("ne", [true, false, true], false),
        ("lt", [true, false, false], false),
        ("geu", [false, true, true], true),
        ("neu", [true, false, true], true),
        ("num", [true; 3], false),
        ("nan", [false; 3], true),
    ] {
        let compare = Compare::parse(name).unwrap();
        assert_eq!([1.0, 2.0, 3.0].map(|a| compare.f32(a, 2.0)), ordered, "{name}");
        assert_eq!(compare.f64(f64::NAN, 1.0), unordered, "{name}");
    }
    let lo = Compare::parse("lo").unwrap();
    assert!(lo.int(Int::unsigned(32), 1, u64::from(u32::MAX)));
    assert!(!lo.int(Int::signed(32), 1, u64::from(u32::MAX)));
}

#[test]
fn conversions() {
    use Rounding::*;
    let s32 = Int::signed(32);
    assert_eq!(float_to_int(2.5, s32, Nearest, false), 2);
    assert_eq!(float_to_int(-1.5, s32, Down, false), 0xFFFF_FFFE);
    assert_eq!(float_to_int(1e20, s32, Zero, false), 0x7FFF_FFFF);
    assert_eq!(float_to_int(-7.0, Int::unsigned(8), Zero, false), 0);
    assert_eq!(float_to_int(f64::NAN, s32, Zero, false), 0);
    assert_eq!(float_to_int(f64::NAN, s32, Zero, true), 1 << 31);
    assert_eq!(float_to_int(f64::NAN, Int::unsigned(64), Zero, false), 1 << 63);
    assert_eq!(int_to_f32(0x0100_0001, Nearest), 16_777_216.0);
    assert_eq!(int_to_f32(0x0100_0001, Up), 16_777_218.0);
    assert_eq!(int_to_f32(i128::from(u64::MAX), Zero), 2f32.powi(64).next_down());
    assert_eq!(int_to_f64((1 << 53) + 1, Up), 2f64.powi(53) + 2.0);
    assert_eq!(int_to_f64(-(1 << 53) - 1, Zero), -2f64.powi(53));
    assert_eq!(int_to_int(0x180, Int::unsigned(16), Int::signed(8), true), 0x7F);
    assert_eq!(f32_to_tf32(f32::from_bits(0x3F80_1000), NearestAway), 0x3F80_2000);
    assert_eq!(f32_to_tf32(f32::from_bits(0x3F80_1000), Nearest), 0x3F80_0000);
    assert_eq!(f32_to_tf32(f32::NAN, Nearest), 0x7FFF_FFFF);
    assert_eq!(f32_to_tf32(f32::from_bits(0x7F80_0001), NearestAway), 0x7F80_0000);
    assert_eq!(f32_to_tf32(f32::from_bits(0xFFC0_1234), NearestAway), 0xFFC0_0000);
    assert_eq!(Half::F16.from_f32(65520.0, Zero), 0x7BFF);
    assert_eq!(Half::Bf16.relu(0xBF80), 0);
    assert_eq!(pair2(0x3F80_3F80, 0x3F80_4000, |a, b| Half::Bf16.add(a, b)), 0x4000_4040);
}

#[test]
fn byte_and_shift_instructions() {
    let (a, b) = (0x3322_1180, 0x7766_5544);
    for (mode, selector, expected) in [
        (Permute::Default, 0x7531, 0x7755_3311),
        (Permute::Default, 0x0080, 0x8080_FF80),
        (Permute::F4e, 1, 0x4433_2211),
        (Permute::B4e, 1, 0x6677_8011),
        (Permute::Rc8, 2, 0x2222_2222),
        (Permute::Ecl, 2, 0x3322_2222),
        (Permute::Ecr, 1, 0x1111_1180),
        (Permute::Rc16, 1, 0x3322_3322),
    ] {
        assert_eq!(mode.apply(a, b, selector), expected, "{mode:?}");
    }
    assert_eq!(funnel_shift(0x8000_0000, 1, 1, true, true), 3);
    assert_eq!(funnel_shift(1, 2, 40, true, false), 1);
    assert_eq!(funnel_shift(1, 2, 40, false, false), 2);
    assert_eq!(funnel_shift(0x100, 0, 40, false, true), 1);
    assert_eq!(dp4a(0xFF01_0203, 0x0101_0101, 10, true, true), 15);
    assert_eq!(dp2a(0xFFFF_0002, 0x0302_0000, 0, true, true, true), 1);
    assert_eq!(Int::signed(32).bfind(u64::from(-8i32 as u32), false), 2);
    assert_eq!(Int::unsigned(32).bfind(0, false), u32::MAX);
    assert_eq!(Int::signed(32).sad(0xFFFF_FFFF, 2, 1), 4);
    assert_eq!(Int::signed(32).mul24(0xFF_FFFF, 2, false), -2i32 as u32);
    assert_eq!(Int::signed(32).shr(0x8000_0000, 99), 0xFFFF_FFFF);
    assert_eq!(Int::signed(32).szext(0x80, 8, false), 0xFFFF_FF80);
}
