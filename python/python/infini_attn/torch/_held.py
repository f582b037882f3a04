"""What the host knows of states on CUDA devices: where their streams stand. Plans are made from it, and
what it does not know must be read from the device, which waits for that."""

import threading
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary


class _Held(NamedTuple):
    # Problem, slots and rotation.
    key: tuple[str, int, bool]
    host: object
    version: int


_held = WeakTensorKeyDictionary()
# Where the buffers of captured graphs lie, whose replays nobody tells of.
_graphed: set[int] = set()


# Whoever writes to one of them holds it.
_lock = threading.RLock()


def known(buffer, key):
    """The host's side of the state in a buffer, or None: nobody has said, somebody has written to it
    since, or a graph may have."""
    held = _held.get(buffer)
    if held is None or held.key != key or held.version != buffer._version:
        return None
    return None if buffer.data_ptr() in _graphed else held.host


def meet(buffer, key):
    """A call is about to write to a buffer.

    One that nobody has told of may be a copy from which a compiled graph will write back, without a
    word, to a buffer that is remembered: of the same problem none is, from then on.
    """
    with _lock:
        if buffer not in _held:
            for other, held in list(_held.items()):
                if held.key == key:
                    _held.pop(other, None)


def note(buffer, key, host):
    """The host's side of a buffer that has just been written; None: not known any more."""
    # Of inference tensors nobody would know that others write to them.
    if buffer.is_inference():
        return
    # For views of it, and for what PyTorch has saved.
    torch.autograd.graph.increment_version(buffer)
    with _lock:
        _held[buffer] = _Held(key, host, buffer._version)


def join_graph(buffer):
    """A buffer is made, or written to, in a graph that is being captured: every replay does that again."""
    with _lock:
        _graphed.add(buffer.data_ptr())


def forget(buffer):
    """A buffer may have been written to, or is about to be, by others."""
    with _lock:
        _held.pop(buffer, None)


def copy(buffer, of, key):
    """A buffer is a copy of another."""
    host = known(of, key)
    note(buffer, key, host and host.copy())
