//! Logic and shifts, of registers and of predicates.

use crate::ast::Type;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result, mask};
use crate::numeric::int;
use crate::ops::integer;
use crate::program::Decoded;

/// and, or, xor, not, cnot, lop3, shl, shr.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    match op.root() {
        "lop3" => lop3(op, env),
        "shl" | "shr" => shift(op, env),
        "not" | "cnot" => complement(op, env),
        root => {
            let ty = op.ty()?;
            type Rule = fn(u64, u64) -> u64;
            let f: Rule = match root {
                "and" => |a, b| a & b,
                "or" => |a, b| a | b,
                _ => |a, b| a ^ b,
            };
            let [d, a, b] = op.operands()?;
            if ty == Type::Pred {
                let (d, a, b) = (env.pred_dst(d)?, env.pred(a)?, env.pred(b)?);
                return Ok(Decoded::next(Class::Predicate, move |cx| {
                    let (a, b) = (cx.take_predicate(a), cx.take_predicate(b));
                    cx.set(d, f(a.into(), b.into()) as u32);
                }));
            }
            let (d, a, b) = (env.dst(d, ty)?, env.src(a, ty)?, env.src(b, ty)?);
            let m = mask(ty.size());
            // Spelled out so that each is a loop of its own.
            Ok(match root {
                "and" => {
                    Decoded::next(Class::Integer, move |cx| cx.map2(d, &a, &b, |a, b| a & b & m))
                }
                "or" => {
                    Decoded::next(Class::Integer, move |cx| cx.map2(d, &a, &b, |a, b| (a | b) & m))
                }
                _ => {
                    Decoded::next(Class::Integer, move |cx| cx.map2(d, &a, &b, |a, b| (a ^ b) & m))
                }
            })
        }
    }
}

fn complement(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let logical = op.root() == "cnot";
    let ty = op.ty()?;
    let [d, a] = op.operands()?;
    if ty == Type::Pred {
        let (d, a) = (env.pred_dst(d)?, env.pred(a)?);
        return Ok(Decoded::next(Class::Predicate, move |cx| {
            let a = cx.take_predicate(a);
            cx.set(d, !a);
        }));
    }
    let (d, a, m) = (env.dst(d, ty)?, env.src(a, ty)?, mask(ty.size()));
    Ok(Decoded::next(Class::Integer, move |cx| {
        cx.map1(d, &a, |a| if logical { u64::from(a & m == 0) } else { !a & m });
    }))
}

fn lop3(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    op.expect("b32")?;
    let combine = op.one_of(&[("and", true), ("or", false)]);
    let (d, a, b, c, table, q) = match (op.instr.operands.as_slice(), combine) {
        ([d, a, b, c, table], None) => (d, a, b, c, table, None),
        ([d, a, b, c, table, q], Some(and)) => (d, a, b, c, table, Some((and, env.pred(q)?))),
        (o, _) => return Err(format!("{} operands", o.len())),
    };
    let ty = Type::B32;
    let (d, p) = env.dst_pair(d, ty)?;
    let (a, b, c) = (env.src(a, ty)?, env.src(b, ty)?, env.src(c, ty)?);
    let table = env.src(table, Type::B32)?.constant().ok_or("the table is no constant")? as u8;
    let f = move |a, b, c| u64::from(int::lop3(a as u32, b as u32, c as u32, table));
    let Some((and, q)) = q else {
        return Ok(Decoded::next(Class::Integer, move |cx| cx.map3(d, &a, &b, &c, f)));
    };
    // The predicate: whether the result is not zero, combined with q.
    Ok(Decoded::next(Class::Integer, move |cx| {
        let (a, b, c) = (cx.take(&a), cx.take(&b), cx.take(&c));
        let value = std::array::from_fn(|l| f(a[l], b[l], c[l]));
        cx.write(d, &value);
        let nonzero = (0..32).fold(0, |m, l| m | u32::from(value[l] != 0) << l);
        let q = cx.take_predicate(q);
        cx.set(p, if and { nonzero & q } else { nonzero | q });
    }))
}

/// Amounts beyond the width give 0, or the sign.
fn shift(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let left = op.root() == "shl";
    let ty = op.ty()?;
    let i = integer::int(ty)?;
    let [d, a, b] = op.operands()?;
    let (d, a, b) = (env.dst(d, ty)?, env.src(a, ty)?, env.src(b, Type::U32)?);
    Ok(match (left, b.constant()) {
        // A constant amount inside the width: the common case, without a branch per lane.
        (true, Some(n)) if n < i.bits.into() => {
            let m = mask(ty.size());
            Decoded::next(Class::Integer, move |cx| cx.map1(d, &a, |a| a << n & m))
        }
        (false, Some(n)) if n < i.bits.into() && !i.signed => {
            let m = mask(ty.size());
            Decoded::next(Class::Integer, move |cx| cx.map1(d, &a, |a| (a & m) >> n))
        }
        (true, _) => {
            Decoded::next(Class::Integer, move |cx| cx.map2(d, &a, &b, |a, n| i.shl(a, n as u32)))
        }
        (false, _) => {
            Decoded::next(Class::Integer, move |cx| cx.map2(d, &a, &b, |a, n| i.shr(a, n as u32)))
        }
    })
}
