//! How far a backend may be from the float64 reference, as relative RMS.

use infini_attn::DType;

use super::cases::{Case, NORMAL};
use super::metric::{log_rms, relative_rms};

/// What a backend computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 arithmetic on exact inputs, outputs rounded once.
    F32,
    /// Products of 16-bit operands, f32 accumulators.
    TensorCore,
}

/// What a sequence's run leaves, in float64.
#[derive(Clone, Debug, Default)]
pub struct Results {
    /// o, a_dot, a_mem: [tokens, Hq, Dv].
    pub main: [Vec<f64>; 3],
    /// [tokens, Hq]
    pub lse: Vec<f64>,
    /// [Hkv, Dk, Dv]
    pub m: Vec<f64>,
    /// [Hkv, Dk]
    pub z: Vec<f64>,
}

/// Names of [`Results::main`].
pub const MAIN: [&str; 3] = ["o", "a_dot", "a_mem"];

/// Largest relative RMS per tensor.
#[derive(Clone, Copy, Debug)]
pub struct Tolerances {
    pub main: [f64; 3],
    pub lse: f64,
    pub m: f64,
    pub z: f64,
}

/// Of M, z and the log-sum-exp in f32 arithmetic.
pub const STATE_TOLERANCE: f64 = 1e-5;

/// z of a tensor-core backend against sums of the same rounded σ(k).
pub const ROUNDED_SUM_TOLERANCE: f64 = 1e-4;

/// Relative RMS of outputs on N(0, 1) inputs without rotation.
pub fn output_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1e-3,
        DType::BF16 => 4e-3,
        _ => 1e-5,
    }
}

impl Tolerances {
    /// For f32 arithmetic.
    pub fn exact(dtype: DType) -> Self {
        let t = STATE_TOLERANCE;
        Self { main: [output_tolerance(dtype); 3], lse: t, m: t, z: t }
    }

    /// Twice the error of the plain implementation of the same precision, and a rounding floor;
    /// where inputs are N(0, 1), absolute limits besides.
    pub fn tensor_core(case: &Case, committed: u64, want: &Results, plain: &Results) -> Self {
        let p = &case.problem;
        // Floors are a fifth of the type's unit roundoff: where few large rows make up the norm, the plain
        // implementation may be off by nothing.
        let (limit, limit_m, floor) = match p.dtype() {
            DType::F16 => (output_tolerance(DType::F16), 5e-4, 1e-4),
            _ => (output_tolerance(DType::BF16), 4e-3, 8e-4),
        };
        let normal = case.values == NORMAL;
        let error = |what: &str, got: &[f64], want: &[f64]| {
            let e = relative_rms(what, got, want, &[got.len()], f64::INFINITY);
            let e = e.unwrap_or_else(|e| panic!("{}: plain {e}", case.name));
            // A case whose result rounding destroys would let everything pass.
            assert!(e < 0.1, "{}: plain {what} is off by {e:.1e}", case.name);
            e
        };
        // What nobody asked for is not compared, and may be beyond f32.
        let asked = [true, case.asked.a_dot, case.asked.a_mem];
        let main = [0, 1, 2].map(|i| {
            if !asked[i] {
                return 0.0;
            }
            let t = 2.0 * error(MAIN[i], &plain.main[i], &want.main[i]) + floor;
            if normal && case.rope.is_none() { t.min(limit) } else { t }
        });
        let lse = match case.asked.lse {
            true => log_rms("lse", &plain.lse, &want.lse, &[want.lse.len()], f64::INFINITY),
            false => Ok(0.0),
        };
        let lse = lse.unwrap_or_else(|e| panic!("{}: plain {e}", case.name));
        let m = 2.0 * error("M", &plain.m, &want.m) + 1e-4;
        let z = 2.0 * error("z", &plain.z, &want.z) + 1e-4;
        Self {
            main,
            lse: 2.0 * lse + STATE_TOLERANCE,
            m: if normal { limit_m } else { m.max(limit_m) },
            // Rounding errors of σ(k) cancel in long sums only.
            z: if normal && committed >= 1024 { 1e-4 } else { z.max(1e-4) },
        }
    }
}
