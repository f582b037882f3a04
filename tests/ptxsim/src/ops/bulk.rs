//! cp.async.bulk, cp.reduce.async.bulk: bulk and tensor copies, in the async proxy.
//!
//! Loads complete on an mbarrier, stores in groups of the issuing thread. All accesses are checked
//! and recorded when the copy is issued; the bytes move at once, or as late as a wait allows.

mod groups;

use crate::access::{Actor, Mode, Region, Window};
use crate::ast::{Operand, Type};
use crate::clock::{self, Epoch, Scope};
use crate::context::{Cx, lanes};
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::ops::atomic::{OPERATIONS, Operation, operation};
use crate::ops::mbarrier::{At, cell, deliver, find_async};
use crate::program::{Address, Decoded, Lanes, Src};
use crate::shadow::Proxy;
use crate::tensor_map::Dtype;

use super::copy::{Move, Reduction, Run, perform, tensor_runs};
pub use groups::{GangState, perform_one, warp_ended};
use groups::{Store, commit, lane, wait};

/// Alignment of a tensor copy's tile in shared memory.
const TILE_ALIGN: u32 = 128;
/// Granule of bulk copies: addresses and sizes.
const GRANULE: u32 = 16;

/// One end of a copy, as the mnemonic names it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    Global,
    Shared,
}

/// cp.async.bulk.*, cp.reduce.async.bulk.*; `async` has been taken.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    op.expect("bulk")?;
    if op.take("commit_group") {
        let [] = op.operands()?;
        return Ok(Decoded::next(Class::Async, commit));
    }
    if op.take("wait_group") {
        let read = op.take("read");
        let [n] = op.operands()?;
        let n = env.src(n, Type::U32)?.constant().ok_or("the number of groups is no constant")?;
        return Ok(Decoded::next(Class::Async, move |cx| wait(cx, n as usize, read)));
    }
    if op.take("prefetch") {
        return prefetch(op, env);
    }
    Copy::decode(op, env).map(|copy| Decoded::next(Class::Async, move |cx| copy.issue(cx)))
}

fn prefetch(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    for m in ["tensor", "L2", "global", "tile", "L2::cache_hint", "1d", "2d", "3d", "4d", "5d"] {
        op.take(m);
    }
    let [a, ..] = op.instr.operands.as_slice() else { return Err("operands are missing".into()) };
    let a = env.address(a)?;
    Ok(Decoded::next(Class::Other, move |cx| cx.check(&a.base)))
}

/// The global side of a copy.
enum Global {
    Tensor { map: Address, coordinates: Vec<Src> },
    Linear(Address),
}

/// How a copy completes.
enum Completion {
    /// On an mbarrier, in every block of the mask.
    Mbarrier {
        at: Address,
        multicast: Option<Src>,
    },
    Group,
}

/// A decoded copy.
struct Copy {
    global: Option<Global>,
    /// Destination of a load, source of a store.
    shared: Address,
    /// Source of a copy from shared to shared memory.
    source: Option<Address>,
    /// Bytes of a linear copy.
    size: Option<Src>,
    completion: Completion,
    /// Element-wise update, by name, and its type where the map does not tell.
    reduction: Option<(&'static str, Option<Type>)>,
}

impl Copy {
    fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Self> {
        let reduces = op.take("reduce");
        let ends: Vec<End> = op
            .rest()
            .iter()
            .filter_map(|m| match *m {
                "global" => Some(End::Global),
                "shared::cluster" | "shared::cta" => Some(End::Shared),
                _ => None,
            })
            .collect();
        for m in ["global", "shared::cluster", "shared::cta", "shared::cta"] {
            op.take(m);
        }
        let [to, from] = ends[..] else { return Err("the two state spaces are missing".into()) };
        let tensor = op.take("tensor");
        let rank = op.one_of(&[("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)]);
        op.take("tile");
        op.take("cta_group::1");
        let on_mbarrier = op.take("mbarrier::complete_tx::bytes");
        if !on_mbarrier {
            op.expect("bulk_group")?;
        }
        let multicast = op.take("multicast::cluster");
        let hint = op.take("L2::cache_hint");
        let reduction = if reduces {
            op.take("noftz");
            let name =
                OPERATIONS.into_iter().find(|n| op.take(n)).ok_or("the operation is missing")?;
            Some((name, op.types().first().copied()))
        } else {
            None
        };
        let mut rest = op.instr.operands.as_slice();
        let mut next = || -> Result<&Operand> {
            let (first, others) = rest.split_first().ok_or("operands are missing")?;
            rest = others;
            Ok(first)
        };
        let (destination, source) = (next()?, next()?);
        let size = if tensor { None } else { Some(env.src(next()?, Type::U32)?) };
        let completion = if on_mbarrier {
            let at = env.address(next()?)?;
            let multicast = if multicast { Some(env.src(next()?, Type::U16)?) } else { None };
            Completion::Mbarrier { at, multicast }
        } else {
            Completion::Group
        };
        if hint {
            env.src(next()?, Type::B64)?;
        }
        if !rest.is_empty() {
            return Err(format!("{} operands too many", rest.len()));
        }
        let global = |o: &Operand| -> Result<Option<Global>> {
            if !tensor {
                return Ok(Some(Global::Linear(env.address(o)?)));
            }
            let coordinates = env.coordinates(o)?;
            if rank != Some(coordinates.len()) {
                return Err(format!("{} coordinates", coordinates.len()));
            }
            Ok(Some(Global::Tensor { map: env.address(o)?, coordinates }))
        };
        let (global, shared, source) = match (to, from, on_mbarrier) {
            (End::Shared, End::Global, true) => (global(source)?, env.address(destination)?, None),
            (End::Global, End::Shared, false) => (global(destination)?, env.address(source)?, None),
            (End::Shared, End::Shared, true) if !tensor => {
                (None, env.address(destination)?, Some(env.address(source)?))
            }
            _ => return Err("these state spaces do not go together".into()),
        };
        Ok(Self { global, shared, source, size, completion, reduction })
    }

    fn issue(&self, cx: &mut Cx<'_, '_>) {
        let shared = cx.addresses(&self.shared);
        let size = self.size.as_ref().map(|s| cx.read(s));
        let repeats = self.repeats(cx, &shared, size.as_ref());
        if repeats != 0 {
            let text = format!("{} lanes issue the same copy", repeats.count_ones() + 1);
            cx.warn(Kind::Repeated, repeats.trailing_zeros(), text);
        }
        for l in lanes(cx.mask & !repeats) {
            let size = size.map(|s| s[l] as u32);
            let Some((runs, bytes, dtype)) = self.runs(cx, l, size) else { continue };
            match &self.completion {
                Completion::Mbarrier { at, multicast } => {
                    let at = cx.addresses(at)[l];
                    let mask = multicast.as_ref().map(|m| cx.read(m)[l] as u32);
                    self.load(cx, l, &runs, bytes, shared[l], at, mask);
                }
                Completion::Group => self.store(cx, l, runs, bytes, shared[l], dtype),
            }
        }
    }

    /// Lanes whose store a lower lane of the instruction has made: the same bytes, to the same
    /// place.
    fn repeats(&self, cx: &mut Cx<'_, '_>, shared: &Lanes, size: Option<&Lanes>) -> u32 {
        let stores = matches!(self.completion, Completion::Group) && self.reduction.is_none();
        if !stores || cx.mask.is_power_of_two() {
            return 0;
        }
        let mut operands: Vec<Lanes> = size.into_iter().chain([shared]).copied().collect();
        match &self.global {
            None => {}
            Some(Global::Linear(a)) => operands.push(cx.addresses(a)),
            Some(Global::Tensor { map, coordinates }) => {
                operands.push(cx.addresses(map));
                operands.extend(coordinates.iter().map(|c| cx.read(c)));
            }
        }
        let same = |a: usize, b: usize| operands.iter().all(|o| o[a] == o[b]);
        let before = |l: usize| lanes(cx.mask & ((1 << l) - 1));
        lanes(cx.mask).filter(|l| before(*l).any(|b| same(b, *l))).fold(0, |m, l| m | 1 << l)
    }

    /// The runs of the copy, its bytes, and the element type of a tensor; None after a report.
    fn runs(
        &self,
        cx: &mut Cx<'_, '_>,
        l: usize,
        size: Option<u32>,
    ) -> Option<(Vec<Run>, u32, Option<Dtype>)> {
        let lane = l as u32;
        if let Some(size) = size
            && (size == 0 || !size.is_multiple_of(GRANULE))
        {
            let text = format!("a bulk copy of {size} bytes; multiples of {GRANULE} are possible");
            cx.report_lane(Kind::InvalidOperand, lane, text);
            return None;
        }
        match &self.global {
            None => Some((vec![Run::linear(None, size?)], size?, None)),
            Some(Global::Linear(a)) => {
                let address = cx.addresses(a)[l];
                let region = cx.locate(lane, Window::Global, address, size?, GRANULE)?;
                Some((vec![Run::linear(Some(region), size?)], size?, None))
            }
            Some(Global::Tensor { map, coordinates }) => {
                let address = cx.addresses(map)[l];
                let region = cx.locate(lane, Window::Generic, address, 128, 64)?;
                cx.touch(region, 128, Mode::Read, cx.own(l, None), "tensor map");
                let mut bytes = [0; 128];
                cx.copy_out(l, region, &mut bytes);
                let at: Vec<i32> = coordinates.iter().map(|c| cx.read(c)[l] as i32).collect();
                match tensor_runs(cx, lane, &bytes, &at) {
                    Ok(runs) => runs,
                    Err(error) => {
                        cx.report_lane(Kind::InvalidOperand, lane, error);
                        None
                    }
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn load(
        &self,
        cx: &mut Cx<'_, '_>,
        l: usize,
        runs: &[Run],
        bytes: u32,
        to: u64,
        at: u64,
        multicast: Option<u32>,
    ) {
        let align =
            if matches!(self.global, Some(Global::Tensor { .. })) { TILE_ALIGN } else { GRANULE };
        let targets: Vec<(u64, u64)> = match multicast {
            None => vec![(to, at)],
            Some(mask) => {
                let local = |a: u64, rank: usize| {
                    a & ((1 << crate::memory::RANK_SHIFT) - 1)
                        | (rank as u64 + 1) << crate::memory::RANK_SHIFT
                };
                lanes(mask & 0xffff).map(|rank| (local(to, rank), local(at, rank))).collect()
            }
        };
        // What goes to several blocks is read once.
        for run in runs {
            if let Some(region) = run.global {
                cx.count_range(region, run.bytes, Mode::Read);
            }
        }
        for (to, at) in targets {
            let Some(place) = find_async(cx, l, Window::Shared, at) else { continue };
            let Some(Region::Shared { block, address }) =
                cx.locate(l as u32, Window::Shared, to, bytes, align)
            else {
                continue;
            };
            if block != place.block {
                let text = "the destination and its mbarrier lie in different blocks".into();
                cx.report_lane(Kind::InvalidOperand, l as u32, text);
                continue;
            }
            self.start_load(cx, l, runs, bytes, (block, address), place);
        }
    }

    fn start_load(
        &self,
        cx: &mut Cx<'_, '_>,
        l: usize,
        runs: &[Run],
        bytes: u32,
        (block, address): (usize, u32),
        place: At,
    ) {
        let cell = cell(cx.gang, place);
        let phase = cell.state.issue_tx(bytes.into());
        let actor = clock::Actor::barrier(cell.actor);
        let epoch = Epoch { actor, clock: phase as u32 + 1, lanes: u32::MAX };
        let actor = Actor { lane: l as u32, epoch, proxy: Proxy::Async, strong: None };
        let mut moves = Vec::new();
        if let Some(source) = &self.source {
            let from = cx.addresses(source)[l];
            let Some(region) = cx.locate(l as u32, Window::Shared, from, bytes, GRANULE) else {
                return;
            };
            cx.touch(region, bytes, Mode::Read, actor, "bulk copy from");
            moves.push(Move::between(region, Region::Shared { block, address }, bytes));
        }
        for run in runs {
            if let Some(region) = run.global {
                cx.touch(region, run.bytes, Mode::Read, actor, "bulk copy from");
            }
            if self.source.is_none() {
                moves.extend(run.placed(block, address, true));
            }
        }
        let to = Region::Shared { block, address };
        cx.touch(to, bytes, Mode::Write, actor, "bulk copy to");
        let by = (cx.pc, cx.warp.global, l as u32);
        cx.gang.start(cx.grid, move |state, grid| {
            perform(state, grid, &moves);
            deliver(state, grid, place, bytes.into(), phase, by);
        });
    }

    fn store(
        &self,
        cx: &mut Cx<'_, '_>,
        l: usize,
        runs: Vec<Run>,
        bytes: u32,
        from: u64,
        dtype: Option<Dtype>,
    ) {
        let align =
            if matches!(self.global, Some(Global::Tensor { .. })) { TILE_ALIGN } else { GRANULE };
        let Some(Region::Shared { block, address }) =
            cx.locate(l as u32, Window::Shared, from, bytes, align)
        else {
            return;
        };
        let reduction = match self.reduction(dtype) {
            Ok(reduction) => reduction,
            Err(error) => return cx.report_lane(Kind::InvalidOperand, l as u32, error),
        };
        let warp = cx.warp.global;
        let clock = lane(cx, l).groups.now();
        lane(cx, l).last = (clock, cx.pc);
        let of = |actor, strong| Actor {
            lane: l as u32,
            epoch: Epoch { actor, clock, lanes: 1 << l },
            proxy: Proxy::Async,
            strong,
        };
        let source = Region::Shared { block, address };
        cx.touch(
            source,
            bytes,
            Mode::Read,
            of(clock::Actor::bulk_read(warp), None),
            "bulk copy from",
        );
        let writer = clock::Actor::bulk(warp);
        for run in &runs {
            let Some(region) = run.global else { continue };
            cx.count_range(region, run.bytes, Mode::Write);
            match &reduction {
                None => cx.touch(region, run.bytes, Mode::Write, of(writer, None), "bulk copy to"),
                // Element by element: atomics meet only when they overlap completely.
                Some(r) => {
                    let Region::Global { buffer, offset } = region else { continue };
                    for o in (offset..offset + u64::from(run.bytes)).step_by(r.bytes as usize) {
                        let region = Region::Global { buffer, offset: o };
                        let actor = of(writer, Some(Scope::Gpu));
                        cx.touch(region, r.bytes, Mode::Update, actor, "bulk reduction to");
                    }
                }
            }
        }
        let moves = runs.iter().flat_map(|r| r.placed(block, address, false)).collect();
        let store = Store::new(moves, reduction);
        if cx.grid.options.timing.is_lazy() {
            lane(cx, l).groups.queue.issue(store);
        } else {
            store.perform(cx.gang, cx.grid);
        }
    }

    fn reduction(&self, dtype: Option<Dtype>) -> Result<Option<Reduction>> {
        let Some((name, ty)) = self.reduction else { return Ok(None) };
        let ty = match (ty, dtype) {
            (Some(ty), _) => ty,
            (None, Some(dtype)) => element_type(dtype),
            (None, None) => return Err("the type of the reduction is missing".into()),
        };
        let f: Operation = operation(name, ty)?;
        Ok(Some(Reduction { bytes: ty.size(), f: f.into() }))
    }
}

fn element_type(dtype: Dtype) -> Type {
    match dtype {
        Dtype::U8 => Type::U8,
        Dtype::U16 => Type::U16,
        Dtype::U32 => Type::U32,
        Dtype::S32 => Type::S32,
        Dtype::U64 => Type::U64,
        Dtype::S64 => Type::S64,
        Dtype::F16 => Type::F16,
        Dtype::F32 | Dtype::Tf32 => Type::F32,
        Dtype::F64 => Type::F64,
        Dtype::Bf16 => Type::Bf16,
    }
}
