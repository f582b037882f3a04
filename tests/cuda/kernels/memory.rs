//! The kernels that write the memory, in the simulator, against plain f64 sums: the phases of
//! prefill and the commit of open segments.

mod commit;
mod fixture;
mod launches;
mod model;
mod prefill;

use infini_attn::DType;
use infini_attn::cuda::params::{
    INFINI_DENOMINATOR_ADD, INFINI_DENOMINATOR_CLAMP, INFINI_DENOMINATOR_EXACT,
};
use model::Policy;

/// Head dimensions that the kernels are compiled for.
const DIMS: [(usize, usize); 8] =
    [(32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (64, 128), (128, 64), (192, 128)];

const EXACT: Policy = Policy { kind: INFINI_DENOMINATOR_EXACT, epsilon: 0.0 };

/// All policies, with thresholds that matter at the tests' scale.
const POLICIES: [Policy; 3] = [
    EXACT,
    Policy { kind: INFINI_DENOMINATOR_CLAMP, epsilon: 9000.0 },
    Policy { kind: INFINI_DENOMINATOR_ADD, epsilon: 3000.0 },
];

/// Mean and deviation of keys, and of values, far from what normal ones are.
const SIZES: [((f32, f32), (f32, f32)); 4] = [
    ((-6.0, 0.7), (0.1, 1.0)),
    ((0.0, 40.0), (0.0, 1.0)),
    ((0.0, 1.0), (0.0, 1e-4)),
    ((0.0, 1.0), (10.0, 3000.0)),
];

/// Relative RMS error that M may have.
fn memory_tolerance(dtype: DType) -> f64 {
    if dtype == DType::F16 { 5e-4 } else { 4e-3 }
}
