//! Access to device memory by address.

use ptxsim::diagnostic::Kind;
use ptxsim::{AddressError, Arch, Arg, Device, Uninitialised};

use crate::run::launch;

/// More than a page of the simulator, and not a multiple of one.
const SIZE: u64 = 10_000;

fn device() -> (Device, u64) {
    let mut device = Device::new(Arch::Sm80);
    device.uninitialised_bytes("before", 64);
    let buffer = device.uninitialised_bytes("data", SIZE);
    device.uninitialised_bytes("behind", 64);
    let address = device.address(buffer);
    (device, address)
}

#[test]
fn written_bytes_are_read_back_across_pages() {
    let (mut device, at) = device();
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
    device.write(at + 1, &bytes[1..SIZE as usize - 1]).expect("inside");
    assert_eq!(device.read_bytes(at + 1, SIZE - 2).expect("written"), bytes[1..SIZE as usize - 1]);
    assert_eq!(device.read_bytes(at + 4090, 20).expect("written"), bytes[4090..4110]);

    device.fill(at + 4000, 200, 7).expect("inside");
    assert_eq!(device.read_bytes(at + 3999, 202).expect("written")[..2], [bytes[3999], 7]);
    assert_eq!(device.read_bytes(at + 4199, 2).expect("written"), [7, bytes[4200]]);
}

#[test]
fn only_written_bytes_can_be_read() {
    let (mut device, at) = device();
    device.fill(at, 16, 0).expect("inside");
    assert_eq!(device.read_bytes(at, 16).expect("written"), [0; 16]);
    let error = device.read_bytes(at, 17).expect_err("byte 16 is not written");
    let unwritten = Uninitialised { buffer: "data".into(), offset: 16 };
    assert_eq!(error, AddressError::Uninitialised(unwritten));
    assert!(device.read_bytes(at + 16, 0).expect("nothing to read").is_empty());
}

#[test]
fn copies_leave_out_what_was_never_written() {
    let (mut device, from) = device();
    let copy = device.uninitialised_bytes("copy", SIZE);
    let to = device.address(copy);
    device.fill(from + 10, 5000, 3).expect("inside");
    device.fill(from + 6000, 4, 4).expect("inside");
    device.copy(to, from, SIZE - 1).expect("inside");
    assert_eq!(device.read_bytes(to + 10, 5000).expect("copied"), [3; 5000]);
    assert_eq!(device.read_bytes(to + 6000, 4).expect("copied"), [4; 4]);
    assert_eq!(device.unwritten(copy), SIZE - 5004);
    assert_eq!(device.peek(to + 9, 2).expect("inside"), [0, 3]);
    let size = SIZE;
    let outside = AddressError::Outside { buffer: "copy".into(), offset: 1, bytes: size, size };
    assert_eq!(device.copy(to + 1, from, SIZE), Err(outside));
}

/// A device that allocates and frees for ever does not run out of numbers; an address comes again
/// only after thousands of others.
#[test]
fn numbers_of_freed_buffers_come_again_late() {
    let mut device = Device::new(Arch::Sm80);
    let kept = device.upload("kept", &[5]);
    let mut seen = std::collections::BTreeSet::from([device.address(kept)]);
    let mut again = None;
    for i in 0..40_000 {
        let buffer = device.uninitialised_bytes("some", 4);
        let new = seen.insert(device.address(buffer));
        again = again.or((!new).then_some(i));
        assert_eq!(device.unwritten(buffer), 4);
        device.free(buffer);
    }
    assert!(again.is_some_and(|i| i > 10_000), "{again:?}");
    assert_eq!(device.download(kept).expect("kept"), [5]);
}

#[test]
fn ranges_must_lie_in_one_buffer() {
    let (mut device, at) = device();
    let outside =
        |offset, bytes| AddressError::Outside { buffer: "data".into(), offset, bytes, size: SIZE };
    assert_eq!(device.write(at + SIZE - 1, &[1, 2]), Err(outside(SIZE as i64 - 1, 2)));
    assert_eq!(device.write(at - 1, &[1, 2]), Err(outside(-1, 2)));
    assert_eq!(device.fill(at, SIZE + 1, 0), Err(outside(0, SIZE + 1)));
    assert_eq!(device.fill(at + 8, u64::MAX, 0), Err(outside(8, u64::MAX)));
    assert_eq!(device.read_bytes(at + SIZE, 1), Err(outside(SIZE as i64, 1)));
    assert_eq!(device.read_bytes(at, 1), device.read_bytes(at, SIZE), "nothing was written");
    device.write(at + SIZE, &[]).expect("an empty range at the end");

    for address in [0, 1 << 20, at << 4, u64::MAX] {
        assert_eq!(device.write(address, &[1]), Err(AddressError::NoBuffer { address }));
    }
    let text = device.write(at + SIZE, &[1]).expect_err("outside").to_string();
    assert_eq!(text, "1 bytes at offset 10000 of buffer data leave its 10000 bytes");
}

/// Copies 4 bytes from `data` to 64 bytes behind it.
const COPY: &str = "
    .version 8.0 .target sm_80 .address_size 64
    .visible .entry copy(.param .u64 data) {
        .reg .b32 %r; .reg .b64 %rd;
        ld.param.u64 %rd, [data];
        ld.global.u32 %r, [%rd];
        st.global.u32 [%rd+64], %r;
        ret;
    }";

#[test]
fn a_kernel_may_read_what_was_written_and_nothing_more() {
    let (mut device, at) = device();
    let run = |device: &mut Device| launch(device, COPY, [1, 1], &[Arg::U64(at)]).is_clean();
    device.write(at, &[1, 2, 3]).expect("inside");
    assert!(!run(&mut device), "the fourth byte was never written");
    device.fill(at + 3, 1, 4).expect("inside");
    assert!(run(&mut device));
    assert_eq!(device.read_bytes(at + 64, 4).expect("the kernel wrote it"), [1, 2, 3, 4]);
}

#[test]
fn a_freed_buffer_has_no_bytes() {
    let mut device = Device::new(Arch::Sm80);
    let buffer = device.buffer("data", &[0u8; 128]);
    let address = device.address(buffer);
    device.free(buffer);
    let report = launch(&mut device, COPY, [1, 1], &[Arg::U64(address)]);
    assert!(report.has(Kind::OutOfBounds), "{report}");
    assert!(report.to_string().contains("data (freed)"), "{report}");
    assert!(device.read_bytes(address, 1).is_err());
    let next = device.buffer("next", &[1u8]);
    assert_ne!(device.address(next), address, "addresses are not used again");
}
