//! Address windows, global buffers, shared memory.
//!
//! A 64-bit generic address carries the number of its allocation above bit 40, so that an address
//! that leaves one allocation never reaches another. The low 32 bits of the generic address of
//! shared memory equal the shared address, as on the hardware.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::clock::Knowledge;
use crate::mbarrier::Mbarrier;
use crate::shadow::Shadow;

/// Bits of an address below the number of the allocation.
const WINDOW_BITS: u32 = 40;
/// Where a global allocation begins in its window; what lies before it is a red zone.
const GLOBAL_START: u64 = 1 << 20;
/// Bytes of the kernel's parameters.
pub const PARAM_WINDOW: u64 = 0xfffd << WINDOW_BITS;
/// Local memory of the executing thread.
pub const LOCAL_WINDOW: u64 = 0xfffe << WINDOW_BITS;
/// Shared memory of the block, and of its cluster.
pub const SHARED_WINDOW: u64 = 0xffff << WINDOW_BITS;
/// In a shared address: the number of the block in its cluster plus one, 0 for the block itself.
pub const RANK_SHIFT: u32 = 24;
/// Bytes of a page of global memory.
pub const PAGE: u64 = 4096;

/// Where a generic address points.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Target {
    /// Byte of a global buffer, possibly outside of it.
    Global {
        /// Number of the buffer.
        buffer: usize,
        /// Bytes from its start.
        offset: i64,
    },
    /// Shared address.
    Shared(u32),
    /// Byte of the thread's local memory.
    Local(u64),
    /// Byte of the kernel's parameters.
    Param(u64),
    /// No window.
    Wild,
}

/// Takes a generic address apart.
#[inline]
pub fn target(address: u64) -> Target {
    let low = address & ((1 << WINDOW_BITS) - 1);
    match address >> WINDOW_BITS << WINDOW_BITS {
        SHARED_WINDOW => Target::Shared(low as u32),
        LOCAL_WINDOW => Target::Local(low),
        PARAM_WINDOW => Target::Param(low),
        0 => Target::Wild,
        _ => Target::Global {
            buffer: (address >> WINDOW_BITS) as usize - 1,
            offset: low as i64 - GLOBAL_START as i64,
        },
    }
}

/// Address of the first byte of global buffer number `buffer`.
pub fn global_address(buffer: usize) -> u64 {
    (buffer as u64 + 1) << WINDOW_BITS | GLOBAL_START
}

/// Part of a global buffer with its shadow.
pub struct Page {
    /// Bytes.
    pub data: Vec<u8>,
    /// Who touched them.
    pub shadow: Shadow,
}

impl Page {
    /// Copies bytes in at an offset in the page and marks them initialised.
    #[inline]
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        copy_few(&mut self.data[offset as usize..][..bytes.len()], bytes);
        self.shadow.mark_initialised(offset, bytes.len() as u32);
    }
}

/// One global allocation.
pub struct GlobalBuffer {
    /// Name for reports.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Whether kernels may write it (not for `.const`).
    pub writable: bool,
    pages: Vec<Mutex<Page>>,
}

impl GlobalBuffer {
    /// A buffer of `bytes` bytes that nobody has written.
    pub fn new(name: &str, bytes: u64) -> Self {
        let pages = (0..bytes.div_ceil(PAGE)).map(|i| {
            let len = PAGE.min(bytes - i * PAGE);
            Mutex::new(Page { data: vec![0; len as usize], shadow: Shadow::new(len) })
        });
        Self { name: name.into(), bytes, writable: true, pages: pages.collect() }
    }

    /// The page that holds byte `offset`, which must be inside.
    #[inline]
    pub fn page(&self, offset: u64) -> MutexGuard<'_, Page> {
        lock(&self.pages[(offset / PAGE) as usize])
    }

    /// Copies out bytes, whoever wrote them.
    pub fn copy_out(&self, mut offset: u64, mut out: &mut [u8]) {
        while !out.is_empty() {
            let page = self.page(offset);
            let from = (offset % PAGE) as usize;
            let n = out.len().min(page.data.len() - from);
            let (now, rest) = std::mem::take(&mut out).split_at_mut(n);
            now.copy_from_slice(&page.data[from..from + n]);
            (offset, out) = (offset + n as u64, rest);
        }
    }

    /// Copies bytes in and marks them initialised.
    pub fn copy_in(&self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let mut page = self.page(offset);
            let n = bytes.len().min(page.data.len() - (offset % PAGE) as usize);
            page.write(offset % PAGE, &bytes[..n]);
            (offset, bytes) = (offset + n as u64, &bytes[n..]);
        }
    }

    /// Changes bytes in place, `f(offset in the range, bytes)` page by page, under the page's lock.
    pub fn update(&self, offset: u64, bytes: usize, mut f: impl FnMut(usize, &mut [u8])) {
        let mut done = 0;
        while done < bytes {
            let at = offset + done as u64;
            let mut page = self.page(at);
            let from = (at % PAGE) as usize;
            let n = (bytes - done).min(page.data.len() - from);
            f(done, &mut page.data[from..from + n]);
            page.shadow.mark_initialised(from as u64, n as u32);
            done += n;
        }
    }

    /// First byte of a range that nobody has written.
    pub fn uninitialised(&self, offset: u64, bytes: u64) -> Option<u64> {
        let end = offset + bytes;
        let mut from = offset;
        while from < end {
            let to = end.min((from / PAGE + 1) * PAGE);
            let page = self.page(from);
            if !page.shadow.is_initialised(from % PAGE, (to - from) as u32) {
                return (from..to).find(|o| !page.shadow.is_initialised(o % PAGE, 1));
            }
            from = to;
        }
        None
    }

    /// Which bytes of a range have been written.
    pub fn initialised(&self, range: Range<u64>) -> Vec<bool> {
        let mut written = Vec::with_capacity((range.end - range.start) as usize);
        let mut from = range.start;
        while from < range.end {
            let to = range.end.min((from / PAGE + 1) * PAGE);
            let shadow = &self.page(from).shadow;
            match shadow.is_initialised(from % PAGE, (to - from) as u32) {
                true => written.resize(written.len() + (to - from) as usize, true),
                false => written.extend((from..to).map(|o| shadow.is_initialised(o % PAGE, 1))),
            }
            from = to;
        }
        written
    }

    /// Puts contents back as they were.
    pub fn restore(&mut self, bytes: &[u8], written: &[bool]) {
        *self = Self { writable: self.writable, ..Self::new(&self.name, self.bytes) };
        let mut at = 0;
        for run in written.chunk_by(|a, b| a == b) {
            if run[0] {
                self.copy_in(at as u64, &bytes[at..at + run.len()]);
            }
            at += run.len();
        }
    }

    /// Forgets who touched the buffer: a new launch begins.
    pub fn reset_accesses(&mut self) {
        for page in &mut self.pages {
            page.get_mut().unwrap_or_else(PoisonError::into_inner).shadow.reset_accesses();
        }
    }
}

/// Fills `to` from the start of `from`; the usual sizes of accesses without a call.
#[inline]
pub fn copy_few(to: &mut [u8], from: &[u8]) {
    match to.len() {
        4 => to.copy_from_slice(&from[..4]),
        16 => to.copy_from_slice(&from[..16]),
        n => to.copy_from_slice(&from[..n]),
    }
}

#[inline]
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An mbarrier object and what its phases carry.
pub struct MbarrierCell {
    /// State machine.
    pub state: Mbarrier,
    /// Number of its asynchronous actor.
    pub actor: u32,
    /// What the arrivals of the current phase have released.
    pub gathering: Knowledge,
    /// What a wait for the last completed phase acquires.
    pub completed: Knowledge,
}

/// A range of shared memory that belongs to one variable.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SharedRange {
    /// Name of the variable.
    pub name: String,
    /// Shared address of its first byte.
    pub start: u32,
    /// Size in bytes.
    pub bytes: u32,
}

/// Shared memory of one block.
pub struct SharedMemory {
    /// The variables, by address; what lies between is a red zone.
    pub ranges: Vec<SharedRange>,
    /// Shared address of `data[0]`.
    pub base: u32,
    /// Bytes.
    pub data: Vec<u8>,
    /// Who touched them.
    pub shadow: Shadow,
    /// mbarrier objects by shared address.
    pub mbarriers: std::collections::BTreeMap<u32, MbarrierCell>,
    /// Whether each 8 bytes are an mbarrier.
    is_mbarrier: Vec<bool>,
}

impl SharedMemory {
    /// Memory for these ranges.
    pub fn new(ranges: &[SharedRange]) -> Self {
        let base = ranges.first().map_or(0, |r| r.start & !15);
        let end = ranges.last().map_or(0, |r| r.start + r.bytes);
        let bytes = (end - base) as usize;
        Self {
            ranges: ranges.to_vec(),
            base,
            data: vec![0; bytes],
            shadow: Shadow::new(bytes as u64),
            mbarriers: Default::default(),
            is_mbarrier: vec![false; bytes.div_ceil(8) + 1],
        }
    }

    /// The variable that holds all of `bytes` bytes at a shared address (without rank bits).
    #[inline]
    pub fn range(&self, address: u32, bytes: u32) -> Option<&SharedRange> {
        let end = u64::from(address) + u64::from(bytes);
        let inside =
            |r: &&SharedRange| address >= r.start && end <= u64::from(r.start) + u64::from(r.bytes);
        self.ranges.iter().find(inside)
    }

    /// Writes bytes at an address that lies in a range, and marks them initialised.
    #[inline]
    pub fn write(&mut self, address: u32, bytes: &[u8]) {
        let at = self.index(address);
        copy_few(&mut self.data[at..at + bytes.len()], bytes);
        self.shadow.mark_initialised(at as u64, bytes.len() as u32);
    }

    /// Index into `data` of a shared address that lies in a range.
    #[inline]
    pub fn index(&self, address: u32) -> usize {
        (address - self.base) as usize
    }

    /// Whether an ordinary access would touch an mbarrier object.
    #[inline]
    pub fn touches_mbarrier(&self, address: u32, bytes: u32) -> bool {
        if self.mbarriers.is_empty() || bytes == 0 {
            return false;
        }
        let first = self.index(address) / 8;
        let last = (self.index(address) + bytes as usize - 1) / 8;
        self.is_mbarrier[first..=last].contains(&true)
    }

    /// Adds or removes an mbarrier object.
    pub fn mark_mbarrier(&mut self, address: u32, present: bool) {
        let i = self.index(address) / 8;
        self.is_mbarrier[i] = present;
    }
}
