//! setp, set, selp, slct.

use crate::ast::{Operand, Type};
use crate::context::Cx;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result, mask};
use crate::numeric::half::Half;
use crate::numeric::{Compare, ftz};
use crate::ops::integer;
use crate::program::{Decoded, Pred, Src};

/// setp, set, selp, slct.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    match op.root() {
        "setp" => setp(op, env),
        "set" => set(op, env),
        "selp" => selp(op, env),
        _ => slct(op, env),
    }
}

const COMPARISONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu",
    "geu", "num", "nan",
];

fn comparison(op: &mut Opcode<'_>) -> Result<Compare> {
    let name = COMPARISONS.into_iter().find(|c| op.take(c)).ok_or("the comparison is missing")?;
    Compare::parse(name).ok_or_else(|| format!("comparison {name}"))
}

#[derive(Clone, Copy)]
enum Combine {
    And,
    Or,
    Xor,
}

impl Combine {
    fn apply(self, a: u32, b: u32) -> u32 {
        match self {
            Self::And => a & b,
            Self::Or => a | b,
            Self::Xor => a ^ b,
        }
    }
}

fn combination(op: &mut Opcode<'_>) -> Option<Combine> {
    op.one_of(&[("and", Combine::And), ("or", Combine::Or), ("xor", Combine::Xor)])
}

/// Lanes in which a comparison holds.
type Test = Box<dyn Fn(&mut Cx<'_, '_>, &Src, &Src) -> u32 + Send + Sync>;

/// A comparison of values of one type.
fn test(compare: Compare, ty: Type, flush: bool) -> Result<Test> {
    let f32 = move |v: u64| {
        let v = f32::from_bits(v as u32);
        if flush { ftz(v) } else { v }
    };
    let half = |kind: Half| -> Test {
        Box::new(move |cx, a, b| cx.compare(a, b, |a, b| compare.half(kind, a as u16, b as u16)))
    };
    Ok(match ty {
        // The common ones as loops of their own.
        Type::F32 => match compare {
            Compare::Lt => Box::new(move |cx, a, b| cx.compare(a, b, |a, b| f32(a) < f32(b))),
            Compare::Gt => Box::new(move |cx, a, b| cx.compare(a, b, |a, b| f32(a) > f32(b))),
            _ => Box::new(move |cx, a, b| cx.compare(a, b, |a, b| compare.f32(f32(a), f32(b)))),
        },
        Type::F64 => Box::new(move |cx, a, b| {
            cx.compare(a, b, |a, b| compare.f64(f64::from_bits(a), f64::from_bits(b)))
        }),
        Type::F16 => half(Half::F16),
        Type::Bf16 => half(Half::Bf16),
        ty => integers(compare, ty)?,
    })
}

fn integers(compare: Compare, ty: Type) -> Result<Test> {
    let i = integer::int(ty)?;
    let (m, flip) = (mask(ty.size()), if i.signed { 1u64 << (i.bits - 1) } else { 0 });
    // Signed values in the order of unsigned ones.
    let key = move |v: u64| (v & m) ^ flip;
    Ok(match compare {
        Compare::Eq => Box::new(move |cx, a, b| cx.compare(a, b, |a, b| a & m == b & m)),
        Compare::Ne => Box::new(move |cx, a, b| cx.compare(a, b, |a, b| a & m != b & m)),
        Compare::Lt => Box::new(move |cx, a, b| cx.compare(a, b, |a, b| key(a) < key(b))),
        Compare::Le => Box::new(move |cx, a, b| cx.compare(a, b, |a, b| key(a) <= key(b))),
        Compare::Gt => Box::new(move |cx, a, b| cx.compare(a, b, |a, b| key(a) > key(b))),
        Compare::Ge => Box::new(move |cx, a, b| cx.compare(a, b, |a, b| key(a) >= key(b))),
        other => return Err(format!("comparison {other:?} of .{ty}")),
    })
}

fn setp(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let compare = comparison(op)?;
    let combine = combination(op);
    let flush = op.take("ftz");
    let ty = op.ty()?;
    let (d, a, b, c) = match (op.instr.operands.as_slice(), combine) {
        ([d, a, b], None) => (d, a, b, None),
        ([d, a, b, c], Some(f)) => (d, a, b, Some((f, env.pred(c)?))),
        (o, _) => return Err(format!("{} operands", o.len())),
    };
    let (p, q) = env.pred_pair(d)?;
    if matches!(ty, Type::F16x2 | Type::Bf16x2) {
        return setp_pair(env, compare, ty, (p, q), (a, b), c);
    }
    let (a, b) = (env.src(a, ty)?, env.src(b, ty)?);
    let test = test(compare, ty, flush)?;
    Ok(Decoded::next(Class::Predicate, move |cx| {
        let holds = test(cx, &a, &b);
        let Some((f, c)) = c else {
            cx.set(p, holds);
            return cx.set(q, !holds);
        };
        let c = cx.take_predicate(c);
        cx.set(p, f.apply(holds, c));
        cx.set(q, f.apply(!holds, c));
    }))
}

/// Packed halves: p of the low ones, q of the high ones.
fn setp_pair(
    env: &Env<'_>,
    compare: Compare,
    ty: Type,
    (p, q): (crate::program::PredDst, crate::program::PredDst),
    (a, b): (&Operand, &Operand),
    c: Option<(Combine, Pred)>,
) -> Result<Decoded> {
    let kind = if ty == Type::F16x2 { Half::F16 } else { Half::Bf16 };
    let (a, b) = (env.src(a, Type::B32)?, env.src(b, Type::B32)?);
    Ok(Decoded::next(Class::Predicate, move |cx| {
        let low = cx.compare(&a, &b, |a, b| compare.half(kind, a as u16, b as u16));
        let high =
            cx.compare(&a, &b, |a, b| compare.half(kind, (a >> 16) as u16, (b >> 16) as u16));
        let combined = |cx: &mut Cx<'_, '_>, v| match c {
            None => v,
            Some((f, c)) => f.apply(v, cx.take_predicate(c)),
        };
        let (low, high) = (combined(cx, low), combined(cx, high));
        cx.set(p, low);
        cx.set(q, high);
    }))
}

/// All ones, or 1.0 for a floating-point destination, where the comparison holds.
fn set(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let compare = comparison(op)?;
    let combine = combination(op);
    let flush = op.take("ftz");
    let [d, ty] = op.types()[..] else { return Err("two types are needed".into()) };
    let (to, a, b, c) = match (op.instr.operands.as_slice(), combine) {
        ([d, a, b], None) => (d, a, b, None),
        ([d, a, b, c], Some(f)) => (d, a, b, Some((f, env.pred(c)?))),
        (o, _) => return Err(format!("{} operands", o.len())),
    };
    let to = env.dst(to, d)?;
    let packed = matches!(ty, Type::F16x2 | Type::Bf16x2);
    let (half_one, all) = match d {
        Type::F32 => (0, u64::from(1f32.to_bits())),
        Type::F16 => (0, 0x3c00),
        Type::Bf16 => (0, 0x3f80),
        Type::F16x2 => (0x3c00, 0),
        Type::Bf16x2 => (0x3f80, 0),
        d => (0xffff, mask(d.size())),
    };
    if !packed {
        let (a, b) = (env.src(a, ty)?, env.src(b, ty)?);
        let test = test(compare, ty, flush)?;
        return Ok(Decoded::next(Class::Predicate, move |cx| {
            let mut holds = test(cx, &a, &b);
            if let Some((f, c)) = c {
                holds = f.apply(holds, cx.take_predicate(c));
            }
            cx.write(to, &std::array::from_fn(|l| if holds >> l & 1 != 0 { all } else { 0 }));
        }));
    }
    if c.is_some() {
        return Err("packed halves with a third predicate are not supported".into());
    }
    let kind = if ty == Type::F16x2 { Half::F16 } else { Half::Bf16 };
    let (a, b) = (env.src(a, Type::B32)?, env.src(b, Type::B32)?);
    let one = move |a: u64, b: u64| {
        if compare.half(kind, a as u16, b as u16) { half_one } else { 0 }
    };
    Ok(Decoded::next(Class::Half, move |cx| {
        cx.map2(to, &a, &b, |a, b| one(a, b) | one(a >> 16, b >> 16) << 16);
    }))
}

fn selp(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let ty = op.ty()?;
    let [d, a, b, p] = op.operands()?;
    let (d, a, b, p) = (env.dst(d, ty)?, env.src(a, ty)?, env.src(b, ty)?, env.pred(p)?);
    let m = mask(ty.size());
    Ok(Decoded::next(Class::Predicate, move |cx| {
        let p = cx.take_predicate(p);
        let known = cx.defined;
        let a = cx.take(&a);
        let in_a = std::mem::replace(&mut cx.defined, known);
        let b = cx.take(&b);
        // Only the operand that is picked has to hold a value.
        cx.defined = p & in_a | !p & cx.defined;
        let pick = |l: usize| if p >> l & 1 != 0 { a[l] & m } else { b[l] & m };
        cx.write(d, &std::array::from_fn(pick));
    }))
}

/// a where c is not negative, otherwise b.
fn slct(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let flush = op.take("ftz");
    let [ty, by] = op.types()[..] else { return Err("two types are needed".into()) };
    let [d, a, b, c] = op.operands()?;
    let (d, a, b, c) = (env.dst(d, ty)?, env.src(a, ty)?, env.src(b, ty)?, env.src(c, by)?);
    let first = move |c: u64| match by {
        Type::F32 => {
            let c = f32::from_bits(c as u32);
            (if flush { ftz(c) } else { c }) >= 0.0
        }
        _ => (c as i32) >= 0,
    };
    Ok(Decoded::next(Class::Predicate, move |cx| {
        cx.map3(d, &a, &b, &c, |a, b, c| if first(c) { a } else { b });
    }))
}
