"""The state of streams in one tensor."""

import operator
import os
from collections.abc import Iterable
from typing import Any

import torch

from .. import _core
from . import _layout, _tracked, ops  # noqa: F401 (the operators are registered)

_problems: dict[str, _core.Problem] = {}


class State(_tracked.Tracked):
    """The state of B independent streams in one tensor, on the CPU or a GPU.

    State(problem, sequences=1) starts that many empty streams. All of it lies in `buffer`, a tensor of
    bytes; `memory`, `normalizer`, `open_k`, `open_k_rotated`, `open_v` and `counters` are parts of it
    that can be read and written. What PyTorch does with tensors it does with a state: move, copy, index,
    save, capture in a graph, register as a buffer of a module (`from_buffer` makes a state of it again).

    Other than with `infini_attn.State`, a copy is a copy of all its bytes.

    Parameters
    ----------
    problem : Problem
    sequences : int
        Streams, B.
    device
        Where the buffer is made, "cpu" by default.
    rotation : bool
        Room for rotated keys, which calls with rope need.
    """

    def __init__(
        self, problem: _core.Problem, sequences: int = 1, *, device: Any = "cpu", rotation: bool = True
    ):
        device, sequences = torch.device(device), operator.index(sequences)
        text = _core._problem_text(problem)
        # What is no number of streams, and what memory does not hold, is refused there.
        problem.state_bytes(sequences, rotation=rotation)
        self._hold(_empty(text, sequences, rotation, device), text, sequences, rotation)

    def _hold(self, buffer, text, sequences, rotation):
        self.buffer = buffer
        self.sequences = sequences
        self.rotation = rotation
        self._text = text
        self._tracked = None

    @classmethod
    def _of(cls, buffer, text, sequences, rotation):
        state = cls.__new__(cls)
        state._hold(buffer, text, sequences, rotation)
        return state

    def _like(self, buffer, sequences=None):
        return State._of(
            buffer, self._text, self.sequences if sequences is None else sequences, self.rotation
        )

    @staticmethod
    def from_buffer(
        buffer: torch.Tensor, problem: _core.Problem, sequences: int = 1, *, rotation: bool = True
    ) -> "State":
        """The state that lies in a buffer made by a State of the same arguments; shares its memory."""
        text, sequences = _core._problem_text(problem), operator.index(sequences)
        expected = [_layout.total(text, sequences, rotation, buffer.device.type)]
        if buffer.dtype != torch.uint8:
            raise TypeError(f"buffer: dtype {buffer.dtype} given, torch.uint8 expected")
        if list(buffer.shape) != expected or not buffer.is_contiguous():
            raise ValueError(
                f"buffer: shape {list(buffer.shape)} given, {expected} (contiguous) expected"
            )
        return State._of(buffer, text, sequences, rotation)

    @staticmethod
    def from_state(state: _core.State, *, device: Any = "cpu", rotation: bool = True) -> "State":
        """A copy of an `infini_attn.State`."""
        if not isinstance(state, _core.State):
            raise TypeError(f"state: {type(state).__name__} given, an infini_attn.State expected")
        copy = State(state.problem, state.sequences, device=device, rotation=rotation)
        if copy._on_cuda():
            _cuda().from_host(copy._key(), copy.buffer, state)
        else:
            _core._state_into_buffer(state, copy.buffer, copy.sequences, copy._text, rotation)
        return copy

    def to_state(self) -> _core.State:
        """A copy as an `infini_attn.State`."""
        if self._on_cuda():
            return _cuda().to_host(self._key(), self.buffer)
        here = self.cpu()
        return _core._state_from_buffer(here.buffer, here.sequences, here._text, here.rotation)

    @property
    def problem(self) -> _core.Problem:
        """The problem this state belongs to."""
        if self._text not in _problems:
            _problems[self._text] = _core._problem_from_text(self._text)
        return _problems[self._text]

    def _parts(self):
        parts = _layout.views(self.buffer, self._text, self.sequences, self.rotation)
        if self._tracked is not None:
            parts |= _layout.views(self._tracked, self._text, self.sequences, self.rotation)
        return parts

    @property
    def memory(self) -> torch.Tensor:
        """Compressive memory M, float32 [B, Hkv, Dk, Dv]."""
        return self._parts()["memory"]

    @property
    def normalizer(self) -> torch.Tensor:
        """Normaliser z, float32 [B, Hkv, Dk]."""
        return self._parts()["normalizer"]

    @property
    def open_k(self) -> torch.Tensor:
        """Keys of the open segments; on the CPU float32 [B, Hkv, blocks, Dk, width], key j in column j %
        width of block j // width."""
        return self._parts()["open_k"]

    @property
    def open_k_rotated(self) -> torch.Tensor | None:
        """The same keys rotated, or None without room for them."""
        return self._parts().get("open_k_rotated")

    @property
    def open_v(self) -> torch.Tensor:
        """Values of the open segments; on the CPU float32 [B, Hkv, N, Dv]."""
        return self._parts()["open_v"]

    @property
    def counters(self) -> torch.Tensor:
        """On the CPU int64 [B, 4]: tokens, committed, open_len, and whether the open segment is rotated.
        A slot whose counters are 0 must have memory and normalizer of zeros."""
        if self._on_cuda():
            _cuda().forget(self.buffer)
        return self._parts()["counters"]

    def _counts(self):
        if self.buffer.device.type != "cuda":
            return self._parts()["counters"]
        return _cuda().counts(self._key(), self.buffer)

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens each stream has seen: int64 [B] on the CPU, a copy; likewise below."""
        return self._counts()[:, 0].cpu().clone()

    @property
    def committed(self) -> torch.Tensor:
        """Tokens each stream has written into the memory."""
        return self._counts()[:, 1].cpu().clone()

    @property
    def open_len(self) -> torch.Tensor:
        """Tokens in each stream's open segment."""
        return self._counts()[:, 2].cpu().clone()

    @property
    def position(self) -> torch.Tensor:
        """Default position of each stream's next token (= tokens)."""
        return self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.nbytes

    @property
    def device(self) -> torch.device:
        """Where the buffer is."""
        return self.buffer.device

    def __len__(self) -> int:
        return self.sequences

    def _chosen(self, argument, slots):
        """Slots as int64 [n] beside the buffer, for kernels on the CPU."""
        chosen = torch.as_tensor(slots, device="cpu" if self._on_cuda() else self.device).reshape(-1)
        if chosen.numel() == 0:
            chosen = chosen.long()
        if chosen.dtype.is_floating_point or chosen.dtype.is_complex or chosen.dtype == torch.bool:
            raise TypeError(f"{argument}: dtype {chosen.dtype} given, integers expected")
        chosen = chosen.long()
        if not torch.compiler.is_compiling() and chosen.device.type == "cpu":
            for i, slot in enumerate(chosen.tolist()):
                if not 0 <= slot < self.sequences:
                    expected = f"less than the state's {self.sequences} slots"
                    raise ValueError(f"{argument}[{i}]: {slot} given, {expected} expected")
        return chosen

    def index_select(self, slots: Any) -> "State":
        """A state whose stream i continues where stream slots[i] stands; a slot may be named several
        times."""
        return self._take(self._chosen("slots", slots))

    def _take(self, chosen):
        if self._is_recorded():
            return _tracked.taken(self, chosen)
        count = chosen.shape[0]
        new = self._empty_like(count)
        if self._on_cuda():
            new._copy(self, chosen, torch.arange(count))
            return new
        for name, part in new._parts().items():
            if _is_of_slots(self, name):
                torch.index_select(self._parts()[name], 0, chosen, out=part)
        return new

    def _empty_like(self, slots, rotation=None):
        rotation = self.rotation if rotation is None else rotation
        return State._of(_empty(self._text, slots, rotation, self.device), self._text, slots, rotation)

    def _on_cuda(self):
        """Whether operations on the state go to its kernels, past PyTorch's."""
        return self.device.type == "cuda" and not torch.compiler.is_compiling()

    def _copy(self, source, come, go):
        if self._on_cuda():
            pairs = list(zip(come.tolist(), go.tolist()))
            _cuda().copy_slots(self._key(), self.buffer, source._key(), source.buffer, pairs)
            return
        theirs = source._parts()
        for name, part in self._parts().items():
            if _is_of_slots(self, name) and name in theirs:
                part[go] = theirs[name][come]

    def fork(self, slots: Any = None) -> "State":
        """A copy, or that of the streams given (`index_select`)."""
        return self.clone() if slots is None else self.index_select(slots)

    def __getitem__(self, index: Any) -> "State":
        """A copy of one stream (an index, from the end if negative), or of those of a slice or list."""
        if isinstance(index, slice):
            return self.index_select(list(range(self.sequences)[index]))
        given = _integers("index", index)
        for i in given:
            if not -self.sequences <= i < self.sequences:
                raise IndexError(f"index: {i} given, one of {self.sequences} streams expected")
        return self.index_select([i % self.sequences for i in given])

    @staticmethod
    def concat(states: Iterable["State"]) -> "State":
        """The streams of all the states, one state after another, as one state."""
        states = list(states)
        if not states:
            raise ValueError("states: 0 given, at least 1 expected")
        for i, state in enumerate(states):
            _check_state(f"states[{i}]", state)
        first, count = states[0], sum(state.sequences for state in states)
        for i, state in enumerate(states):
            if (state._text, state.device) != (first._text, first.device):
                given = f"{state.problem} on {state.device}"
                raise ValueError(
                    f"states[{i}]: {given} given, {first.problem} on {first.device} expected"
                )
        if any(state._is_recorded() for state in states):
            return _tracked.concatenated(states)
        new = first._empty_like(count, any(state.rotation for state in states))
        at = 0
        for state in states:
            new._copy(state, torch.arange(state.sequences), torch.arange(at, at + state.sequences))
            at += state.sequences
        return new

    def copy_slots(self, source: "State", pairs: Iterable[tuple[int, int]]) -> None:
        """For every pair (from, to): slot `to` of this state continues where slot `from` of `source`
        stands, which may be this state. No slot is written twice, nor one that is read."""
        _check_state("source", source)
        source._check_constant("source")
        self._check_constant("copy_slots")
        pairs = list(pairs)
        if (
            source._text != self._text
            or source.rotation != self.rotation
            or source.device != self.device
        ):
            raise ValueError(
                f"source: {source!r} given, a state of the same problem, rotation and device expected"
            )
        come = source._chosen("pairs (from)", [pair[0] for pair in pairs])
        go = self._chosen("pairs (to)", [pair[1] for pair in pairs])
        for i, (_, slot) in enumerate(pairs):
            if slot in (earlier := [to for _, to in pairs[:i]]):
                expected = f"a slot other than that of pairs[{earlier.index(slot)}]"
                raise ValueError(f"pairs[{i}] (to): {slot} given, {expected} expected")
            if source.buffer.data_ptr() == self.buffer.data_ptr() and slot in come.tolist():
                expected = "a slot that is not copied as well"
                raise ValueError(f"pairs[{i}] (to): {slot} given, {expected} expected")
        self._copy(source, come, go)
        self._changed()

    def reset(self, slots: Any = None) -> None:
        """Forgets everything all streams (or those in `slots`) have seen, in place."""
        self._check_constant("reset")
        torch.ops.infini_attn.reset_(*self._arguments(), seq_slots=self._optional(slots))
        self._changed()

    def flush(self, slots: Any = None) -> None:
        """Commits the open segments of all streams (or of those in `slots`), in place; the next token
        opens a new segment of full length."""
        self._check_constant("flush")
        torch.ops.infini_attn.flush_(*self._arguments(), seq_slots=self._optional(slots))
        self._changed()

    def truncate(self, slot: int, tokens: int) -> None:
        """Takes back the last tokens of a stream, which goes on behind its first `tokens`. That reaches
        back to where its open segment begins."""
        slot, tokens = operator.index(slot), operator.index(tokens)
        if not 0 <= slot < self.sequences:
            expected = f"less than the state's {self.sequences} slots"
            raise ValueError(f"slot: {slot} given, {expected} expected")
        if tokens < 0:
            raise ValueError(f"tokens: {tokens} given, at least 0 expected")
        self._check_constant("truncate")
        torch.ops.infini_attn.truncate_(*self._arguments(), slot, tokens)
        self._changed()

    def _arguments(self):
        return self.buffer, self.sequences, self._text, self.rotation

    def _key(self):
        return self._text, self.sequences, self.rotation

    def _optional(self, slots):
        return None if slots is None else torch.as_tensor(slots, device=_there(slots)).reshape(-1)

    def to(self, device: Any) -> "State":
        """This state, or a copy of it on another device."""
        device = torch.device(device)
        if device == self.device or (device.type == self.device.type and device.index is None):
            return self
        if self._is_recorded():
            given = f"a state that requires grad on {self.device}"
            raise ValueError(f"device: {device} for {given} given, state.detach() expected before")
        if device.type != self.device.type and "cuda" in (device.type, self.device.type):
            # Laid out otherwise there.
            return State.from_state(self.to_state(), device=device, rotation=self.rotation)
        with torch.inference_mode(False):
            return self._copied(self.buffer.to(device))

    def _copied(self, buffer):
        if self._on_cuda():
            _cuda().copied(self._key(), buffer, self.buffer)
        return self._like(buffer)

    def cpu(self) -> "State":
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> "State":
        """`to("cuda")`, or to another device."""
        return self.to("cuda" if device is None else torch.device("cuda", device))

    def clone(self) -> "State":
        """A copy of all bytes; differentiable, if the state requires grad."""
        if self._is_recorded():
            return State._of_tracked(self._floats().clone(), self._text, self.sequences, self.rotation)
        # A tensor that knows when it is written to, whatever the mode.
        with torch.inference_mode(False):
            return self._copied(self.buffer.clone())

    def refresh(self) -> None:
        """Where the streams stand is read again before it is needed: after others have written to the
        buffer of a state on a GPU in a way that PyTorch does not count as writing (a collective,
        `tensor.data`, a kernel of another library). On the CPU it is read at every call."""
        if self._on_cuda():
            _cuda().forget(self.buffer)

    def check_status(self) -> None:
        """RuntimeError where kernels have met slots, lengths or positions in a GPU's memory that they
        could not accept: the tokens of those sequences were not taken in, at positions outside the tables
        without rotation. Waits for the GPU; on the CPU calls say so themselves."""
        if self._on_cuda():
            _cuda().status(self._key(), self.buffer)

    def save(self, path: str | bytes | os.PathLike[Any]) -> None:
        """Writes the state to a file that `infini_attn.State.load` reads as well."""
        self.to_state().save(path)

    @staticmethod
    def load(
        path: str | bytes | os.PathLike[Any],
        problem: _core.Problem | None = None,
        *,
        device: Any = "cpu",
        rotation: bool = True,
    ) -> "State":
        """Reads a state from a file; with `problem`, refuses the state of another one."""
        return State.from_state(_core.State.load(path, problem), device=device, rotation=rotation)

    def __copy__(self) -> "State":
        return self.clone()

    def __deepcopy__(self, memo: Any) -> "State":
        return self.clone()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # As on the CPU, for a machine without the device.
        here, device = self.cpu(), str(self.device)
        return _state_of, (here.buffer, here._text, here.sequences, here.rotation, device)

    def __repr__(self) -> str:
        return (
            f"infini_attn.torch.State({self.problem!r}, {self.sequences}, device='{self.device}',"
            f" rotation={self.rotation})"
        )


def _integers(argument, given):
    """One integer or a list of them, as a list."""
    try:
        given = torch.as_tensor(given, device=_there(given))
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"{argument}: {type(given).__name__} given, integers expected") from None
    if given.numel() and (
        given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool
    ):
        raise TypeError(f"{argument}: dtype {given.dtype} given, integers expected")
    if given.dim() > 1:
        raise ValueError(f"{argument}: shape {list(given.shape)} given, one or a list [n] expected")
    return [int(i) for i in given.reshape(-1).tolist()]


def _there(slots):
    """Where a tensor of slots is; lists are for the host, whatever the default device."""
    return slots.device if isinstance(slots, torch.Tensor) else "cpu"


def _check_state(argument, state):
    if not isinstance(state, State):
        given = "an infini_attn.State" if isinstance(state, _core.State) else type(state).__name__
        raise TypeError(f"{argument}: {given} given, an infini_attn.torch.State expected")


def _cuda():
    from . import _cuda

    return _cuda


def _empty(text, slots, rotation, device):
    # A tensor that knows when it is written to, whatever the mode.
    with torch.inference_mode(False):
        buffer = _layout.empty(text, slots, rotation, device)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _cuda().begin((text, slots, rotation), buffer)
    return buffer


def _is_of_slots(state, name):
    parts = _layout.parts(state._text, state.rotation, state.device.type)
    return next(part.of_slots for part in parts if part.name == name)


def _state_of(buffer, text, sequences, rotation, device="cpu"):
    """What pickle calls. Without CUDA a state from there stays on the CPU."""
    state = State.from_buffer(buffer, _core._problem_from_text(text), sequences, rotation=rotation)
    there = torch.device(device)
    return state.to(there) if there.type == "cuda" and torch.cuda.is_available() else state


def _flatten(state):
    memory = state.buffer if state._tracked is None else state._tracked
    return [memory, state.sequences], (state._text, state.rotation)


def _flatten_with_keys(state):
    leaves, context = _flatten(state)
    keys = torch.utils._pytree.GetAttrKey("buffer"), torch.utils._pytree.GetAttrKey("sequences")
    return list(zip(keys, leaves)), context


def _unflatten(leaves, context):
    dtype = getattr(leaves[0], "dtype", torch.uint8)
    if dtype.is_floating_point and dtype != torch.float32:
        raise TypeError(f"state: dtype {dtype} given, the bytes or float32 of a state expected")
    tracked = dtype == torch.float32
    return (State._of_tracked if tracked else State._of)(leaves[0], context[0], leaves[1], context[1])


torch.utils._pytree.register_pytree_node(
    State,
    _flatten,
    _unflatten,
    serialized_type_name="infini_attn.torch.State",
    flatten_with_keys_fn=_flatten_with_keys,
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
