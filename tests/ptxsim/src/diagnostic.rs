#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    OutOfBounds,
    Misaligned,
    UninitialisedRegister,
    UninitialisedMemory,
    Race,
    PendingRead,
    PendingWrite,
    MissingProxyFence,
    MissingWgmmaFence,
    AccumulatorInFlight,
    Mbarrier,
    Divergence,
    BarrierMismatch,
    Deadlock,
    Limit,
    ScheduleDependent,
    Trap,
    InvalidOperand,
}
#[derive(Clone, Debug)]
pub struct Location {
    pub ptx_line: u32,
    pub source: Option<(String, u32)>,
    pub block: [u32; 3],
    pub warp: u32,
    pub lane: u32,
}
impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}
#[derive(Clone, Debug)]
pub struct Place {
    pub space: String,
    pub buffer: String,
    pub offset: i64,
}
impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}
#[derive(Clone, Debug)]
pub struct Diagnostic {
    pub kind: Kind,
    pub message: String,
    pub at: Location,
    pub other: Option<Location>,
    pub address: Option<Place>,
    pub repeated: u64,
}
#[derive(Default)]
pub struct Findings(pub Vec<Diagnostic>);
impl Findings {
    pub fn add(&mut self, _pc: u32, _o: Option<u32>, d: Diagnostic) {
        self.0.push(d)
    }
}
