"""The operator on float64 tensors of the CPU, by the reference: slow, and what `torch.autograd.gradcheck`
checks gradients with."""

import math
from typing import Any

import torch

from .. import _core
from . import _layout
from ._train import CALL, NAMES, TOKENS, define, gate, refuse

_ROWS = CALL.replace(", bool rotation", "")
SCHEMAS = {
    "prefill_float64": (
        f"({_ROWS}, SymInt? bptt_segments=None, {TOKENS})"
        " -> (Tensor o, Tensor lse, Tensor new_state, Tensor a_dot, Tensor a_mem)"
    ),
    "prefill_float64_backward": (
        f"({_ROWS}, Tensor? d_o, Tensor? d_lse, Tensor? d_state, Tensor? d_a_dot, Tensor? d_a_mem,"
        f" SymInt? bptt_segments=None, {TOKENS})"
        " -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_state)"
    ),
}


class Float64State:
    """What calls of float64 tensors return and take: one tensor `rows`, float64 [B, numbers of a stream],
    with PyTorch's history of it. Like `State` it stays as it is, and a call returns the next."""

    rows: torch.Tensor

    def __init__(self, rows: torch.Tensor, text: str):
        self.rows = rows
        self._text = text

    def _part(self, name):
        shapes = {part.name: part.shape for part in _layout.parts(self._text, False, "cpu")}
        at = 0 if name == "memory" else math.prod(shapes["memory"])
        return self.rows[:, at : at + math.prod(shapes[name])].unflatten(1, shapes[name])

    @property
    def problem(self) -> _core.Problem:
        """The problem this state belongs to (which knows no float64: it says f32)."""
        return _core._problem_from_text(self._text)

    @property
    def sequences(self) -> int:
        """Streams, B."""
        return self.rows.shape[0]

    @property
    def memory(self) -> torch.Tensor:
        """Compressive memory M, float64 [B, Hkv, Dk, Dv], a part of `rows`."""
        return self._part("memory")

    @property
    def normalizer(self) -> torch.Tensor:
        """Normaliser z, float64 [B, Hkv, Dk], a part of `rows`."""
        return self._part("normalizer")

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens each stream has seen: int64 [B], a copy."""
        return self.rows[:, -4].detach().long()

    @property
    def requires_grad(self) -> bool:
        """Whether gradients with respect to the state are computed."""
        return self.rows.requires_grad

    def detach(self) -> "Float64State":
        """The same state as a constant: gradients end here."""
        return Float64State(self.rows.detach(), self._text)


def prefill(q, k, v, beta, state, slots, problem, bptt_segments=None, *tokens):
    options = dict(zip(NAMES, tokens))
    return tuple(_core._advance_float64(q, k, v, beta, state, slots, problem, **options))


def fake_prefill(q, k, v, beta, state, slots, problem, bptt_segments=None, *tokens):
    out = lambda: q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]))
    return out(), lse, q.new_empty((slots, _core._row_len(problem))), out(), out()


def backward(
    q, k, v, beta, state, slots, problem, d_o, d_lse, d_state, d_a_dot, d_a_mem, bptt_segments=None, *tokens
):  # fmt: skip
    gradients = _core._backward_float64(
        q, k, v, beta, state, slots, problem, d_o, d_lse, d_state, d_a_dot, d_a_mem,
        bptt_segments=bptt_segments, **dict(zip(NAMES, tokens)),
    )  # fmt: skip
    return tuple(gradients)


def fake_backward(q, k, v, beta, state, slots, problem, *rest):
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty((slots, _core._row_len(problem)))


def _save(ctx, inputs, output):
    *tensors, ctx.slots, ctx.problem, ctx.bptt_segments = inputs[:8]
    *tokens, ctx.interleaved = inputs[8:]
    ctx.save_for_backward(*tensors, *tokens)
    ctx.set_materialize_grads(False)


def _gradients(ctx, *of_outputs):
    q, k, v, beta, state, *tokens = ctx.saved_tensors
    d_q, d_k, d_v, d_state = torch.ops.infini_attn.prefill_float64_backward(
        q, k, v, beta, state, ctx.slots, ctx.problem, *of_outputs, ctx.bptt_segments, *tokens,
        ctx.interleaved,
    )  # fmt: skip
    d_state = d_state if ctx.needs_input_grad[4] else None
    return d_q, d_k, d_v, None, d_state, *[None] * (3 + len(NAMES))


def register(library):
    """The two operators, in the library of the others."""
    define(library, "prefill_float64", SCHEMAS, prefill, fake_prefill, _gradients, _save)
    define(library, "prefill_float64_backward", SCHEMAS, backward, fake_backward, refuse)


def attend(q, k, v, beta, state, sequences, problem, bptt_segments, options) -> Any:
    """(out, state, lse, a_dot, a_mem).

    The operator computes what the memory gives (an open gate of float32); gates of float64, and their
    gradients, are PyTorch's.
    """
    heads = q.shape[-2]
    g = gate(beta, heads, torch.float64).sigmoid()[:, None]
    opened = torch.full((heads,), torch.inf)
    rows = None if state is None else state.rows
    # Of tokens that bypass an empty memory `from_memory` is the local branch.
    from_memory, lse, rows, a_dot, a_mem = torch.ops.infini_attn.prefill_float64(
        q, k, v, opened, rows, sequences, problem, bptt_segments, *options.values()
    )
    out = g * from_memory + (1 - g) * a_dot
    return out, Float64State(rows, problem), lse, a_dot, a_mem
