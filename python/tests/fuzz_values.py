"""Values at random for the fuzzer: arrays in every layout, wrong ones of every kind, and what may become
of a right argument."""

import pathlib
import sys
from decimal import Decimal

import numpy as np
import torch

from infini_attn import KeySums, Problem, SegmentMap, State

INTS = (-(2**63), -1, 0, 1, 2, 3, 5, 2**48, 2**63 - 1, 2**63, 2**64, 10**5000)
FLOATS = (0.0, -1.0, 0.5, 1e-40, 1e300, float("inf"), float("-inf"), float("nan"))
STRINGS = ("", "x", "delta", "linear", "gate", "bypass", "exact", "f32", "f16", "bf16", "\ud800", "a\0b", "x" * 300)
NUMPY_TYPES = "?bBhHiIlLefdgFDUSOMm"
TORCH_TYPES = [getattr(torch, name) for name in (
    "bool uint8 int8 int16 int32 int64 uint16 uint64 float16 bfloat16 float32 float64 complex64 float8_e5m2".split())]
TYPE_NAMES = {"f32": (np.float32, torch.float32), "f16": (np.float16, torch.float16), "bf16": (None, torch.bfloat16)}


class Mine(Exception):
    """What the objects below raise: it may come out of a call as it is."""


def hostile(error):
    """An object whose every way into a number, an array, a list or a path raises `error`."""

    def refuse(*args, **kwargs):
        raise error

    names = "index float array fspath iter len getitem bool repr str hash eq dlpack".split()
    if not isinstance(error, Exception):
        # NumPy takes anything raised elsewhere for "no sequence".
        names = "index float array fspath".split()
    return type("Hostile", (), {f"__{name}__": refuse for name in names} | {"error": error})()


def interrupts(values):
    """The interrupts that hostile objects among some values have raised."""
    for value in values:
        if type(value) in (list, tuple):
            yield from interrupts(value)
        elif type(value).__name__ == "Hostile" and value.error.__traceback__ is not None:
            if not isinstance(value.error, Exception):
                yield value.error


class Liar:
    """A sequence that is much longer than it is."""

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, i):
        raise IndexError


class Subclass(np.ndarray):
    """NumPy's, by another name."""


def junk(rng):
    """Anything."""
    return rng.choice((
        lambda: None, lambda: rng.choice((True, False)), lambda: rng.choice(INTS), lambda: rng.choice(FLOATS),
        lambda: rng.choice(STRINGS), lambda: rng.randbytes(rng.randrange(9)), lambda: bytearray(8), lambda: {},
        lambda: {"a": 1}, lambda: [], lambda: [[1], [2, 3]], lambda: [1, 2], lambda: [0.5, None], lambda: (),
        lambda: (1, 2, 3), object, lambda: ..., lambda: State, lambda: len, lambda: np.float32(1), lambda: np.int64(2),
        lambda: np.array(1.0), lambda: 1j, lambda: Decimal(1), lambda: iter([1.0]), lambda: range(2**45),
        lambda: range(2**60), lambda: memoryview(b"abcd"), lambda: torch.float32, lambda: torch.Size([2]), Liar,
        lambda: hostile(Mine("mine")), lambda: hostile(Mine()), lambda: hostile(KeyboardInterrupt()),
        lambda: pathlib.Path("x"), nested, lambda: an_array(rng), lambda: an_array(rng), lambda: an_array(rng),
    ))()


def nested():
    """A list within a list, 70 times."""
    value = []
    for _ in range(70):
        value = [value]
    return value


def an_array(rng):
    """An array of any type and rank."""
    shape = [rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(rng.randrange(6))]
    if rng.random() < 0.5:
        return torch.zeros(shape).to(rng.choice(TORCH_TYPES))
    return np.zeros(shape, rng.choice(NUMPY_TYPES))


def numbers(rng, shape, dtype, of_torch):
    """Standard normal numbers, of a dtype "f32", "f16" or "bf16", in one of the layouts a call must take."""
    values = np.random.default_rng(rng.getrandbits(32)).standard_normal(shape, np.float32)
    if not of_torch:
        return laid_out(rng, values.astype(TYPE_NAMES[dtype][0]))
    # NumPy, which has no bfloat16, lays out the bits.
    bits, dtype = {"f32": torch.int32}.get(dtype, torch.int16), TYPE_NAMES[dtype][1]
    values = laid_out(rng, torch.from_numpy(values).to(dtype).view(bits).numpy())
    if any(s < 0 for s in values.strides) or not values.flags.writeable:
        values = values.copy()
    return torch.from_numpy(values).view(dtype)


def laid_out(rng, a):
    """The same numbers, elsewhere in memory; the last dimension stays contiguous."""
    way = rng.randrange(12)
    if way == 0 and a.ndim == 4:  # [B, H, T, D] and [T, B, H, D]
        return a.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)
    if way == 1 and a.ndim > 1:
        return np.moveaxis(np.moveaxis(a, -2, 0).copy(), 0, -2)
    if way == 2 and a.ndim:
        wide = np.full((*a.shape[:-1], a.shape[-1] + 3), np.nan if a.dtype.kind == "f" else -1, a.dtype)  # NaN, either way
        wide[..., 1:-2] = a
        return wide[..., 1:-2]
    if way == 3 and a.ndim > 1:
        axis = rng.randrange(a.ndim - 1)
        return np.flip(np.flip(a, axis).copy(), axis)
    if way == 4 and a.ndim > 1:
        axis = rng.randrange(a.ndim - 1)
        return np.broadcast_to(a.take([0], axis), a.shape) if a.shape[axis] else a
    if way == 5:
        a.flags.writeable = False
    if way == 6:
        return a.view(Subclass)
    return a


def spoiled(rng, value):
    """A right argument after a mutation; what comes out may still be right."""
    if rng.random() < 0.25:
        return junk(rng)
    if isinstance(value, np.ndarray | torch.Tensor):
        if isinstance(value, torch.Tensor) and not plain(value):
            return junk(rng)
        try:
            return spoiled_array(rng, value)
        except (RuntimeError, TypeError, ValueError, IndexError):  # Not for this type or rank.
            return None
    if isinstance(value, State | Problem | KeySums | SegmentMap):
        other = rng.choice(OTHERS[type(value)])
        return other.fork() if isinstance(other, State) else other
    if isinstance(value, bool) or value is None:
        return junk(rng)
    if isinstance(value, int):
        if abs(value) >= 2**62:
            return junk(rng)
        return rng.choice((value + 1, value - 1, float(value), str(value), np.int64(value), np.float64(value), *INTS))
    if isinstance(value, float):
        return rng.choice((*FLOATS, str(value), np.float32(value)))
    if isinstance(value, str):
        return rng.choice((*STRINGS, value.upper(), value.encode(errors="replace"), np.str_(value)))
    if isinstance(value, bytes | bytearray):
        return spoiled_bytes(rng, value)
    if isinstance(value, list | tuple):
        return spoiled_list(rng, value)
    return junk(rng)


def spoiled_bytes(rng, value):
    where, way = rng.randrange(len(value) + 1), rng.randrange(4)
    if way == 0:
        return value[:where]
    if way == 1:
        return value[:where] + rng.randbytes(rng.randrange(1, 9)) + value[where:]
    if way == 2:
        return value[:where] + bytes([rng.randrange(256)]) + value[where + 1 :]
    return bytearray(value)


def spoiled_list(rng, value):
    items, way = list(value), rng.randrange(6)
    where = rng.randrange(len(items)) if items else 0
    if way == 0 and items:
        del items[where]
    elif way == 1:
        items.insert(where, items[where] if items else junk(rng))
    elif way == 2:
        return tuple(value) if isinstance(value, list) else items
    elif way == 3:
        items.reverse()
    elif items:
        items[where] = spoiled(rng, items[where])
    return tuple(items) if isinstance(value, tuple) else items


def spoiled_array(rng, a):
    """An array of another type, shape, layout, kind, or with other values."""
    if rng.random() < 0.3:
        return reshaped(rng, a)
    if isinstance(a, torch.Tensor):
        return spoiled_tensor(rng, a)
    way = rng.randrange(12)
    if way == 0:
        return a.astype(rng.choice(NUMPY_TYPES), order="K")
    if way == 1:
        return np.asfortranarray(a)
    if way == 2:
        return np.repeat(a, 2, -1)[..., ::2] if a.ndim else a
    if way == 3:
        return np.flip(a)
    if way == 4:
        memory = np.zeros(a.nbytes + 1, np.uint8)[1:]
        memory[:] = np.frombuffer(a.tobytes(), np.uint8)
        return memory.view(a.dtype).reshape(a.shape)
    if way == 5:
        return np.ma.masked_array(a)
    if way == 6:
        return a.astype(a.dtype.newbyteorder())
    if way == 7:
        return a.tolist()
    if way == 8:
        return np.zeros(a.shape, [("x", a.dtype)])
    if way == 9 and a.size:
        copy = a.copy()
        copy.flat[rng.randrange(a.size)] = rng.choice((np.nan, np.inf, -np.inf, 6e4) if a.dtype.kind == "f" else (-1, 99))
        return copy
    if way == 10:
        return np.lib.stride_tricks.as_strided(a, a.shape, [0] * a.ndim)
    return torch.from_numpy(a.copy()) if a.dtype.kind in "fi" else None


def reshaped(rng, a):
    """Another rank, or an extent that is 0, 1 or off by one."""
    way = rng.randrange(5)
    if way == 0:
        return a[None]
    if not a.ndim or 0 in a.shape:
        return a
    if way == 1:
        return a[0]
    axis = rng.randrange(a.ndim)
    extent = rng.choice((0, 1, a.shape[axis] - 1, a.shape[axis] + 1))
    rows = [i % a.shape[axis] for i in range(extent)]
    if isinstance(a, torch.Tensor):
        return a.index_select(axis, torch.tensor(rows, dtype=torch.int64))
    return a.take(rows, axis) if rows else a[tuple(slice(0 if d == axis else None) for d in range(a.ndim))]


def spoiled_tensor(rng, a):
    """What PyTorch adds: tensors without memory, with gradients, of other layouts."""

    def freed():
        copy = a.clone()
        copy.untyped_storage().resize_(0)
        return copy

    def with_nan():
        copy = a.clone()
        if copy.numel():
            copy.view(-1)[rng.randrange(copy.numel())] = rng.choice((float("nan"), float("inf"), 6e4))
        return copy

    ways = [
        lambda: a.to(rng.choice(TORCH_TYPES)), lambda: a.to("meta"), freed, lambda: a.to_sparse(),
        lambda: a.repeat_interleave(2, -1)[..., ::2], lambda: a.numpy(), lambda: a.tolist(),
        lambda: torch._efficientzerotensor(a.shape, dtype=a.dtype), lambda: torch.empty_strided(a.shape, [0] * a.ndim).fill_(0.5),
    ]
    if a.is_floating_point():
        ways += [
            with_nan, lambda: torch.nn.Parameter(a), lambda: a.clone().requires_grad_(),
            lambda: torch.complex(a.float(), a.float()).conj().imag, lambda: torch.nested.nested_tensor([a, a]),
            lambda: torch.quantize_per_tensor(a.float(), 0.1, 0, torch.qint8), lambda: a.float().to_mkldnn(),
        ]
    return rng.choice(ways)()


def plain(tensor):
    """Whether a tensor has its elements in memory, as they are."""
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    if tensor._is_zerotensor() or tensor.is_neg() or tensor.is_conj():
        return False
    return not tensor.numel() or tensor.untyped_storage().nbytes() > 0


def describe(value, depth=0):
    """A value in a few words, without asking objects that may raise."""
    if isinstance(value, np.ndarray):
        return f"numpy({value.dtype}, {value.shape}, strides {value.strides})"
    if isinstance(value, torch.Tensor):
        if not plain(value):
            return f"torch({value.dtype}, no plain tensor)"
        return f"torch({value.dtype}, {list(value.shape)}, strides {value.stride()})"
    if isinstance(value, list | tuple) and depth < 3:
        items = ", ".join(describe(item, depth + 1) for item in value[:9])
        return f"({items})" if isinstance(value, tuple) else f"[{items}]"
    if value is None or isinstance(value, bool | float | Problem | State | KeySums | SegmentMap | range | str | bytes):
        text = repr(value)
        return text if len(text) < 200 else f"{text[:200]}..."
    if isinstance(value, int):
        return str(value) if abs(value) < 2**70 else "a huge int"
    return f"<{type(value).__name__}>"


def others():
    """Objects of other problems."""
    import infini_attn

    problems = [
        Problem(heads=1, key_dim=1, segment_len=1), Problem(heads=2, key_dim=3, segment_len=2, update="linear"),
        Problem(heads=2, kv_heads=1, key_dim=8, value_dim=2, segment_len=4, dtype="f16"),
    ]
    states = [State(p, n) for p in problems for n in (1, 2)]
    sums = [KeySums.zero(p, n) for p in problems for n in (1, 2)]
    k = np.ones((1, 2, 1, 1), np.float32)
    maps = [infini_attn.segment_map(problems[0], k, k, KeySums.zero(problems[0])) for _ in "a"]
    return {Problem: problems, State: states, KeySums: sums, SegmentMap: maps}


OTHERS = others()
