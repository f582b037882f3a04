//! `infini_attn._core`: the Python extension module. Shapes, policies and the state are checked by
//! the core; here arrays are borrowed, results allocated and errors translated.

mod attend;
mod backward;
mod batch;
mod buffer;
#[cfg(feature = "cuda")]
mod cuda;
mod delegate;
mod dlpack;
mod error;
mod float64;
mod keywords;
mod merge;
mod problem;
mod reference;
mod rope;
mod run;
mod state;
mod tensor;
mod threads;
mod torch;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::attend::infini_attention;
    #[pymodule_export]
    use crate::backward::_backward;
    #[pymodule_export]
    use crate::buffer::{
        _advance, _flush_slots, _host_layout, _reset_slots, _state_from_buffer, _state_into_buffer,
        _truncate_slot,
    };
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use crate::cuda::mirror::{_device_layout, DeviceState};
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use crate::cuda::plan::{_merge_partials_on, DevicePlan};
    #[pymodule_export]
    use crate::float64::{_advance_float64, _backward_float64, _row_len};
    #[pymodule_export]
    use crate::merge::{
        _key_sums_from_bytes, _segment_map_from_bytes, KeySums, SegmentMap, apply, compose,
        key_sums, merge_memories, merge_partials, segment_map,
    };
    #[pymodule_export]
    use crate::problem::{
        _call_problem, _problem_from_fields, _problem_from_text, _problem_text, Problem,
    };
    #[pymodule_export]
    use crate::reference::{ReferenceState, reference_infini_attention};
    #[pymodule_export]
    use crate::state::{_state_from_bytes, State};
    #[pymodule_export]
    use crate::threads::{get_num_threads, set_num_threads, simd_level};

    /// The first CUDA device, or what is missing for there to be one.
    #[pyfunction]
    fn _cuda_status() -> String {
        #[cfg(feature = "cuda")]
        return crate::cuda::status();
        #[cfg(not(feature = "cuda"))]
        return "not in this build (feature cuda)".into();
    }

    /// Most tokens of a sequence that a decode takes.
    #[pymodule_export]
    const MAX_DECODE_TOKENS: usize = infini_attn::MAX_DECODE_TOKENS;

    /// The package's version.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
