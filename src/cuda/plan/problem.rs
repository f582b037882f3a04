//! A problem as launch parameter.

use super::params::*;
use crate::problem::{Denominator, EmptyMemory, Problem, Update};

/// The problem as launch parameter. Every extent is at most 2^24.
pub(crate) fn problem_params(p: &Problem) -> InfiniProblem {
    let (denominator, epsilon) = match p.denominator() {
        Denominator::Exact => (INFINI_DENOMINATOR_EXACT, 0.0),
        Denominator::Clamp(epsilon) => (INFINI_DENOMINATOR_CLAMP, epsilon),
        Denominator::Add(epsilon) => (INFINI_DENOMINATOR_ADD, epsilon),
    };
    let scale_log2 = (p.scale().abs() * std::f64::consts::LOG2_E) as f32;
    InfiniProblem {
        key_dim: p.key_dim() as i32,
        value_dim: p.value_dim() as i32,
        heads: p.heads() as i32,
        kv_heads: p.kv_heads() as i32,
        group: p.group() as i32,
        segment_len: p.segment_len() as i32,
        delta: (p.update() == Update::Delta).into(),
        bypass: (p.empty_memory() == EmptyMemory::Bypass).into(),
        denominator: denominator as i32,
        epsilon,
        // The kernels multiply masked scores, −∞, by it: not 0, but what no finite score notices.
        scale_log2: scale_log2.max(f32::from_bits(1)),
        negative: (p.scale() < 0.0).into(),
    }
}
