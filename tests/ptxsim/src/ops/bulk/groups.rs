//! Groups of bulk stores, which the issuing thread waits for.

use std::collections::BTreeMap;

use crate::async_queue::LaneGroups;
use crate::clock::{self, Epoch};
use crate::context::{Cx, lanes};
use crate::diagnostic::Kind;
use crate::gang::State;
use crate::launch::Grid;
use crate::ops::copy::{Move, Reduction};

/// Stores not waited for, by warp of the grid and lane.
#[derive(Default)]
pub struct GangState {
    lanes: BTreeMap<(u32, u32), Lane>,
}

/// One lane's stores.
#[derive(Default)]
pub struct Lane {
    pub groups: LaneGroups<Store>,
    /// Time up to which sources have been waited for.
    read: u32,
    /// Time of the last store, and its program counter.
    pub last: (u32, u32),
}

/// One store: its moves, and their bytes once the source has been read.
pub struct Store {
    moves: Vec<Move>,
    reduction: Option<Reduction>,
    captured: Option<Vec<Vec<u8>>>,
}

impl Store {
    /// A store that has moved nothing yet.
    pub fn new(moves: Vec<Move>, reduction: Option<Reduction>) -> Self {
        Self { moves, reduction, captured: None }
    }

    fn capture(&mut self, state: &State) {
        let read = |m: &Move| m.read(state, None);
        self.captured.get_or_insert_with(|| self.moves.iter().map(read).collect());
    }

    /// Moves the bytes.
    pub fn perform(mut self, state: &mut State, grid: &Grid<'_>) {
        self.capture(state);
        for (m, bytes) in self.moves.iter().zip(self.captured.iter().flatten()) {
            m.write(state, grid, bytes, self.reduction.as_ref());
        }
    }
}

/// The stores of a lane.
pub fn lane<'s>(cx: &'s mut Cx<'_, '_>, l: usize) -> &'s mut Lane {
    cx.gang.bulk.lanes.entry((cx.warp.global, l as u32)).or_default()
}

/// Closes the group of each executing lane.
pub fn commit(cx: &mut Cx<'_, '_>) {
    for l in lanes(cx.mask) {
        lane(cx, l).groups.commit();
    }
}

/// Waits until at most `n` groups are pending; with `read`, only until their sources are read.
pub fn wait(cx: &mut Cx<'_, '_>, n: usize, read: bool) {
    let warp = cx.warp.global;
    for l in lanes(cx.mask) {
        let Some(mut lane) = cx.gang.bulk.lanes.remove(&(warp, l as u32)) else { continue };
        let reached = lane.groups.reached(n);
        lane.read = lane.read.max(reached.unwrap_or_default());
        if read {
            lane.groups.queue.wait_read(n).for_each(|store| store.capture(cx.gang));
        } else {
            for store in lane.groups.wait(n) {
                store.perform(cx.gang, cx.grid);
            }
        }
        let epoch = |actor, clock| Epoch { actor, clock, lanes: 1 << l };
        let clock = &mut cx.warp.clock;
        clock.learn(1 << l, &epoch(clock::Actor::bulk_read(warp), lane.read));
        if let Some(reached) = reached.filter(|_| !read) {
            clock.learn(1 << l, &epoch(clock::Actor::bulk(warp), reached));
        }
        cx.gang.bulk.lanes.insert((warp, l as u32), lane);
    }
}

/// A warp has ended: nobody else can wait until its stores have read shared memory, which the block
/// gives back. Hardware has been seen to read it in time.
pub fn warp_ended(cx: &mut Cx<'_, '_>) {
    let warp = cx.warp.global;
    let of_warp = cx.gang.bulk.lanes.range((warp, 0)..(warp + 1, 0));
    let unread = of_warp.filter(|(_, lane)| lane.last.0 > lane.read);
    let unread: Vec<_> = unread.map(|((_, l), lane)| (lane.last.1, warp, *l)).collect();
    for by in unread {
        let text = "the thread ends before it knows that the copy has read shared memory".into();
        let diagnostic = cx.grid.diagnostic(Kind::PendingRead, by, text);
        cx.gang.forgiven(cx.grid).add(by.0, None, diagnostic);
    }
}

/// Performs the stores nobody has waited for; false when there are none.
pub fn perform_one(state: &mut State, grid: &Grid<'_>) -> bool {
    let mut lanes = state.bulk.lanes.values_mut();
    let Some(lane) = lanes.find(|l| l.groups.queue.pending() > 0) else { return false };
    for store in lane.groups.queue.complete_issued() {
        store.perform(state, grid);
    }
    true
}
