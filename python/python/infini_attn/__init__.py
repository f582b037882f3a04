"""Infini-attention: compressive-memory attention over unbounded context in constant memory.

The operator is `infini_attention`; what it carries from call to call is a `State`. `reference` has
the same operator in float64.
"""

from . import _core, reference
from ._core import (
    KeySums,
    Problem,
    SegmentMap,
    State,
    __version__,
    apply,
    compose,
    get_num_threads,
    infini_attention,
    key_sums,
    merge_memories,
    merge_partials,
    segment_map,
    set_num_threads,
)

# What pickles of this package call, for `torch.serialization.add_safe_globals`: with it
# `torch.load(weights_only=True)` takes states, problems, key sums and segment maps.
SAFE_GLOBALS = [
    _core._key_sums_from_bytes,
    _core._problem_from_fields,
    _core._segment_map_from_bytes,
    _core._state_from_bytes,
]

__all__ = [
    "KeySums",
    "Problem",
    "SAFE_GLOBALS",
    "SegmentMap",
    "State",
    "__version__",
    "apply",
    "compose",
    "get_num_threads",
    "infini_attention",
    "key_sums",
    "merge_memories",
    "merge_partials",
    "reference",
    "segment_map",
    "set_num_threads",
]
