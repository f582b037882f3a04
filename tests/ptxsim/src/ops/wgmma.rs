//! wgmma: asynchronous matrix products of a warpgroup.
//!
//! A product is one operation of four warps, though each executes the instruction by itself and
//! goes on: it starts when all four have issued it and is complete for all four at once. When it
//! starts, its reads of shared memory are recorded, in the async proxy; they are done then, or when
//! the first warp waits for them. A warp computes its own 16 rows at its own wait.

mod compute;
mod group;
mod operand;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use crate::ast::{Operand, Type};
use crate::clock::{self, ALL_LANES, Epoch, Knowledge};
use crate::context::Cx;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::layout::Major;
use crate::numeric::half::Half;
use crate::ops::mma::{Element, element};
use crate::program::{Decoded, Dst, Flow, Pred, Src, Waiting};

use compute::Fragments;
pub use group::GangState;
use group::{Operation, Step};

/// Rows of one warp.
const M: usize = 16;

/// Products of a warp that have not been waited for.
#[derive(Default)]
pub struct WarpState {
    open: Vec<Issued>,
    groups: VecDeque<Vec<Issued>>,
    /// Closed groups.
    closed: u32,
    /// What the warp knew at its last wgmma.fence, if there was one.
    fence: Option<Rc<Knowledge>>,
}

/// A warp's part of a product under way.
struct Issued {
    operation: Rc<RefCell<Operation>>,
    /// A in registers, as it was at the issue.
    fragments: Option<Fragments>,
}

/// Operand A.
enum Left {
    Registers(Vec<Src>),
    Descriptor(Src),
}

/// A decoded product.
struct Product {
    n: usize,
    element: Element,
    /// f16 accumulators, two to a register.
    half: bool,
    d: Vec<u32>,
    a: Left,
    b: Src,
    accumulate: Pred,
    /// Whether A and B are negated.
    negate: [bool; 2],
    majors: [Major; 2],
}

/// wgmma.*
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let forms = ["fence", "commit_group", "wait_group", "mma_async"];
    let form = forms.into_iter().find(|f| op.take(f)).ok_or("the operation is missing")?;
    op.expect("sync")?;
    op.expect("aligned")?;
    match form {
        "fence" => {
            let [] = op.operands()?;
            Ok(Decoded::flow(Class::Tensor, |cx| step(cx).unwrap_or_else(|| fence(cx))))
        }
        "commit_group" => {
            let [] = op.operands()?;
            Ok(Decoded::flow(Class::Tensor, |cx| step(cx).unwrap_or_else(|| commit(cx))))
        }
        "wait_group" => {
            let [n] = op.operands()?;
            let n =
                env.src(n, Type::U32)?.constant().ok_or("the number of groups is no constant")?;
            Ok(Decoded::flow(Class::Tensor, move |cx| match cx.note {
                None => step(cx).unwrap_or_else(|| wait(cx, n as usize)),
                Some(_) => wait(cx, n as usize),
            }))
        }
        _ => product(op, env),
    }
}

/// What all wgmma instructions without operands begin with: None to go on.
fn step(cx: &mut Cx<'_, '_>) -> Option<Flow> {
    together(cx).or_else(|| group::log(cx, Step::Executed(cx.pc)))
}

/// For an instruction of a whole warp of a whole warpgroup: None to go on.
fn together(cx: &mut Cx<'_, '_>) -> Option<Flow> {
    cx.converged().or_else(|| {
        let text = || format!("warp {} belongs to no whole warpgroup", cx.warp.index);
        let text = (!group::is_whole(cx)).then(text)?;
        Some(cx.fault(Kind::InvalidOperand, text))
    })
}

fn fence(cx: &mut Cx<'_, '_>) -> Flow {
    cx.warp.wgmma_fence();
    cx.warp.wgmma.fence = Some(Rc::new(cx.warp.clock.release(cx.mask)));
    Flow::Next
}

fn commit(cx: &mut Cx<'_, '_>) -> Flow {
    let state = &mut cx.warp.wgmma;
    let group = std::mem::take(&mut state.open);
    state.groups.push_back(group);
    state.closed += 1;
    let closed = state.closed;
    if group::of(&mut cx.gang.warpgroups, cx.warp).commit(cx.warp.index, closed) {
        cx.gang.progress();
    }
    Flow::Next
}

/// Waits until at most `n` groups are pending. A group is complete for all four warps at once, so
/// not before all four have committed it.
fn wait(cx: &mut Cx<'_, '_>, n: usize) -> Flow {
    let state = &cx.warp.wgmma;
    let left = n.min(state.groups.len());
    let done = state.closed - left as u32;
    if let Some(missing) = group::of(&mut cx.gang.warpgroups, cx.warp).missing(done) {
        cx.note = Some(done.into());
        let text = format!(
            "wgmma group {done}, which warps {missing} of the warpgroup have not committed"
        );
        return Flow::Wait(Waiting::On(text));
    }
    while cx.warp.wgmma.groups.len() > left {
        let group = cx.warp.wgmma.groups.pop_front();
        for issued in group.into_iter().flatten() {
            issued.compute(cx);
            let product = &issued.operation.borrow().product;
            cx.warp.unhold(&product.d, &product.fragments());
        }
    }
    let actor = clock::Actor::wgmma(group::first_warp(cx));
    cx.warp.clock.learn(cx.mask, &Epoch { actor, clock: done, lanes: ALL_LANES });
    Flow::Next
}

/// A warp has ended; false when the launch cannot go on.
pub fn warp_ended(cx: &mut Cx<'_, '_>) -> bool {
    let WarpState { open, groups, .. } = &cx.warp.wgmma;
    let pending = open.len() + groups.iter().map(Vec::len).sum::<usize>();
    if pending > 0 {
        let text = format!("{pending} wgmma were never waited for");
        cx.report(Kind::AccumulatorInFlight, text);
    }
    !group::is_whole(cx) || group::log(cx, Step::Ended).is_none()
}

fn product(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    let shapes = op.take_prefixed("m64n");
    let [shape] = shapes[..] else { return Err("the shape is missing".into()) };
    let (n, k) = shape["m64n".len()..]
        .split_once('k')
        .and_then(|(n, k)| Some((n.parse::<usize>().ok()?, k.parse::<usize>().ok()?)))
        .filter(|(n, _)| (8..=256).contains(n) && n.is_multiple_of(8))
        .ok_or_else(|| format!("shape {shape} is not supported"))?;
    let types = op.types();
    let [accumulator, rest @ ..] = &types[..] else { return Err("the types are missing".into()) };
    let element = element(op, rest)?;
    if k != 8 * element.per_register() {
        return Err(format!("k = {k} for this type"));
    }
    let half = match accumulator {
        Type::F32 => false,
        Type::F16 if element == Element::Half(Half::F16) => true,
        ty => return Err(format!("accumulators of .{ty}")),
    };
    let [d, a, b, scale, rest @ ..] = op.instr.operands.as_slice() else {
        return Err("operands are missing".into());
    };
    let ty = if half { Type::B32 } else { Type::F32 };
    let d = env.dsts(d, ty)?;
    let d: Option<Vec<u32>> = d.iter().map(|Dst(slot)| *slot).collect();
    let d = d.ok_or("an accumulator is no register")?;
    let expected = if half { n / 4 } else { n / 2 };
    if d.len() != expected {
        return Err(format!("{} accumulators, {expected} expected", d.len()));
    }
    let a = match a {
        Operand::Vector(v) if v.len() == 4 => Left::Registers(env.srcs(a, Type::B32)?),
        Operand::Vector(v) => return Err(format!("{} registers of A, 4 expected", v.len())),
        a => Left::Descriptor(env.src(a, Type::B64)?),
    };
    let (negate, majors) = immediates(rest, element, &a)?;
    let b = env.src(b, Type::B64)?;
    let accumulate = env.pred(scale)?;
    let product = Arc::new(Product { n, element, half, d, a, b, accumulate, negate, majors });
    Ok(Decoded::flow(Class::Tensor, move |cx| together(cx).unwrap_or_else(|| issue(cx, &product))))
}

/// Signs of A and B, and which of their dimensions is contiguous.
fn immediates(rest: &[Operand], element: Element, a: &Left) -> Result<([bool; 2], [Major; 2])> {
    let values: Option<Vec<i64>> =
        rest.iter().map(|o| if let Operand::Int(v) = o { Some(*v as i64) } else { None }).collect();
    let values = values.ok_or("scale or transposition is no constant")?;
    let sign = |v: i64| match v {
        1 => Ok(false),
        -1 => Ok(true),
        v => Err(format!("scale {v}; 1 and -1 are possible")),
    };
    let major = |v: i64| match v {
        0 => Ok(Major::K),
        1 => Ok(Major::Mn),
        v => Err(format!("transposition {v}; 0 and 1 are possible")),
    };
    match (&values[..], element, a) {
        ([x, y], _, _) => Ok(([sign(*x)?, sign(*y)?], [Major::K, Major::K])),
        ([x, y, b], Element::Half(_), Left::Registers(_)) => {
            Ok(([sign(*x)?, sign(*y)?], [Major::K, major(*b)?]))
        }
        ([x, y, a, b], Element::Half(_), Left::Descriptor(_)) => {
            Ok(([sign(*x)?, sign(*y)?], [major(*a)?, major(*b)?]))
        }
        _ => Err(format!("{} constants", values.len())),
    }
}

fn issue(cx: &mut Cx<'_, '_>, product: &Arc<Product>) -> Flow {
    let scale = cx.test(product.accumulate) & cx.mask;
    if scale != 0 && scale != cx.mask {
        cx.report(Kind::InvalidOperand, "scale-d differs between lanes".into());
    }
    let accumulate = scale != 0;
    check_registers(cx, product, accumulate);
    let b = cx.uniform(&product.b, "the descriptor of B");
    let (a, fragments) = match &product.a {
        Left::Registers(s) => (None, Some(Fragments::read(cx, s))),
        Left::Descriptor(s) => (Some(cx.uniform(s, "the descriptor of A")), None),
    };
    if let Some(flow) = group::log(cx, Step::Product { pc: cx.pc, a, b, accumulate }) {
        return flow;
    }
    cx.gang.counters.add_flops(cx.pc, (2 * M * product.n * product.k()) as u64);
    let new = Operation::new(product.clone(), (a, b), accumulate, cx.warp.wgmma.closed + 1);
    let operation = group::of(&mut cx.gang.warpgroups, cx.warp).issue(cx.warp, new);
    let issued = operation.borrow().is_issued();
    if issued && operation.borrow_mut().start(cx).is_none() {
        return Flow::Fault;
    }
    cx.warp.hold(&product.d, &product.fragments());
    cx.warp.wgmma.open.push(Issued { operation, fragments });
    Flow::Next
}

/// Registers must have passed a wgmma.fence since they were written, and accumulators in flight
/// must belong to products of the same shape.
fn check_registers(cx: &mut Cx<'_, '_>, product: &Product, accumulate: bool) {
    if cx.warp.wgmma.fence.is_none() {
        let text = "no wgmma.fence before the first wgmma.mma_async".into();
        cx.report(Kind::MissingWgmmaFence, text);
    }
    let fragments = product.fragments();
    let written = |slot: &&u32| cx.warp.written_since_fence(**slot);
    if let Some(slot) = product.d.iter().chain(&fragments).find(written) {
        let name = &cx.grid.kernel.names[*slot as usize];
        let text = format!("{name} was written by another instruction since the last wgmma.fence");
        cx.report(Kind::MissingWgmmaFence, text);
    }
    let mut others = cx.warp.wgmma.open.iter().chain(cx.warp.wgmma.groups.iter().flatten());
    let overlaps = |o: &Issued| {
        let other = &o.operation.borrow().product;
        !other.same_accumulators(product) && other.d.iter().any(|r| product.d.contains(r))
    };
    if others.any(overlaps) {
        let text = "accumulators overlap those of another shape in flight".into();
        cx.report(Kind::AccumulatorInFlight, text);
    }
    if let Some(slot) = fragments.iter().find(|slot| cx.warp.accumulates(**slot)) {
        let name = &cx.grid.kernel.names[*slot as usize];
        let text = format!("{name} is A and an accumulator of a wgmma in flight");
        cx.report(Kind::AccumulatorInFlight, text);
    }
    // Rows that hold no value stay so, and are reported where they are used.
    let missing = |slot: &&u32| cx.warp.is_untouched(**slot) && !cx.warp.accumulates(**slot);
    if accumulate && let Some(slot) = product.d.iter().find(missing) {
        let name = &cx.grid.kernel.names[*slot as usize];
        let text = format!("accumulator {name} holds no value");
        cx.report(Kind::UninitialisedRegister, text);
    }
}

impl Product {
    /// Whether another product may follow this one on the same accumulators without a fence.
    fn same_accumulators(&self, other: &Self) -> bool {
        let shape = |p: &Self| (p.n, p.k(), p.half);
        self.d == other.d && shape(self) == shape(other)
    }

    /// Registers of A.
    fn fragments(&self) -> Vec<u32> {
        match &self.a {
            Left::Descriptor(_) => Vec::new(),
            Left::Registers(s) => {
                s.iter().filter_map(|s| if let Src::Reg(r) = s { Some(*r) } else { None }).collect()
            }
        }
    }

    fn k(&self) -> usize {
        8 * self.element.per_register()
    }
}
