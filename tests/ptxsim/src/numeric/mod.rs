#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulation {
    Exact,
    Chain,
}
