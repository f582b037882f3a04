"""Infini-attention as operators of PyTorch, with states that are tensors."""

from . import ops
from ._float64 import Float64State
from .operator import BatchInfiniAttention, chunk_infini_attention, infini_attention
from .state import State, _state_of

# What pickles of states call, for `torch.serialization.add_safe_globals`.
SAFE_GLOBALS = [_state_of]

__all__ = [
    "BatchInfiniAttention",
    "Float64State",
    "SAFE_GLOBALS",
    "State",
    "chunk_infini_attention",
    "infini_attention",
    "ops",
]
