//! Architectures: limits of a launch, and the rates the coarse bound is made of.

use std::fmt;
use std::str::FromStr;

/// A GPU architecture.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Arch {
    /// A100.
    Sm80,
    /// A10, RTX 30.
    Sm86,
    /// L4, RTX 40.
    Sm89,
    /// H100, H200, without the instructions of `sm_90a`.
    Sm90,
    /// H100, H200.
    Sm90a,
}

const NAMES: [(&str, Arch); 5] = [
    ("sm_80", Arch::Sm80),
    ("sm_86", Arch::Sm86),
    ("sm_89", Arch::Sm89),
    ("sm_90", Arch::Sm90),
    ("sm_90a", Arch::Sm90a),
];

/// No architecture of that name.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("architecture {0}; sm_80, sm_86, sm_89, sm_90 and sm_90a are possible")]
pub struct UnknownArch(String);

impl FromStr for Arch {
    type Err = UnknownArch;

    fn from_str(name: &str) -> Result<Self, UnknownArch> {
        let found = NAMES.iter().find(|(n, _)| *n == name);
        found.map(|(_, arch)| *arch).ok_or_else(|| UnknownArch(name.into()))
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = NAMES.iter().find(|(_, arch)| arch == self);
        f.write_str(found.map_or("", |(name, _)| name))
    }
}

/// What one multiprocessor does per cycle, and what the device has of everything: fixed published
/// figures, not tuned to anything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Multiprocessors of the device.
    pub multiprocessors: u32,
    /// Cycles per second.
    pub clock: f64,
    /// Bytes per second of device memory.
    pub bandwidth: f64,
    /// Dense 16-bit flop per cycle of the tensor cores.
    pub tensor: f64,
    /// Results per cycle of the special function unit.
    pub special: f64,
    /// Warp instructions issued per cycle.
    pub issue: f64,
    /// Bytes per cycle of shared memory.
    pub shared: f64,
}

impl Arch {
    /// Whether it runs code for a `.target` of the text: one that is not newer, and for targets with
    /// features of their own (`sm_90a`) that very one.
    pub fn runs(self, target: &str) -> bool {
        let own = self.to_string();
        let number = |name: &str| -> Option<u32> {
            name.strip_prefix("sm_")?.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok()
        };
        let first = target.split(',').next().unwrap_or_default().trim();
        match (number(first), number(&own)) {
            _ if first.ends_with('a') => first == own,
            (Some(target), Some(own)) => target <= own,
            _ => false,
        }
    }

    /// Whether it has clusters, mbarrier transactions and tensor copies.
    pub fn is_hopper(self) -> bool {
        matches!(self, Self::Sm90 | Self::Sm90a)
    }

    /// Most bytes of shared memory of a block.
    pub fn shared_per_block(self) -> u32 {
        match self {
            Self::Sm80 => 166_912,
            Self::Sm86 | Self::Sm89 => 101_376,
            Self::Sm90 | Self::Sm90a => 232_448,
        }
    }

    /// Shared memory of a multiprocessor, of which every block takes [`Self::reserved_shared`] bytes
    /// besides its own.
    pub fn shared_per_multiprocessor(self) -> u32 {
        match self {
            Self::Sm80 => 167_936,
            Self::Sm86 | Self::Sm89 => 102_400,
            Self::Sm90 | Self::Sm90a => 233_472,
        }
    }

    /// Bytes of shared memory that the system keeps for itself in every block.
    pub fn reserved_shared(self) -> u32 {
        1024
    }

    /// Most threads that a multiprocessor holds.
    pub fn threads_per_multiprocessor(self) -> u32 {
        match self {
            Self::Sm86 | Self::Sm89 => 1536,
            _ => 2048,
        }
    }

    /// Most blocks that a multiprocessor holds.
    pub fn blocks_per_multiprocessor(self) -> u32 {
        match self {
            Self::Sm86 => 16,
            Self::Sm89 => 24,
            _ => 32,
        }
    }

    /// Bytes of the L2 cache.
    pub fn l2_bytes(self) -> u32 {
        let mebibytes = match self {
            Self::Sm80 => 40,
            Self::Sm86 => 6,
            Self::Sm89 => 48,
            Self::Sm90 | Self::Sm90a => 50,
        };
        mebibytes << 20
    }

    /// Multiprocessors of each processing cluster (GPC), all of which a cluster of blocks shares; none
    /// where there are no such clusters. 132 of the 8 × 18 multiprocessors of the chip are enabled,
    /// and which differs from one device to another.
    pub fn processing_clusters(self) -> &'static [u32] {
        if self.is_hopper() { &[18, 18, 16, 16, 16, 16, 16, 16] } else { &[] }
    }

    /// Major and minor compute capability.
    pub fn capability(self) -> (u32, u32) {
        match self {
            Self::Sm80 => (8, 0),
            Self::Sm86 => (8, 6),
            Self::Sm89 => (8, 9),
            Self::Sm90 | Self::Sm90a => (9, 0),
        }
    }

    /// Most blocks of a cluster; 16 need the kernel's consent, which PTX does not show.
    pub fn max_cluster(self) -> u32 {
        if self.is_hopper() { 16 } else { 1 }
    }

    /// Most blocks of a cluster without the kernel's consent.
    pub fn portable_cluster(self) -> u32 {
        self.max_cluster().min(8)
    }

    /// 32-bit registers of a multiprocessor, all of which one block may use.
    pub fn registers(self) -> u32 {
        65_536
    }

    /// Most bytes of kernel parameters.
    pub fn max_params(self) -> u32 {
        if self.is_hopper() { 32_764 } else { 4_096 }
    }

    /// Multiprocessors of the device the bound is made for.
    pub fn multiprocessors(self) -> u32 {
        self.rates().multiprocessors
    }

    /// Rates of the device the bound is made for: H200, A100, A10, L4.
    pub fn rates(self) -> Rates {
        let (multiprocessors, clock, bandwidth, tensor) = match self {
            Self::Sm80 => (108, 1.41e9, 1.555e12, 2048.0),
            Self::Sm86 => (72, 1.695e9, 0.6e12, 1024.0),
            Self::Sm89 => (58, 2.04e9, 0.3e12, 1024.0),
            Self::Sm90 | Self::Sm90a => (132, 1.755e9, 4.2e12, 4096.0),
        };
        Rates {
            multiprocessors,
            clock,
            bandwidth,
            tensor,
            special: 16.0,
            issue: 4.0,
            shared: 128.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        assert!(Arch::Sm80.runs("sm_80") && Arch::Sm80.runs("sm_75") && Arch::Sm90a.runs("sm_80"));
        assert!(Arch::Sm90a.runs("sm_90a") && Arch::Sm90a.runs("sm_90, debug"));
        assert!(!Arch::Sm80.runs("sm_86") && !Arch::Sm90.runs("sm_90a"));
        assert!(!Arch::Sm90a.runs("sm_100a") && !Arch::Sm90a.runs("texmode_unified"));
    }

    #[test]
    fn processing_clusters_are_the_whole_device() {
        for arch in [Arch::Sm90, Arch::Sm90a] {
            assert_eq!(arch.processing_clusters().iter().sum::<u32>(), arch.multiprocessors());
        }
    }

    #[test]
    fn a_block_of_all_shared_memory_leaves_what_is_reserved() {
        for (_, arch) in NAMES {
            let largest = arch.shared_per_block() + arch.reserved_shared();
            assert_eq!(largest, arch.shared_per_multiprocessor(), "{arch}");
        }
    }

    #[test]
    fn names() {
        for (name, arch) in NAMES {
            assert_eq!((name.parse(), arch.to_string()), (Ok(arch), name.to_string()));
        }
        assert!("sm_70".parse::<Arch>().is_err_and(|e| e.to_string().contains("sm_70")));
    }
}
