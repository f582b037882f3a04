//! What the device says it is able to do, and what it refuses.

use super::*;
use crate::error::{
    COOPERATIVE_TOO_LARGE, INVALID_CLUSTER, INVALID_DEVICE, INVALID_VALUE, OUT_OF_RESOURCES,
};

fn resident(function: usize, threads: c_int, shared: usize) -> std::result::Result<c_int, Code> {
    let call =
        |n| unsafe { cuOccupancyMaxActiveBlocksPerMultiprocessor(n, function, threads, shared) };
    given(call)
}

/// A launch of `blocks` blocks of 128 threads, with one attribute.
fn launch(function: usize, blocks: u32, id: u32, value: [u32; 3]) -> Code {
    let [x, y, z] = value;
    let mut attribute = Attribute { id, padding: 0, value: [0; 16] };
    attribute.value[..3].copy_from_slice(&[x, y, z]);
    let args = [(&raw const ZERO).cast::<u8>(); 2];
    let config = config(blocks, &attribute);
    unsafe { cuLaunchKernelEx(&config, function, args.as_ptr(), null_mut()) }
}

static ZERO: u64 = 0;

fn config(blocks: u32, attribute: &Attribute) -> Config {
    let (grid, block) = ([blocks, 1, 1], [128, 1, 1]);
    Config { grid, block, shared_bytes: 0, stream: 0, attributes: attribute, count: 1 }
}

#[test]
fn attributes_of_the_device() {
    ok(unsafe { cuInit(0) });
    assert_eq!([97, 39, 75, 76].map(|n| attribute(n, 0)), [Ok(166_912), Ok(2048), Ok(8), Ok(0)]);
    assert_eq!(attribute(4711, 0), Err(INVALID_VALUE));
    assert_eq!(attribute(16, 1), Err(INVALID_DEVICE));
    assert_eq!(unsafe { cuDeviceGetAttribute(null_mut(), 16, 0) }, INVALID_VALUE);
    let mut name = [1; 4];
    ok(unsafe { cuDeviceGetName(name.as_mut_ptr(), 4, 0) });
    assert_eq!(name.map(|c| c as u8), *b"PTX\0");
}

#[test]
fn shared_memory_of_a_kernel() {
    let _context = Context::new();
    let large = function(module(), "large");
    let get = |n| given(|value| unsafe { cuFuncGetAttribute(value, n, large) });
    // Threads, static shared memory, the most of the dynamic.
    assert_eq!([0, 1, 8].map(get), [Ok(1024), Ok(4096), Ok(48 << 10)]);
    unsafe {
        // The kernel's own 4 KiB count as well.
        ok(cuFuncSetAttribute(large, 8, 166_912 - 4096));
        assert_eq!(cuFuncSetAttribute(large, 8, 166_913 - 4096), INVALID_VALUE);
        assert_eq!(cuFuncSetAttribute(large, 8, -1), INVALID_VALUE);
        ok(cuFuncSetAttribute(large, 8, 100_000));
        assert_eq!((get(8), get(4711)), (Ok(100_000), Err(INVALID_VALUE)));
    }
}

#[test]
fn blocks_of_a_multiprocessor() {
    let _context = Context::new();
    let large = function(module(), "large");
    assert_eq!(resident(large, 1024, 0), Ok(2));
    // 4 KiB are the kernel's own, 1 KiB the system's.
    assert_eq!(resident(large, 32, 77 << 10), Ok(2));
    assert_eq!(resident(large, 32, (77 << 10) + 1), Ok(1));
    assert_eq!(resident(large, 32, 160 << 10), Ok(0));
    assert_eq!(resident(large, 0, 0), Err(INVALID_VALUE));
}

#[test]
fn clusters() {
    if with("tests::limits::clusters", &[("PTXSIM_ARCH", "sm_90a")]).is_some() {
        return;
    }
    let _context = Context::new();
    let large = function(module(), "large");
    assert_eq!(attribute(120, 0), Ok(1));
    let of = |n| {
        let mut attribute = Attribute { id: CLUSTER, padding: 0, value: [1; 16] };
        attribute.value[0] = n;
        let config = config(32, &attribute);
        let size = given(|s| unsafe { cuOccupancyMaxPotentialClusterSize(s, large, &config) });
        let count = given(|c| unsafe { cuOccupancyMaxActiveClusters(c, large, &config) });
        (size, count)
    };
    // 16 blocks of 128 threads fit a multiprocessor.
    assert_eq!(of(8), (Ok(8), Ok(132 * 2)));
    assert_eq!(of(16), (Ok(8), Err(INVALID_CLUSTER)));
    assert_eq!(launch(large, 32, CLUSTER, [16, 1, 1]), INVALID_CLUSTER);
    assert_eq!(launch(large, 32, CLUSTER, [3, 1, 1]), INVALID_CLUSTER);
    ok(launch(large, 32, CLUSTER, [4, 1, 1]));
    ok(unsafe { cuFuncSetAttribute(large, 14, 1) });
    assert_eq!(of(16), (Ok(16), Ok(132)));
    ok(launch(large, 32, CLUSTER, [16, 1, 1]));
    assert_eq!(launch(large, 32, CLUSTER, [32, 1, 1]), INVALID_CLUSTER);
    assert_eq!(launch(large, 32, CLUSTER, [0, 1, 1]), INVALID_CLUSTER);
}

#[test]
fn an_older_device_has_no_clusters() {
    let _context = Context::new();
    let large = function(module(), "large");
    assert_eq!(launch(large, 2, CLUSTER, [2, 1, 1]), INVALID_CLUSTER);
    ok(launch(large, 2, CLUSTER, [1, 1, 1]));
}

#[test]
fn cooperative_launches_fit_the_device() {
    let _context = Context::new();
    let large = function(module(), "large");
    // 16 blocks of 128 threads on each of 108 multiprocessors.
    assert_eq!(launch(large, 1729, COOPERATIVE, [1, 0, 0]), COOPERATIVE_TOO_LARGE);
    ok(launch(large, 1729, COOPERATIVE, [0, 0, 0]));
    ok(launch(large, 108, COOPERATIVE, [1, 0, 0]));
}

#[test]
fn registers() {
    if with("tests::limits::registers", &[("PTXSIM_ARCH", "sm_90a")]).is_some() {
        return;
    }
    let _context = Context::new();
    let moves = function(load(MOVES), "moves");
    let registers = given(|value| unsafe { cuFuncGetAttribute(value, 4, moves) });
    assert_eq!(registers, Ok(168));
    assert_eq!([256, 384, 512].map(|n| resident(moves, n, 0)), [Ok(1), Ok(1), Ok(0)]);
    let run = |threads| {
        let args = [(&raw const ZERO).cast::<u8>(); 2];
        unsafe { cuLaunchKernel(moves, 1, 1, 1, threads, 1, 1, 0, 0, args.as_ptr(), null_mut()) }
    };
    assert_eq!(run(512), OUT_OF_RESOURCES);
    ok(run(384));
    ok(run(256));
}
