#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Integer,
    Float,
    Half,
    Convert,
    Special,
    Move,
    Predicate,
    Control,
    SharedLoad,
    SharedStore,
    GlobalLoad,
    GlobalStore,
    Local,
    Param,
    Atomic,
    Tensor,
    Async,
    Barrier,
    Shuffle,
    Other,
}
pub struct Counters {
    pub executed: Vec<u64>,
}
impl Counters {
    pub fn new(n: usize, _b: &[(usize, u64)]) -> Self {
        Self { executed: vec![0; n] }
    }
}
