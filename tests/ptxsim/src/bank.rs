//! Banks of shared memory and sectors of global memory.
//!
//! Shared memory has 32 banks of 4 bytes. A request takes as many wavefronts as the fullest bank
//! holds distinct words; 64-bit accesses are served in two requests, 128-bit ones in four, each
//! row of eight of ldmatrix and stmatrix in one. The hardware's rules are not documented; these
//! agree with what its profiler counts.

/// Wavefronts of an access, and how many of them conflicts have added.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Phases {
    /// Wavefronts.
    pub phases: u32,
    /// Those beyond one per request.
    pub excess: u32,
}

impl std::ops::AddAssign for Phases {
    fn add_assign(&mut self, other: Self) {
        self.phases += other.phases;
        self.excess += other.excess;
    }
}

/// Bytes of a sector of global memory.
const SECTOR: u64 = 32;

/// Wavefronts of an access of `bytes` bytes per lane of `mask`.
pub fn shared_phases(addresses: &[u32; 32], mask: u32, bytes: u32) -> Phases {
    let lanes_per_request = (128 / bytes.clamp(4, 16)) as usize;
    let mut total = Phases::default();
    for first in (0..32).step_by(lanes_per_request) {
        let lanes = (first..first + lanes_per_request).filter(|l| mask >> l & 1 != 0);
        let words = lanes.flat_map(|l| {
            let start = addresses[l] / 4;
            start..addresses[l].saturating_add(bytes).div_ceil(4).max(start + 1)
        });
        total += request(words);
    }
    total
}

/// Wavefronts of one 8 × 16-byte matrix of ldmatrix or stmatrix.
pub fn matrix_phases(rows: &[u32; 8]) -> Phases {
    request(rows.iter().flat_map(|row| row / 4..row / 4 + 4))
}

/// Wavefronts of one request: the most distinct words in a bank.
fn request(words: impl Iterator<Item = u32>) -> Phases {
    let mut distinct: [u32; 128] = [0; 128];
    let mut n = 0;
    for word in words {
        if !distinct[..n].contains(&word) && n < distinct.len() {
            distinct[n] = word;
            n += 1;
        }
    }
    let mut banks = [0; 32];
    distinct[..n].iter().for_each(|w| banks[(w % 32) as usize] += 1);
    let phases = banks.into_iter().max().unwrap_or(0);
    Phases { phases, excess: phases.saturating_sub(1) }
}

/// Sectors that an access of `bytes` bytes per lane of `mask` touches.
pub fn sectors(addresses: &[u64; 32], mask: u32, bytes: u32) -> u32 {
    let mut seen = [u64::MAX; 64];
    let mut n = 0;
    for address in (0..32).filter(|l| mask >> l & 1 != 0).map(|l| addresses[l]) {
        let last = address.saturating_add(u64::from(bytes.max(1)) - 1) / SECTOR;
        for sector in address / SECTOR..=last {
            if !seen[..n].contains(&sector) && n < seen.len() {
                seen[n] = sector;
                n += 1;
            }
        }
    }
    n as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phases(f: impl Fn(u32) -> u32, bytes: u32) -> (u32, u32) {
        let p = shared_phases(&std::array::from_fn(|l| f(l as u32)), u32::MAX, bytes);
        (p.phases, p.excess)
    }

    #[test]
    fn words() {
        assert_eq!(phases(|l| 4 * l, 4), (1, 0), "neighbours");
        assert_eq!(phases(|_| 64, 4), (1, 0), "broadcast");
        assert_eq!(phases(|l| 8 * l, 4), (2, 1), "stride 2");
        assert_eq!(phases(|l| 128 * l, 4), (32, 31), "one bank");
        assert_eq!(phases(|l| 132 * l, 4), (1, 0), "padded rows");
        assert_eq!(phases(|l| 2 * l, 2), (1, 0), "halves share words");
    }

    #[test]
    fn vectors() {
        assert_eq!(phases(|l| 8 * l, 8), (2, 0), "64-bit neighbours");
        assert_eq!(phases(|l| 16 * l, 16), (4, 0), "128-bit neighbours");
        assert_eq!(phases(|l| 128 * l, 16), (32, 28), "rows of 128 bytes");
        assert_eq!(phases(|l| 144 * l, 16), (4, 0), "padded rows");
    }

    #[test]
    fn inactive_lanes_cost_nothing() {
        let one_bank = std::array::from_fn(|l| 128 * l as u32);
        assert_eq!(shared_phases(&one_bank, 1, 4), Phases { phases: 1, excess: 0 });
        assert_eq!(shared_phases(&one_bank, 0, 4), Phases::default());
    }

    #[test]
    fn matrices() {
        let rows = |f: fn(u32) -> u32| matrix_phases(&std::array::from_fn(|r| f(r as u32)));
        assert_eq!(rows(|r| 16 * r), Phases { phases: 1, excess: 0 });
        assert_eq!(rows(|r| 128 * r), Phases { phases: 8, excess: 7 });
        assert_eq!(rows(|r| 128 * r + 16 * r), Phases { phases: 1, excess: 0 }, "swizzled");
        assert_eq!(rows(|r| 64 * r), Phases { phases: 4, excess: 3 });
    }

    #[test]
    fn sectors_of_warps() {
        let at = |f: fn(u64) -> u64| std::array::from_fn(|l| f(l as u64));
        assert_eq!(sectors(&at(|l| 4 * l), u32::MAX, 4), 4);
        assert_eq!(sectors(&at(|l| 16 * l), u32::MAX, 16), 16);
        assert_eq!(sectors(&at(|l| 4096 * l), u32::MAX, 4), 32);
        assert_eq!(sectors(&at(|l| 16 + 4 * l), u32::MAX, 4), 5);
        assert_eq!(sectors(&at(|_| 0), u32::MAX, 4), 1);
        assert_eq!(sectors(&at(|l| 16 + 32 * l), u32::MAX, 16), 32);
    }
}
