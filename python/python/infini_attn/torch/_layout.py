"""Where the parts of a state lie in its buffer."""

from typing import NamedTuple

import torch

from .. import _core

ALIGNMENT = 256


class Part(NamedTuple):
    """A part of a state: of every slot, or one for all of them."""

    name: str
    dtype: torch.dtype
    # Without the slots.
    shape: tuple[int, ...]
    of_slots: bool

    def bytes(self, slots: int) -> int:
        count = slots if self.of_slots else 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


_known: dict[tuple[str, bool, bool], tuple[Part, ...]] = {}


@torch.compiler.assume_constant_result
def parts(problem: str, rotation: bool, device: str) -> tuple[Part, ...]:
    """The parts of a state on a kind of device, in their order."""
    key = (problem, rotation, device == "cuda")
    if key not in _known:
        _known[key] = tuple(_read(*key))
    return _known[key]


def _read(problem, rotation, cuda):
    # Two slots and three tell what there is per slot.
    table = _core._host_layout
    if cuda:
        from . import _cuda

        table = _cuda.layout
    (two, _), (three, _) = (table(problem, slots, rotation) for slots in (2, 3))
    for (name, dtype, shape, _), (_, _, more, _) in zip(two, three):
        of_slots = shape != more
        yield Part(name, getattr(torch, dtype), tuple(shape[1:] if of_slots else shape), of_slots)


def total(problem: str, slots: int, rotation: bool, device: str) -> int:
    """Bytes of a state of that many slots."""
    return sum(_aligned(part.bytes(slots)) for part in parts(problem, rotation, device))


def empty(problem: str, slots: int, rotation: bool, device: torch.device) -> torch.Tensor:
    """A buffer of empty streams."""
    size = total(problem, slots, rotation, device.type)
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        views(buffer, problem, slots, rotation)["snapshot_scale"].fill_(1)
    return buffer


def views(buffer: torch.Tensor, problem: str, slots: int, rotation: bool) -> dict[str, torch.Tensor]:
    """The parts of a buffer by name, [slots, ...], which share its memory. Of the same memory as float32
    all but the counters, differentiably."""
    found, at, width = {}, 0, buffer.element_size()
    for part in parts(problem, rotation, buffer.device.type):
        size = part.bytes(slots)
        shape = (slots, *part.shape) if part.of_slots else part.shape
        if width == 1 or part.dtype == buffer.dtype:
            piece = buffer[at // width : (at + size) // width]
            found[part.name] = (piece.view(part.dtype) if width == 1 else piece).view(shape)
        at += _aligned(size)
    return found


def rows(floats: torch.Tensor, problem: str, slots: int, rotation: bool) -> dict[str, torch.Tensor]:
    """The parts of a state on the CPU as float32 by name, [slots, bytes / 4], in their order and the
    counters among them, of which only copies have a meaning."""
    found, at = {}, 0
    for part in parts(problem, rotation, "cpu"):
        size = part.bytes(slots)
        found[part.name] = floats[at // 4 : (at + size) // 4].view(slots, part.bytes(1) // 4)
        at += _aligned(size)
    return found


def joined(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The state of such parts, as float32: a copy, to the bit."""
    pieces = []
    for row in rows.values():
        size = 4 * row.numel()
        pieces += [row.reshape(-1), row.new_zeros((_aligned(size) - size) // 4)]
    return torch.cat(pieces)


def _aligned(size):
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may have an element in common."""
    (first, last), (begin, end) = _extent(a), _extent(b)
    return first < end and begin < last


def _extent(tensor):
    """The addresses that a tensor's elements lie between."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
