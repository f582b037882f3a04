//! Floating-point arithmetic of f32 and f64, exact and approximate.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;

use crate::ast::Type;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::numeric::approx::Approx;
use crate::numeric::{self, Rounding};
use crate::program::{Decoded, Dst, Lanes, Src};

const ROUNDINGS: [(&str, Rounding); 4] = [
    ("rn", Rounding::Nearest),
    ("rz", Rounding::Zero),
    ("rm", Rounding::Down),
    ("rp", Rounding::Up),
];

/// What happens to operands and results of f32.
#[derive(Clone, Copy)]
struct Mode {
    flush: bool,
    saturate: bool,
}

impl Mode {
    fn take(op: &mut Opcode<'_>) -> Self {
        Self { flush: op.take("ftz"), saturate: op.take("sat") }
    }

    #[inline]
    fn input(self, v: u64) -> f32 {
        let v = f32::from_bits(v as u32);
        if self.flush { numeric::ftz(v) } else { v }
    }

    #[inline]
    fn output(self, v: f32) -> u64 {
        let v = if self.flush { numeric::ftz(v) } else { v };
        let v = if self.saturate { numeric::saturate(v) } else { v };
        v.to_bits().into()
    }
}

/// Destination and sources, all of one type.
fn operands<const N: usize>(op: &Opcode<'_>, env: &Env<'_>, ty: Type) -> Result<(Dst, Vec<Src>)> {
    let [d, rest @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    if rest.len() != N {
        return Err(format!("{} operands, {} expected", rest.len() + 1, N + 1));
    }
    let sources = rest.iter().map(|o| env.src(o, ty)).collect::<Result<_>>()?;
    Ok((env.dst(d, ty)?, sources))
}

/// add, sub, mul, mad, fma, div, min, max, abs, neg, copysign of f32 and f64, and tanh and the like.
pub fn arithmetic(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type) -> Result<Decoded> {
    match op.root() {
        "add" | "sub" | "mul" | "fma" | "mad" => rounded(op, env, ty),
        "min" | "max" => extremum(op, env, ty),
        "abs" | "neg" => sign(op, env, ty),
        "copysign" => {
            let (d, s) = operands::<2>(op, env, ty)?;
            let bit = 1u64 << (8 * ty.size() - 1);
            // The sign is the first operand's.
            Ok(Decoded::next(Class::Float, move |cx| {
                cx.map2(d, &s[0], &s[1], |a, b| b & (bit - 1) | a & bit);
            }))
        }
        "div" => division(op, env, ty),
        root => Err(format!("unknown opcode {root} of .{ty}")),
    }
}

/// `fma.rn.f32` of a warp, by the processor's own instruction where it has one.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn fma_nearest(mode: Mode, a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
    let native = target_cfg_f!(any(target_feature = "fma", target_arch = "aarch64"));
    let mut d = [0; 32];
    for (l, d) in d.iter_mut().enumerate() {
        let (a, b, c) = (mode.input(a[l]), mode.input(b[l]), mode.input(c[l]));
        *d = mode.output(if native {
            numeric::canonical(a.mul_add(b, c))
        } else {
            numeric::fma_f32(a, b, c, Rounding::Nearest)
        });
    }
    d
}

fn rounded(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type) -> Result<Decoded> {
    let root = op.root();
    let rounding = match op.one_of(&ROUNDINGS) {
        None if root == "fma" => return Err("the rounding is missing".into()),
        rounding => rounding.unwrap_or(Rounding::Nearest),
    };
    let mode = Mode::take(op);
    if ty == Type::F64 {
        return rounded_f64(op, env, root, rounding);
    }
    let plain = rounding == Rounding::Nearest;
    if matches!(root, "fma" | "mad") {
        let (d, s) = operands::<3>(op, env, ty)?;
        if plain {
            return Ok(Decoded::next(Class::Float, move |cx| {
                cx.map3_lanes(d, &s[0], &s[1], &s[2], |a, b, c| fma_nearest(mode, a, b, c));
            }));
        }
        return Ok(Decoded::next(Class::Float, move |cx| {
            cx.map3(d, &s[0], &s[1], &s[2], |a, b, c| {
                let (a, b, c) = (mode.input(a), mode.input(b), mode.input(c));
                mode.output(numeric::fma_f32(a, b, c, rounding))
            });
        }));
    }
    let (d, s) = operands::<2>(op, env, ty)?;
    // Spelled out so that each is a loop of its own.
    Ok(match root {
        "add" if plain => Decoded::next(Class::Float, move |cx| {
            cx.map2(d, &s[0], &s[1], |a, b| {
                mode.output(numeric::add_f32(mode.input(a), mode.input(b), Rounding::Nearest))
            });
        }),
        "sub" if plain => Decoded::next(Class::Float, move |cx| {
            cx.map2(d, &s[0], &s[1], |a, b| {
                mode.output(numeric::sub_f32(mode.input(a), mode.input(b), Rounding::Nearest))
            });
        }),
        "mul" if plain => Decoded::next(Class::Float, move |cx| {
            cx.map2(d, &s[0], &s[1], |a, b| {
                mode.output(numeric::mul_f32(mode.input(a), mode.input(b), Rounding::Nearest))
            });
        }),
        root => {
            let f = match root {
                "add" => numeric::add_f32,
                "sub" => numeric::sub_f32,
                _ => numeric::mul_f32,
            };
            Decoded::next(Class::Float, move |cx| {
                cx.map2(d, &s[0], &s[1], |a, b| {
                    mode.output(f(mode.input(a), mode.input(b), rounding))
                });
            })
        }
    })
}

fn rounded_f64(op: &Opcode<'_>, env: &Env<'_>, root: &str, rounding: Rounding) -> Result<Decoded> {
    if rounding != Rounding::Nearest {
        return Err("only .rn of .f64 is supported".into());
    }
    let ty = Type::F64;
    if matches!(root, "fma" | "mad") {
        let (d, s) = operands::<3>(op, env, ty)?;
        return Ok(Decoded::next(Class::Float, move |cx| {
            cx.map3(d, &s[0], &s[1], &s[2], |a, b, c| {
                let [a, b, c] = [a, b, c].map(f64::from_bits);
                numeric::fma_f64(a, b, c).to_bits()
            });
        }));
    }
    let f: fn(f64, f64) -> f64 = match root {
        "add" => |a, b| a + b,
        "sub" => |a, b| a - b,
        _ => |a, b| a * b,
    };
    let (d, s) = operands::<2>(op, env, ty)?;
    Ok(Decoded::next(Class::Float, move |cx| {
        cx.map2(d, &s[0], &s[1], |a, b| f(f64::from_bits(a), f64::from_bits(b)).to_bits());
    }))
}

fn extremum(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type) -> Result<Decoded> {
    let least = op.root() == "min";
    let propagate = op.take("NaN");
    let signed_by_xor = op.take("xorsign");
    if signed_by_xor {
        op.expect("abs")?;
    }
    let mode = Mode::take(op);
    if ty == Type::F64 {
        let f = if least { numeric::min_f64 } else { numeric::max_f64 };
        let (d, s) = operands::<2>(op, env, ty)?;
        return Ok(Decoded::next(Class::Float, move |cx| {
            cx.map2(d, &s[0], &s[1], |a, b| f(f64::from_bits(a), f64::from_bits(b)).to_bits());
        }));
    }
    let f = if least { numeric::min_f32 } else { numeric::max_f32 };
    if op.instr.operands.len() == 4 {
        let (d, s) = operands::<3>(op, env, ty)?;
        return Ok(Decoded::next(Class::Float, move |cx| {
            cx.map3(d, &s[0], &s[1], &s[2], |a, b, c| {
                let ab = f(mode.input(a), mode.input(b), propagate);
                mode.output(f(ab, mode.input(c), propagate))
            });
        }));
    }
    let (d, s) = operands::<2>(op, env, ty)?;
    Ok(Decoded::next(Class::Float, move |cx| {
        cx.map2(d, &s[0], &s[1], |a, b| {
            let (a, b) = (mode.input(a), mode.input(b));
            if !signed_by_xor {
                return mode.output(f(a, b, propagate));
            }
            let sign = (a.to_bits() ^ b.to_bits()) & 1 << 31;
            mode.output(f32::from_bits(f(a.abs(), b.abs(), propagate).to_bits() | sign))
        });
    }))
}

fn sign(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type) -> Result<Decoded> {
    let negates = op.root() == "neg";
    let flush = op.take("ftz");
    let bit = 1u64 << (8 * ty.size() - 1);
    let (d, s) = operands::<1>(op, env, ty)?;
    let flushed = move |v: u64| match (flush, ty) {
        (true, Type::F32) => numeric::ftz(f32::from_bits(v as u32)).to_bits().into(),
        _ => v,
    };
    Ok(Decoded::next(Class::Float, move |cx| {
        cx.map1(d, &s[0], |a| if negates { flushed(a) ^ bit } else { flushed(a) & !bit });
    }))
}

fn division(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type) -> Result<Decoded> {
    let (approx, full) = (op.take("approx"), op.take("full"));
    let rounding = op.one_of(&ROUNDINGS);
    let mode = Mode::take(op);
    let (d, s) = operands::<2>(op, env, ty)?;
    if ty == Type::F64 {
        if rounding != Some(Rounding::Nearest) {
            return Err("only .rn of .f64 is supported".into());
        }
        return Ok(Decoded::next(Class::Float, move |cx| {
            cx.map2(d, &s[0], &s[1], |a, b| (f64::from_bits(a) / f64::from_bits(b)).to_bits());
        }));
    }
    // A quotient costs a reciprocal of the special function unit.
    Ok(Decoded::next(Class::Special, move |cx| {
        let near = Approx { seed: cx.grid.options.perturb };
        cx.map2(d, &s[0], &s[1], |a, b| {
            let (a, b) = (mode.input(a), mode.input(b));
            mode.output(match rounding {
                Some(rounding) => numeric::div_f32(a, b, rounding),
                None if full => near.div_full(a, b),
                None if approx => near.div(a, b),
                None => near.div(a, b),
            })
        });
    }))
}

/// rcp, sqrt, rsqrt, ex2, lg2, tanh, sin, cos.
pub fn special(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let approx = op.take("approx");
    let rounding = op.one_of(&ROUNDINGS);
    let mode = Mode::take(op);
    let ty = op.ty()?;
    match ty {
        Type::F32 => {}
        Type::F64 => return special_f64(op, env, rounding, approx && mode.flush),
        _ => return super::half::special(op, env, ty),
    }
    let (d, s) = operands::<1>(op, env, ty)?;
    if let Some(rounding) = rounding {
        let f = match op.root() {
            "rcp" => numeric::rcp_f32,
            "sqrt" => numeric::sqrt_f32,
            root => return Err(format!("{root} with a rounding")),
        };
        return Ok(Decoded::next(Class::Special, move |cx| {
            cx.map1(d, &s[0], |a| mode.output(f(mode.input(a), rounding)));
        }));
    }
    if !approx {
        return Err("one of .approx and a rounding is missing".into());
    }
    let f: fn(Approx, f32) -> f32 = match op.root() {
        "rcp" => Approx::rcp,
        "sqrt" => Approx::sqrt,
        "rsqrt" => Approx::rsqrt,
        "ex2" => Approx::ex2,
        "lg2" => Approx::lg2,
        "tanh" => Approx::tanh,
        "sin" => Approx::sin,
        _ => Approx::cos,
    };
    Ok(Decoded::next(Class::Special, move |cx| {
        let near = Approx { seed: cx.grid.options.perturb };
        cx.map1(d, &s[0], |a| mode.output(f(near, mode.input(a))));
    }))
}

/// The upper half of an f64, a subnormal flushed: all that the approximations of f64 work with.
fn upper(x: f64) -> f64 {
    let x = f64::from_bits(x.to_bits() & !0xFFFF_FFFF);
    if x.is_subnormal() { 0f64.copysign(x) } else { x }
}

fn special_f64(
    op: &Opcode<'_>,
    env: &Env<'_>,
    rounding: Option<Rounding>,
    approx: bool,
) -> Result<Decoded> {
    let f: fn(f64) -> f64 = match (op.root(), rounding, approx) {
        ("rcp", Some(Rounding::Nearest), false) => f64::recip,
        ("sqrt", Some(Rounding::Nearest), false) => f64::sqrt,
        ("rcp", None, true) => |x| upper(upper(x).recip()),
        ("rsqrt", None, true) => |x| upper(upper(x).sqrt().recip()),
        (root, ..) => return Err(format!("this {root} of .f64 is not supported")),
    };
    let (d, s) = operands::<1>(op, env, Type::F64)?;
    Ok(Decoded::next(Class::Special, move |cx| {
        cx.map1(d, &s[0], |a| f(f64::from_bits(a)).to_bits());
    }))
}

/// testp: a class of numbers.
pub fn testp(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    type Test = fn(f64, bool) -> bool;
    let tests: [(&str, Test); 6] = [
        ("finite", |x, _| x.is_finite()),
        ("infinite", |x, _| x.is_infinite()),
        ("number", |x, _| !x.is_nan()),
        ("notanumber", |x, _| x.is_nan()),
        // Zeros count as normal.
        ("normal", |x, subnormal| x.is_finite() && !subnormal),
        ("subnormal", |_, subnormal| subnormal),
    ];
    let test = op.one_of(&tests).ok_or("the class is missing")?;
    let ty = op.ty()?;
    let [p, a] = op.operands()?;
    let (p, a) = (env.pred_dst(p)?, env.src(a, ty)?);
    Ok(Decoded::next(Class::Predicate, move |cx| {
        let holds = cx.compare(&a, &Src::imm(0), |a, _| match ty {
            Type::F32 => {
                let x = f32::from_bits(a as u32);
                test(x.into(), x.is_subnormal())
            }
            _ => {
                let x = f64::from_bits(a);
                test(x, x.is_subnormal())
            }
        });
        cx.set(p, holds);
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_warp_rounds_as_the_exact_sum(
            a: [u32; 32], b: [u32; 32], c: [u32; 32], near: bool, flush: bool, saturate: bool,
        ) {
            let mode = Mode { flush, saturate };
            let lanes = |x: [u32; 32]| x.map(u64::from);
            // Uniform bits hardly ever cancel: c next to -ab does.
            let c = if near {
                std::array::from_fn(|l| {
                    let product = f32::from_bits(a[l]) * f32::from_bits(b[l]);
                    (-product).to_bits() ^ c[l] & 3
                })
            } else {
                c
            };
            let got = fma_nearest(mode, &lanes(a), &lanes(b), &lanes(c));
            for l in 0..32 {
                let [a, b, c] = [a[l], b[l], c[l]].map(|x| mode.input(x.into()));
                let want = mode.output(numeric::fma_f32(a, b, c, Rounding::Nearest));
                prop_assert_eq!(got[l], want, "{} * {} + {}", a, b, c);
            }
        }
    }
}
