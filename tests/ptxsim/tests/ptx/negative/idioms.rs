//! Idioms of kernels in production, and the faults that make them wrong: what one thread releases
//! for a warpgroup, what four warps write together, barriers a warp arrives at twice.

use ptxsim::diagnostic::Kind::{
    BarrierMismatch, Deadlock, Mbarrier, MissingProxyFence, MissingWgmmaFence, PendingRead,
    PendingWrite, Race, Repeated,
};

use super::case::Case;

/// A producer warp copies four tiles of B into one buffer; a warpgroup multiplies, waits, and one
/// of its threads releases the buffer.
const PIPELINE: &str = "
    .shared .align 8 .b8 full[8];
    .shared .align 8 .b8 empty[8];
    mov.u32 r1, full;
    mov.u32 r2, empty;
    @!leader bra READY;
    mbarrier.init.shared::cta.b64 [r1], 1;
    mbarrier.init.shared::cta.b64 [r2], 1;
    fence.mbarrier_init.release.cluster;
    READY:
    bar.sync 0;
    mov.u32 r3, 0;
    setp.ge.u32 q, warp, 4;
    @q bra PRODUCER;
    setp.ne.u32 q, tid, 64;
    mov.b32 r4, 0x3f803f80;
    mov.f32 f0, 0f00000000;
    mov.f32 f1, 0f00000000;
    mov.f32 f2, 0f00000000;
    mov.f32 f3, 0f00000000;
    CONSUME:
    and.b32 r6, r3, 1;
    FULL:
    mbarrier.try_wait.parity.shared::cta.b64 p, [r1], r6;
    @!p bra FULL;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, {r4, r4, r4, r4}, front, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    @!q mbarrier.arrive.shared::cta.b64 _, [r2];
    add.u32 r3, r3, 1;
    setp.lt.u32 p, r3, 4;
    @p bra CONSUME;
    mad.wide.u32 d1, tid, 4, out;
    st.global.f32 [d1], f0;
    bra DONE;
    PRODUCER:
    setp.ne.u32 q, lane, 0;
    @q bra DONE;
    PRODUCE:
    sub.u32 r6, r3, 1;
    and.b32 r6, r6, 1;
    EMPTY:
    mbarrier.try_wait.parity.shared::cta.b64 p, [r2], r6;
    @!p bra EMPTY;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [r1], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sh], [in], 256, [r1];
    add.u64 in, in, 256;
    add.u32 r3, r3, 1;
    setp.lt.u32 p, r3, 4;
    @p bra PRODUCE;
    DONE:";

const COPY: &str = "cp.async.bulk.shared::cluster";
const PRODUCT: &str = "wgmma.mma_async";
const POLL: &str = "mbarrier.try_wait";

fn pipeline() -> Case {
    Case::new(PIPELINE).threads(160).descriptors()
}

/// A is ones: each thread leaves the sum of a row of all tiles, whose halves with odd numbers are 0.
#[test]
fn pipeline_in_every_schedule() {
    let word = |at: u32| f32::from_bits(at << 16);
    let row = |n: u32| {
        let words = (0..4).flat_map(|tile| (0..8).map(move |w| (tile, w / 4, w % 4)));
        words.map(|(tile, k, w)| word(64 * tile + 32 * k + 4 * n + w)).sum::<f32>()
    };
    let expected: Vec<u32> = (0..128).map(|thread| row(2 * (thread % 4)).to_bits()).collect();
    pipeline().leaves(&expected);
}

#[test]
fn pipeline_without_the_wait_for_a_full_buffer() {
    let case = pipeline().without("@!p bra FULL;");
    case.at(PRODUCT).at(COPY).reports_one_of(&[PendingWrite, PendingRead]);
}

#[test]
fn pipeline_without_the_wait_for_an_empty_buffer() {
    pipeline().without("@!p bra EMPTY;").at(COPY).reports_one_of(&[PendingWrite]);
}

#[test]
fn pipeline_that_releases_nothing() {
    let case = pipeline().without("@!q mbarrier.arrive.shared::cta.b64 _, [r2];");
    case.at(POLL).at("@!p bra").reports_at_one(Deadlock);
}

#[test]
fn pipeline_that_releases_before_the_product_is_complete() {
    let right = "wgmma.wait_group.sync.aligned 0;";
    let case = pipeline().plant(right, "wgmma.wait_group.sync.aligned 1;");
    // A warp that comes late may miss the phase altogether.
    case.reports_one_of(&[PendingRead, Deadlock]);
}

#[test]
fn pipeline_without_the_fence_of_the_initialisation() {
    let case = pipeline().without("fence.mbarrier_init.release.cluster;");
    case.at("mbarrier.init.shared::cta.b64 [r1]").at(COPY).is_forgiven(MissingProxyFence);
}

#[test]
fn pipeline_without_the_barrier_after_the_initialisation() {
    pipeline().without("bar.sync 0;").reports_one_of(&[Mbarrier, Race]);
}

#[test]
fn pipeline_without_a_wgmma_fence() {
    let case = pipeline().without("wgmma.fence.sync.aligned;").at(PRODUCT);
    case.reports(MissingWgmmaFence);
}

/// Four warps fill both operands, a quarter each, and multiply without a barrier between.
const OPERANDS: &str = "
    mov.u32 r0, 0x3f803f80;
    mov.u32 r1, tid;
    FILL:
    mad.lo.u32 r2, r1, 4, sh;
    st.shared.u32 [r2], r0;
    add.u32 r1, r1, 128;
    setp.lt.u32 p, r1, 576;
    @p bra FILL;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 p, r0, r0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 d2, tid, 4, out;
    st.global.f32 [d2], f0;";

/// A kernel of a warpgroup that multiplies once.
fn warpgroup(text: &str) -> Case {
    Case::new(text).threads(128).descriptors()
}

fn operands() -> Case {
    warpgroup(OPERANDS).at("st.shared.u32").at(PRODUCT)
}

#[test]
fn operands_that_only_the_wgmma_fences_order() {
    operands().without("bar.sync 0;").is_forgiven(Race);
}

#[test]
fn operands_by_all_warps_without_a_proxy_fence() {
    operands().without("fence.proxy.async.shared::cta;").reports(MissingProxyFence);
}

/// Each warp writes the rows of A that its own accumulators need, and waits for no other.
const OWN_ROWS: &str = "
    mov.u32 r0, 0x3f803f80;
    setp.lt.u32 q, tid, 16;
    @q st.shared.v4.u32 [quad+2048], {r0, r0, r0, r0};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    st.shared.v4.u32 [quad], {r0, r0, r0, r0};
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 p, r0, r0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 d2, tid, 4, out;
    st.global.f32 [d2], f0;";

#[test]
fn rows_of_a_warp_by_that_warp() {
    warpgroup(OWN_ROWS).leaves(&[16f32.to_bits(); 128]);
    let case = warpgroup(OWN_ROWS).without("bar.warp.sync -1;");
    case.at("st.shared.v4.u32 [quad]").at(PRODUCT).is_forgiven(Race);
}

/// B is read where A is.
#[test]
fn rows_of_a_warp_by_another() {
    let case = warpgroup(&OWN_ROWS.replace(
        "wgmma.fence",
        "-mov.b64 back, front;
        wgmma.fence",
    ));
    case.at("st.shared.v4.u32 [quad]").at(PRODUCT).is_forgiven(Race);
}

/// What a warp writes after it has issued a product is not in order before it, though a wgmma.fence
/// for the next one follows while other warps are still to issue the first.
#[test]
fn operand_rewritten_for_the_next_product() {
    let again = OPERANDS.replace(
        "wgmma.wait_group.sync.aligned 0;",
        "setp.eq.u32 q, warp, 0;
        -@q st.shared.u32 [sh], r0;
        fence.proxy.async.shared::cta;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, front, back, p, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;",
    );
    warpgroup(&again).lenient().reports_one_of(&[PendingRead, Race]);
}

/// Two warps take turns by two barriers; each arrives for its own first turn.
const TURNS: &str = "
    setp.ne.u32 p, lane, 0;
    @leader st.shared.u32 [sh], 0;
    bar.sync 0;
    add.u32 r0, warp, 1;
    sub.u32 r1, 2, warp;
    setp.eq.u32 q, warp, 0;
    @!q bra TURN;
    bar.arrive 1, 64;
    TURN:
    mov.u32 r2, 0;
    LOOP:
    bar.sync r0, 64;
    @!p ld.shared.u32 r3, [sh];
    @!p add.u32 r3, r3, 1;
    @!p st.shared.u32 [sh], r3;
    bar.arrive r1, 64;
    add.u32 r2, r2, 1;
    setp.lt.u32 q, r2, 3;
    @q bra LOOP;
    setp.eq.u32 q, warp, 0;
    @!q bra DONE;
    bar.sync 1, 64;
    DONE:";

fn turns() -> Case {
    Case::new(TURNS).threads(64)
}

#[test]
fn turns_without_an_arrival_for_the_first() {
    turns().without("bar.arrive 1, 64;").at("bar.sync r0").reports_at_one(Deadlock);
}

#[test]
fn turns_without_an_arrival_for_the_other() {
    turns().without("bar.arrive r1, 64;").at("bar.sync r0").reports_at_one(Deadlock);
}

#[test]
fn turns_that_nobody_waits_for() {
    turns().without("bar.sync r0, 64;").reports_one_of(&[Race]);
}

#[test]
fn turns_by_one_warp_too_many() {
    turns().plant("bar.arrive r1, 64;", "bar.arrive r1, 96;").reports_one_of(&[BarrierMismatch]);
}

/// Three warps store with the last: it arrives with them, stores, and waits at the same barrier; the
/// producer warp has ended long before.
const EPILOGUE: &str = "
    setp.eq.u32 p, warp, 0;
    @p bra DONE;
    sub.u32 r0, tid, 32;
    mad.lo.u32 r0, r0, 4, sh;
    st.shared.u32 [r0], tid;
    bar.arrive 1, 96;
    setp.eq.u32 p, warp, 1;
    @p bra DONE;
    bar.sync 1, 96;
    ld.shared.u32 r1, [r0-128];
    mad.wide.u32 d0, lane, 4, out;
    st.global.u32 [d0], r1;
    DONE:";

fn epilogue() -> Case {
    Case::new(EPILOGUE).threads(96)
}

#[test]
fn epilogue_without_the_arrival() {
    epilogue().without("bar.arrive 1, 96;").at("bar.sync").reports(Deadlock);
}

#[test]
fn epilogue_without_the_wait() {
    epilogue().without("bar.sync 1, 96;").at("st.shared").at("ld.shared").reports(Race);
}

#[test]
fn epilogue_for_warps_that_have_ended() {
    epilogue().plant("bar.sync 1, 96;", "bar.sync 2, 96;").at("bar.sync 2").reports(Deadlock);
}

/// Two blocks publish their mbarriers by the light-weight fence and a relaxed arrival; each thread 0
/// then writes to the other block and arrives there.
const CLUSTER: &str = "
    @!leader bra JOIN;
    mbarrier.init.shared::cta.b64 [mbar], 1;
    fence.mbarrier_init.release.cluster;
    JOIN:
    bar.warp.sync -1;
    barrier.cluster.arrive.relaxed.aligned;
    barrier.cluster.wait.aligned;
    xor.b32 r3, rank, 1;
    mapa.shared::cluster.u32 r4, mbar, r3;
    mapa.shared::cluster.u32 r5, sh, r3;
    @leader st.shared::cluster.u32 [r5], rank;
    @leader mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r4];
    WAIT:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [mbar], 0;
    @!p bra WAIT;
    ld.shared::cta.u32 r6, [sh];
    mad.wide.u32 d0, rank, 4, out;
    @leader st.global.u32 [d0], r6;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.acquire.aligned;";

fn cluster() -> Case {
    Case::new(CLUSTER).cluster(2)
}

#[test]
fn cluster_without_the_fence_of_the_initialisation() {
    cluster().without("fence.mbarrier_init.release.cluster;").reports_one_of(&[Race]);
}

#[test]
fn cluster_with_a_fence_of_the_block_only() {
    let case = cluster().plant("fence.mbarrier_init.release.cluster;", "fence.acq_rel.cta;");
    case.reports_one_of(&[Race]);
}

#[test]
fn cluster_with_a_fence_of_the_cluster() {
    let case = cluster().plant("fence.mbarrier_init.release.cluster;", "fence.acq_rel.cluster;");
    case.both_are_clean();
}

#[test]
fn cluster_that_does_not_wait_for_the_others_initialisation() {
    let case = cluster().without("barrier.cluster.wait.aligned;");
    case.reports_one_of(&[Mbarrier, Race, BarrierMismatch]);
}

#[test]
fn remote_arrival_that_releases_nothing() {
    let (right, wrong) = (
        "@leader mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r4];",
        "@leader mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [r4];",
    );
    let case = cluster().plant(right, wrong);
    case.at("@leader st.shared::cluster").at("ld.shared::cta").reports(Race);
}

#[test]
fn remote_arrival_left_out() {
    let right = "@leader mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r4];";
    cluster().without(right).at(POLL).at("@!p bra").reports_at_one(Deadlock);
}

/// Thread 0 of each block reads its word and releases it to the other block by the default form of
/// the arrival, which costs no memory barrier; the other then writes there.
const REMOTE_RELEASE: &str = "
    xor.b32 r3, rank, 1;
    mapa.shared::cluster.u32 r4, mbar, r3;
    mapa.shared::cluster.u32 r5, sh, r3;
    @leader mbarrier.init.shared::cta.b64 [mbar], 1;
    @leader st.shared.u32 [sh], rank;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    @!leader bra JOIN;
    ld.shared::cta.u32 r6, [sh];
    mbarrier.arrive.shared::cluster.b64 _, [r4];
    WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 p, [mbar], 0;
    @!p bra WAIT;
    st.shared::cluster.u32 [r5], rank;
    JOIN:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;";

#[test]
fn word_released_to_another_block() {
    let right = "mbarrier.arrive.shared::cluster.b64 _, [r4];";
    let case = Case::new(REMOTE_RELEASE).cluster(2).without(right);
    case.at(POLL).at("@!p bra").reports_at_one(Deadlock);
}

#[test]
fn word_of_another_block_that_is_not_waited_for() {
    let case = Case::new(REMOTE_RELEASE).cluster(2).without("@!p bra WAIT;");
    case.at("ld.shared::cta").at("st.shared::cluster").reports(Race);
}

/// The fence of the initialisation publishes nothing else.
#[test]
fn data_published_by_the_fence_of_the_initialisation() {
    let text = CLUSTER.replace(
        "fence.mbarrier_init",
        "-st.shared.u32 [sh], 7;
        fence.mbarrier_init",
    );
    let case = Case::new(&text).cluster(2);
    case.at("st.shared.u32 [sh]").at("@leader st.shared::cluster").reports(Race);
}

/// A warp stores a tile whole, every lane of it the same copy.
const STORE: &str = "
    st.shared.u32 [word], tid;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    cp.async.bulk.global.shared::cta.bulk_group [out], [sh], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    bar.warp.sync -1;
    st.shared.u32 [word], 0;";

const STORED: &str = "cp.async.bulk.global";

#[test]
fn store_by_all_lanes() {
    Case::new(STORE).says("32 lanes issue the same copy").at(STORED).warns(Repeated);
}

#[test]
fn store_by_all_lanes_without_a_proxy_fence() {
    let case = Case::new(STORE).without("fence.proxy.async.shared::cta;");
    case.at("st.shared.u32 [word], tid").at(STORED).reports(MissingProxyFence);
}

#[test]
fn store_by_all_lanes_whose_source_is_overwritten() {
    let right = "cp.async.bulk.wait_group.read 0;";
    let case = Case::new(STORE).plant(right, "cp.async.bulk.wait_group.read 1;");
    case.at(STORED).at("st.shared.u32 [word], 0").reports(PendingRead);
}

/// A reduction by all lanes is one for each.
#[test]
fn reduction_by_all_lanes() {
    let text = STORE.replace("cp.async.bulk.global", "cp.reduce.async.bulk.global");
    let text = text.replace("bulk_group [out]", "bulk_group.add.u32 [out]");
    let expected: Vec<u32> = (0..32).map(|lane| 32 * lane).collect();
    Case::new(&text).leaves(&expected);
}
