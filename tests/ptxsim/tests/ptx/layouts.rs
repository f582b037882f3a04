//! Tensor copies, swizzles, descriptors and wgmma together: for every layout of the operands the
//! result is the matrix product.

use std::fmt::Write;

use half::{bf16, f16};
use proptest::prelude::*;
use ptxsim::layout::{Major, Swizzle, wgmma_a, wgmma_d};
use ptxsim::tensor_map::{Dtype, TensorMap};
use ptxsim::{Arch, Arg, Device, Timing};

use crate::run::launch;

const M: usize = 64;
const K: usize = 64;

/// How an operand of `mn` × K lies in global and shared memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    major: Major,
    swizzle: Swizzle,
    mn: usize,
}

impl Layout {
    /// Bytes of a row of a strip: the swizzle's, or one 16-byte chunk.
    fn row(self) -> usize {
        u32::from(self.swizzle).max(16) as usize
    }

    /// Columns and rows of the matrix as it lies in global memory.
    fn global(self) -> [usize; 2] {
        if self.major == Major::K { [K, self.mn] } else { [self.mn, K] }
    }

    fn strip_bytes(self) -> usize {
        self.row() * self.global()[1]
    }

    /// Strips of `row` bytes of columns, one tensor copy each.
    fn strips(self) -> usize {
        2 * self.global()[0] / self.row()
    }

    fn map(self, dtype: Dtype, address: u64) -> TensorMap {
        let [columns, rows] = self.global();
        let dims = vec![columns as u64, rows as u64];
        let map = TensorMap::dense(dtype, dims, vec![self.row() as u32 / 2, rows as u32]);
        TensorMap { swizzle: self.swizzle, address, ..map }
    }

    /// Leading and stride offsets of the descriptor.
    fn offsets(self) -> [usize; 2] {
        match (self.major, self.swizzle) {
            (Major::K, Swizzle::None) => [self.strip_bytes(), 128],
            (Major::K, _) => [16, 8 * self.row()],
            (Major::Mn, Swizzle::None) => [128, self.strip_bytes()],
            (Major::Mn, _) => [self.strip_bytes(), 8 * self.row()],
        }
    }

    /// The descriptor's bits but the start address.
    fn bits(self) -> u64 {
        let [leading, stride] = self.offsets();
        let mode = match self.swizzle {
            Swizzle::None => 0,
            Swizzle::B128 => 1,
            Swizzle::B64 => 2,
            Swizzle::B32 => 3,
        };
        (leading as u64 >> 4) << 16 | (stride as u64 >> 4) << 32 | mode << 62
    }

    /// Where step `s` of 16 along K begins.
    fn step(self, s: usize) -> usize {
        match self.major {
            Major::Mn => s * 16 * self.row(),
            Major::K => {
                let byte = s * 32;
                byte / self.row() * self.strip_bytes() + byte % self.row()
            }
        }
    }
}

/// Loads both operands by tensor copies and multiplies them; every thread stores its accumulators.
fn text(ty: &str, a: Option<Layout>, b: Layout) -> String {
    let n = b.mn;
    let bytes = |l: Layout| l.strips() * l.strip_bytes();
    let size_a = a.map_or(16, bytes);
    let mut t = format!(
        ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry product(\n\
         .param .align 64 .b8 map_a[128], .param .align 64 .b8 map_b[128], .param .u64 fragments, \
         .param .u64 out)\n{{\n\
         .reg .pred %p<4>; .reg .b32 %r<20>; .reg .f32 %d<{}>; .reg .b64 %x<20>;\n\
         .shared .align 1024 .b8 a[{size_a}]; .shared .align 1024 .b8 b[{}];\n\
         .shared .align 8 .b8 full[8];\n\
         mov.u32 %r0, %tid.x; mov.u32 %r1, full; mov.u32 %r2, a; mov.u32 %r3, b;\n\
         setp.ne.s32 %p0, %r0, 0; @%p0 bra READY;\n\
         mbarrier.init.shared::cta.b64 [%r1], 1; fence.mbarrier_init.release.cluster;\n\
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {};\n\
         mov.b64 %x0, map_a; cvta.param.u64 %x0, %x0;\n\
         mov.b64 %x1, map_b; cvta.param.u64 %x1, %x1;\n",
        n / 2,
        bytes(b),
        bytes(b) + a.map_or(0, bytes),
    );
    for (layout, map, register) in [(a, "%x0", "%r2"), (Some(b), "%x1", "%r3")] {
        let Some(layout) = layout else { continue };
        for strip in 0..layout.strips() {
            let (column, offset) = (strip * layout.row() / 2, strip * layout.strip_bytes());
            let _ = writeln!(
                t,
                "add.s32 %r4, {register}, {offset}; cp.async.bulk.tensor.2d.shared::cluster.global\
                 .mbarrier::complete_tx::bytes [%r4], [{map}, {{{column}, 0}}], [%r1];"
            );
        }
    }
    t += "READY: bar.sync 0;\n\
          WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0; @!%p1 bra WAIT;\n\
          ld.param.u64 %x2, [fragments]; mul.wide.u32 %x3, %r0, 64; add.s64 %x2, %x2, %x3;\n";
    let d: Vec<String> = (0..n / 2).map(|i| format!("%d{i}")).collect();
    for s in 0..K / 16 {
        if a.is_none() {
            let _ = writeln!(t, "ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%x2+{}];", 16 * s);
        }
        t += "wgmma.fence.sync.aligned;\n";
        let mut descriptor = |x: &str, register: &str, layout: Layout| {
            let _ = writeln!(
                t,
                "add.s32 %r5, {register}, {}; and.b32 %r5, %r5, 0x3ffff; shr.u32 %r5, %r5, 4; \
                 cvt.u64.u32 {x}, %r5; or.b64 {x}, {x}, {:#x};",
                layout.step(s),
                layout.bits()
            );
        };
        descriptor("%x5", "%r3", b);
        let (left, trans) = match a {
            None => ("{%r10, %r11, %r12, %r13}", String::new()),
            Some(a) => {
                descriptor("%x4", "%r2", a);
                ("%x4", format!("{}, ", u8::from(a.major == Major::Mn)))
            }
        };
        let _ = writeln!(
            t,
            "setp.ne.s32 %p2, {s}, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ty}.{ty} {{{}}}, \
             {left}, %x5, %p2, 1, 1, {trans}{}; wgmma.commit_group.sync.aligned; \
             wgmma.wait_group.sync.aligned 0;",
            d.join(", "),
            u8::from(b.major == Major::Mn)
        );
    }
    let _ = writeln!(
        t,
        "ld.param.u64 %x6, [out]; mul.wide.u32 %x7, %r0, {}; add.s64 %x6, %x6, %x7;",
        2 * n
    );
    for (i, d) in d.iter().enumerate() {
        let _ = writeln!(t, "st.global.f32 [%x6+{}], {d};", 4 * i);
    }
    t + "ret;\n}\n"
}

trait Element: bytemuck::Pod {
    const NAME: &'static str;
    const DTYPE: Dtype;
    fn of(x: f32) -> Self;
}

impl Element for bf16 {
    const NAME: &'static str = "bf16";
    const DTYPE: Dtype = Dtype::Bf16;
    fn of(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

impl Element for f16 {
    const NAME: &'static str = "f16";
    const DTYPE: Dtype = Dtype::F16;
    fn of(x: f32) -> Self {
        f16::from_f32(x)
    }
}

/// Small integers, so that every sum is exact.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as i64 % 7 - 3
    };
    (0..n).map(|_| next() as f32).collect()
}

/// A matrix [mn][K] as it lies in global memory.
fn place<T: Element>(x: &[f32], layout: Layout) -> Vec<T> {
    let [columns, rows] = layout.global();
    let at = |r: usize, c: usize| if layout.major == Major::K { r * K + c } else { c * K + r };
    (0..rows * columns).map(|i| T::of(x[at(i / columns, i % columns)])).collect()
}

fn check<T: Element>(a: Option<Layout>, b: Layout, seed: u64, timing: Timing) {
    let case = format!("{} {a:?} {b:?} {timing:?}", T::NAME);
    let (x, y) = (numbers(seed, M * K), numbers(seed + 1, b.mn * K));
    let mut device = Device::new(Arch::Sm90a);
    device.options.seed = seed;
    device.options.timing = timing;
    let global_a = a.unwrap_or(Layout { major: Major::K, swizzle: Swizzle::B128, mn: M });
    let buffers =
        [device.buffer("a", &place::<T>(&x, global_a)), device.buffer("b", &place::<T>(&y, b))];
    // Registers of A: thread, step, four pairs.
    let mut fragments = Vec::new();
    for thread in 0..128 {
        for s in 0..K / 16 {
            fragments.extend((0..8).map(|i| {
                let (m, k) = wgmma_a(thread, i);
                T::of(x[m * K + 16 * s + k])
            }));
        }
    }
    let fragments = device.buffer("fragments", &fragments);
    let out = device.uninitialised::<f32>("out", M * b.mn);
    let map = |l: Layout, i: usize| Arg::TensorMap(l.map(T::DTYPE, device.address(buffers[i])));
    let args = [map(global_a, 0), map(b, 1), fragments.into(), out.into()];
    let report = launch(&mut device, &text(T::NAME, a, b), [1, 128], &args);
    assert!(report.is_clean(), "{case}:\n{report}");
    assert_eq!(report.tensor_flops(), (2 * M * b.mn * K) as u64, "{case}");
    let got = device.read::<f32>(out).unwrap_or_else(|e| panic!("{case}: {e}"));
    for thread in 0..128 {
        for i in 0..b.mn / 2 {
            let (m, n) = wgmma_d(thread, i);
            let want: f32 = (0..K).map(|k| x[m * K + k] * y[n * K + k]).sum();
            let got = got[thread * b.mn / 2 + i];
            assert_eq!(got, want, "{case}: element ({m}, {n})");
        }
    }
}

const SWIZZLES: [Swizzle; 4] = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];
const MAJORS: [Major; 2] = [Major::K, Major::Mn];

/// Every pair of layouts, both types, both timings.
#[test]
fn every_layout_multiplies() {
    let layouts = |mn| {
        let of = move |major| SWIZZLES.map(|swizzle| Layout { major, swizzle, mn });
        MAJORS.into_iter().flat_map(of)
    };
    let mut seed = 1;
    for a in layouts(M).map(Some).chain([None]) {
        for b in layouts(64) {
            for timing in [Timing::Eager, Timing::Lazy] {
                seed += 1;
                check::<bf16>(a, b, seed, timing);
                check::<f16>(a, b, seed, timing);
            }
        }
    }
}

/// Every N.
#[test]
fn every_width_multiplies() {
    for n in (8..=256).step_by(8) {
        let a = Layout { major: Major::K, swizzle: Swizzle::B128, mn: M };
        let b = Layout { mn: n, ..a };
        check::<bf16>(Some(a), b, n as u64, Timing::Eager);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_layout_multiplies(
        seed in any::<u32>(),
        (a, b) in ((0usize..2, 0usize..4), (0usize..2, 0usize..4)),
        width in 1usize..5,
        lazy in any::<bool>(),
    ) {
        let layout = |(major, swizzle): (usize, usize), mn| {
            Layout { major: MAJORS[major], swizzle: SWIZZLES[swizzle], mn }
        };
        let timing = if lazy { Timing::Lazy } else { Timing::Eager };
        check::<bf16>(Some(layout(a, M)), layout(b, 64 * width), seed.into(), timing);
    }
}
