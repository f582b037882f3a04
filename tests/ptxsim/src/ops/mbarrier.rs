//! mbarrier: arrivals, expected bytes, waits.

use crate::access::{Actor, Mode, Region, Window};
use crate::ast::{Operand, Type};
use crate::clock::{self, Epoch, Knowledge, Scope};
use crate::context::{Cx, lanes};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::gang::State;
use crate::launch::Grid;
use crate::mbarrier::{Mbarrier, MbarrierError};
use crate::memory::MbarrierCell;
use crate::ops::load_store::{scope, window};
use crate::program::{Address, Decoded, Dst, Flow, Lanes, PredDst, Src, Waiting};
use crate::shadow::Proxy;

/// Bytes of the object, and its alignment.
const BYTES: u32 = 8;

/// Where an mbarrier object is: block of the gang and shared address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct At {
    /// Index of the block in the gang.
    pub block: usize,
    /// Shared address without rank.
    pub address: u32,
}

/// mbarrier.*
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let forms = [
        "init",
        "inval",
        "expect_tx",
        "complete_tx",
        "arrive",
        "arrive_drop",
        "test_wait",
        "try_wait",
        "pending_count",
    ];
    // `arrive.expect_tx` has both words: the first one written is the operation.
    let first = op.rest().first().copied().unwrap_or_default();
    let form = *forms.iter().find(|f| **f == first).ok_or("the operation is missing")?;
    op.take(form);
    op.expect("b64")?;
    let relaxed = op.take("relaxed");
    for m in ["release", "acquire"] {
        op.take(m);
    }
    scope(op);
    let window = window(op).unwrap_or(Window::Generic);
    match form {
        "init" => init(op, env, window),
        "inval" => inval(op, env, window),
        "expect_tx" | "complete_tx" => bytes(op, env, window, form == "expect_tx"),
        "arrive" | "arrive_drop" => arrive(op, env, window, form == "arrive_drop", relaxed),
        "pending_count" => pending_count(op, env),
        _ => wait(op, env, window, relaxed),
    }
}

fn init(op: &mut Opcode<'_>, env: &Env<'_>, window: Window) -> Result<Decoded> {
    let [a, count] = op.operands()?;
    let (a, count) = (env.address(a)?, env.src(count, Type::U32)?);
    Ok(Decoded::next(Class::Barrier, move |cx| {
        let (at, counts) = (cx.addresses(&a), cx.read(&count));
        let mut repeats = 0;
        for l in lanes(cx.mask) {
            let same = |b: usize| at[b] == at[l] && counts[b] == counts[l];
            if lanes(cx.mask & ((1 << l) - 1)).any(same) {
                repeats += 1;
                continue;
            }
            init_one(cx, l, window, at[l], counts[l]);
        }
        if repeats > 0 {
            let lane = cx.mask.trailing_zeros() & 31;
            let text = format!("{} lanes initialise the same mbarrier alike", repeats + 1);
            cx.forgive(Kind::Mbarrier, lane, text);
        }
    }))
}

fn init_one(cx: &mut Cx<'_, '_>, l: usize, window: Window, at: u64, count: u64) {
    let Some(region) = cx.locate(l as u32, window, at, BYTES, BYTES) else { return };
    let Region::Shared { block, address } = region else {
        return report(cx, l, "an mbarrier must lie in shared memory".into(), None);
    };
    let place = Some(At { block, address });
    if let Some(cell) = cx.gang.blocks[block].shared.mbarriers.get(&address) {
        let error = cell.state.reinit_error(count);
        return report(cx, l, error.to_string(), place);
    }
    let state = match Mbarrier::init(count) {
        Ok(state) => state,
        Err(error) => return report(cx, l, error.to_string(), place),
    };
    let epoch = cx.warp.clock.init(l as u32);
    let actor = Actor { epoch, ..cx.own(l, None) };
    cx.touch(region, BYTES, Mode::Write, actor, "mbarrier.init");
    let b = &mut cx.gang.blocks[block];
    let actor = cx.grid.new_barrier(b.linear);
    let (gathering, completed) = (Knowledge::default(), Knowledge::default());
    b.shared.mbarriers.insert(address, MbarrierCell { state, actor, gathering, completed });
    b.shared.mark_mbarrier(address, true);
}

fn inval(op: &mut Opcode<'_>, env: &Env<'_>, window: Window) -> Result<Decoded> {
    let [a] = op.operands()?;
    let a = env.address(a)?;
    Ok(Decoded::next(Class::Barrier, move |cx| {
        let at = cx.addresses(&a);
        for l in lanes(cx.mask) {
            let Some(place) = find(cx, l, window, at[l]) else { continue };
            if let Err(error) = cell(cx.gang, place).state.inval() {
                report(cx, l, error.to_string(), Some(place));
            }
            let shared = &mut cx.gang.blocks[place.block].shared;
            shared.mbarriers.remove(&place.address);
            // Arrivals before it are the object's own affair: no write to what they have read.
            shared.mark_mbarrier(place.address, false);
        }
    }))
}

/// A block has ended: asynchronous work nobody has waited for may still write its shared memory.
pub fn block_ended(cx: &mut Cx<'_, '_>) {
    let cells = &cx.block().shared.mbarriers;
    let busy = |cell: &MbarrierCell| cell.state.inval().err();
    let busy: Vec<_> = cells.iter().filter_map(|(at, cell)| Some((*at, busy(cell)?))).collect();
    for (address, error) in busy {
        let region = Region::Shared { block: cx.warp.block, address };
        let text = format!("the block ends; {error}");
        cx.report_at(Kind::PendingWrite, 0, text, cx.region_place(region), None);
    }
}

fn bytes(op: &mut Opcode<'_>, env: &Env<'_>, window: Window, expect: bool) -> Result<Decoded> {
    let [a, count] = op.operands()?;
    let (a, count) = (env.address(a)?, env.src(count, Type::U32)?);
    Ok(Decoded::next(Class::Barrier, move |cx| {
        let (at, counts) = (cx.addresses(&a), cx.read(&count));
        for l in lanes(cx.mask) {
            let Some(place) = find(cx, l, window, at[l]) else { continue };
            let state = &mut cell(cx.gang, place).state;
            let result = match expect {
                true => state.expect_tx(counts[l] as u32).map(|()| None),
                false => state.simulate_complete_tx(counts[l] as u32),
            };
            settle(cx, l, place, result);
        }
    }))
}

/// What an arrive does beside arriving.
struct Arrive {
    at: Address,
    window: Window,
    token: Dst,
    count: Src,
    expect: Option<Src>,
    drop: bool,
    relaxed: bool,
}

fn arrive(
    op: &mut Opcode<'_>,
    env: &Env<'_>,
    window: Window,
    drop: bool,
    relaxed: bool,
) -> Result<Decoded> {
    let expects = op.take("expect_tx");
    op.take("noComplete");
    // The token may be left out altogether when nobody wants it.
    let (token, rest) = match op.instr.operands.as_slice() {
        [a @ Operand::Address { .. }, rest @ ..] => (Dst(None), (a, rest)),
        [d, a, rest @ ..] => (env.dst(d, Type::B64)?, (a, rest)),
        _ => return Err("operands are missing".into()),
    };
    let (a, rest) = rest;
    let value = match rest {
        [] => None,
        [v] => Some(env.src(v, Type::U32)?),
        _ => return Err("too many operands".into()),
    };
    let (count, expect) = match (expects, value) {
        (false, value) => (value.unwrap_or(Src::imm(1)), None),
        (true, Some(bytes)) => (Src::imm(1), Some(bytes)),
        (true, None) => return Err("the number of bytes is missing".into()),
    };
    let arrive = Arrive { at: env.address(a)?, window, token, count, expect, drop, relaxed };
    Ok(Decoded::next(Class::Barrier, move |cx| arrive.execute(cx)))
}

impl Arrive {
    fn execute(&self, cx: &mut Cx<'_, '_>) {
        let (at, counts) = (cx.addresses(&self.at), cx.read(&self.count));
        let expect = self.expect.as_ref().map(|e| cx.read(e));
        let mut tokens = [0; 32];
        let mut released = Released::default();
        for l in lanes(cx.mask) {
            let Some(place) = find(cx, l, self.window, at[l]) else { continue };
            if !self.relaxed {
                released.gather(cx, l, place, &at);
            }
            let state = &mut cell(cx.gang, place).state;
            let count = counts[l] as u32;
            let result = match (&expect, self.drop) {
                (Some(bytes), true) => {
                    state.expect_tx(bytes[l] as u32).and_then(|()| state.arrive_drop(count))
                }
                (Some(bytes), false) => state.arrive_expect_tx(count, bytes[l] as u32),
                (None, true) => state.arrive_drop(count),
                (None, false) => state.arrive(count),
            };
            tokens[l] = result.as_ref().map_or(0, |a| a.token);
            settle(cx, l, place, result.map(|a| a.completed));
        }
        cx.write(self.token, &tokens);
    }
}

/// Lanes that arrive at the same object release together, once.
#[derive(Default)]
struct Released {
    done: u32,
}

impl Released {
    fn gather(&mut self, cx: &mut Cx<'_, '_>, lane: usize, place: At, at: &Lanes) {
        if self.done >> lane & 1 != 0 {
            return;
        }
        let same = lanes(cx.mask).filter(|l| at[*l] == at[lane]).fold(0, |m, l| m | 1 << l);
        self.done |= same;
        let gathering = &mut cell(cx.gang, place).gathering;
        cx.warp.clock.release_into(same, gathering);
    }
}

fn pending_count(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let [d, token] = op.operands()?;
    let _ = (env.dst(d, Type::U32)?, env.src(token, Type::B64)?);
    Err("mbarrier.pending_count is not supported: the state is opaque here".into())
}

fn wait(op: &mut Opcode<'_>, env: &Env<'_>, window: Window, relaxed: bool) -> Result<Decoded> {
    let parity = op.take("parity");
    let [p, a, phase, rest @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    if rest.len() > 1 {
        return Err("too many operands".into());
    }
    let hint = rest.first().map(|h| env.src(h, Type::U32)).transpose()?;
    let ty = if parity { Type::U32 } else { Type::B64 };
    let wait = Wait {
        done: env.pred_dst(p)?,
        at: env.address(a)?,
        window,
        phase: env.src(phase, ty)?,
        parity,
        relaxed,
    };
    Ok(Decoded::flow(Class::Barrier, move |cx| {
        if let Some(hint) = &hint {
            cx.check(hint);
        }
        wait.execute(cx)
    }))
}

struct Wait {
    done: PredDst,
    at: Address,
    window: Window,
    phase: Src,
    parity: bool,
    relaxed: bool,
}

impl Wait {
    fn execute(&self, cx: &mut Cx<'_, '_>) -> Flow {
        let (at, phases) = (cx.addresses(&self.at), cx.read(&self.phase));
        let mut done = 0;
        let mut failed = None;
        for l in lanes(cx.mask) {
            // Lanes that wait for the same as the one before share its answer.
            let before = (l > 0 && cx.mask >> (l - 1) & 1 != 0).then(|| l - 1);
            if let Some(b) = before.filter(|b| at[*b] == at[l] && phases[*b] == phases[l]) {
                done |= (done >> b & 1) << l;
                continue;
            }
            let Some(place) = find(cx, l, self.window, at[l]) else { continue };
            match self.test(cx, l, place, phases[l]) {
                Ok(true) => done |= 1 << l,
                Ok(false) => failed = Some((place, phases[l])),
                Err(error) => {
                    report(cx, l, error.to_string(), Some(place));
                    // Going on shows what comes after; the report stands.
                    done |= 1 << l;
                }
            }
        }
        self.acquire(cx, &at, done);
        cx.set(self.done, done);
        match failed {
            None => Flow::Next,
            Some((place, phase)) => {
                let what = if self.parity { "parity" } else { "token" };
                let state = &cell(cx.gang, place).state;
                let text =
                    format!("mbarrier at shared {:#x}, {what} {phase} ({state})", place.address);
                Flow::Spin(Waiting::On(text))
            }
        }
    }

    fn test(
        &self,
        cx: &mut Cx<'_, '_>,
        l: usize,
        at: At,
        phase: u64,
    ) -> Result<bool, MbarrierError> {
        let actor = clock::Actor::barrier(cell(cx.gang, at).actor);
        let known = cx.warp.clock.known(l as u32, actor).checked_sub(1).map(u64::from);
        let state = &cell(cx.gang, at).state;
        match self.parity {
            true => state.parity_complete(phase as u32, known),
            false => state.token_complete(phase),
        }
    }

    /// Lanes whose wait has succeeded learn what the phase carries, together where they can.
    fn acquire(&self, cx: &mut Cx<'_, '_>, at: &Lanes, done: u32) {
        let mut rest = done;
        while rest != 0 {
            let first = rest.trailing_zeros() as usize;
            let same = lanes(rest).filter(|l| at[*l] == at[first]).fold(0, |m, l| m | 1 << l);
            rest &= !same;
            let Some(place) = find(cx, first, self.window, at[first]) else { continue };
            let cell = cell(cx.gang, place);
            cell.state.observe();
            if !self.relaxed {
                cx.warp.clock.acquire(same, &cell.completed);
            }
        }
    }
}

/// The live object at an address; reports when there is none, or when its initialisation is not
/// ordered before this.
pub fn find(cx: &mut Cx<'_, '_>, lane: usize, window: Window, address: u64) -> Option<At> {
    find_by(cx, lane, window, address, Proxy::Generic)
}

/// The same for an asynchronous copy, which needs a proxy fence after the initialisation.
pub fn find_async(cx: &mut Cx<'_, '_>, lane: usize, window: Window, address: u64) -> Option<At> {
    find_by(cx, lane, window, address, Proxy::Async)
}

fn find_by(
    cx: &mut Cx<'_, '_>,
    lane: usize,
    window: Window,
    address: u64,
    proxy: Proxy,
) -> Option<At> {
    let region = cx.locate(lane as u32, window, address, BYTES, BYTES)?;
    let Region::Shared { block, address } = region else {
        report(cx, lane, "an mbarrier must lie in shared memory".into(), None);
        return None;
    };
    let at = At { block, address };
    if !cx.gang.blocks[block].shared.mbarriers.contains_key(&address) {
        let place = cx.region_place(region);
        let text = "no mbarrier has been initialised here".into();
        cx.report_at(Kind::Mbarrier, lane as u32, text, place, None);
        return None;
    }
    let actor = Actor { proxy, ..cx.own(lane, Some(Scope::Cluster)) };
    cx.touch_object(region, BYTES, Mode::Read, actor, "use of an mbarrier");
    Some(at)
}

/// The object, known to be there.
pub fn cell(state: &mut State, at: At) -> &mut MbarrierCell {
    state.blocks[at.block].shared.mbarriers.get_mut(&at.address).expect("found before")
}

/// Reports an error, or lets waiters know of a completed phase.
fn settle(cx: &mut Cx<'_, '_>, lane: usize, at: At, result: Result<Option<u64>, MbarrierError>) {
    match result {
        Ok(completed) => settle_phase(cx.gang, at, completed),
        Err(error) => report(cx, lane, error.to_string(), Some(at)),
    }
}

/// A phase has completed: what it gathered can be acquired.
pub fn settle_phase(state: &mut State, at: At, completed: Option<u64>) {
    let Some(phase) = completed else { return };
    let cell = cell(state, at);
    cell.completed = std::mem::take(&mut cell.gathering);
    let actor = clock::Actor::barrier(cell.actor);
    cell.completed.learn(&Epoch { actor, clock: phase as u32 + 1, lanes: u32::MAX });
    state.progress();
}

/// A copy issued in `phase` has delivered `bytes` bytes.
pub fn deliver(
    state: &mut State,
    grid: &Grid<'_>,
    at: At,
    bytes: u64,
    phase: u64,
    issuer: (u32, u32, u32),
) {
    if !state.blocks[at.block].shared.mbarriers.contains_key(&at.address) {
        return;
    }
    match cell(state, at).state.complete_tx(bytes, phase) {
        Ok(completed) => settle_phase(state, at, completed),
        Err(error) => state.report(grid, Kind::Mbarrier, issuer, error.to_string()),
    }
}

fn report(cx: &mut Cx<'_, '_>, lane: usize, text: String, at: Option<At>) {
    let region = at.map(|a| Region::Shared { block: a.block, address: a.address });
    let place = region.and_then(|r| cx.region_place(r));
    cx.report_at(Kind::Mbarrier, lane as u32, text, place, None);
}
