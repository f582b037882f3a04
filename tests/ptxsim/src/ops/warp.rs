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

/// Runs a collective once for each set of lanes that names the same members; all of them must be
/// here.
fn collective(cx: &mut Cx<'_, '_>, mask: &Src, body: impl Fn(&mut Cx<'_, '_>, u32)) -> Flow {
    let (masks, all) = (cx.read(mask), cx.mask);
    let sets = |rest: u32| {
        let members = masks[rest.trailing_zeros() as usize & 31];
        let same = lanes(rest).filter(|l| masks[*l] == members).fold(0u32, |m, l| m | 1 << l);
        (members as u32, same)
    };
    let mut rest = all;
    while rest != 0 {
        let (members, same) = sets(rest);
        let others = members & all & !same;
        if others != 0 {
            let text = format!("lanes {others:#x} of the mask {members:#x} give another mask");
            return cx.fault(Kind::Divergence, text);
        }
        cx.mask = same;
        let flow = cx.gathered(members);
        cx.mask = all;
        if let Some(flow) = flow {
            return flow;
        }
        rest &= !same;
    }
    rest = all;
    while rest != 0 {
        let (members, same) = sets(rest);
        (cx.mask, cx.defined) = (same, u32::MAX);
        body(cx, members);
        rest &= !same;
    }
    cx.mask = all;
    Flow::Next
}

/// bar.warp.sync: orders memory among the lanes of the mask.
pub fn sync(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let [mask] = op.operands()?;
    let mask = env.src(mask, Type::B32)?;
    Ok(Decoded::flow(Class::Barrier, move |cx| {
        collective(cx, &mask, |cx, members| cx.warp.clock.sync_lanes(members))
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
        collective(cx, &mask, |cx, members| {
            let (b, c) = (cx.read(&b), cx.read(&c));
            let a = cx.take(&a);
            let held = std::mem::replace(&mut cx.defined, 0);
            let (mut out, mut inside) = (a, 0);
            for l in lanes(cx.mask) {
                let (from, ok) = mode.source(l as u32, b[l] as u32, c[l] as u32);
                if members >> from & 1 == 0 {
                    let text = format!(
                        "lane {l} reads lane {from}, which is not in the mask {members:#x}"
                    );
                    cx.report_lane(Kind::InvalidOperand, l as u32, text);
                }
                out[l] = a[from as usize];
                cx.defined |= (held >> from & 1) << l;
                inside |= u32::from(ok) << l;
            }
            cx.write(d, &out);
            cx.defined = u32::MAX;
            cx.set(p, inside);
        })
    }))
}

fn vote(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let [d, a, mask] = op.operands()?;
    let (a, mask) = (env.pred(a)?, env.src(mask, Type::B32)?);
    if op.take("ballot") {
        op.expect("b32")?;
        let d = env.dst(d, Type::B32)?;
        return Ok(Decoded::flow(Class::Shuffle, move |cx| {
            collective(cx, &mask, |cx, members| {
                let votes = cx.test(a) & members;
                cx.write(d, &[votes.into(); 32]);
            })
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
    Ok(Decoded::flow(Class::Shuffle, move |cx| {
        collective(cx, &mask, |cx, members| {
            let votes = cx.test(a) & members;
            cx.set(d, if rule(votes, members) { u32::MAX } else { 0 });
        })
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
        collective(cx, &mask, |cx, members| {
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
        })
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
    Ok(Decoded::flow(Class::Shuffle, move |cx| {
        collective(cx, &mask, |cx, members| {
            let a = cx.read(&a);
            let v = lanes(members).map(|l| a[l] as u32).reduce(f).unwrap_or_default();
            cx.write(d, &[v.into(); 32]);
        })
    }))
}

/// The leader is the lowest lane: the instruction set leaves it open, but it is always the same.
fn elect(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let [d, mask] = op.operands()?;
    let (d, p) = env.dst_pair(d, Type::B32)?;
    let mask = env.src(mask, Type::B32)?;
    Ok(Decoded::flow(Class::Shuffle, move |cx| {
        collective(cx, &mask, |cx, members| {
            let leader = members.trailing_zeros();
            cx.write(d, &[leader.into(); 32]);
            cx.set(p, 1 << leader);
        })
    }))
}
