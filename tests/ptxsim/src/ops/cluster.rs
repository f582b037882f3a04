//! barrier.cluster.

use std::collections::BTreeMap;

use crate::clock::{Knowledge, Reach};
use crate::context::Cx;
use crate::count::Class;
use crate::decode::{Env, Opcode, Result};
use crate::diagnostic::Kind;
use crate::named_barrier::ClusterBarrier;
use crate::program::{Decoded, Flow, Waiting};

/// The cluster barriers of a gang, by cluster of the grid.
#[derive(Default)]
pub struct GangState {
    clusters: BTreeMap<u32, Cluster>,
}

struct Cluster {
    barrier: ClusterBarrier,
    /// What the arrivals of the current round have released.
    gathering: Knowledge,
    /// What the last completed round carries.
    released: Knowledge,
}

impl Cluster {
    fn settle(&mut self, completed: Option<u64>) -> bool {
        if completed.is_some() {
            self.released = std::mem::take(&mut self.gathering);
        }
        completed.is_some()
    }
}

/// The barrier of the warp's cluster, and the warp's number in it.
fn own<'c>(cx: &'c mut Cx<'_, '_>) -> (&'c mut Cluster, u32) {
    let block = &cx.gang.blocks[cx.warp.block];
    let rank = (cx.warp.block - block.cluster_first) as u32;
    let warp = rank * cx.grid.warps_per_block() + cx.warp.index;
    let new = || Cluster {
        barrier: ClusterBarrier::new(cx.grid.cluster_size(), cx.grid.threads()),
        gathering: Knowledge::default(),
        released: Knowledge::default(),
    };
    (cx.gang.clusters.clusters.entry(block.cluster).or_insert_with(new), warp)
}

/// The executing lanes have ended: a barrier that waited only for them opens.
pub fn lanes_ended(cx: &mut Cx<'_, '_>) {
    let lanes = cx.mask;
    let (cluster, warp) = own(cx);
    let completed = cluster.barrier.exit(warp, lanes);
    cluster.settle(completed);
}

/// barrier.cluster.arrive, barrier.cluster.wait.
pub fn decode(op: &mut Opcode<'_>, _env: &Env<'_>) -> Result<Decoded> {
    let arrive = op.take("arrive");
    if !arrive {
        op.expect("wait")?;
    }
    let relaxed = op.take("relaxed");
    for m in ["release", "acquire"] {
        op.take(m);
    }
    let aligned = op.take("aligned");
    let [] = op.operands()?;
    Ok(Decoded::flow(Class::Barrier, move |cx| {
        if aligned && let Some(flow) = cx.converged() {
            return flow;
        }
        if arrive { execute_arrive(cx, relaxed) } else { execute_wait(cx) }
    }))
}

fn execute_arrive(cx: &mut Cx<'_, '_>, relaxed: bool) -> Flow {
    let mask = cx.mask;
    let k = cx.warp.clock.publish(mask, !relaxed, Reach::Device);
    let (cluster, warp) = own(cx);
    if let Some(k) = k {
        cluster.gathering.join(&k);
    }
    let result = cluster.barrier.arrive(warp, mask).map(|completed| cluster.settle(completed));
    match result {
        Err(error) => cx.fault(Kind::BarrierMismatch, error.to_string()),
        Ok(completed) => {
            if completed {
                cx.gang.progress();
            }
            Flow::Next
        }
    }
}

fn execute_wait(cx: &mut Cx<'_, '_>) -> Flow {
    let mask = cx.mask;
    let (cluster, warp) = own(cx);
    match cluster.barrier.wait(warp, mask) {
        Err(error) => cx.fault(Kind::BarrierMismatch, error.to_string()),
        Ok(false) => {
            let text = format!("the cluster barrier, round {}", cluster.barrier.round());
            Flow::Wait(Waiting::On(text))
        }
        Ok(true) => {
            let released = cluster.released.clone();
            cx.warp.clock.acquire(mask, &released);
            Flow::Next
        }
    }
}
