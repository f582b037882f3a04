//! cp.async: copies of one thread from global to shared memory, and their groups.
//!
//! The accesses are recorded when the copy is issued, under the lane's own asynchronous actor; the
//! bytes move at once, or when a wait needs them.

use std::collections::BTreeMap;

use crate::access::{Actor, Mode, Region, Window};
use crate::ast::{Operand, Type};
use crate::async_queue::LaneGroups;
use crate::clock::{self, Epoch};
use crate::context::{Cx, lanes};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::gang::State;
use crate::launch::Grid;
use crate::ops::load_store::{hints, window};
use crate::ops::mbarrier::{cell, find, settle_phase};
use crate::program::{Address, Decoded, Lanes, Pred, Src};
use crate::shadow::Proxy;

/// Copies not waited for, by warp of the grid and lane.
#[derive(Default)]
pub struct GangState {
    lanes: BTreeMap<(u32, u32), LaneGroups<Copy>>,
}

/// One copy.
struct Copy {
    /// None reads nothing.
    source: Option<Region>,
    destination: Region,
    /// Bytes from the source; the rest of the destination is zero.
    valid: usize,
    bytes: usize,
}

impl Copy {
    fn perform(&self, state: &mut State, grid: &Grid<'_>) {
        let mut data = [0; 16];
        if let Some(Region::Global { buffer, offset }) = self.source {
            grid.existing(buffer).copy_out(offset, &mut data[..self.valid]);
        }
        if let Region::Shared { block, address } = self.destination {
            state.blocks[block].shared.write(address, &data[..self.bytes]);
        }
    }
}

/// cp.async.* but the bulk copies.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    op.expect("async")?;
    if op.rest().contains(&"bulk") {
        return super::bulk::decode(op, env);
    }
    if op.take("commit_group") {
        let [] = op.operands()?;
        return Ok(Decoded::next(Class::Async, commit));
    }
    if op.take("wait_all") {
        let [] = op.operands()?;
        return Ok(Decoded::next(Class::Async, |cx| {
            commit(cx);
            wait(cx, 0);
        }));
    }
    if op.take("wait_group") {
        let [n] = op.operands()?;
        let n = env.src(n, Type::U32)?.constant().ok_or("the number of groups is no constant")?;
        return Ok(Decoded::next(Class::Async, move |cx| wait(cx, n as usize)));
    }
    if op.take("mbarrier") {
        return deferred_arrive(op, env);
    }
    copy(op, env)
}

fn lane<'s>(cx: &'s mut Cx<'_, '_>, l: usize) -> &'s mut LaneGroups<Copy> {
    cx.gang.cp_async.lanes.entry((cx.warp.global, l as u32)).or_default()
}

fn commit(cx: &mut Cx<'_, '_>) {
    for l in lanes(cx.mask) {
        lane(cx, l).commit();
    }
}

/// Waits until at most `n` groups are pending. Completed groups of lanes that stand at the same
/// time are learnt together.
fn wait(cx: &mut Cx<'_, '_>, n: usize) {
    let mut learnt: BTreeMap<u32, u32> = BTreeMap::new();
    for l in lanes(cx.mask) {
        let lane = lane(cx, l);
        if let Some(reached) = lane.reached(n) {
            *learnt.entry(reached).or_default() |= 1 << l;
        }
        for copy in lane.wait(n) {
            copy.perform(cx.gang, cx.grid);
        }
    }
    let actor = clock::Actor::cp_async(cx.warp.global);
    for (clock, lanes) in learnt {
        cx.warp.clock.learn(lanes, &Epoch { actor, clock, lanes });
    }
}

/// What follows the two addresses and the size.
enum Extra {
    None,
    SourceSize(Src),
    Ignore(Pred),
}

fn copy(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let cg = op.take("cg");
    if !cg {
        op.expect("ca")?;
    }
    let hint = hints(op);
    if window(op) != Some(Window::Shared) || window(op) != Some(Window::Global) {
        return Err("only .shared.global is possible".into());
    }
    let [d, s, size, extra @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    let (d, s) = (env.address(d)?, env.address(s)?);
    let size = env.src(size, Type::U32)?.constant().ok_or("the size is no constant")?;
    if !matches!(size, 4 | 8 | 16) || cg && size != 16 {
        return Err(format!("{size} bytes; .ca copies 4, 8 or 16, .cg 16"));
    }
    let extra = match (extra, hint) {
        (extra, true) => extra.split_last().ok_or("the cache policy is missing")?.1,
        (extra, false) => extra,
    };
    let extra = match extra {
        [] => Extra::None,
        [o @ Operand::Not(_)] => Extra::Ignore(env.pred(o)?),
        [o] => match env.pred(o) {
            Ok(p @ Pred::Reg { .. }) => Extra::Ignore(p),
            _ => Extra::SourceSize(env.src(o, Type::U32)?),
        },
        _ => return Err("too many operands".into()),
    };
    let size = size as u32;
    Ok(Decoded::next(Class::Async, move |cx| issue(cx, &d, &s, size, &extra)))
}

/// Counts the bytes that come from the source: those of a lane that is to fill with zeros do not.
fn count_reads(cx: &mut Cx<'_, '_>, from: &Lanes, valid: &Lanes) {
    let all = cx.mask;
    let mut rest = lanes(all).filter(|l| valid[*l] > 0).fold(0u32, |m, l| m | 1 << l);
    while let Some(first) = lanes(rest).next() {
        cx.mask = lanes(rest).filter(|l| valid[*l] == valid[first]).fold(0, |m, l| m | 1 << l);
        rest &= !cx.mask;
        cx.count_access(Window::Global, valid[first] as u32, from, Mode::Read);
    }
    cx.mask = all;
}

fn issue(cx: &mut Cx<'_, '_>, d: &Address, s: &Address, size: u32, extra: &Extra) {
    let (to, from) = (cx.addresses(d), cx.addresses(s));
    let valid = match extra {
        Extra::None => [u64::from(size); 32],
        Extra::SourceSize(n) => cx.read(n),
        Extra::Ignore(p) => {
            let ignore = cx.test(*p);
            std::array::from_fn(|l| if ignore >> l & 1 != 0 { 0 } else { u64::from(size) })
        }
    };
    count_reads(cx, &from, &valid);
    cx.count_access(Window::Shared, size, &to, Mode::Write);
    for l in lanes(cx.mask) {
        let valid = valid[l] as u32;
        if valid > size {
            let text = format!("source size {valid} is larger than the copy's {size} bytes");
            cx.report_lane(Kind::InvalidOperand, l as u32, text);
            continue;
        }
        let clock = lane(cx, l).now();
        let epoch = Epoch { actor: clock::Actor::cp_async(cx.warp.global), clock, lanes: 1 << l };
        // cp.async works in the generic proxy.
        let actor = Actor { lane: l as u32, epoch, proxy: Proxy::Generic, strong: None };
        let mut source = None;
        if valid > 0 {
            let Some(region) = cx.locate(l as u32, Window::Global, from[l], valid, 1) else {
                continue;
            };
            if !from[l].is_multiple_of(size.into()) {
                cx.locate(l as u32, Window::Global, from[l], valid, size);
                continue;
            }
            cx.touch(region, valid, Mode::Read, actor, "cp.async from");
            source = Some(region);
        }
        let Some(destination) = cx.locate(l as u32, Window::Shared, to[l], size, size) else {
            continue;
        };
        cx.touch(destination, size, Mode::Write, actor, "cp.async to");
        let copy = Copy { source, destination, valid: valid as usize, bytes: size as usize };
        if cx.grid.options.timing.is_lazy() {
            lane(cx, l).queue.issue(copy);
        } else {
            copy.perform(cx.gang, cx.grid);
        }
    }
}

/// cp.async.mbarrier.arrive: an arrive once all copies the lane has issued are complete.
fn deferred_arrive(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    op.expect("arrive")?;
    let noinc = op.take("noinc");
    op.expect("b64")?;
    let window = window(op).unwrap_or(Window::Generic);
    let [a] = op.operands()?;
    let a = env.address(a)?;
    Ok(Decoded::next(Class::Async, move |cx| {
        let at = cx.addresses(&a);
        for l in lanes(cx.mask) {
            let Some(place) = find(cx, l, window, at[l]) else { continue };
            let arrive = match cell(cx.gang, place).state.defer_arrive(noinc) {
                Ok(arrive) => arrive,
                Err(error) => {
                    cx.report_lane(Kind::Mbarrier, l as u32, error.to_string());
                    continue;
                }
            };
            let (key, by) = ((cx.warp.global, l as u32), (cx.pc, cx.warp.global, l as u32));
            // Copies issued from here on are not among those the arrive stands for.
            let clock = lane(cx, l).tick();
            let actor = clock::Actor::cp_async(key.0);
            let epoch = Epoch { actor, clock, lanes: 1 << l };
            cx.gang.start(cx.grid, move |state, grid| {
                let copies = state.cp_async.lanes.get_mut(&key).map(|l| l.queue.complete_issued());
                copies.into_iter().flatten().for_each(|copy| copy.perform(state, grid));
                if !state.blocks[place.block].shared.mbarriers.contains_key(&place.address) {
                    return;
                }
                let cell = cell(state, place);
                // The copies are what the waiter learns of, not what else the thread did.
                cell.gathering.learn(&epoch);
                match cell.state.trigger(arrive) {
                    Ok(arrival) => settle_phase(state, place, arrival.completed),
                    Err(error) => state.report(grid, Kind::Mbarrier, by, error.to_string()),
                }
            });
        }
    }))
}

/// Performs the copies nobody has waited for; false when there are none.
pub fn perform_one(state: &mut State, grid: &Grid<'_>) -> bool {
    let mut lanes = state.cp_async.lanes.values_mut();
    let Some(lane) = lanes.find(|l| l.queue.pending() > 0) else { return false };
    for copy in lane.queue.complete_issued() {
        copy.perform(state, grid);
    }
    true
}
