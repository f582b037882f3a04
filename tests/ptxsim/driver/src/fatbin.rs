//! What modules are loaded from: PTX text, or a fatbin that holds some.

use std::ffi::{CStr, c_char, c_void};
use std::io::Read;

const MAGIC: u32 = 0xba55_ed50;
const PTX: u16 = 1;
/// A flag of an entry: its payload is a zstd frame.
const ZSTD: u64 = 0x8000;
/// Flags of the other compressions.
const OTHER: u64 = 0x2000 | 0x1000;

/// The PTX of an image.
///
/// # Safety
/// `image` is a fatbin, or text that ends with NUL.
pub unsafe fn ptx(image: *const c_void) -> Option<String> {
    // SAFETY: either is at least this long, or ends before.
    let head = unsafe { (image as *const u32).read_unaligned() };
    if head != MAGIC {
        // SAFETY: the caller's promise.
        return Some(unsafe { CStr::from_ptr(image as *const c_char) }.to_string_lossy().into());
    }
    // SAFETY: the header says how long the rest is.
    let all = unsafe {
        let header = std::slice::from_raw_parts(image as *const u8, 16);
        std::slice::from_raw_parts(image as *const u8, 16 + number(header, 8, 8) as usize)
    };
    first_ptx(all)
}

/// The PTX of an image of known length: a file's.
pub fn ptx_of_file(content: &[u8]) -> Option<String> {
    if content.starts_with(&MAGIC.to_le_bytes()) {
        return first_ptx(content);
    }
    String::from_utf8(content.to_vec()).ok()
}

fn first_ptx(all: &[u8]) -> Option<String> {
    // Header: magic, version u16, length of the header u16, length of the entries u64.
    let mut rest = all.get(number(all.get(..16)?, 6, 2) as usize..)?;
    while rest.len() >= 64 {
        // Entry: kind u16, version u16, length of the header u32, of the payload u64; at 16 the
        // compressed length u32, at 40 flags u64.
        let (header, payload) = (number(rest, 4, 4) as usize, number(rest, 8, 8) as usize);
        let end = header.max(64).checked_add(payload)?;
        if number(rest, 0, 2) as u16 == PTX {
            return text(rest.get(header..end)?, rest);
        }
        rest = rest.get(end..)?;
    }
    None
}

fn text(payload: &[u8], entry: &[u8]) -> Option<String> {
    let flags = number(entry, 40, 8);
    let bytes = match flags {
        _ if flags & ZSTD != 0 => {
            let frame = &payload[..(number(entry, 16, 4) as usize).min(payload.len())];
            let mut bytes = Vec::new();
            let mut decoder = ruzstd::decoding::StreamingDecoder::new(frame).ok()?;
            decoder.read_to_end(&mut bytes).ok()?;
            bytes
        }
        _ if flags & OTHER != 0 => return None,
        _ => payload.to_vec(),
    };
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8(bytes[..end].to_vec()).ok()
}

/// Little-endian.
fn number(bytes: &[u8], at: usize, count: usize) -> u64 {
    bytes[at..at + count].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}
