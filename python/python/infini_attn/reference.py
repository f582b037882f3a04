"""The operator in float64, the paper's equations line by line: slow, made to test against."""

from ._core import ReferenceState as State
from ._core import reference_infini_attention as infini_attention

__all__ = ["State", "infini_attention"]
