//! Arithmetic of f16 and bf16, single and packed in pairs.

use crate::ast::Type;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::numeric::approx::Approx;
use crate::numeric::half::{Half, pair, pair2, pair3};
use crate::program::Decoded;

/// Format, and whether two values are packed.
fn format(ty: Type) -> Result<(Half, bool, Type)> {
    Ok(match ty {
        Type::F16 => (Half::F16, false, Type::B16),
        Type::Bf16 => (Half::Bf16, false, Type::B16),
        Type::F16x2 => (Half::F16, true, Type::B32),
        Type::Bf16x2 => (Half::Bf16, true, Type::B32),
        ty => return Err(format!("unknown type .{ty} here")),
    })
}

/// What happens to operands and results.
#[derive(Clone, Copy)]
struct Mode {
    kind: Half,
    flush: bool,
    saturate: bool,
    relu: bool,
}

impl Mode {
    fn input(self, v: u16) -> u16 {
        if self.flush { self.kind.ftz(v) } else { v }
    }

    fn output(self, v: u16) -> u16 {
        let v = self.input(v);
        let v = if self.saturate { self.kind.saturate(v) } else { v };
        if self.relu { self.kind.relu(v) } else { v }
    }
}

/// add, sub, mul, fma, neg, abs, min, max.
pub fn arithmetic(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type) -> Result<Decoded> {
    let (kind, packed, bits) = format(ty)?;
    op.take("rn");
    let propagate = op.take("NaN");
    let signed_by_xor = matches!(op.root(), "min" | "max") && op.take("xorsign");
    if signed_by_xor {
        op.expect("abs")?;
    }
    let mode =
        Mode { kind, flush: op.take("ftz"), saturate: op.take("sat"), relu: op.take("relu") };
    let root = op.root();
    let [d, rest @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    let d = env.dst(d, bits)?;
    let s = rest.iter().map(|o| env.src(o, bits)).collect::<Result<Vec<_>>>()?;
    match (root, s.len()) {
        ("neg" | "abs", 1) => {
            let f = if root == "neg" { Half::neg } else { Half::abs };
            let one = move |a: u16| f(kind, mode.input(a));
            let f = move |a: u64| match packed {
                true => pair(a as u32, one).into(),
                false => one(a as u16).into(),
            };
            Ok(Decoded::next(Class::Half, move |cx| cx.map1(d, &s[0], f)))
        }
        ("add" | "sub" | "mul" | "min" | "max", 2) => {
            type Binary = fn(Half, u16, u16, bool) -> u16;
            let f: Binary = match root {
                "add" => |k, a, b, _| k.add(a, b),
                "sub" => |k, a, b, _| k.sub(a, b),
                "mul" => |k, a, b, _| k.mul(a, b),
                "min" => Half::min,
                _ => Half::max,
            };
            let one = move |a: u16, b: u16| {
                let (a, b) = (mode.input(a), mode.input(b));
                if !signed_by_xor {
                    return mode.output(f(kind, a, b, propagate));
                }
                mode.output(f(kind, a & 0x7FFF, b & 0x7FFF, propagate) | (a ^ b) & 0x8000)
            };
            let f = move |a: u64, b: u64| match packed {
                true => pair2(a as u32, b as u32, one).into(),
                false => one(a as u16, b as u16).into(),
            };
            Ok(Decoded::next(Class::Half, move |cx| cx.map2(d, &s[0], &s[1], f)))
        }
        ("fma", 3) => {
            let one =
                move |a, b, c| mode.output(kind.fma(mode.input(a), mode.input(b), mode.input(c)));
            let f = move |a: u64, b: u64, c: u64| match packed {
                true => pair3(a as u32, b as u32, c as u32, one).into(),
                false => one(a as u16, b as u16, c as u16).into(),
            };
            Ok(Decoded::next(Class::Half, move |cx| cx.map3(d, &s[0], &s[1], &s[2], f)))
        }
        (_, n) => Err(format!("unknown opcode {root} of .{ty} with {n} sources")),
    }
}

/// ex2, tanh; `.approx` and `.ftz` have been taken.
pub fn special(op: &Opcode<'_>, env: &Env<'_>, ty: Type) -> Result<Decoded> {
    let (kind, packed, bits) = format(ty)?;
    let f: fn(Approx, Half, u16) -> u16 = match op.root() {
        "ex2" => Approx::ex2_half,
        "tanh" => Approx::tanh_half,
        root => return Err(format!("unknown opcode {root} of .{ty}")),
    };
    let [d, a] = op.operands()?;
    let (d, a) = (env.dst(d, bits)?, env.src(a, bits)?);
    Ok(Decoded::next(Class::Special, move |cx| {
        let near = Approx { seed: cx.grid.options.perturb };
        cx.map1(d, &a, |a| match packed {
            true => pair(a as u32, |a| f(near, kind, a)).into(),
            false => f(near, kind, a as u16).into(),
        });
    }))
}
