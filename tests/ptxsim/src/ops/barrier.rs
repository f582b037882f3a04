//! bar, barrier: the named barriers of a block.

use crate::ast::{Operand, Type};
use crate::clock::Knowledge;
use crate::context::Cx;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::named_barrier::{Arrive, BARRIERS, NamedBarriers, Operation, Reduction, Release};
use crate::program::{Decoded, Dst, Flow, Pred, PredDst, Src, Waiting};

/// The named barriers of a block, and what passes through them.
pub struct BlockState {
    /// State machine.
    pub named: NamedBarriers,
    rounds: [Round; BARRIERS],
}

/// What passes through one barrier.
#[derive(Default)]
struct Round {
    /// Completed rounds.
    completed: u64,
    /// What the warps that have arrived release.
    gathering: Knowledge,
    /// What the last completed round carries.
    released: Knowledge,
    /// Result of its reduction.
    value: u32,
}

impl BlockState {
    /// Barriers of a block of `threads` threads.
    pub fn new(threads: u32) -> Self {
        Self { named: NamedBarriers::new(threads), rounds: Default::default() }
    }

    fn release(&mut self, release: &Release) {
        let round = &mut self.rounds[release.id as usize];
        round.completed += 1;
        round.released = std::mem::take(&mut round.gathering);
        round.value = release.value;
    }
}

/// The executing lanes have ended: barriers that waited only for them open.
pub fn lanes_ended(cx: &mut Cx<'_, '_>) {
    let (index, lanes) = (cx.warp.index, cx.mask);
    let barriers = &mut cx.block().barriers;
    for release in barriers.named.exit(index, lanes) {
        barriers.release(&release);
    }
}

/// Where a reduction's result goes.
#[derive(Clone, Copy)]
enum Outcome {
    None,
    Count(Dst),
    Predicate(PredDst),
}

struct Barrier {
    operation: Operation,
    aligned: bool,
    id: Src,
    count: Option<Src>,
    predicate: Pred,
    result: Outcome,
}

/// bar.{sync,arrive,red}, barrier.{sync,arrive,red}, bar.warp.sync, barrier.cluster.
pub fn decode(op: &mut Opcode<'_>, env: &Env<'_>) -> Result<Decoded> {
    if op.take("warp") {
        op.expect("sync")?;
        return super::warp::sync(op, env);
    }
    if op.take("cluster") {
        return super::cluster::decode(op, env);
    }
    op.take("cta");
    // `bar` is `barrier` with `.aligned`.
    let aligned = op.take("aligned") || op.root() == "bar";
    let o = op.instr.operands.as_slice();
    if op.take("red") {
        return reduction(op, env, aligned);
    }
    let operation = op
        .one_of(&[("sync", Operation::Sync), ("arrive", Operation::Arrive)])
        .ok_or("the operation is missing")?;
    let (id, count) = match o {
        [id] => (id, None),
        [id, count] => (id, Some(env.src(count, Type::U32)?)),
        _ => return Err("wrong number of operands".into()),
    };
    let id = env.src(id, Type::U32)?;
    let (predicate, result) = (Pred::Constant(false), Outcome::None);
    let barrier = Barrier { operation, aligned, id, count, predicate, result };
    Ok(Decoded::flow(Class::Barrier, move |cx| barrier.execute(cx)))
}

fn reduction(op: &mut Opcode<'_>, env: &Env<'_>, aligned: bool) -> Result<Decoded> {
    let rules = [("popc", Reduction::Popc), ("and", Reduction::And), ("or", Reduction::Or)];
    let rule = op.one_of(&rules).ok_or("the reduction is missing")?;
    op.ty()?;
    let (d, id, count, p): (_, _, Option<&Operand>, _) = match op.instr.operands.as_slice() {
        [d, id, p] => (d, id, None, p),
        [d, id, count, p] => (d, id, Some(count), p),
        _ => return Err("wrong number of operands".into()),
    };
    let result = match rule {
        Reduction::Popc => Outcome::Count(env.dst(d, Type::U32)?),
        _ => Outcome::Predicate(env.pred_dst(d)?),
    };
    let barrier = Barrier {
        operation: Operation::Red(rule),
        aligned,
        id: env.src(id, Type::U32)?,
        count: count.map(|c| env.src(c, Type::U32)).transpose()?,
        predicate: env.pred(p)?,
        result,
    };
    Ok(Decoded::flow(Class::Barrier, move |cx| barrier.execute(cx)))
}

impl Barrier {
    fn execute(&self, cx: &mut Cx<'_, '_>) -> Flow {
        let id = cx.uniform(&self.id, "the number of the barrier");
        if let Some(round) = cx.note {
            return self.resume(cx, id, round);
        }
        if self.aligned
            && let Some(flow) = cx.converged()
        {
            return flow;
        }
        let count = self.count.as_ref().map(|c| cx.uniform(c, "the thread count"));
        let predicate = cx.test(self.predicate);
        let arrive = Arrive {
            warp: cx.warp.index,
            id,
            count,
            operation: self.operation,
            lanes: cx.mask,
            aligned: self.aligned,
            predicate,
        };
        let release = match cx.block().barriers.named.arrive(arrive) {
            Ok(release) => release,
            Err(error) => return cx.fault(Kind::BarrierMismatch, error.to_string()),
        };
        let barriers = &mut cx.gang.blocks[cx.warp.block].barriers;
        let round = &mut barriers.rounds[id as usize];
        cx.warp.clock.release_into(cx.mask, &mut round.gathering);
        let number = round.completed;
        if let Some(release) = release {
            barriers.release(&release);
            cx.gang.progress();
        }
        match self.operation {
            Operation::Arrive => Flow::Next,
            _ => self.resume(cx, id, number),
        }
    }

    /// Goes on once round `number` is complete.
    fn resume(&self, cx: &mut Cx<'_, '_>, id: u64, number: u64) -> Flow {
        let block = &mut cx.gang.blocks[cx.warp.block];
        let round = &block.barriers.rounds[id as usize];
        if round.completed == number {
            cx.note = Some(number);
            let text = block.barriers.named.incomplete();
            let text = text.into_iter().find(|(i, _)| u64::from(*i) == id).map(|(_, text)| text);
            return Flow::Wait(Waiting::On(text.unwrap_or_else(|| format!("barrier {id}"))));
        }
        cx.warp.clock.acquire(cx.mask, &round.released);
        let value = round.value;
        match self.result {
            Outcome::None => {}
            Outcome::Count(d) => cx.write(d, &[value.into(); 32]),
            Outcome::Predicate(p) => cx.set(p, if value != 0 { u32::MAX } else { 0 }),
        }
        Flow::Next
    }
}
