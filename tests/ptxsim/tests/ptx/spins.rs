//! Threads that poll memory for each other.

use ptxsim::diagnostic::Kind;
use ptxsim::{Arch, Arg, Device, Residency, Timing};

use crate::run::{clean, launch};

/// Two sides hand a number to and fro `rounds` times, each waiting for its own parity: side 0 makes
/// an even number odd, side 1 an odd one even.
fn ping_pong(side: &str, shared: bool, sleeps: bool) -> String {
    let (space, scope) = if shared { ("shared::cta", "cta") } else { ("global", "gpu") };
    let sleep = if sleeps { "nanosleep.u32 20;" } else { "" };
    let address = if shared { "mov.u32 %r9, flag; cvt.u64.u32 %x0, %r9;" } else { "" };
    format!(
        "
        .version 8.0 .target sm_80 .address_size 64
        .visible .entry play(.param .u64 flag_pointer, .param .u32 rounds) {{
            .reg .pred %p<4>; .reg .b32 %r<10>; .reg .b64 %x<2>;
            .shared .align 4 .b32 flag;
            ld.param.u64 %x0, [flag_pointer];
            ld.param.u32 %r1, [rounds];
            {address}
            mov.u32 %r0, %tid.x; and.b32 %r2, %r0, 31;
            setp.ne.s32 %p0, %r0, 0; @%p0 bra START;
            mov.u32 %r3, %ctaid.x; setp.ne.s32 %p0, %r3, 0; @%p0 bra START;
            mov.u32 %r4, 0;
            st.relaxed.{scope}.{space}.u32 [%x0], %r4;
        START:
            bar.sync 0;
            setp.ne.s32 %p0, %r2, 0; @%p0 bra END;
            {side}
            mov.u32 %r5, 0;
        ROUND:
        POLL:
            {sleep}
            ld.acquire.{scope}.{space}.u32 %r6, [%x0];
            and.b32 %r7, %r6, 1;
            setp.ne.u32 %p1, %r7, %r3; @%p1 bra POLL;
            add.u32 %r6, %r6, 1;
            st.release.{scope}.{space}.u32 [%x0], %r6;
            add.u32 %r5, %r5, 1;
            setp.lt.u32 %p2, %r5, %r1; @%p2 bra ROUND;
        END:
            ret;
        }}"
    )
}

const BY_BLOCK: &str = "mov.u32 %r3, %ctaid.x;";
const BY_WARP: &str = "shr.u32 %r3, %r0, 5;";

#[test]
fn blocks_that_wait_for_each_other() {
    for sleeps in [true, false] {
        let text = ping_pong(BY_BLOCK, false, sleeps);
        for seed in 0..3 {
            let mut device = Device::new(Arch::Sm80);
            device.options.seed = seed;
            device.options.residency = Residency::CoResident;
            let flag = device.buffer("flag", &[0u32]);
            clean(&mut device, &text, [2, 32], &[flag.into(), Arg::U32(300)]);
            assert_eq!(device.read::<u32>(flag).expect("written"), [600]);
        }
    }
}

/// On one core; on several, blocks that run at the same time may meet by chance.
#[test]
fn one_after_the_other_they_wait_for_ever() {
    let text = ping_pong(BY_BLOCK, false, true);
    let mut device = Device::new(Arch::Sm80);
    let flag = device.buffer("flag", &[0u32]);
    let args = [flag.into(), Arg::U32(3)];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    let report = pool.install(|| launch(&mut device, &text, [2, 32], &args));
    assert!(report.has(Kind::Deadlock) && !report.complete, "{report}");
}

#[test]
fn warps_that_wait_for_each_other() {
    for (sleeps, timing) in [(true, Timing::Eager), (false, Timing::Lazy)] {
        let mut device = Device::new(Arch::Sm80);
        device.options.timing = timing;
        let unused = device.buffer("unused", &[0u32]);
        let text = ping_pong(BY_WARP, true, sleeps);
        clean(&mut device, &text, [1, 64], &[unused.into(), Arg::U32(300)]);
    }
}

/// Lanes of one warp that wait for each other: the spinning ones must not keep the others back.
#[test]
fn lanes_that_wait_for_each_other() {
    let text = "
        .version 8.0 .target sm_80 .address_size 64
        .visible .entry lanes(.param .u64 out) {
            .reg .pred %p<4>; .reg .b32 %r<10>; .reg .b64 %x<4>;
            .shared .align 4 .b32 flag;
            ld.param.u64 %x0, [out];
            mov.u32 %r0, %tid.x; mov.u32 %r9, flag;
            setp.ne.s32 %p0, %r0, 5; @%p0 bra READY;
            st.relaxed.cta.shared.u32 [%r9], 0;
        READY:
            bar.warp.sync 0xffffffff;
            setp.eq.s32 %p1, %r0, 31; @%p1 bra GIVE;
        POLL:
            ld.acquire.cta.shared.u32 %r6, [%r9];
            setp.eq.s32 %p2, %r6, 0; @%p2 bra POLL;
            bra END;
        GIVE:
            st.release.cta.shared.u32 [%r9], 7;
            mov.u32 %r6, 7;
        END:
            mul.wide.u32 %x1, %r0, 4; add.u64 %x1, %x0, %x1;
            st.global.u32 [%x1], %r6;
            ret;
        }";
    let mut device = Device::new(Arch::Sm80);
    let out = device.uninitialised::<u32>("out", 32);
    clean(&mut device, text, [1, 32], &[out.into()]);
    assert_eq!(device.read::<u32>(out).expect("written"), [7; 32]);
}

/// A warp that polls memory with loads does not keep back the copy another one waits for.
#[test]
fn a_copy_put_off_while_a_warp_polls() {
    let text = "
        .version 8.0 .target sm_90a .address_size 64
        .visible .entry pass(.param .u64 data, .param .u64 out) {
            .reg .pred %p<4>; .reg .b32 %r<10>; .reg .b64 %x<4>;
            .shared .align 16 .b8 tile[16];
            .shared .align 8 .b64 full;
            .shared .align 4 .b32 flag;
            ld.param.u64 %x0, [data]; ld.param.u64 %x1, [out];
            mov.u32 %r0, %tid.x; mov.u32 %r1, tile; mov.u32 %r2, full; mov.u32 %r3, flag;
            setp.ne.s32 %p0, %r0, 0; @%p0 bra READY;
            mbarrier.init.shared::cta.b64 [%r2], 1;
            st.relaxed.cta.shared.u32 [%r3], 0;
            fence.proxy.async;
        READY:
            bar.sync 0;
            setp.eq.s32 %p1, %r0, 32; @%p1 bra POLL;
            @%p0 bra END;
            mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 16;
            cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
                [%r1], [%x0], 16, [%r2];
        WAIT:
            mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
            @!%p2 bra WAIT;
            st.release.cta.shared.u32 [%r3], 1;
            bra END;
        POLL:
            ld.acquire.cta.shared.u32 %r4, [%r3];
            setp.eq.s32 %p2, %r4, 0; @%p2 bra POLL;
            ld.shared.u32 %r5, [%r1];
            st.global.u32 [%x1], %r5;
        END:
            ret;
        }";
    let mut device = Device::new(Arch::Sm90a);
    device.options.timing = Timing::Lazy;
    device.options.max_instructions = 1_000_000;
    let (data, out) = (device.buffer("data", &[7u32; 4]), device.uninitialised::<u32>("out", 1));
    clean(&mut device, text, [1, 64], &[data.into(), out.into()]);
    assert_eq!(device.read::<u32>(out).expect("written"), [7]);
}
