//! Integer arithmetic and bit fields.

use crate::ast::{Operand, Type};
use crate::context::{Cx, lanes};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result, mask};
use crate::diagnostic::Kind;
use crate::numeric::int::{self, Int, Permute};
use crate::program::{Decoded, Dst, Src};

/// The integer type of a PTX type; untyped bits count as unsigned.
pub fn int(ty: Type) -> Result<Int> {
    let bits = 8 * ty.size();
    match ty {
        Type::S8 | Type::S16 | Type::S32 | Type::S64 => Ok(Int::signed(bits)),
        Type::U8 | Type::U16 | Type::U32 | Type::U64 => Ok(Int::unsigned(bits)),
        Type::B8 | Type::B16 | Type::B32 | Type::B64 => Ok(Int::unsigned(bits)),
        ty => Err(format!(".{ty} is no integer type")),
    }
}

/// Destination and sources of one type.
fn operands<const N: usize>(
    op: &Opcode<'_>,
    env: &Env<'_>,
    d: Type,
    types: [Type; N],
) -> Result<(Dst, [Src; N])> {
    let [to, from @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    let from: &[Operand; N] =
        from.try_into().map_err(|_| format!("{} operands, {} expected", from.len() + 1, N + 1))?;
    let mut sources = Vec::with_capacity(N);
    for (o, ty) in from.iter().zip(types) {
        sources.push(env.src(o, ty)?);
    }
    let sources = sources.try_into().map_err(|_| "operands are missing")?;
    Ok((env.dst(to, d)?, sources))
}

/// d = f(a) for the operands of an instruction.
fn unary(
    op: &Opcode<'_>,
    env: &Env<'_>,
    (d, a): (Type, Type),
    f: impl Fn(u64) -> u64 + Send + Sync + 'static,
) -> Result<Decoded> {
    let (d, [a]) = operands(op, env, d, [a])?;
    Ok(Decoded::next(Class::Integer, move |cx| cx.map1(d, &a, &f)))
}

/// d = f(a, b).
fn binary(
    op: &Opcode<'_>,
    env: &Env<'_>,
    (d, a, b): (Type, Type, Type),
    f: impl Fn(u64, u64) -> u64 + Send + Sync + 'static,
) -> Result<Decoded> {
    let (d, [a, b]) = operands(op, env, d, [a, b])?;
    Ok(Decoded::next(Class::Integer, move |cx| cx.map2(d, &a, &b, &f)))
}

/// d = f(a, b, c).
fn ternary(
    op: &Opcode<'_>,
    env: &Env<'_>,
    (d, a, b, c): (Type, Type, Type, Type),
    f: impl Fn(u64, u64, u64) -> u64 + Send + Sync + 'static,
) -> Result<Decoded> {
    let (d, [a, b, c]) = operands(op, env, d, [a, b, c])?;
    Ok(Decoded::next(Class::Integer, move |cx| cx.map3(d, &a, &b, &c, &f)))
}

/// add, sub, mul, mad, div, rem, min, max, abs, neg of integers.
pub fn arithmetic(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type) -> Result<Decoded> {
    let i = int(ty)?;
    match op.root() {
        "add" | "sub" => sum(op, env, ty, i),
        "mul" | "mad" => product(op, env, ty, i),
        "div" | "rem" => quotient(op, env, ty, i),
        "min" | "max" => extremum(op, env, ty, i),
        "abs" => unary(op, env, (ty, ty), move |a| i.mask(i.value(a).unsigned_abs() as u64)),
        _ => unary(op, env, (ty, ty), move |a| i.mask(a.wrapping_neg())),
    }
}

fn sum(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type, i: Int) -> Result<Decoded> {
    let subtracts = op.root() == "sub";
    if op.take("cc") {
        return carry(op, env, ty, i, false);
    }
    let types = (ty, ty, ty);
    if op.take("sat") {
        if ty != Type::S32 {
            return Err(format!("modifier .sat is for .s32, not .{ty}"));
        }
        let f = move |a, b| match subtracts {
            true => i.saturate(i.value(a) - i.value(b)),
            false => i.saturate(i.value(a) + i.value(b)),
        };
        return binary(op, env, types, f);
    }
    match (subtracts, i.bits) {
        (false, 32) => binary(op, env, types, |a, b| (a as u32).wrapping_add(b as u32).into()),
        (true, 32) => binary(op, env, types, |a, b| (a as u32).wrapping_sub(b as u32).into()),
        (false, 64) => binary(op, env, types, u64::wrapping_add),
        (true, 64) => binary(op, env, types, u64::wrapping_sub),
        (false, _) => binary(op, env, types, move |a, b| i.mask(a.wrapping_add(b))),
        (true, _) => binary(op, env, types, move |a, b| i.mask(a.wrapping_sub(b))),
    }
}

/// add.cc, addc, sub.cc, subc: with the carry flag of each lane.
fn carry(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type, i: Int, reads: bool) -> Result<Decoded> {
    let subtracts = op.root().starts_with("sub");
    let writes = op.root().len() == 3 || op.take("cc");
    let (d, [a, b]) = operands(op, env, ty, [ty, ty])?;
    Ok(Decoded::next(Class::Integer, move |cx| {
        let (a, b) = (cx.take(&a), cx.take(&b));
        let (mut out, mut carries) = ([0; 32], 0);
        for l in 0..32 {
            let carry = reads && cx.warp.carry >> l & 1 != 0;
            let (sum, carried) = match subtracts {
                true => i.sub_borrow(a[l], b[l], carry),
                false => i.add_carry(a[l], b[l], carry),
            };
            out[l] = sum;
            carries |= u32::from(carried) << l;
        }
        set_carry(cx, writes, carries);
        cx.write(d, &out);
    }))
}

fn set_carry(cx: &mut Cx<'_, '_>, writes: bool, carries: u32) {
    if writes {
        cx.warp.carry = cx.warp.carry & !cx.mask | carries & cx.mask;
    }
}

/// addc, subc, madc.
pub fn with_carry(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let ty = op.ty()?;
    let i = int(ty)?;
    match op.root() {
        "madc" => product_carry(op, env, ty, i, true),
        _ => carry(op, env, ty, i, true),
    }
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Part {
    Low,
    High,
    Wide,
}

fn part(op: &mut Opcode<'_>) -> Result<Part> {
    let parts = [("lo", Part::Low), ("hi", Part::High), ("wide", Part::Wide)];
    op.one_of(&parts).ok_or_else(|| "one of .lo, .hi and .wide is missing".into())
}

fn product(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type, i: Int) -> Result<Decoded> {
    if op.rest().contains(&"cc") {
        return product_carry(op, env, ty, i, false);
    }
    let adds = op.root() == "mad";
    let saturates = op.take("sat");
    let part = part(op)?;
    let wide = match (part, ty) {
        (Part::Wide, Type::S16) => Type::S32,
        (Part::Wide, Type::U16) => Type::U32,
        (Part::Wide, Type::S32) => Type::S64,
        (Part::Wide, Type::U32) => Type::U64,
        (Part::Wide, ty) => return Err(format!(".wide of .{ty}")),
        (_, ty) => ty,
    };
    let d = int(wide)?;
    if saturates && (part != Part::High || ty != Type::S32 || !adds) {
        return Err(".sat is for mad.hi.s32".into());
    }
    let multiply = move |a, b| match part {
        Part::Low => i.mul_lo(a, b),
        Part::High => i.mul_hi(a, b),
        Part::Wide => i.mul_wide(a, b),
    };
    match (adds, part, i) {
        (false, Part::Low, _) => {
            binary(op, env, (wide, ty, ty), move |a, b| i.mask(a.wrapping_mul(b)))
        }
        (false, Part::Wide, Int { bits: 32, signed: true }) => {
            binary(op, env, (wide, ty, ty), |a, b| {
                (i64::from(a as i32) * i64::from(b as i32)) as u64
            })
        }
        (false, ..) => binary(op, env, (wide, ty, ty), multiply),
        (true, Part::Low, _) => ternary(op, env, (wide, ty, ty, wide), move |a, b, c| {
            d.mask(a.wrapping_mul(b).wrapping_add(c))
        }),
        (true, ..) if saturates => ternary(op, env, (wide, ty, ty, wide), move |a, b, c| {
            d.saturate(d.value(multiply(a, b)) + d.value(c))
        }),
        (true, ..) => ternary(op, env, (wide, ty, ty, wide), move |a, b, c| {
            d.mask(multiply(a, b).wrapping_add(c))
        }),
    }
}

/// mad.cc, madc.
fn product_carry(
    op: &mut Opcode<'_>,
    env: &Env<'_>,
    ty: Type,
    i: Int,
    reads: bool,
) -> Result<Decoded> {
    let writes = op.take("cc");
    let high = match part(op)? {
        Part::Low => false,
        Part::High => true,
        Part::Wide => return Err(".wide with a carry".into()),
    };
    let (d, [a, b, c]) = operands(op, env, ty, [ty, ty, ty])?;
    Ok(Decoded::next(Class::Integer, move |cx| {
        let (a, b, c) = (cx.take(&a), cx.take(&b), cx.take(&c));
        let (mut out, mut carries) = ([0; 32], 0);
        for l in 0..32 {
            let product = if high { i.mul_hi(a[l], b[l]) } else { i.mul_lo(a[l], b[l]) };
            let carry = reads && cx.warp.carry >> l & 1 != 0;
            let (sum, carried) = i.add_carry(product, c[l], carry);
            out[l] = sum;
            carries |= u32::from(carried) << l;
        }
        set_carry(cx, writes, carries);
        cx.write(d, &out);
    }))
}

/// mul24, mad24.
pub fn product24(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let ty = op.ty()?;
    let i = int(ty)?;
    let high = match part(op)? {
        Part::Low => false,
        Part::High => true,
        Part::Wide => return Err(".wide of 24 bits".into()),
    };
    match op.root() {
        "mul24" => binary(op, env, (ty, ty, ty), move |a, b| i.mul24(a, b, high).into()),
        _ => ternary(op, env, (ty, ty, ty, ty), move |a, b, c| {
            u64::from(i.mul24(a, b, high).wrapping_add(c as u32))
        }),
    }
}

fn quotient(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type, i: Int) -> Result<Decoded> {
    let remainder = op.root() == "rem";
    let (d, [a, b]) = operands(op, env, ty, [ty, ty])?;
    let divide = move |a: u64, b: u64| match (i.value(a), i.value(b)) {
        (_, 0) => i.mask(u64::MAX),
        (a, b) if remainder => i.mask((a % b) as u64),
        (a, b) => i.mask((a / b) as u64),
    };
    Ok(Decoded::next(Class::Integer, move |cx| {
        let divisors = cx.read(&b);
        if let Some(l) = lanes(cx.mask).find(|l| i.mask(divisors[*l]) == 0) {
            cx.report_lane(Kind::InvalidOperand, l as u32, "integer division by zero".into());
        }
        cx.map2(d, &a, &b, divide);
    }))
}

fn extremum(op: &mut Opcode<'_>, env: &Env<'_>, ty: Type, i: Int) -> Result<Decoded> {
    let least = op.root() == "min";
    let relu = op.take("relu");
    let types = (ty, ty, ty);
    // Signed values in the order of unsigned ones.
    let flip = if i.signed { 1 << (i.bits - 1) } else { 0 };
    let m = mask(ty.size());
    let clamp = move |v: u64| if relu && v & flip != 0 { 0 } else { v };
    binary(op, env, types, move |a, b| {
        let (x, y) = ((a & m) ^ flip, (b & m) ^ flip);
        clamp((if least { x.min(y) } else { x.max(y) }) ^ flip)
    })
}

/// bmsk: `b` ones from bit `a` on.
fn bit_mask(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let wrap = op.take("wrap");
    if !wrap {
        op.expect("clamp")?;
    }
    op.expect("b32")?;
    binary(op, env, (Type::B32, Type::U32, Type::U32), move |a, b| {
        let (a, b) = if wrap { (a & 31, b & 31) } else { (a.min(32), b.min(32)) };
        (((1 << b) - 1) << a) & 0xFFFF_FFFF
    })
}

/// popc, clz, brev, bfind, bfe, bfi, bmsk, szext, prmt, shf, sad, dp4a, dp2a.
pub fn bits(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let root = op.root();
    if root == "bmsk" {
        return bit_mask(op, env);
    }
    if root.starts_with("dp") {
        return dot(op, env);
    }
    if root == "prmt" || root == "shf" {
        return permute(op, env);
    }
    let shift_amount = root == "bfind" && op.take("shiftamt");
    let wrap = root == "szext" && op.take("wrap");
    if root == "szext" && !wrap {
        op.expect("clamp")?;
    }
    let ty = op.ty()?;
    let i = int(ty)?;
    let u32s = Type::U32;
    match root {
        "popc" => unary(op, env, (u32s, ty), move |a| i.popc(a).into()),
        "clz" => unary(op, env, (u32s, ty), move |a| i.clz(a).into()),
        "brev" => unary(op, env, (ty, ty), move |a| i.brev(a)),
        "bfind" => unary(op, env, (u32s, ty), move |a| i.bfind(a, shift_amount).into()),
        "bfe" => {
            ternary(op, env, (ty, ty, u32s, u32s), move |a, b, c| i.bfe(a, b as u32, c as u32))
        }
        "bfi" => {
            let (d, [a, b, c, n]) = operands(op, env, ty, [ty, ty, u32s, u32s])?;
            Ok(Decoded::next(Class::Integer, move |cx| {
                let (a, b, c, n) = (cx.take(&a), cx.take(&b), cx.take(&c), cx.take(&n));
                let f = |l: usize| i.bfi(a[l], b[l], c[l] as u32, n[l] as u32);
                cx.write(d, &std::array::from_fn(f));
            }))
        }
        "szext" => {
            binary(op, env, (ty, ty, u32s), move |a, n| i.szext(a as u32, n as u32, wrap).into())
        }
        _ => ternary(op, env, (ty, ty, ty, ty), move |a, b, c| i.sad(a, b, c)),
    }
}

fn permute(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let left = op.take("l");
    let right = op.take("r");
    let wrap = op.take("wrap");
    let clamp = op.take("clamp");
    op.expect("b32")?;
    let types = (Type::B32, Type::B32, Type::B32, Type::B32);
    if op.root() == "shf" {
        if left == right || wrap == clamp {
            return Err("one of .l and .r, and one of .wrap and .clamp are needed".into());
        }
        return ternary(op, env, types, move |a, b, c| {
            int::funnel_shift(a as u32, b as u32, c as u32, left, wrap).into()
        });
    }
    let modes = ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"];
    let mode = modes.into_iter().find(|m| op.take(m));
    let mode = mode.and_then(Permute::parse).unwrap_or(Permute::Default);
    ternary(op, env, types, move |a, b, c| mode.apply(a as u32, b as u32, c as u32).into())
}

fn dot(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let two = op.root() == "dp2a";
    let high = two && op.take("hi");
    if two && !high {
        op.expect("lo")?;
    }
    let [a, b] = op.types()[..] else { return Err("two types are needed".into()) };
    let signed = |ty| matches!(ty, Type::S32);
    let (x, y) = (signed(a), signed(b));
    let d = if x || y { Type::S32 } else { Type::U32 };
    ternary(op, env, (d, Type::B32, Type::B32, d), move |a, b, c| {
        let (a, b, c) = (a as u32, b as u32, c as u32);
        u64::from(if two { int::dp2a(a, b, c, x, y, high) } else { int::dp4a(a, b, c, x, y) })
    })
}
