pub use self::Arch::*;
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    Sm80,
    Sm90a,
}
impl Arch {
    pub fn shared_per_block(self) -> u32 {
        232448
    }
    pub fn max_cluster(self) -> u32 {
        8
    }
    pub fn registers(self) -> u32 {
        65536
    }
    pub fn multiprocessors(self) -> u32 {
        132
    }
    pub fn max_params(self) -> u32 {
        4096
    }
}
