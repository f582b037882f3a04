//! Contexts and what belongs to them.

use std::cell::RefCell;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use super::*;
use crate::error::{INVALID_CONTEXT, INVALID_HANDLE, LAUNCH_FAILED};
use crate::pinned::Pinned;

fn current() -> usize {
    given(|c| unsafe { cuCtxGetCurrent(c) }).unwrap()
}

fn new_stream() -> usize {
    given(|s| unsafe { cuStreamCreate(s, 0) }).unwrap()
}

fn new_event() -> usize {
    given(|e| unsafe { cuEventCreate(e, 0) }).unwrap()
}

#[test]
fn the_primary_context_is_always_the_same() {
    let name = "tests::contexts::the_primary_context_is_always_the_same";
    // Others in this process may retain it.
    if with(name, &[]).is_some() {
        return;
    }
    unsafe {
        ok(cuInit(0));
        let retain = || given(|c| cuDevicePrimaryCtxRetain(c, 0)).unwrap();
        let first = retain();
        assert_eq!(retain(), first);
        ok(cuCtxSetCurrent(first));
        let stream = new_stream();
        ok(cuDevicePrimaryCtxRelease_v2(0));
        ok(cuStreamSynchronize(stream));
        // The last release ends what it has.
        ok(cuDevicePrimaryCtxRelease_v2(0));
        assert_eq!(cuStreamSynchronize(stream), INVALID_HANDLE);
        assert_eq!(cuCtxSynchronize(), INVALID_CONTEXT);
        assert_eq!(cuDevicePrimaryCtxRelease_v2(0), INVALID_CONTEXT);
        assert_eq!(retain(), first);
        ok(cuCtxSynchronize());
        assert_eq!(cuCtxDestroy_v2(first), INVALID_CONTEXT);
    }
}

#[test]
fn contexts_are_a_stack_of_the_thread() {
    unsafe {
        let first = Context::new();
        let second = Context::new();
        assert!(first.0 != second.0 && current() == second.0);
        assert_eq!(thread::spawn(current).join().unwrap(), 0);
        ok(cuCtxPushCurrent_v2(first.0));
        assert_eq!(current(), first.0);
        assert_eq!(given(|c| cuCtxPopCurrent_v2(c)), Ok(first.0));
        assert_eq!(current(), second.0);
        ok(cuCtxSetCurrent(first.0));
        assert_eq!(given(|c| cuCtxPopCurrent_v2(c)), Ok(first.0));
        // The second was replaced; the first, under it, is current again.
        assert_eq!(current(), first.0);
        ok(cuCtxSetCurrent(0));
        assert_eq!((current(), cuCtxSynchronize()), (0, INVALID_CONTEXT));
        assert_eq!(given(|a| cuMemAlloc_v2(a, 4)), Err(INVALID_CONTEXT));
        assert_eq!(cuCtxSetCurrent(0xbad), INVALID_CONTEXT);
        assert_eq!(cuCtxPopCurrent_v2(null_mut()), INVALID_CONTEXT);
    }
}

/// Tells, when its thread ends, what is current there.
struct AtEnd(Sender<std::result::Result<usize, Code>>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        _ = self.0.send(given(|c| unsafe { cuCtxGetCurrent(c) }));
    }
}

#[test]
fn a_thread_that_ends_has_no_context() {
    thread_local! {
        static LAST: RefCell<Option<AtEnd>> = const { RefCell::new(None) };
    }
    let context = Context::new();
    let handle = context.0;
    let (sender, receiver) = channel();
    thread::spawn(move || {
        // What a thread sets first ends last.
        LAST.with_borrow_mut(|last| *last = Some(AtEnd(sender)));
        ok(unsafe { cuCtxSetCurrent(handle) });
    })
    .join()
    .unwrap();
    assert_eq!(receiver.recv(), Ok(Ok(0)));
}

#[test]
fn a_context_ends_with_what_it_has() {
    let context = Context::new();
    let (stream, event, to) = (new_stream(), new_event(), words(1));
    let fill = function(module(), "fill");
    ok(unsafe { cuMemcpyHtoD_v2(to, [1, 2, 3, 4].as_ptr(), 4) });
    let other = Context::new();
    assert_eq!(first_word(to), Ok(0x0403_0201));
    drop(context);
    unsafe {
        assert_eq!(current(), other.0);
        assert_eq!(cuStreamSynchronize(stream), INVALID_HANDLE);
        assert_eq!(cuEventQuery(event), INVALID_HANDLE);
        assert_eq!(run(fill, to, 0, 0), INVALID_HANDLE);
        assert_eq!(first_word(to), Err(error::INVALID_VALUE));
    }
}

#[test]
fn handles_of_another_context_are_refused() {
    let first = Context::new();
    let (stream, event, module) = (new_stream(), new_event(), module());
    let (fill, to) = (function(module, "fill"), words(32));
    let second = Context::new();
    let own = function(self::module(), "fill");
    unsafe {
        // The function, the stream, the module, the event are the first's.
        assert_eq!(run(fill, to, 1, 0), INVALID_HANDLE);
        assert_eq!(run(own, to, 1, stream), INVALID_HANDLE);
        assert_eq!(run(fill, to, 1, stream), INVALID_HANDLE);
        let name = c"fill".as_ptr();
        assert_eq!(given(|f| cuModuleGetFunction(f, module, name)), Err(INVALID_HANDLE));
        assert_eq!(cuEventRecord(event, 0), INVALID_HANDLE);
        ok(run(own, to, 1, 0));
        ok(cuCtxSetCurrent(first.0));
        ok(run(fill, to, 1, stream));
        ok(cuEventRecord(event, stream));
        // Waiting is possible from anywhere.
        ok(cuCtxSetCurrent(second.0));
        ok(cuStreamWaitEvent(0, event, 0));
        ok(cuEventSynchronize(event));
        ok(cuStreamSynchronize(stream));
    }
}

#[test]
fn a_failure_stays_in_its_context() {
    let first = Context::new();
    let to = words(32);
    assert_eq!(run(function(module(), "race"), to, 0, 0), LAUNCH_FAILED);
    assert_eq!(unsafe { cuCtxSynchronize() }, LAUNCH_FAILED);
    let _second = Context::new();
    ok(run(function(module(), "fill"), to, 3, 0));
    assert_eq!(first_word(to), Ok(3));
    unsafe {
        ok(cuCtxPushCurrent_v2(first.0));
        assert_eq!(cuCtxSynchronize(), LAUNCH_FAILED);
    }
}

#[test]
fn modules_from_files() {
    let _context = Context::new();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        CString::new(path.to_str().unwrap()).unwrap()
    };
    let load = |name: &CString| given(|m| unsafe { cuModuleLoad(m, name.as_ptr()) });
    let (text, to) = (file("text", PTX.as_bytes()), words(32));
    ok(run(function(load(&text).unwrap(), "fill"), to, 5, 0));
    assert_eq!(first_word(to), Ok(5));
    // A fatbin that ends in its header, and one in an entry that claims more.
    let head = [0x50, 0xed, 0x55, 0xba, 1, 0, 16, 0, 80, 0, 0, 0, 0, 0, 0, 0];
    let entry = [&head[..], &[1, 0, 1, 1, 64, 0, 0, 0, 200], &[0; 55]].concat();
    for content in [&head[..9], &head, &entry] {
        assert_eq!(load(&file("cut", content)), Err(error::INVALID_IMAGE));
    }
    assert_eq!(load(&CString::new("/nowhere").unwrap()), Err(error::FILE_NOT_FOUND));
}

#[test]
fn copies_between_contexts() {
    let first = Context::new();
    let from = words(32);
    ok(run(function(module(), "fill"), from, 7, 0));
    let second = Context::new();
    let to = words(32);
    ok(unsafe { cuMemcpyPeerAsync(to, second.0, from, first.0, 128, 0) });
    assert_eq!(first_word(to), Ok(7));
    // Past the end.
    let code = unsafe { cuMemcpyPeerAsync(to, second.0, from, first.0, 132, 0) };
    assert_eq!(code, error::INVALID_VALUE);
}

/// What a stream captures: 0 is nothing.
fn capturing(stream: usize) -> u32 {
    given(|status| unsafe { cuStreamIsCapturing(stream, status) }).unwrap()
}

#[test]
fn every_thread_has_a_default_stream() {
    let owner = Context::new();
    let context = owner.0;
    unsafe {
        // The one of all threads captures nothing.
        assert_eq!(cuStreamBeginCapture_v2(0, 0), error::CAPTURE_UNSUPPORTED);
        ok(cuStreamBeginCapture_v2(2, 0));
        assert_eq!((capturing(2), capturing(0), capturing(1)), (1, 0, 0));
        let to = words(32);
        let fill = function(module(), "fill");
        ok(run(fill, to, 1, 0));
        ok(run(fill, to, 2, 2));
        thread::spawn(move || {
            ok(cuCtxSetCurrent(context));
            assert_eq!(capturing(2), 0);
            assert_eq!(first_word(to), Ok(1));
        })
        .join()
        .unwrap();
        let graph = given(|graph| cuStreamEndCapture(2, graph)).unwrap();
        assert_eq!(first_word(to), Ok(1));
        let exec = given(|exec| cuGraphInstantiateWithFlags(exec, graph, 0)).unwrap();
        ok(cuGraphLaunch(exec, 2));
        assert_eq!(first_word(to), Ok(2));
    }
}

#[test]
fn a_launch_leaves_alone_what_other_threads_write_meanwhile() {
    let mut device = ptxsim::Device::new(ptxsim::Arch::Sm80);
    let mut pinned = Pinned::new(&mut device, 4).unwrap();
    let host = pinned.start() as *mut [u8; 4];
    let address = pinned.map(&device);
    unsafe { host.write([1, 2, 3, 4]) };
    pinned.upload(&mut device);
    device.write(address, &[10]).unwrap();
    unsafe { host.write([1, 20, 3, 4]) };
    pinned.download(&device);
    assert_eq!(unsafe { host.read() }, [10, 20, 3, 4]);
    pinned.upload(&mut device);
    assert_eq!(device.contents(pinned.buffer), [10, 20, 3, 4]);
}
