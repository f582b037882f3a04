use crate::clock::*;
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Proxy {
    Generic,
    Async,
}
pub struct Access<'a> {
    pub offset: u64,
    pub bytes: u32,
    pub lanes: u32,
    pub epoch: Epoch,
    pub pc: u32,
    pub proxy: Proxy,
    pub strong: Option<Scope>,
    pub cta: u32,
    pub clock: &'a WarpClock,
    pub lane: u32,
}
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Conflict {
    ReadAfterWrite,
    WriteAfterRead,
    WriteAfterWrite,
    MissingProxyFence,
    PendingWrite,
    PendingRead,
}
pub struct Race {
    pub conflict: Conflict,
    pub offset: u64,
    pub other: Epoch,
    pub other_pc: u32,
}
pub struct Shadow(Vec<bool>);
impl Shadow {
    pub fn new(b: u64) -> Self {
        Shadow(vec![false; b as usize])
    }
    pub fn read(&mut self, _a: &Access<'_>, _s: ProxySpace) -> Result<(), Race> {
        Ok(())
    }
    pub fn write(&mut self, _a: &Access<'_>, _s: ProxySpace) -> Result<(), Race> {
        Ok(())
    }
    pub fn is_initialised(&self, o: u64, b: u32) -> bool {
        !self.0[o as usize..o as usize + b as usize].contains(&false)
    }
    pub fn mark_initialised(&mut self, o: u64, b: u32) {
        self.0[o as usize..o as usize + b as usize].fill(true)
    }
    pub fn reset_accesses(&mut self) {}
}
