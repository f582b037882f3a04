//! Exchange between the lanes of a warp: shfl, vote, match, redux, elect, activemask,
//! bar.warp.sync.

use crate::ast::Type;
use crate::context::{Cx, lanes};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::program::{Decoded, Flow, Src};

/// shfl, vote, match, redux, elect, activemask.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    if op.root() == "activemask" {
        op.expect("b32")?;
        let [d] = op.operands()?;
        let d = env.dst(d, Type::B32)?;
        return Ok(Decoded::next(Class::Other, move |cx| cx.write(d, &[cx.mask.into(); 32])));
    }
    op.expect("sync")?;
    match op.root() {
        "shfl" => shfl(op, env),
        "vote" => vote(op, env),
        "match" => matching(op, env),
        "redux" => redux(op, env),
        _ => elect(op, env),
    }
}

/// Member mask of a collective; Err: what to return instead of going on.
fn members(cx: &mut Cx<'_, '_>, mask: &Src) -> Result<u32, Flow> {
    let members = cx.uniform(mask, "the member mask") as u32;
    match cx.gathered(members) {
        Some(flow) => Err(flow),
        None => Ok(members),
    }
}

/// bar.warp.sync: orders memory among the lanes of the mask.
pub fn sync(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let [mask] = op.operands()?;
    let mask = env.src(mask, Type::B32)?;
    Ok(Decoded::flow(Class::Barrier, move |cx| match members(cx, &mask) {
        Err(flow) => flow,
        Ok(members) => {
            cx.warp.clock.sync_lanes(members);
            Flow::Next
        }
    }))
}

#[derive(Clone, Copy)]
enum Shuffle {
    Up,
    Down,
    Bfly,
    Idx,
}

impl Shuffle {
    /// Source lane, and whether it lies in the segment.
    fn source(self, lane: u32, b: u32, c: u32) -> (u32, bool) {
        let (b, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
        let max = lane & segment | clamp & !segment;
        let min = lane & segment;
        let (from, inside) = match self {
            Self::Up => {
                let from = i64::from(lane) - i64::from(b);
                (from, from >= i64::from(max))
            }
            Self::Down => {
                let from = i64::from(lane + b);
                (from, from <= i64::from(max))
            }
            Self::Bfly => {
                let from = i64::from(lane ^ b);
                (from, from <= i64::from(max))
            }
            Self::Idx => {
                let from = i64::from(min | b & !segment);
                (from, from <= i64::from(max))
            }
        };
        (if inside { from as u32 } else { lane }, inside)
    }
}

fn shfl(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let mode = op.one_of(&[
        ("up", Shuffle::Up),
        ("down", Shuffle::Down),
        ("bfly", Shuffle::Bfly),
        ("idx", Shuffle::Idx),
    ]);
    let mode = mode.ok_or("the mode is missing")?;
    op.expect("b32")?;
    let [d, a, b, c, mask] = op.operands()?;
    let (d, p) = env.dst_pair(d, Type::B32)?;
    let [a, b, c, mask] = [
        env.src(a, Type::B32)?,
        env.src(b, Type::B32)?,
        env.src(c, Type::B32)?,
        env.src(mask, Type::B32)?,
    ];
    Ok(Decoded::flow(Class::Shuffle, move |cx| {
        let members = match members(cx, &mask) {
            Err(flow) => return flow,
            Ok(members) => members,
        };
        let (b, c) = (cx.read(&b), cx.read(&c));
        let a = cx.take(&a);
        let held = std::mem::replace(&mut cx.defined, 0);
        let (mut out, mut inside) = (a, 0);
        for l in lanes(cx.mask) {
            let (from, ok) = mode.source(l as u32, b[l] as u32, c[l] as u32);
            if members >> from & 1 == 0 {
                let text =
                    format!("lane {l} reads lane {from}, which is not in the mask {members:#x}");
                cx.report_lane(Kind::InvalidOperand, l as u32, text);
            }
            out[l] = a[from as usize];
            cx.defined |= (held >> from & 1) << l;
            inside |= u32::from(ok) << l;
        }
        cx.write(d, &out);
        cx.defined = u32::MAX;
        cx.set(p, inside);
        Flow::Next
    }))
}

fn vote(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let [d, a, mask] = op.operands()?;
    let (a, mask) = (env.pred(a)?, env.src(mask, Type::B32)?);
    if op.take("ballot") {
        op.expect("b32")?;
        let d = env.dst(d, Type::B32)?;
        return Ok(Decoded::flow(Class::Shuffle, move |cx| match members(cx, &mask) {
            Err(flow) => flow,
            Ok(members) => {
                let votes = cx.test(a) & members;
                cx.write(d, &[votes.into(); 32]);
                Flow::Next
            }
        }));
    }
    type Rule = fn(u32, u32) -> bool;
    let rules: [(&str, Rule); 3] = [
        ("all", |votes, members| votes == members),
        ("any", |votes, _| votes != 0),
        ("uni", |votes, members| votes == 0 || votes == members),
    ];
    let rule = op.one_of(&rules).ok_or("the mode is missing")?;
    op.expect("pred")?;
    let d = env.pred_dst(d)?;
    Ok(Decoded::flow(Class::Shuffle, move |cx| match members(cx, &mask) {
        Err(flow) => flow,
        Ok(members) => {
            let votes = cx.test(a) & members;
            cx.set(d, if rule(votes, members) { u32::MAX } else { 0 });
            Flow::Next
        }
    }))
}

fn matching(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let all = op.take("all");
    if !all {
        op.expect("any")?;
    }
    let ty = op.ty()?;
    let [d, a, mask] = op.operands()?;
    let (d, p) = env.dst_pair(d, Type::B32)?;
    let (a, mask) = (env.src(a, ty)?, env.src(mask, Type::B32)?);
    Ok(Decoded::flow(Class::Shuffle, move |cx| {
        let members = match members(cx, &mask) {
            Err(flow) => return flow,
            Ok(members) => members,
        };
        let a = cx.read(&a);
        let same =
            |l: usize| lanes(members).filter(|o| a[*o] == a[l]).fold(0u32, |m, o| m | 1 << o);
        let any: [u32; 32] = std::array::from_fn(same);
        if all {
            let agree = lanes(members).all(|l| any[l] == members);
            cx.write(d, &[if agree { members.into() } else { 0 }; 32]);
            cx.set(p, if agree { u32::MAX } else { 0 });
        } else {
            cx.write(d, &any.map(u64::from));
        }
        Flow::Next
    }))
}

fn redux(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    type Combine = fn(u32, u32) -> u32;
    let ty = op.ty()?;
    let table: [(&str, Combine); 6] = match ty {
        Type::S32 => [
            ("add", u32::wrapping_add),
            ("min", |a, b| (a as i32).min(b as i32) as u32),
            ("max", |a, b| (a as i32).max(b as i32) as u32),
            ("and", |a, b| a & b),
            ("or", |a, b| a | b),
            ("xor", |a, b| a ^ b),
        ],
        Type::U32 | Type::B32 => [
            ("add", u32::wrapping_add),
            ("min", u32::min),
            ("max", u32::max),
            ("and", |a, b| a & b),
            ("or", |a, b| a | b),
            ("xor", |a, b| a ^ b),
        ],
        ty => return Err(format!("redux of .{ty} is not supported")),
    };
    let f = op.one_of(&table).ok_or("the operation is missing")?;
    let [d, a, mask] = op.operands()?;
    let (d, a, mask) = (env.dst(d, ty)?, env.src(a, ty)?, env.src(mask, Type::B32)?);
    Ok(Decoded::flow(Class::Shuffle, move |cx| match members(cx, &mask) {
        Err(flow) => flow,
        Ok(members) => {
            let a = cx.read(&a);
            let v = lanes(members).map(|l| a[l] as u32).reduce(f).unwrap_or_default();
            cx.write(d, &[v.into(); 32]);
            Flow::Next
        }
    }))
}

/// The leader is the lowest lane: the instruction set leaves it open, but it is always the same.
fn elect(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let [d, mask] = op.operands()?;
    let (d, p) = env.dst_pair(d, Type::B32)?;
    let mask = env.src(mask, Type::B32)?;
    Ok(Decoded::flow(Class::Shuffle, move |cx| match members(cx, &mask) {
        Err(flow) => flow,
        Ok(members) => {
            let leader = members.trailing_zeros();
            cx.write(d, &[leader.into(); 32]);
            cx.set(p, 1 << leader);
            Flow::Next
        }
    }))
}
