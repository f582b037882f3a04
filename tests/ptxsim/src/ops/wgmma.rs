//! wgmma: asynchronous matrix products of a warpgroup.
//!
//! Each of the four warps computes its own 16 rows, without meeting the others; a log of what each
//! warp has issued tells when the four do not execute the same. Shared memory is read in the async
//! proxy: recorded when the product is issued, done at once or when the group is waited for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::access::{Actor, Mode, Window};
use crate::ast::{Operand, Type};
use crate::clock::{self, ALL_LANES, Epoch};
use crate::context::Cx;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::layout::{Descriptor, Major, MmaShape};
use crate::numeric::convert::tf32_operand;
use crate::numeric::half::Half;
use crate::numeric::tensor::{mma_tile, mma_tile_f16};
use crate::ops::mma::{Element, element};
use crate::program::{Decoded, Dst, Flow, Lanes, Pred, Src};
use crate::shadow::Proxy;

/// Rows of one warp.
const M: usize = 16;
/// Bytes of a chunk of an operand in shared memory.
const CHUNK: u32 = 16;

/// Products of a warp that have not been waited for.
#[derive(Default)]
pub struct WarpState {
    open: Vec<Issued>,
    groups: VecDeque<Vec<Issued>>,
    /// Closed groups.
    clock: u32,
    /// Whether wgmma.fence has been executed at all.
    fenced: bool,
    /// Instructions executed, to find the others' in the log.
    executed: u64,
}

impl WarpState {
    /// Products nobody has waited for.
    pub fn pending(&self) -> usize {
        self.open.len() + self.groups.iter().map(Vec::len).sum::<usize>()
    }
}

/// What the warps of each warpgroup have executed, by block, warpgroup and number; an entry goes
/// when all four have.
#[derive(Default)]
pub struct GangState {
    log: BTreeMap<(usize, u32, u64), Entry>,
}

impl GangState {
    /// Program counters that some warps of a warpgroup of this block have executed, and not all.
    pub fn unfinished(&mut self, block: usize) -> Vec<u32> {
        let of_block = (block, 0, 0)..(block + 1, 0, 0);
        let left: Vec<_> = self.log.range(of_block).map(|(key, e)| (*key, e.step.pc)).collect();
        left.into_iter().filter_map(|(key, pc)| self.log.remove(&key).map(|_| pc)).collect()
    }
}

struct Entry {
    step: Step,
    warps: u32,
}

/// One wgmma instruction: what all four warps have to agree in.
#[derive(Clone, Copy, Eq, PartialEq)]
struct Step {
    pc: u32,
    a: u64,
    b: u64,
    accumulate: bool,
}

/// One product under way.
struct Issued {
    product: Arc<Product>,
    /// A in registers, as it was at the issue.
    fragments: Option<Vec<Lanes>>,
    /// Addresses of the chunks of A (this warp's rows) and of B.
    a: Vec<u32>,
    b: Vec<u32>,
    accumulate: bool,
    /// Whether it has been computed already.
    done: bool,
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
            Ok(aligned(|cx| {
                cx.warp.wgmma_fence();
                cx.warp.wgmma.fenced = true;
            }))
        }
        "commit_group" => {
            let [] = op.operands()?;
            Ok(aligned(|cx| {
                let state = &mut cx.warp.wgmma;
                let group = std::mem::take(&mut state.open);
                state.groups.push_back(group);
                state.clock += 1;
            }))
        }
        "wait_group" => {
            let [n] = op.operands()?;
            let n =
                env.src(n, Type::U32)?.constant().ok_or("the number of groups is no constant")?;
            Ok(aligned(move |cx| wait(cx, n as usize)))
        }
        _ => product(op, env),
    }
}

fn aligned(f: impl Fn(&mut Cx<'_, '_>) + Send + Sync + 'static) -> Decoded {
    Decoded::flow(Class::Tensor, move |cx| match cx.converged() {
        Some(flow) => flow,
        None => {
            log(cx, Step { pc: cx.pc, a: 0, b: 0, accumulate: false });
            f(cx);
            Flow::Next
        }
    })
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
    Ok(Decoded::flow(Class::Tensor, move |cx| match cx.converged() {
        Some(flow) => flow,
        None => issue(cx, &product),
    }))
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
    let group = cx.warp.index / 4;
    if cx.grid.warps_per_block() < 4 * (group + 1) {
        let text = format!("warp {} belongs to no whole warpgroup", cx.warp.index);
        return cx.fault(Kind::InvalidOperand, text);
    }
    let scale = cx.test(product.accumulate) & cx.mask;
    if scale != 0 && scale != cx.mask {
        cx.report(Kind::InvalidOperand, "scale-d differs between lanes".into());
    }
    let accumulate = scale != 0;
    check_registers(cx, product, accumulate);
    let epoch = Epoch {
        actor: clock::Actor::wgmma(cx.warp.global),
        clock: cx.warp.wgmma.clock + 1,
        lanes: ALL_LANES,
    };
    let lane = cx.mask.trailing_zeros() & 31;
    let actor = Actor { lane, epoch, proxy: Proxy::Async, strong: None };
    let b_bits = cx.uniform(&product.b, "the descriptor of B");
    let Some(b) = chunks(cx, b_bits, 0, product.n as u32, product.majors[1], actor) else {
        return Flow::Fault;
    };
    let (a_bits, a, fragments) = match &product.a {
        Left::Registers(s) => (0, Vec::new(), Some(s.iter().map(|s| cx.read(s)).collect())),
        Left::Descriptor(s) => {
            let bits = cx.uniform(s, "the descriptor of A");
            let first = M as u32 * (cx.warp.index % 4);
            match chunks(cx, bits, first, M as u32, product.majors[0], actor) {
                None => return Flow::Fault,
                Some(a) => (bits, a, None),
            }
        }
    };
    log(cx, Step { pc: cx.pc, a: a_bits, b: b_bits, accumulate });
    cx.gang.counters.add_flops(cx.pc, (2 * M * product.n * product.k()) as u64);
    let mut issued = Issued { product: product.clone(), fragments, a, b, accumulate, done: false };
    if !cx.grid.options.timing.is_lazy() {
        issued.compute(cx);
    }
    cx.warp.hold(&product.d, &product.fragments());
    cx.warp.wgmma.open.push(issued);
    Flow::Next
}

/// Registers must have passed a wgmma.fence since they were written, and accumulators in flight
/// must belong to products of the same shape.
fn check_registers(cx: &mut Cx<'_, '_>, product: &Product, accumulate: bool) {
    if !cx.warp.wgmma.fenced {
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
    let others = cx.warp.wgmma.open.iter().chain(cx.warp.wgmma.groups.iter().flatten());
    let overlaps = |o: &&Issued| {
        !o.product.same_accumulators(product) && o.product.d.iter().any(|r| product.d.contains(r))
    };
    if others.clone().any(|o| overlaps(&o)) {
        let text = "accumulators overlap those of another shape in flight".into();
        cx.report(Kind::AccumulatorInFlight, text);
    }
    if let Some(slot) = fragments.iter().find(|slot| cx.warp.accumulates(**slot)) {
        let name = &cx.grid.kernel.names[*slot as usize];
        let text = format!("{name} is A and an accumulator of a wgmma in flight");
        cx.report(Kind::AccumulatorInFlight, text);
    }
    let missing = |slot: &&u32| cx.warp.written(**slot) != u32::MAX && !cx.warp.accumulates(**slot);
    if accumulate && let Some(slot) = product.d.iter().find(missing) {
        let name = &cx.grid.kernel.names[*slot as usize];
        let text = format!("accumulator {name} holds no value");
        cx.report(Kind::UninitialisedRegister, text);
    }
}

/// Addresses of the chunks of rows `first` and on of an operand, each checked and recorded.
fn chunks(
    cx: &mut Cx<'_, '_>,
    bits: u64,
    first: u32,
    rows: u32,
    major: Major,
    actor: Actor,
) -> Option<Vec<u32>> {
    let descriptor = match Descriptor::new(bits) {
        Ok(descriptor) => descriptor,
        Err(error) => {
            cx.report(Kind::InvalidOperand, error.to_string());
            return None;
        }
    };
    let addresses = operand(descriptor, first, rows, major);
    for address in &addresses {
        let at = u64::from(*address);
        let region = cx.locate(actor.lane, Window::Shared, at, CHUNK, CHUNK)?;
        cx.touch(region, CHUNK, Mode::Read, actor, "wgmma operand");
    }
    Some(addresses)
}

/// K-major: [row][k / 8]; MN-major: [k][row / 8].
fn operand(descriptor: Descriptor, first: u32, rows: u32, major: Major) -> Vec<u32> {
    let at = |(mn, k)| descriptor.operand_address(mn, k, major);
    match major {
        Major::K => (first..first + rows).flat_map(|r| [at((r, 0)), at((r, 8))]).collect(),
        Major::Mn => {
            (0..16).flat_map(|k| (0..rows / 8).map(move |c| (first + 8 * c, k))).map(at).collect()
        }
    }
}

/// Compares with what the other warps of the warpgroup executed as their wgmma of this number.
fn log(cx: &mut Cx<'_, '_>, step: Step) {
    let number = cx.warp.wgmma.executed;
    cx.warp.wgmma.executed += 1;
    let key = (cx.warp.block, cx.warp.index / 4, number);
    let entry = cx.gang.warpgroups.log.entry(key).or_insert(Entry { step, warps: 0 });
    entry.warps += 1;
    let (other, complete) = (entry.step, entry.warps == 4);
    if complete {
        cx.gang.warpgroups.log.remove(&key);
    }
    if other != step {
        let words = |s: &Step| {
            let line = cx.grid.kernel.instrs[s.pc as usize].line;
            let Step { a, b, accumulate, .. } = s;
            format!("PTX line {line}, descriptors {a:#x} and {b:#x}, scale-d {accumulate}")
        };
        let text = format!(
            "the warps of a warpgroup differ in their wgmma number {number}: {}; here {}",
            words(&other),
            words(&step)
        );
        cx.report(Kind::Divergence, text);
    }
}

/// Waits until at most `n` groups are pending.
fn wait(cx: &mut Cx<'_, '_>, n: usize) {
    while cx.warp.wgmma.groups.len() > n {
        let Some(group) = cx.warp.wgmma.groups.pop_front() else { break };
        for mut issued in group {
            issued.compute(cx);
            let product = issued.product;
            cx.warp.unhold(&product.d, &product.fragments());
        }
    }
    let done = cx.warp.wgmma.clock - cx.warp.wgmma.groups.len() as u32;
    let actor = clock::Actor::wgmma(cx.warp.global);
    cx.warp.clock.learn(cx.mask, &Epoch { actor, clock: done, lanes: ALL_LANES });
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

    /// The elements of a chunk, four or eight.
    fn unpack(&self, bytes: &[u8], sign: f32) -> [f32; 8] {
        let mut values = [0.0; 8];
        match self.element {
            Element::Half(kind) => {
                for (v, b) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *v = sign * kind.to_f32(u16::from_le_bytes(*b));
                }
            }
            Element::Tf32 => {
                for (v, b) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *v = sign * tf32_operand(u32::from_le_bytes(*b));
                }
            }
        }
        values
    }
}

impl Issued {
    /// Reads the operands and writes the accumulators, once.
    fn compute(&mut self, cx: &mut Cx<'_, '_>) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        let p = &self.product;
        let (n, k) = (p.n, p.k());
        let b = self.load(cx, &self.b, n, 1);
        let a = match &self.fragments {
            None => self.load(cx, &self.a, M, 0),
            Some(registers) => self.left(registers),
        };
        let mut c = vec![0f32; M * n];
        // A lane's accumulators lie as those of lane 0, counted from its first.
        let place = |lane, i| {
            let (row, column) = crate::layout::wgmma_d(lane, i);
            row * n + column
        };
        let lanes: [usize; 32] = std::array::from_fn(|l| place(l, 0));
        let at = |i: usize| {
            let first = place(0, i);
            lanes.map(|lane| first + lane)
        };
        if p.half {
            return self.compute_half(cx, &a, &b, at);
        }
        if self.accumulate {
            for (i, slot) in p.d.iter().enumerate() {
                let v = cx.warp.register(*slot);
                at(i).iter().zip(v).for_each(|(at, v)| c[*at] = f32::from_bits(*v as u32));
            }
        }
        mma_tile((M, n, k), &a, &b, &mut c, cx.grid.options.accumulation);
        for (i, slot) in p.d.iter().enumerate() {
            cx.warp.set_accumulator(*slot, &at(i).map(|at| c[at].to_bits().into()));
        }
    }

    fn compute_half(
        &self,
        cx: &mut Cx<'_, '_>,
        a: &[f32],
        b: &[f32],
        at: impl Fn(usize) -> [usize; 32],
    ) {
        let p = &self.product;
        let mut c = vec![0u16; M * p.n];
        if self.accumulate {
            for (r, slot) in p.d.iter().enumerate() {
                let v = cx.warp.register(*slot);
                for (at, v) in at(2 * r).iter().zip(v) {
                    // Neighbours in a row.
                    (c[*at], c[*at + 1]) = (*v as u16, (*v >> 16) as u16);
                }
            }
        }
        mma_tile_f16((M, p.n, p.k()), a, b, &mut c, cx.grid.options.accumulation);
        for (r, slot) in p.d.iter().enumerate() {
            let pair = |at: usize| u64::from(c[at]) | u64::from(c[at + 1]) << 16;
            cx.warp.set_accumulator(*slot, &at(2 * r).map(pair));
        }
    }

    /// An operand from shared memory, row by row.
    fn load(&self, cx: &Cx<'_, '_>, chunks: &[u32], rows: usize, which: usize) -> Vec<f32> {
        let p = &self.product;
        let k = p.k();
        let per_chunk = k / 2;
        let sign = if p.negate[which] { -1.0 } else { 1.0 };
        let mut out = vec![0f32; rows * k];
        let shared = &cx.gang.blocks[cx.warp.block].shared;
        for (i, address) in chunks.iter().enumerate() {
            let bytes = &shared.data[shared.index(*address)..][..CHUNK as usize];
            let values = p.unpack(bytes, sign);
            match p.majors[which] {
                Major::K => {
                    let at = i * per_chunk;
                    out[at..at + per_chunk].copy_from_slice(&values[..per_chunk]);
                }
                Major::Mn => {
                    let (row, column) = (i % (rows / 8) * 8, i / (rows / 8));
                    let to = out[row * k..].chunks_exact_mut(k);
                    to.zip(values).for_each(|(row, v)| row[column] = v);
                }
            }
        }
        out
    }

    /// A from registers, row by row.
    fn left(&self, registers: &[Lanes]) -> Vec<f32> {
        let p = &self.product;
        let k = p.k();
        let shape =
            if p.element == Element::Tf32 { MmaShape::M16n8k8Tf32 } else { MmaShape::M16n8k16 };
        let sign = if p.negate[0] { -1.0 } else { 1.0 };
        let mut out = vec![0f32; M * k];
        for lane in 0..32 {
            for i in 0..M * k / 32 {
                let (row, column) = shape.a(lane, i);
                out[row * k + column] = sign * p.element.get(registers, lane, i);
            }
        }
        out
    }
}
