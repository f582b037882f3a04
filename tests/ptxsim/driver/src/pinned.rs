//! Memory of the host that kernels reach as well: a launch finds there what the host has written, and
//! leaves there what it has written itself.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::slice::from_raw_parts;

use ptxsim::{Buffer, Device};

/// Where the driver lets such memory begin.
const PAGE: usize = 4096;

pub struct Pinned {
    /// Address in the host's memory, which the caller's program writes and reads by itself.
    start: usize,
    layout: Layout,
    /// What kernels see of it.
    pub buffer: Buffer,
    /// What the last launch found; nothing where no program has asked where kernels find it.
    found: Option<Vec<u8>>,
}

impl Pinned {
    /// None without bytes or memory.
    pub fn new(device: &mut Device, bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes, PAGE).ok().filter(|_| bytes > 0)?;
        // SAFETY: there is at least one byte.
        let start = unsafe { alloc_zeroed(layout) } as usize;
        let buffer =
            (start != 0).then(|| device.uninitialised_bytes("pinned memory", bytes as u64));
        Some(Self { start, layout, buffer: buffer?, found: None })
    }

    pub fn start(&self) -> usize {
        self.start
    }

    /// Where kernels find it.
    pub fn map(&mut self, device: &Device) -> u64 {
        self.found.get_or_insert_default();
        device.address(self.buffer)
    }

    /// Before a launch.
    pub fn upload(&mut self, device: &mut Device) {
        let Some(found) = &mut self.found else { return };
        // SAFETY: the memory is this object's; a program that writes it during a launch that reads it
        // has a race on a device as well.
        *found = unsafe { from_raw_parts(self.start as *const u8, self.layout.size()) }.to_vec();
        _ = device.write(device.address(self.buffer), found);
    }

    /// After it. Other threads of the host may have written here meanwhile what the launch did not.
    pub fn download(&self, device: &Device) {
        let Some(found) = &self.found else { return };
        let left = device.contents(self.buffer);
        let written = left.iter().zip(found).enumerate().filter(|(_, (left, found))| left != found);
        for (at, (byte, _)) in written {
            // SAFETY: within the memory, which is this object's.
            unsafe { (self.start as *mut u8).add(at).write(*byte) };
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start as *mut u8, self.layout) }
    }
}
