//! The speed of the simulator: `cargo bench -p ptxsim --bench simulator`.
//!
//! An element is one warp instruction, so `Melem/s` reads million warp instructions per second.
//! Loops of one kind of instruction run on one core, with all checks and without; compiled kernels
//! run as in the tests, with all checks and on all cores. The kernels need nvcc.

use std::fmt::Write;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use ptxsim::layout::Swizzle;
use ptxsim::tensor_map::{Dtype, TensorMap};
use ptxsim::{Arch, Arg, Device, Launch, Module};

#[path = "../tests/support/mod.rs"]
mod support;

use support::compare::{generator, random};
use support::run::compiled;

/// Loops of a thread.
const LOOPS: u32 = 100;
/// Blocks of a launch.
const BLOCKS: u32 = 4;
/// Threads of a block.
const THREADS: u32 = 256;
/// Bytes of shared memory of a block, and of the buffer in global memory per block.
const BYTES: u32 = 20 * THREADS;

/// Chains of integers and floats, comparisons, a selection, a guarded instruction.
const ARITHMETIC: &str = "
    fma.rn.f32 %f0, %f0, %f1, %f2;
    add.f32 %f2, %f2, %f1;
    mul.f32 %f3, %f2, 0f3F000000;
    fma.rn.f32 %f4, %f3, %f1, %f0;
    add.s32 %r4, %r4, %r0;
    mad.lo.s32 %r5, %r4, %r0, %r5;
    and.b32 %r6, %r5, 255;
    xor.b32 %r7, %r6, %r4;
    shl.b32 %r8, %r7, 2;
    setp.lt.s32 %p1, %r8, %r5;
    selp.b32 %r4, %r8, %r7, %p1;
    setp.gt.f32 %p2, %f3, %f4;
    @%p2 add.s32 %r5, %r5, 1;";

/// Words of neighbours, and 16 bytes per lane.
const SHARED: &str = "
    ld.shared.f32 %f0, [%r2];
    st.shared.f32 [%r2], %f0;
    ld.shared.v4.f32 {%f1, %f2, %f3, %f4}, [%r3];
    st.shared.v4.f32 [%r3], {%f1, %f2, %f3, %f4};";

const LDMATRIX: &str = "
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r3];
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r4, %r5, %r6, %r7}, [%r3];";

const GLOBAL: &str = "
    ld.global.f32 %f0, [%rd2];
    st.global.f32 [%rd2], %f0;
    ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd3];
    st.global.v4.f32 [%rd3], {%f1, %f2, %f3, %f4};";

/// A kernel that repeats `body`, eight times to a loop. %r0: thread, %r2 and %r3: shared addresses
/// of the thread's 4 and 16 bytes, %rd2 and %rd3: the same in the buffer.
fn text(body: &str) -> String {
    // The words lie behind the 16 bytes of each thread.
    let words = 16 * THREADS;
    let mut text = format!(
        ".version 8.5
.target sm_80
.address_size 64
.visible .entry repeat(.param .u64 buffer, .param .u32 loops)
{{
    .reg .pred %p<3>;
    .reg .b32 %r<10>;
    .reg .f32 %f<5>;
    .reg .b64 %rd<4>;
    .shared .align 16 .b8 memory[{BYTES}];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, memory;
    mov.b32 %f0, 0f3F800000;
    mad.lo.u32 %r3, %r0, 16, %r1;
    st.shared.v4.f32 [%r3], {{%f0, %f0, %f0, %f0}};
    mad.lo.u32 %r2, %r0, 4, %r1;
    add.u32 %r2, %r2, {words};
    st.shared.f32 [%r2], %f0;
    bar.sync 0;
    ld.param.u64 %rd1, [buffer];
    cvta.to.global.u64 %rd1, %rd1;
    mov.u32 %r4, %ctaid.x;
    mad.wide.u32 %rd1, %r4, {BYTES}, %rd1;
    mad.wide.u32 %rd3, %r0, 16, %rd1;
    mad.wide.u32 %rd2, %r0, 4, %rd1;
    add.u64 %rd2, %rd2, {words};
    mov.b32 %f1, 0f3F000000;
    mov.b32 %f2, 0f3E800000;
    mov.b32 %f3, 0f3F800000;
    mov.b32 %f4, 0f3F800000;
    ld.param.u32 %r9, [loops];
loop:"
    );
    for _ in 0..8 {
        text += body;
    }
    let _ = write!(
        text,
        "
    sub.u32 %r9, %r9, 1;
    setp.ne.u32 %p0, %r9, 0;
    @%p0 bra loop;
    ret;
}}"
    );
    text
}

/// Runs it on one core; the number of warp instructions.
fn repeat(module: &Module, device: &mut Device, args: &[Arg]) -> u64 {
    let launch = Launch::linear(BLOCKS, THREADS);
    let report =
        device.launch(module, "repeat", &launch, args).unwrap_or_else(|e| panic!("repeat: {e}"));
    assert!(report.is_clean(), "{report}");
    report.instructions()
}

fn loops(c: &mut Criterion) {
    let core = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let core = core.unwrap_or_else(|e| panic!("a pool of one thread: {e}"));
    let bodies = [
        ("arithmetic", ARITHMETIC),
        ("shared", SHARED),
        ("ldmatrix", LDMATRIX),
        ("global", GLOBAL),
    ];
    for (name, body) in bodies {
        let module = support::run::parse(name, &text(body));
        let mut device = Device::new(Arch::Sm80);
        let buffer = device.buffer("buffer", &vec![1f32; (BLOCKS * BYTES / 4) as usize]);
        let args = [buffer.into(), Arg::U32(LOOPS)];
        let mut group = c.benchmark_group(name);
        for (checks, label) in [(true, "checked"), (false, "unchecked")] {
            device.options.checks = checks;
            let instructions = core.install(|| repeat(&module, &mut device, &args));
            group.throughput(Throughput::Elements(instructions));
            group.bench_function(label, |b| {
                core.install(|| b.iter(|| repeat(&module, &mut device, &args)));
            });
        }
    }
}

/// Launches a compiled kernel on all cores.
fn compiled_kernel(
    c: &mut Criterion,
    [group, case]: [&str; 2],
    (module, device): (&Module, &mut Device),
    kernel: &str,
    launch: Launch,
    args: &[Arg],
) {
    let mut run = || {
        let report = device.launch(module, kernel, &launch, args);
        let report = report.unwrap_or_else(|e| panic!("{kernel}: {e}"));
        assert!(report.is_clean(), "{report}");
        report.instructions()
    };
    let mut group = c.benchmark_group(group);
    group.sample_size(10).throughput(Throughput::Elements(run()));
    group.bench_function(case, |b| b.iter(&mut run));
}

fn attention(c: &mut Criterion) {
    const TOKENS: u32 = 256;
    const HEADS: u32 = 2;
    let (module, mut device) = compiled("attention_sm80", "sm_80");
    let mut rng = generator("attention");
    let n = (HEADS * TOKENS * 128) as usize;
    let [q, k, v] = ["q", "k", "v"].map(|x| device.buffer(x, &random::<bf16>(&mut rng, n, 2.0)));
    let o = device.uninitialised::<bf16>("o", n);
    let grid = [TOKENS / 64, HEADS, 1];
    let launch = Launch { grid, ..Launch::linear(1, 128).shared(49152) };
    let mut args: Vec<Arg> = [q, k, v, o].map(Arg::from).to_vec();
    args.extend([Arg::I32(TOKENS as i32), Arg::F32(128f32.sqrt().recip()), Arg::I32(0)]);
    let case = ["attention", "256 tokens, d = 128, 2 heads"];
    compiled_kernel(c, case, (&module, &mut device), "attention_d128", launch, &args);
}

/// Tensor copies and wgmma.
fn product(c: &mut Criterion) {
    const SIZE: usize = 256;
    let (module, mut device) = compiled("matmul_sm90", "sm_90a");
    let mut rng = generator("product");
    let n = SIZE * SIZE;
    let [a, b] = ["a", "b"].map(|x| device.buffer(x, &random::<bf16>(&mut rng, n, 1.0)));
    let o = device.uninitialised::<bf16>("c", n);
    let map = |matrix| {
        Arg::TensorMap(TensorMap {
            swizzle: Swizzle::B128,
            address: device.address(matrix),
            ..TensorMap::dense(Dtype::Bf16, vec![SIZE as u64; 2], vec![64, 64])
        })
    };
    let args = [map(a), map(b), map(o), Arg::I32(SIZE as i32)];
    let grid = [SIZE as u32 / 128, SIZE as u32 / 64, 1];
    let launch = Launch { grid, ..Launch::linear(1, 256).shared(90112) };
    let case = ["product", "256 x 256 x 256, wgmma"];
    compiled_kernel(c, case, (&module, &mut device), "matmul_wgmma", launch, &args);
}

criterion_group!(benches, loops, attention, product);
criterion_main!(benches);
