"""States that PyTorch differentiates: their gradients, and what is done with them differentiably."""

import operator
from typing import Any, NamedTuple, TypeVar

import torch

from .. import _core
from . import _layout

Self = TypeVar("Self", bound="Tracked")


class StateGradient(NamedTuple):
    """The gradient of a loss with respect to a state: a tensor for each of the parts that have one."""

    memory: torch.Tensor
    normalizer: torch.Tensor
    open_k: torch.Tensor
    open_k_rotated: torch.Tensor | None
    open_v: torch.Tensor


class Tracked:
    """Of a state, what concerns gradients. `_tracked`, if it is not None, is the buffer's memory as
    float32, with the history by which PyTorch differentiates it."""

    buffer: torch.Tensor
    sequences: int
    rotation: bool
    _text: str
    _tracked: torch.Tensor | None

    @classmethod
    def _of_tracked(cls: Any, floats, text, sequences, rotation) -> Any:
        state = cls._of(floats.detach().view(torch.uint8), text, sequences, rotation)
        if floats.requires_grad:
            state._tracked = floats
        return state

    @classmethod
    def from_memory(
        cls: type[Self],
        problem: _core.Problem,
        memory: torch.Tensor,
        normalizer: torch.Tensor,
        *,
        tokens: int = 1,
        rotation: bool = True,
    ) -> Self:
        """Streams that begin with M, float32 [B, Hkv, Dk, Dv], and z, float32 [B, Hkv, Dk], as if `tokens`
        tokens had been committed to them. Copies, differentiably: M and z can be learned. On the CPU."""
        for name, given in (("memory", memory), ("normalizer", normalizer)):
            if not isinstance(given, torch.Tensor) or given.dim() == 0:
                raise TypeError(f"{name}: {type(given).__name__} given, a PyTorch tensor [B, ...] expected")
        tokens, b = operator.index(tokens), len(memory)
        if not 1 <= tokens <= 1 << 62:
            raise ValueError(f"tokens: {tokens} given, 1 to {1 << 62} expected")
        state: Any = cls(problem, b, rotation=rotation)  # type: ignore[call-arg]
        for name, given in (("memory", memory), ("normalizer", normalizer)):
            expected = list(getattr(state, name).shape)
            if list(given.shape) != expected:
                raise ValueError(f"{name}: shape {list(given.shape)} given, {expected} expected")
            if given.dtype != torch.float32 or given.device.type != "cpu":
                got = f"{given.dtype} on {given.device}"
                raise TypeError(f"{name}: {got} given, torch.float32 on cpu expected")
        state.counters[:, :2] = tokens
        rows = _layout.rows(state._floats(), *state._key())
        rows |= dict(memory=memory.reshape(b, -1), normalizer=normalizer.reshape(b, -1))
        return state._of_tracked(_layout.joined(rows), state._text, b, rotation)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients with respect to the state are computed."""
        return self._tracked is not None

    def requires_grad_(self: Self) -> Self:
        """Begins to record what is done with the state; `grad` is then its gradient. On the CPU."""
        if self.buffer.device.type != "cpu":
            raise ValueError(f"state: device {self.buffer.device} given, cpu expected of what is recorded")
        if self._tracked is None:
            self._tracked = self.buffer.detach().view(torch.float32).requires_grad_()
        return self

    def detach(self) -> Any:
        """The same state, its memory shared, as a constant: gradients end here."""
        state: Any = self
        return state._like(self.buffer)

    @property
    def grad(self) -> StateGradient | None:
        """After backward(), the gradient with respect to a state of which `requires_grad_()` was asked.
        Of the open segments' parts only the first open_len rows mean anything."""
        tracked = self._tracked
        grad = tracked.grad if tracked is not None and tracked.is_leaf else None
        if grad is None:
            return None
        parts = _layout.views(grad, self._text, self.sequences, self.rotation)
        return StateGradient(*(parts.get(name) for name in StateGradient._fields))  # type: ignore[arg-type]

    def _floats(self):
        return self.buffer.view(torch.float32) if self._tracked is None else self._tracked

    def _is_recorded(self):
        return self._tracked is not None and torch.is_grad_enabled()

    def _rows(self):
        return _layout.rows(self._floats(), self._text, self.sequences, self.rotation)

    def _check_constant(self, name):
        """Before a change in place, or another thing that has no gradient."""
        if self._is_recorded():
            raise ValueError(
                f"{name}: a state that requires grad given, one that does not expected (this has no "
                "gradient: use state.detach(), or torch.no_grad())"
            )

    def _changed(self):
        """After a change in place: the state does not depend any more on what it came from."""
        if self._tracked is not None and not self._tracked.is_leaf:
            self._tracked = None


def taken(state, chosen):
    """The streams chosen, differentiably."""
    rows = {name: row.index_select(0, chosen) for name, row in state._rows().items()}
    return state._of_tracked(_layout.joined(rows), state._text, len(chosen), state.rotation)


def concatenated(states):
    """All their streams, differentiably."""
    first, rotation = states[0], any(state.rotation for state in states)
    every = [state._rows() for state in states]
    names = max(every, key=len)
    # Room for rotated keys, where a state has none.
    missing = lambda name, rows: rows["memory"].new_zeros(len(rows["memory"]), names[name].shape[1])
    rows = {
        name: torch.cat([rows[name] if name in rows else missing(name, rows) for rows in every])
        for name in names
    }
    count = sum(state.sequences for state in states)
    return first._of_tracked(_layout.joined(rows), first._text, count, rotation)
