#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct Actor(u32);
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum ActorKind {
    Thread,
    CpAsync,
    Bulk,
    Wgmma,
    Barrier,
}
impl Actor {
    pub fn bulk(w: u32) -> Self {
        Self(w)
    }
    pub fn bulk_read(w: u32) -> Self {
        Self(w)
    }
    pub fn barrier(w: u32) -> Self {
        Self(w)
    }
    pub fn cp_async(w: u32) -> Self {
        Self(w)
    }
    pub fn kind(self) -> ActorKind {
        ActorKind::Thread
    }
    pub fn index(self) -> u32 {
        0
    }
    pub fn thread(w: u32) -> Self {
        Self(w)
    }
}
#[derive(Copy, Clone, Debug)]
pub struct Epoch {
    pub actor: Actor,
    pub clock: u32,
    pub lanes: u32,
}
#[derive(Clone, Default, Debug)]
pub struct Knowledge {
    pub generic: Clock,
}
impl Knowledge {
    pub fn join(&mut self, _k: &Self) {}
}
#[derive(Clone, Default, Debug)]
pub struct Clock;
impl Clock {
    pub fn learn(&mut self, _e: &Epoch) {}
}
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum ProxySpace {
    Shared,
    Global,
}
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Scope {
    Cta,
    Cluster,
    Gpu,
    Sys,
}
pub struct WarpClock(u32);
impl WarpClock {
    pub fn known(&self, _l: u32, _a: Actor) -> u32 {
        0
    }
    pub fn acquire(&mut self, _l: u32, _k: &Knowledge) {}
    pub fn release(&mut self, _l: u32) -> Knowledge {
        Knowledge::default()
    }
    pub fn learn(&mut self, _l: u32, _e: &Epoch) {}
    pub fn fence(&mut self, _l: u32) {}
    pub fn proxy_fence(&mut self, _l: u32, _s: Option<ProxySpace>) {}
    pub fn sync_lanes(&mut self, _l: u32) {}
    pub fn new(w: u32) -> Self {
        Self(w)
    }
    pub fn epoch(&self, lanes: u32) -> Epoch {
        Epoch { actor: Actor(self.0), clock: 1, lanes }
    }
    pub fn publish(&mut self, _l: u32, _r: bool) -> Option<Knowledge> {
        None
    }
    pub fn observe(&mut self, _l: u32, _k: &Knowledge, _a: bool) {}
}
#[derive(Default)]
pub struct SyncTable;
impl SyncTable {
    pub fn weak_store(&mut self, _a: u64, _b: u32) {}
    pub fn publish(
        &mut self,
        _a: u64,
        _s: Scope,
        _cta: u32,
        _c: u32,
        _k: Option<Knowledge>,
        _rmw: bool,
    ) {
    }
    pub fn observe(&self, _a: u64, _s: Scope, _cta: u32, _cl: u32) -> Option<Knowledge> {
        None
    }
}
