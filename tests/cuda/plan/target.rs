//! Plans for devices of compute capability 9.0: which kernels they choose, and the tensor maps that
//! these get.

use crate::common::plans::{Step, base, call, f32s, mirror, params, problem, run, tensor};
use crate::common::switches;
use infini_attn::cuda::params::{
    InfiniRotateKeys, InfiniSegmentAttention, InfiniSegmentState, InfiniState,
};
use infini_attn::cuda::{
    Arch, Call, DecodeOptions, DeviceRope, DeviceTensor, KeySumsMirror, Operand, Plan,
    PlannedLaunch, PrefillOptions, Target, TensorMap, plan_decode, plan_prefill, plan_segment,
    plan_segment_map,
};
use infini_attn::{DType, Problem, Update};

const TARGET: Target = Target { arch: Arch::Sm90, ..Target::DEFAULT };
const OPTIONS: PrefillOptions = PrefillOptions { workspace_bytes: 1 << 30, target: TARGET };
const D: usize = 128;
/// Segment length.
const N: usize = 128;

fn square(d: usize) -> Problem {
    problem(|b| b.key_dim(d).value_dim(d))
}

fn plan(p: &Problem, call: &Call<'_>, slots: usize) -> Plan {
    plan_prefill(p, call, &mirror(p, slots), &OPTIONS).expect("valid")
}

fn launch<'a>(plan: &'a Plan, operation: &str) -> PlannedLaunch<'a> {
    let mut launches = plan.launches();
    launches.find(|l| l.kernel.operation == operation).unwrap_or_else(|| panic!("{plan}"))
}

/// The maps of a run, addresses filled in.
fn maps(plan: &Plan, wanted: &str) -> Vec<TensorMap> {
    let of = |step| match step {
        Step::Launch { operation, maps, .. } if operation == wanted => Some(maps),
        _ => None,
    };
    run(plan).into_iter().find_map(of).unwrap_or_else(|| panic!("{plan}"))
}

/// The map of a dense array [batches, rows, heads, channels] in memory order `strides`, in elements.
fn map(data: u64, extents: [u64; 4], strides: [u64; 3], rows: u32) -> TensorMap {
    TensorMap { dtype: DType::BF16, data, extents, strides: strides.map(|s| 2 * s), rows }
}

/// A contiguous tensor of a call.
fn rows(operand: Operand, [b, t, h, d]: [u64; 4], rows: u32) -> TensorMap {
    let batch = if b > 1 { t * h * d } else { d };
    map(base(operand), [d, h, t, b], [d, h * d, batch], rows)
}

/// An array [batches][heads][rows][channels].
fn array(data: u64, [b, h, r, d]: [u64; 4], rows: u32) -> TensorMap {
    map(data, [d, h, r, b], [r * d, d, h * r * d], rows)
}

#[test]
fn new_kernels_are_chosen_where_there_are_any() {
    for d in [64, 128, 256] {
        let p = square(d);
        let plan = plan(&p, &call(&p, &[1, 300]), 1);
        let archs: Vec<_> = plan.launches().map(|l| (l.kernel.operation, l.kernel.arch)).collect();
        let expected = [
            ("segment_state", Arch::Sm90),
            ("normaliser_scan", Arch::Sm90),
            ("segment_transition", Arch::Sm90),
            ("memory_scan", Arch::Sm90),
            ("segment_attention", Arch::Sm90),
            ("append", Arch::Sm80),
        ];
        assert_eq!(archs, expected, "{plan}");
        let text = plan.to_string();
        assert!(text.contains("\nkernels: sm90 where there are any, sm80 otherwise"), "{text}");
        assert!(!text.contains("portable"), "{text}");
        for launch in plan.launches() {
            let scan = launch.kernel.operation.ends_with("_scan");
            assert_eq!(launch.maps.is_empty(), scan || launch.kernel.arch == Arch::Sm80);
            let pairs = launch.kernel.operation == "segment_attention";
            assert_eq!(launch.cluster, 1 + u32::from(pairs));
        }
    }
}

/// Launches that begin while the one before ends: those whose kernels wait for it, behind a kernel.
#[test]
fn memory_phases_begin_early_if_the_target_wants_it() {
    let early = |arch, early, tokens: &[usize]| -> Vec<&'static str> {
        let p = square(D);
        let options = PrefillOptions { target: Target { arch, early, ..TARGET }, ..OPTIONS };
        let plan = plan_prefill(&p, &call(&p, tokens), &mirror(&p, 1), &options).expect("valid");
        let early = plan.launches().filter(|l| l.early);
        early
            .inspect(|l| assert!(l.why.ends_with("; begins early")))
            .map(|l| l.kernel.operation)
            .collect()
    };
    let phases = ["normaliser_scan", "segment_transition", "memory_scan"];
    assert_eq!(early(Arch::Sm90, true, &[1, 300]), phases);
    assert_eq!(early(Arch::Sm90, false, &[1, 300]), [""; 0]);
    assert_eq!(early(Arch::Sm80, true, &[1, 300]), [""; 0]);
    // No segment is completed: the first launch of all.
    assert_eq!(early(Arch::Sm90, true, &[1, 5]), phases[2..]);
}

#[test]
fn other_devices_get_portable_kernels() {
    let p = square(D);
    let target = Target { arch: Arch::Sm80, ..TARGET };
    let options = PrefillOptions { target, ..OPTIONS };
    let plan = plan_prefill(&p, &call(&p, &[1, 300]), &mirror(&p, 1), &options).expect("valid");
    assert!(plan.launches().all(|l| l.kernel.arch == Arch::Sm80 && l.maps.is_empty()), "{plan}");
    let text = plan.to_string();
    assert!(text.contains("\nkernels: sm80, for every device") && !text.contains("portable"));
}

#[test]
fn other_dimensions_get_portable_kernels() {
    let state = "segments completed: 2 of 3; parts: 1, of 128 tokens";
    for (dk, dv, reason) in [(96, 96, "d = 96"), (64, 128, "Dk = 64, Dv = 128")] {
        let p = problem(|b| b.key_dim(dk).value_dim(dv).update(Update::Linear));
        let plan = plan(&p, &call(&p, &[1, 300]), 1);
        let mut others = plan.launches().filter(|l| !l.kernel.operation.ends_with("_scan"));
        assert!(others.all(|l| l.kernel.arch == Arch::Sm80), "{plan}");
        let why = launch(&plan, "segment_state").why;
        assert_eq!(why, format!("{state}; portable: no sm90 kernel for {reason}"));
    }
    // Each kernel by its own dimensions.
    let p = problem(|b| b.key_dim(128).value_dim(64));
    let plan = plan(&p, &call(&p, &[1, 300]), 1);
    assert_eq!(launch(&plan, "segment_transition").kernel.arch, Arch::Sm90);
    assert_eq!(launch(&plan, "segment_attention").kernel.arch, Arch::Sm80);
}

#[test]
fn tensors_that_copies_do_not_reach_get_portable_kernels() {
    let p = square(D);
    let width = 2 * D as i64;
    let reversed = |heads: i64| {
        let strides = [0, -heads * D as i64, D as i64, 1];
        DeviceTensor::strided(p.dtype(), &[1, 300, heads as usize, D], &strides).expect("valid")
    };
    let wide = |token: i64, head: i64| {
        let shape = [1, 300, 2, D];
        DeviceTensor::strided(p.dtype(), &shape, &[0, token, head, 1]).expect("valid")
    };
    let (q, kv) = (tensor(&p, &[1, 300], 4, D), tensor(&p, &[1, 300], 2, D));
    let attention = |q, k, v, o| {
        let plan = plan(&p, &Call::new(q, k, v, f32s(&[4]), o), 1);
        let reasons = ["segment_state", "segment_transition", "segment_attention"].map(|name| {
            let launch = launch(&plan, name);
            assert_eq!(launch.kernel.arch == Arch::Sm80, launch.why.contains("portable"));
            launch.why.split_once("; portable: ").map(|(_, reason)| reason.to_owned())
        });
        reasons.map(Option::unwrap_or_default)
    };
    assert_eq!(attention(q, kv, kv, q), ["", "", ""]);
    let q_reversed = "q has a negative stride";
    assert_eq!(attention(reversed(4), kv, kv, q), ["", "", q_reversed]);
    assert_eq!(attention(q, kv, kv, reversed(4)), ["", "", "o has a negative stride"]);
    let far = "k has a stride of 2^40 bytes or more";
    assert_eq!(attention(q, wide(1 << 39, D as i64), kv, q), [far; 3]);
    assert_eq!(attention(q, wide((1 << 39) - 8, D as i64), kv, q), ["", "", ""]);
    let shared = "v has a stride of 0";
    assert_eq!(attention(q, kv, wide(width, 0), q), [shared, "", shared]);
}

#[test]
fn maps_of_a_call() {
    let p = square(D);
    let c = call(&p, &[2, 300]).slots(&[2, 0]);
    let plan = plan(&p, &c, 3);
    let launch: InfiniSegmentAttention = params(&plan, "segment_attention", 0);
    let (d, n) = (D as u64, N as u64);
    let q = rows(Operand::Q, [2, 300, 4, d], 64);
    // A warp sends its own rows.
    let o = rows(Operand::O, [2, 300, 4, d], 16);
    let keys = |rows_of_box| {
        let InfiniState { open_k, open_v, .. } = launch.state;
        [
            rows(Operand::K, [2, 300, 2, d], rows_of_box),
            rows(Operand::V, [2, 300, 2, d], rows_of_box),
            array(open_k, [3, 2, n, d], rows_of_box),
            array(open_v, [3, 2, n, d], rows_of_box),
        ]
    };
    // Of a pair of blocks each brings half.
    let [k, v, open_k, open_v] = keys(64);
    let snapshot = array(launch.snapshot, [6, 2, d, d], 64);
    let expected = [q, k, v, open_k, open_v, snapshot, o, o, o];
    assert_eq!(maps(&plan, "segment_attention"), expected);
    assert_eq!(maps(&plan, "segment_state"), keys(64));
    let [k, _, open_k, _] = keys(64);
    assert_eq!(maps(&plan, "segment_transition"), [k, open_k]);
    assert_eq!(launch.state.slots, 3);
}

#[test]
fn maps_of_a_packed_call_with_rotation_and_all_outputs() {
    let p = square(256);
    let branch = tensor(&p, &[300], 4, 256);
    let rope = DeviceRope::new(f32s(&[512, 16]), f32s(&[512, 16]));
    let c = call(&p, &[300]).cu_seqlens(&[0, 150, 300]).rope(rope).a_dot(branch).a_mem(branch);
    let plan = plan(&p, &c, 2);
    let launch: InfiniSegmentAttention = params(&plan, "segment_attention", 0);
    let (pieces, n) = (4, N as u64);
    let expected = [
        rows(Operand::Q, [1, 300, 4, 256], 64),
        array(launch.rotated, [pieces, 2, n, 256], 32),
        rows(Operand::V, [1, 300, 2, 256], 32),
        array(launch.state.open_k_rotated, [2, 2, n, 256], 32),
        array(launch.state.open_v, [2, 2, n, 256], 32),
        array(launch.snapshot, [pieces, 2, 256, 256], 32),
        rows(Operand::O, [1, 300, 4, 256], 16),
        rows(Operand::ADot, [1, 300, 4, 256], 16),
        rows(Operand::AMem, [1, 300, 4, 256], 16),
    ];
    assert_eq!(maps(&plan, "segment_attention"), expected);
    // Memories are made of unrotated keys.
    let state: InfiniSegmentState = params(&plan, "segment_state", 0);
    let keys = maps(&plan, "segment_state");
    assert_eq!((keys[0].data, keys[2].data), (state.k.data, state.state.open_k));
}

#[test]
fn rotated_keys_are_padded_to_what_attention_reads_at_a_time() {
    let rotation = |d, target| {
        let p = square(d);
        let rope = DeviceRope::new(f32s(&[512, 16]), f32s(&[512, 16]));
        let (call, options) =
            (call(&p, &[1, 100]).rope(rope), PrefillOptions { target, ..OPTIONS });
        let plan = plan_prefill(&p, &call, &mirror(&p, 1), &options).expect("valid");
        let block = params::<InfiniRotateKeys>(&plan, "rotate_keys", 0).block;
        (block, launch(&plan, "rotate_keys").grid[0])
    };
    let portable = Target { arch: Arch::Sm80, ..TARGET };
    // A block of eight rows each.
    assert_eq!([64, 128, 256].map(|d| rotation(d, TARGET)), [(128, 16), (128, 16), (64, 16)]);
    assert_eq!(rotation(96, TARGET), (1, 13));
    assert_eq!(rotation(128, portable), (1, 13));
}

#[test]
fn boxes_of_snapshots_have_no_more_rows_than_these() {
    let p = square(64);
    let plan = plan(&p, &call(&p, &[1, 300]), 1);
    let maps = launch(&plan, "segment_attention").maps;
    let rows: Vec<u32> = maps.iter().map(|map| map.rows).collect();
    // Of a pair of blocks that share them each brings half.
    assert_eq!(rows, [64, 64, 64, 64, 64, 32, 16, 16, 16]);
}

#[test]
fn without_a_state_keys_and_values_stand_in_for_open_segments() {
    let p = square(D);
    let kv = tensor(&p, &[2, 300], 2, D);
    let before = KeySumsMirror::zero(&p, 2);
    let plan = plan_segment_map(&p, &kv, &kv, &before, &OPTIONS).expect("valid").0;
    let k = launch(&plan, "segment_state").maps;
    assert_eq!(k.len(), 4);
    assert_eq!((k[0], k[1]), (k[2], k[3]));
    assert_eq!((k[0].extents, k[0].rows), ([D as u64, 2, 300, 2], 64));
    let k = launch(&plan, "segment_transition").maps;
    assert!(k.len() == 2 && k[0] == k[1], "{k:?}");
}

#[test]
fn persistent_blocks_are_as_many_as_find_work() {
    let p = square(D);
    let blocks = |tokens, multiprocessors| {
        let target = Target { multiprocessors, ..TARGET };
        let options = PrefillOptions { target, ..OPTIONS };
        let call = call(&p, &[1, tokens]);
        let plan = plan_prefill(&p, &call, &mirror(&p, 1), &options).expect("valid");
        let tiles = params::<InfiniSegmentAttention>(&plan, "segment_attention", 0).tiles;
        (tiles, launch(&plan, "segment_attention").grid)
    };
    assert_eq!(blocks(300, 132), (1, [3 * 4, 1, 1]));
    // In pairs.
    assert_eq!(blocks(300, 5), (1, [4, 1, 1]));
    assert_eq!(blocks(300, 1), (1, [2, 1, 1]));
}

/// A cluster that the device does not hold beside the others would run after all of them.
#[test]
fn no_more_clusters_are_launched_than_the_device_holds() {
    let p = square(D);
    let attention = |pairs| {
        let options = PrefillOptions { target: Target { pairs, ..TARGET }, ..OPTIONS };
        let call = call(&p, &[1, 3000]);
        let plan = plan_prefill(&p, &call, &mirror(&p, 1), &options).expect("valid");
        let launched = launch(&plan, "segment_attention");
        (launched.grid[0], launched.cluster)
    };
    assert_eq!(attention(66), (3000_u32.div_ceil(128) * 4, 2));
    assert_eq!(attention(5), (10, 2));
    assert_eq!(attention(usize::MAX), (3000_u32.div_ceil(128) * 4, 2));
    assert_eq!(attention(0), (3000_u32.div_ceil(128) * 4, 1));
}

#[test]
fn neighbouring_heads_of_a_group_share_what_they_load() {
    for (heads, kv_heads, cluster) in [(4, 2, 2), (4, 1, 2), (3, 1, 1), (2, 2, 1)] {
        let p = problem(|b| b.key_dim(D).value_dim(D).heads(heads).kv_heads(kv_heads));
        let plan = plan(&p, &call(&p, &[1, 300]), 1);
        let attention = launch(&plan, "segment_attention");
        let shared_by = params::<InfiniSegmentAttention>(&plan, "segment_attention", 0).shared_by;
        assert_eq!((attention.cluster, shared_by), (cluster as u32, cluster));
        assert_eq!(attention.maps[1].rows, 128 / cluster as u32);
        // Unless the target has each block load its own.
        let options = PrefillOptions { target: Target { shared_by: 1, ..TARGET }, ..OPTIONS };
        let plan = plan_prefill(&p, &call(&p, &[1, 300]), &mirror(&p, 1), &options).expect("valid");
        let attention = launch(&plan, "segment_attention");
        assert_eq!((attention.cluster, attention.maps[1].rows), (1, 128));
    }
}

#[test]
fn a_cluster_has_a_head_of_a_segment_where_it_fills_the_device() {
    let p = problem(|b| b.key_dim(D).value_dim(D).segment_len(2048));
    let segment = |p: &Problem, target: &Target| {
        plan_segment(p, &call(p, &[1, 100]), &mirror(p, 1), target).expect("valid")
    };
    let full = Target { multiprocessors: 40, ..TARGET };
    let plan = segment(&p, &full);
    let launched = launch(&plan, "segment");
    assert_eq!(launched.kernel.arch, Arch::Sm90);
    assert_eq!((launched.grid, launched.cluster, launched.maps.len()), ([2 * 8, 1, 1], 8, 11));
    assert_eq!(plan.workspace_bytes(), 0);
    let plan = segment(&p, &Target { multiprocessors: 41, ..TARGET });
    let launched = launch(&plan, "segment");
    assert_eq!((launched.kernel.arch, launched.cluster), (Arch::Sm80, 1));
    let reason = "portable: 16 blocks per sequence for 41 multiprocessors";
    assert!(launched.why.contains(reason), "{}", launched.why);
    let plan = segment(&p, &Target { segment_fill: 39, multiprocessors: 41, ..TARGET });
    assert_eq!(launch(&plan, "segment").kernel.arch, Arch::Sm90);
    let plan = segment(&p, &Target { cluster_blocks: 7, ..full });
    let reason = "portable: clusters of 8 blocks, the device holds 7 at most";
    assert!(launch(&plan, "segment").why.contains(reason), "{plan}");
    let plan = segment(&p, &Target { segment_fill: usize::MAX, ..full });
    assert_eq!(launch(&plan, "segment").kernel.arch, Arch::Sm80);
    let narrow = problem(|b| b.key_dim(96).value_dim(96));
    let plan = segment(&narrow, &full);
    assert!(launch(&plan, "segment").why.contains("no sm90 kernel for d = 96"), "{plan}");
}

#[test]
fn as_many_pieces_run_together_as_stay_in_l2() {
    let group = |n, change: fn(infini_attn::ProblemBuilder) -> infini_attn::ProblemBuilder| {
        let p = problem(|b| change(b.key_dim(D).value_dim(D).segment_len(n)));
        let plan = plan(&p, &call(&p, &[1, 9 * n]), 1);
        params::<InfiniSegmentAttention>(&plan, "segment_attention", 0).piece_group
    };
    // Of 2 heads, keys and values of 512 bytes a token; 16 MiB in all.
    assert_eq!(group(2048, |b| b), 8);
    assert_eq!(group(2048, |b| b.heads(8).kv_heads(8)), 2);
    assert_eq!(group(3000, |b| b), 5);
    assert_eq!(group(40_000, |b| b), 1);
    assert_eq!(group(1, |b| b), 9, "no more than there are");
    let p = problem(|b| b.key_dim(D).value_dim(D).segment_len(2048));
    let options = PrefillOptions { target: Target { l2_bytes: 4 << 20, ..TARGET }, ..OPTIONS };
    let plan = plan_prefill(&p, &call(&p, &[1, 4096]), &mirror(&p, 1), &options).expect("valid");
    assert_eq!(params::<InfiniSegmentAttention>(&plan, "segment_attention", 0).piece_group, 2);
}

#[test]
fn targets_that_cannot_be_are_refused() {
    let p = square(D);
    for (target, expected) in [
        (Target { multiprocessors: 0, ..TARGET }, "target.multiprocessors: 0 given, 1 or more"),
        (Target { l2_bytes: 0, ..TARGET }, "target.l2_bytes: 0 given, 1 or more"),
        (Target { split_len: 0, ..TARGET }, "target.split_len: 0 given, 1 or more"),
        (Target { shared_by: 3, ..TARGET }, "target.shared_by: 3 given, 1 or 2"),
    ] {
        let call = call(&p, &[1, 1]);
        let options = PrefillOptions { target, ..OPTIONS };
        let decode = DecodeOptions { target, ..DecodeOptions::default() };
        for plan in [
            plan_prefill(&p, &call, &mirror(&p, 1), &options),
            plan_segment(&p, &call, &mirror(&p, 1), &target),
            plan_decode(&p, &call, &mirror(&p, 1), &decode),
        ] {
            let error = plan.expect_err("refused").to_string();
            assert_eq!(error, format!("{expected} expected"));
        }
    }
}

/// `INFINI_TARGET` of the device tests and the benchmarks.
#[test]
fn switches_change_a_target() {
    let text = "arch=sm80,multiprocessors=7,pairs=2,cluster_blocks=4,shared_by=1,l2_bytes=9,\
                split_len=512,segment_fill=30,early=1";
    let changed = Target {
        arch: Arch::Sm80,
        multiprocessors: 7,
        pairs: 2,
        cluster_blocks: 4,
        shared_by: 1,
        l2_bytes: 9,
        split_len: 512,
        segment_fill: 30,
        early: true,
    };
    assert_eq!(switches::target(TARGET, text).expect("known"), changed);
    let one = switches::target(TARGET, "split_len=64").expect("known");
    assert_eq!(one, Target { split_len: 64, ..TARGET });
    for wrong in ["", "arch", "arch=sm70", "grid=3", "shared_by=two", "shared_by=1,,", "early=2"] {
        let error = switches::target(TARGET, wrong).expect_err(wrong).to_string();
        assert!(error.starts_with("INFINI_TARGET: "), "{error}");
    }
}
