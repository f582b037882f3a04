//! setmaxnreg, griddepcontrol, getctarank.

use crate::ast::{Operand, Type};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::memory::{RANK_SHIFT, Target, target};
use crate::program::{Decoded, Flow, Waiting};

/// setmaxnreg, griddepcontrol, getctarank.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    match op.root() {
        "setmaxnreg" => setmaxnreg(op),
        "griddepcontrol" => {
            if !(op.take("wait") || op.take("launch_dependents")) {
                return Err("the action is missing".into());
            }
            let [] = op.operands()?;
            // A launch is simulated alone: what it depends on is complete.
            Ok(Decoded::next(Class::Control, |_| {}))
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
        if let Some(flow) = cx.converged() {
            return flow;
        }
        let (warp, launched) = (cx.warp.index as usize, cx.grid.launch.registers);
        let registers = &mut cx.block().registers;
        let now = registers[warp];
        if now != 0 && (increase && count < now || !increase && count > now) {
            let change = if increase { "increase" } else { "decrease" };
            let text = format!("{change} from {now} to {count} registers");
            return cx.fault(Kind::Limit, text);
        }
        if let Some(launched) = launched {
            let pool = launched as usize * registers.len();
            let others: u32 = registers.iter().sum::<u32>() - now;
            if (others + count) as usize > pool {
                let free = pool.saturating_sub(others as usize);
                let text =
                    format!("{count} registers a thread, {free} of {pool} per lane are free");
                return Flow::Wait(Waiting::On(text));
            }
        }
        cx.block().registers[warp] = count;
        cx.gang.progress();
        Flow::Next
    }))
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
