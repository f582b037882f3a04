"""The operators on tensors in CPU memory: each as its schema in `ops.py`."""

import torch

from .. import _core
from . import _layout


def prefill(q, k, v, beta, state, slots, problem, rotation, **options):
    if state is None:
        state = _layout.empty(problem, slots, rotation, torch.device("cpu"))
    else:
        state = state.clone()
    options["inplace"] = False
    o, lse, *parts = _core._advance(q, k, v, beta, state, slots, problem, rotation, **options)
    return o, lse, state, *parts


def prefill_(q, k, v, beta, state, slots, problem, rotation, **options):
    results = _core._advance(q, k, v, beta, state, slots, problem, rotation, **options)
    _written(state)
    return results


def decode_(q, k, v, beta, state, slots, problem, rotation, **options):
    return prefill_(q, k, v, beta, state, slots, problem, rotation, short=True, **options)


def flush_(state, slots, problem, rotation, *, seq_slots=None):
    _core._flush_slots(state, slots, problem, rotation, seq_slots)
    _written(state)


def reset_(state, slots, problem, rotation, *, seq_slots=None):
    _core._reset_slots(state, slots, problem, rotation, seq_slots)
    _written(state)


def truncate_(state, slots, problem, rotation, slot, tokens):
    _core._truncate_slot(state, slots, problem, rotation, slot, tokens)
    _written(state)


def _written(state):
    """Tells PyTorch, which saves tensors for gradients."""
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)


def merge_partials(a_dot, lse):
    return _core.merge_partials(a_dot, lse, return_lse=True)
