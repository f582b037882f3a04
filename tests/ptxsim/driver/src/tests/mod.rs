//! The library as its callers see it.

mod contexts;
mod environment;
mod limits;

use std::ffi::{CString, c_int};
use std::process::{Command, Output};
use std::ptr::null_mut;

use crate::error::{Code, SUCCESS};
use crate::launches::*;
use crate::*;

/// `fill` writes its argument to each of 32 words; in `race` all threads write to the first.
const PTX: &str = ".version 8.0
    .target sm_80
    .address_size 64
    .visible .entry fill(.param .u64 to, .param .u32 value) {
        .reg .b32 r<2>;
        .reg .b64 d<2>;
        ld.param.u64 d0, [to];
        ld.param.u32 r0, [value];
        mov.u32 r1, %tid.x;
        mad.wide.u32 d1, r1, 4, d0;
        st.global.u32 [d1], r0;
        ret;
    }
    .visible .entry race(.param .u64 to, .param .u32 value) {
        .reg .b32 r<2>;
        .reg .b64 d<1>;
        ld.param.u64 d0, [to];
        mov.u32 r1, %tid.x;
        st.global.u32 [d0], r1;
        ret;
    }
    .visible .entry stop(.param .u64 to, .param .u32 value) {
        trap;
    }
    .visible .entry large(.param .u64 to, .param .u32 value) {
        .shared .align 4 .b8 tile[4096];
        .reg .b32 r;
        mov.u32 r, tile;
        ret;
    }";

/// A producer gives registers to consumers.
const MOVES: &str = ".version 8.0
    .target sm_90a
    .address_size 64
    .visible .entry moves(.param .u64 to, .param .u32 value) .maxnreg 168 {
        .reg .pred p;
        .reg .b32 r;
        mov.u32 r, %tid.x;
        setp.lt.u32 p, r, 128;
        @p bra PRODUCER;
        setmaxnreg.inc.sync.aligned.u32 240;
        ret;
        PRODUCER:
        setmaxnreg.dec.sync.aligned.u32 24;
        ret;
    }";

#[track_caller]
fn ok(code: Code) {
    assert_eq!(code, SUCCESS);
}

/// What a function writes through its first argument.
fn given<T: Default>(call: impl FnOnce(*mut T) -> Code) -> std::result::Result<T, Code> {
    let mut value = T::default();
    match call(&mut value) {
        SUCCESS => Ok(value),
        error => Err(error),
    }
}

/// A context that is current in this thread, until dropped: what fails in it fails no other test.
struct Context(usize);

impl Context {
    fn new() -> Self {
        unsafe {
            ok(cuInit(0));
            Self(given(|c| cuCtxCreate_v2(c, 0, 0)).unwrap())
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        unsafe { cuCtxDestroy_v2(self.0) };
    }
}

fn load(ptx: &str) -> usize {
    let text = CString::new(ptx).unwrap();
    given(|m| unsafe { cuModuleLoadData(m, text.as_ptr().cast()) }).unwrap()
}

fn module() -> usize {
    load(PTX)
}

fn function(module: usize, name: &str) -> usize {
    let name = CString::new(name).unwrap();
    given(|f| unsafe { cuModuleGetFunction(f, module, name.as_ptr()) }).unwrap()
}

fn words(count: usize) -> u64 {
    given(|address| unsafe { cuMemAlloc_v2(address, 4 * count) }).unwrap()
}

fn first_word(address: u64) -> std::result::Result<u32, Code> {
    given(|to: *mut u32| unsafe { cuMemcpyDtoH_v2(to.cast(), address, 4) })
}

/// Runs a kernel of `PTX` in one block of 32 threads.
fn run(function: usize, to: u64, value: u32, stream: usize) -> Code {
    let args = [(&raw const to).cast::<u8>(), (&raw const value).cast()];
    unsafe { cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, stream, args.as_ptr(), null_mut()) }
}

/// Runs a test again, in a process with these variables; in that process: None.
fn with(name: &str, variables: &[(&str, &str)]) -> Option<Output> {
    const CHILD: &str = "DRIVER_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]).env(CHILD, "1");
    command.envs(variables.iter().copied());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "no test {name}");
    Some(output)
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn attribute(number: u32, device: c_int) -> std::result::Result<c_int, Code> {
    given(|value| unsafe { cuDeviceGetAttribute(value, number, device) })
}
