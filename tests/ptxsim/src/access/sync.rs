//! What atomics and other strong accesses carry from thread to thread.

use super::Window;
use crate::clock::{Knowledge, Reach, Scope};
use crate::context::Cx;
use crate::memory::{SHARED_WINDOW, Target, target};

impl Cx<'_, '_> {
    /// What a strong store or atomic of a lane makes visible to those who read it.
    pub fn publish(
        &mut self,
        lane: usize,
        window: Window,
        address: u64,
        scope: Scope,
        release: bool,
        rmw: bool,
    ) {
        let k = self.warp.clock.publish(1 << lane, release, Reach::of(scope));
        self.hand_on(window, address, scope, k, rmw);
        // A fence of the block serves the block, whatever the scope of the access.
        if !release && scope != Scope::Cta {
            let k = self.warp.clock.publish(1 << lane, false, Reach::Block);
            self.hand_on(window, address, Scope::Cta, k, true);
        }
    }

    fn hand_on(
        &mut self,
        window: Window,
        address: u64,
        scope: Scope,
        k: Option<Knowledge>,
        rmw: bool,
    ) {
        let b = &self.gang.blocks[self.warp.block];
        let (cta, cluster) = (b.linear, b.cluster);
        match self.sync_key(window, address) {
            None => {}
            Some((Some(block), key)) => {
                self.gang.blocks[block].sync.publish(key, scope, cta, cluster, k, rmw);
            }
            Some((None, key)) => self.grid.sync().publish(key, scope, cta, cluster, k, rmw),
        }
    }

    /// What a strong load or atomic of a lane learns.
    pub fn observe(
        &mut self,
        lane: usize,
        window: Window,
        address: u64,
        scope: Scope,
        acquire: bool,
    ) {
        if let Some(k) = self.handed_on(window, address, scope) {
            self.warp.clock.observe(1 << lane, &k, acquire, Reach::of(scope));
        }
        if !acquire
            && scope != Scope::Cta
            && let Some(k) = self.handed_on(window, address, Scope::Cta)
        {
            self.warp.clock.observe(1 << lane, &k, false, Reach::Block);
        }
    }

    fn handed_on(&self, window: Window, address: u64, scope: Scope) -> Option<Knowledge> {
        let b = &self.gang.blocks[self.warp.block];
        let (cta, cluster) = (b.linear, b.cluster);
        match self.sync_key(window, address)? {
            (Some(block), key) => self.gang.blocks[block].sync.observe(key, scope, cta, cluster),
            (None, key) => self.grid.sync().observe(key, scope, cta, cluster),
        }
    }

    /// Block (for shared memory) and key of an address in the tables of synchronising accesses.
    fn sync_key(&self, window: Window, address: u64) -> Option<(Option<usize>, u64)> {
        let shared = |a: u32| {
            self.shared_target(a).map(|(block, a)| (Some(block), SHARED_WINDOW | u64::from(a)))
        };
        match (window, target(address)) {
            (Window::Shared, _) => shared(address as u32),
            (Window::Generic, Target::Shared(a)) => shared(a),
            (_, Target::Global { .. }) => Some((None, address)),
            _ => None,
        }
    }
}
