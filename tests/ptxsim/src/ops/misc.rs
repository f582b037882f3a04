//! setmaxnreg, griddepcontrol, getctarank.

use crate::ast::{Operand, Type};
use crate::context::Cx;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::memory::{RANK_SHIFT, Target, target};
use crate::program::{Decoded, Flow, Waiting};
use crate::registers::{Refusal, Registers};

/// setmaxnreg, griddepcontrol, getctarank.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    match op.root() {
        "setmaxnreg" => setmaxnreg(op),
        "griddepcontrol" => {
            let waits = op.take("wait");
            if !waits && !op.take("launch_dependents") {
                return Err("the action is missing".into());
            }
            let [] = op.operands()?;
            // A launch is simulated alone, when what it depends on is complete.
            Ok(Decoded::next(Class::Control, move |cx| {
                if waits {
                    cx.warp.grid_waited |= cx.mask;
                } else {
                    cx.needs_grid_wait(cx.mask, "lets the next launch begin");
                }
            }))
        }
        _ => getctarank(op, env),
    }
}

/// Registers move between the warpgroups of a block; an increase waits until they are free.
fn setmaxnreg(op: &mut Opcode<'_>) -> Result<Decoded> {
    let increase = op.take("inc");
    if !increase {
        op.expect("dec")?;
    }
    op.expect("sync")?;
    op.expect("aligned")?;
    op.expect("u32")?;
    let count = match op.operands()? {
        [Operand::Int(n)] if (24..=256).contains(n) && n.is_multiple_of(8) => *n as u32,
        [Operand::Int(n)] => {
            return Err(format!("{n} registers; 24 to 256 in steps of 8 are possible"));
        }
        _ => return Err("the number of registers is no constant".into()),
    };
    Ok(Decoded::flow(Class::Control, move |cx| {
        cx.converged().unwrap_or_else(|| set_registers(cx, increase, count))
    }))
}

fn set_registers(cx: &mut Cx<'_, '_>, increase: bool, count: u32) -> Flow {
    let (warp, pc) = (cx.warp.index, cx.pc);
    let Some(registers) = &mut cx.block().registers else {
        let text = "ptxas ignores it: neither .maxnreg nor .minnctapersm with .maxntid tells how \
                    many registers the kernel starts with";
        cx.warn(Kind::Limit, 0, text.into());
        return Flow::Next;
    };
    let pool = registers.pool();
    match registers.set(warp, pc, increase, count) {
        Ok(()) => {
            cx.gang.progress();
            Flow::Next
        }
        Err(Refusal::Direction { now }) => {
            let change = if increase { "increase" } else { "decrease" };
            cx.fault(Kind::Limit, format!("{change} from {now} to {count} registers"))
        }
        Err(Refusal::Other { pc }) => {
            let at = cx.grid.location(pc, cx.warp.global, 0);
            let text = format!("another warp of the warpgroup has executed that at {at}");
            cx.fault(Kind::Divergence, text)
        }
        Err(Refusal::Wait { free }) => {
            let warps = cx.grid.warps_per_block();
            let text = format!(
                "{count} registers a thread: {free} are free for this warp of the {pool} with which \
                 the {warps} warps started"
            );
            Flow::Wait(Waiting::On(text))
        }
    }
}

/// After the last warp of a block.
pub fn block_ended(cx: &mut Cx<'_, '_>) {
    let lacks = cx.block().registers.as_ref().and_then(Registers::unfinished);
    if let Some((warp, pc)) = lacks {
        let first = cx.warp.global - cx.warp.index;
        let text = "not every warp of the warpgroup executed this".into();
        cx.gang.report(cx.grid, Kind::Divergence, (pc, first + warp, 0), text);
    }
}

/// Rank of the block a shared address belongs to.
fn getctarank(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let shared = op.take("shared::cluster");
    let ty = op.ty()?;
    let [d, a] = op.operands()?;
    let (d, a) = (env.dst(d, Type::U32)?, env.src(a, ty)?);
    Ok(Decoded::next(Class::Move, move |cx| {
        let block = &cx.gang.blocks[cx.warp.block];
        let own = (cx.warp.block - block.cluster_first) as u64;
        cx.map1(d, &a, |a| {
            let address = match (shared, target(a)) {
                (true, _) => a as u32,
                (false, Target::Shared(s)) => s,
                _ => 0,
            };
            match address >> RANK_SHIFT {
                0 => own,
                rank => u64::from(rank) - 1,
            }
        });
    }))
}
