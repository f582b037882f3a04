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

/// Wavefronts of an aligned access of `bytes` bytes per lane of `mask`.
pub fn shared_phases(addresses: &[u32; 32], mask: u32, bytes: u32) -> Phases {
    let size = bytes.clamp(4, 16);
    let lanes_per_request = 128 / size as usize;
    let mut total = Phases::default();
    for (i, lanes) in addresses.chunks_exact(lanes_per_request).enumerate() {
        let active = mask >> (i * lanes_per_request);
        let lanes = lanes.iter().enumerate().filter(|(l, _)| active >> l & 1 != 0);
        total += request(size, lanes.map(|(_, address)| *address));
    }
    total
}

/// Wavefronts of one 8 × 16-byte matrix of ldmatrix or stmatrix.
pub fn matrix_phases(rows: &[u32; 8]) -> Phases {
    request(16, rows.iter().copied())
}

/// Wavefronts of one request of at most 32 items of `size` bytes (4, 8 or 16), each of which lies
/// in as many banks as it has words: the most distinct items in one place.
fn request(size: u32, addresses: impl Iterator<Item = u32>) -> Phases {
    let (shift, places) = (size.trailing_zeros(), 128 / size);
    // The distinct items of each place, a list: the latest, and the one before each.
    let (mut items, mut before) = ([0; 32], [NONE; 32]);
    let (mut latest, mut count) = ([NONE; 32], [0u8; 32]);
    let mut most = 0;
    for (n, item) in addresses.map(|a| a >> shift).take(items.len()).enumerate() {
        let place = (item & (places - 1)) as usize;
        let mut at = latest[place];
        while at != NONE && items[at as usize] != item {
            at = before[at as usize];
        }
        if at == NONE {
            (items[n], before[n], latest[place]) = (item, latest[place], n as u8);
            count[place] += 1;
            most = most.max(count[place]);
        }
    }
    Phases { phases: most.into(), excess: u32::from(most).saturating_sub(1) }
}

const NONE: u8 = u8::MAX;

/// Sectors that an access of `bytes` bytes per lane of `mask` touches.
pub fn sectors(addresses: &[u64; 32], mask: u32, bytes: u32) -> u32 {
    let mut seen = [u64::MAX; 64];
    let mut n = 0;
    let mut highest = None;
    for address in (0..32).filter(|l| mask >> l & 1 != 0).map(|l| addresses[l]) {
        let last = address.saturating_add(u64::from(bytes.max(1)) - 1) / SECTOR;
        for sector in address / SECTOR..=last {
            // Mostly they ascend.
            let ascends = highest.is_none_or(|highest| sector > highest);
            if ascends || highest != Some(sector) && !seen[..n].contains(&sector) {
                if n < seen.len() {
                    seen[n] = sector;
                    n += 1;
                }
                highest = highest.max(Some(sector));
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
