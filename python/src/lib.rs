//! `infini_attn._core`: the Python extension module. Shapes, policies and the state are checked by
//! the core; here arrays are borrowed, results allocated and errors translated.

mod attend;
mod batch;
mod dlpack;
mod error;
mod merge;
mod problem;
mod reference;
mod rope;
mod state;
mod tensor;
mod threads;
mod torch;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::attend::infini_attention;
    #[pymodule_export]
    use crate::merge::{
        _key_sums_from_bytes, _segment_map_from_bytes, KeySums, SegmentMap, apply, compose,
        key_sums, merge_memories, merge_partials, segment_map,
    };
    #[pymodule_export]
    use crate::problem::{_problem_from_fields, Problem};
    #[pymodule_export]
    use crate::reference::{ReferenceState, reference_infini_attention};
    #[pymodule_export]
    use crate::state::{_state_from_bytes, State};
    #[pymodule_export]
    use crate::threads::{get_num_threads, set_num_threads, simd_level};

    /// The package's version.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
