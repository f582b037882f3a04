//! mov with its packing forms, cvta, mapa.

use crate::ast::{Operand, Type};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result, mask};
use crate::diagnostic::Kind;
use crate::memory::{LOCAL_WINDOW, PARAM_WINDOW, RANK_SHIFT, SHARED_WINDOW, Target, target};
use crate::program::{Decoded, Dst};

/// mov, cvta, mapa.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    match op.root() {
        "mov" => mov(op, env),
        "cvta" => cvta(op, env),
        _ => mapa(op, env),
    }
}

fn mov(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let ty = op.ty()?;
    let [d, a] = op.operands()?;
    match (d, a) {
        _ if ty == Type::Pred => {
            let (d, a) = (env.pred_dst(d)?, env.pred(a)?);
            Ok(Decoded::next(Class::Predicate, move |cx| {
                let v = cx.take_predicate(a);
                cx.set(d, v);
            }))
        }
        (Operand::Vector(d), a) => unpack(env, ty, d, a),
        (d, Operand::Vector(a)) => pack(env, ty, d, a),
        (d, Operand::Name(name))
            if matches!(
                name.as_str(),
                "%clock" | "%clock64" | "%clock_hi" | "%globaltimer" | "%globaltimer_lo"
            ) =>
        {
            let d = env.dst(d, ty)?;
            let high = name == "%clock_hi";
            Ok(Decoded::next(Class::Move, move |cx| {
                cx.gang.time += 1;
                let now = if high { cx.gang.time >> 32 } else { cx.gang.time };
                cx.write(d, &[now & mask(ty.size()); 32]);
            }))
        }
        (d, a) => {
            let (d, a) = (env.dst(d, ty)?, env.src(a, ty)?);
            let m = mask(ty.size());
            Ok(Decoded::next(Class::Move, move |cx| cx.map1(d, &a, |a| a & m)))
        }
    }
}

/// Types of the parts of a value of `bytes` bytes cut into `n`.
fn part(ty: Type, n: usize) -> Result<Type> {
    match (ty.size() as usize).checked_div(n) {
        Some(1) => Ok(Type::B8),
        Some(2) => Ok(Type::B16),
        Some(4) => Ok(Type::B32),
        Some(8) => Ok(Type::B64),
        _ => Err(format!("{n} parts of a .{ty}")),
    }
}

/// `mov.b64 {lo, hi}, a`.
fn unpack(env: &Env<'_>, ty: Type, d: &[Operand], a: &Operand) -> Result<Decoded> {
    let part = part(ty, d.len())?;
    let d: Vec<Dst> = d.iter().map(|d| env.dst(d, part)).collect::<Result<_>>()?;
    let a = env.src(a, ty)?;
    let (bits, m) = (8 * part.size(), mask(part.size()));
    Ok(Decoded::next(Class::Move, move |cx| {
        let v = cx.take(&a);
        for (i, d) in d.iter().enumerate() {
            cx.write(*d, &v.map(|v| v >> (bits * i as u32) & m));
        }
    }))
}

/// `mov.b64 d, {lo, hi}`.
fn pack(env: &Env<'_>, ty: Type, d: &Operand, a: &[Operand]) -> Result<Decoded> {
    let part = part(ty, a.len())?;
    let a = a.iter().map(|a| env.src(a, part)).collect::<Result<Vec<_>>>()?;
    let d = env.dst(d, ty)?;
    let (bits, m) = (8 * part.size(), mask(part.size()));
    Ok(Decoded::next(Class::Move, move |cx| {
        let mut out = [0; 32];
        let mut low = cx.mask;
        for (i, a) in a.iter().enumerate() {
            let v = cx.take(a);
            (0..32).for_each(|l| out[l] |= (v[l] & m) << (bits * i as u32));
            if i == 0 {
                low &= cx.defined;
            }
        }
        cx.write(d, &out);
        if let (4, Dst(Some(slot))) = (part.size(), d) {
            cx.warp.set_low_written(slot, low);
        }
    }))
}

fn cvta(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let to = op.take("to");
    let spaces = [
        ("global", 0),
        ("const", 0),
        ("shared", SHARED_WINDOW),
        ("shared::cta", SHARED_WINDOW),
        ("shared::cluster", SHARED_WINDOW),
        ("local", LOCAL_WINDOW),
        ("param", PARAM_WINDOW),
        ("param::entry", PARAM_WINDOW),
    ];
    let window = op.one_of(&spaces).ok_or("the state space is missing")?;
    let ty = op.ty()?;
    let [d, a] = op.operands()?;
    let (d, a) = (env.dst(d, ty)?, env.src(a, ty)?);
    Ok(Decoded::next(Class::Move, move |cx| {
        if !to {
            // A null pointer stays one in no space but this one's own zero.
            return cx.map1(d, &a, |a| if window == 0 { a } else { window | a });
        }
        let v = cx.read(&a);
        // A null pointer stays one: programs look at its alignment before they look at whether it is.
        let same = |a: u64| {
            a == 0
                || matches!(
                    (window, target(a)),
                    (0, Target::Global { .. } | Target::Wild)
                        | (SHARED_WINDOW, Target::Shared(_))
                        | (LOCAL_WINDOW, Target::Local(_))
                        | (PARAM_WINDOW, Target::Param(_))
                )
        };
        if let Some(l) = crate::context::lanes(cx.mask).find(|l| !same(v[*l])) {
            let text = format!("generic address {:#x} does not lie in the space", v[l]);
            cx.report_lane(Kind::InvalidOperand, l as u32, text);
        }
        cx.write(d, &v.map(|a| a & !window));
    }))
}

/// Address of a shared variable in another block of the cluster.
fn mapa(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let shared = op.take("shared::cluster");
    let ty = op.ty()?;
    let [d, a, rank] = op.operands()?;
    let (d, a, rank) = (env.dst(d, ty)?, env.src(a, ty)?, env.src(rank, Type::U32)?);
    Ok(Decoded::next(Class::Move, move |cx| {
        let ranks = cx.read(&rank);
        let size = u64::from(cx.grid.cluster_size());
        if let Some(l) = crate::context::lanes(cx.mask).find(|l| ranks[*l] >= size) {
            let text = format!("rank {} of a cluster of {size} blocks", ranks[l]);
            cx.report_lane(Kind::InvalidOperand, l as u32, text);
        }
        let a = cx.read(&a);
        let map = |l: usize| {
            let window = if shared { 0 } else { SHARED_WINDOW };
            let low = a[l] & ((1 << RANK_SHIFT) - 1);
            window | (ranks[l] % size + 1) << RANK_SHIFT | low
        };
        cx.write(d, &std::array::from_fn(map));
    }))
}
