#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulation {
    Exact,
    Chain,
}
pub fn atomic(
    _name: &str,
    _ty: crate::ast::Type,
) -> Option<Box<dyn Fn(u64, u64, u64) -> u64 + Send + Sync>> {
    None
}
