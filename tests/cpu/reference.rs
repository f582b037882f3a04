//! The reference's batches, slots, splits and rotation against its own single, uncut streams.

use crate::common::backend::ReferenceBackend;
use crate::common::cases::cases;
use crate::common::driver::run_cases;
use infini_attn::DType;

#[test]
fn the_reference_does_not_depend_on_layout_or_split() {
    // f32 is enough: the reference widens every type to float64 first.
    let all: Vec<_> = cases().into_iter().filter(|c| c.problem.dtype() == DType::F32).collect();
    let summary = run_cases(&ReferenceBackend, &all).finish("reference");
    assert_eq!(summary.ran, all.len());
    // Only the outputs are rounded to f32; the state stays float64.
    for tensor in ["M", "z"] {
        let worst = &summary.worst[&(tensor, "f32".into())];
        assert!(worst.0 < 1e-11, "{tensor}: {worst:?}");
    }
}
