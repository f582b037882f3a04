//! Plans that make and reset states.

use crate::common::plans::{Step, base, problem, run};
use infini_attn::cuda::params::*;
use infini_attn::cuda::{Operand, StateLayout};

#[test]
fn states_begin_empty_with_scales_of_one() {
    let p = problem(|b| b);
    let layout = StateLayout::new(&p, 40_000, true).expect("supported");
    let steps = run(&layout.plan_init().expect("valid"));
    let at = base(Operand::State);
    assert_eq!(steps[0], Step::Fill { to: at, bytes: layout.bytes(), value: 0 });
    // 80 000 memories, 65 535 to a launch.
    let snapshots: Vec<InfiniSnapshot> = (steps[1..].iter())
        .map(|step| match step {
            Step::Launch { operation: "snapshot", params, .. } => {
                bytemuck::pod_read_unaligned(params)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let state = layout.params(at);
    let memories = 65_535;
    assert_eq!(snapshots.iter().map(|s| s.matrices).collect::<Vec<_>>(), [memories, 14_465]);
    let second = &snapshots[1];
    assert_eq!(second.memory - state.memory, memories as u64 * 64 * 128 * 4);
    assert_eq!(second.snapshot - state.snapshot, memories as u64 * 64 * 128 * 2);
    assert_eq!(second.snapshot_scale - state.snapshot_scale, memories as u64 * 4 * 4);

    let layout = StateLayout::new(&p, 5, false).expect("supported");
    assert_eq!(layout.params(at).open_k_rotated, 0, "no room for rotation");
    let steps = run(&layout.plan_reset(&[4, 1]).expect("valid"));
    let state = layout.params(at);
    let fills = |slot: u64| {
        [(state.memory, 2 * 64 * 128 * 4), (state.normalizer, 2 * 64 * 4), (state.counters, 32)]
            .map(|(part, bytes)| Step::Fill { to: part + slot * bytes, bytes, value: 0 })
    };
    assert_eq!(steps[..3], fills(4));
    assert_eq!(steps[4..7], fills(1));
    assert!(matches!(steps[3], Step::Launch { operation: "snapshot", grid: [4, 2, 1], .. }));
}
