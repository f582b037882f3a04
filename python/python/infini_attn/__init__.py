"""Infini-attention: compressive-memory attention over unbounded context in constant memory.

The operator is `infini_attention`; what it carries from call to call is a `State`. `reference` has
the same operator in float64.
"""

from . import reference
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

__all__ = [
    "KeySums",
    "Problem",
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
