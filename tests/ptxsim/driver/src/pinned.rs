//! Memory of the host that kernels reach as well: a launch finds there what the host has written, and
//! leaves there what it has.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::slice::{from_raw_parts, from_raw_parts_mut};

use ptxsim::{Buffer, Device};

/// Where the driver lets such memory begin.
const PAGE: usize = 4096;

pub struct Pinned {
    /// Address in the host's memory, which the caller's program writes and reads by itself.
    start: usize,
    layout: Layout,
    /// What kernels see of it.
    pub buffer: Buffer,
}

impl Pinned {
    /// None without bytes or memory.
    pub fn new(device: &mut Device, bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes, PAGE).ok().filter(|_| bytes > 0)?;
        // SAFETY: there is at least one byte.
        let start = unsafe { alloc_zeroed(layout) } as usize;
        let buffer =
            (start != 0).then(|| device.uninitialised_bytes("pinned memory", bytes as u64));
        Some(Self { start, layout, buffer: buffer? })
    }

    pub fn start(&self) -> usize {
        self.start
    }

    pub fn upload(&self, device: &mut Device) {
        // SAFETY: the memory is this object's; a program that writes it during a launch has a race on
        // a device as well.
        let bytes = unsafe { from_raw_parts(self.start as *const u8, self.layout.size()) };
        _ = device.write(device.address(self.buffer), bytes);
    }

    pub fn download(&self, device: &Device) {
        // SAFETY: as above.
        let bytes = unsafe { from_raw_parts_mut(self.start as *mut u8, self.layout.size()) };
        bytes.copy_from_slice(&device.contents(self.buffer));
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start as *mut u8, self.layout) }
    }
}
