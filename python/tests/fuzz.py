"""Random calls of everything public, right ones with up to two mutations.

`python fuzz.py SEED FIRST COUNT` makes the calls FIRST to FIRST + COUNT - 1 of a seed. Each comes from
its number alone, so that one can be repeated by itself. Prints, as JSON, how many were accepted and
refused, and by how much the process grew.
"""

import faulthandler
import json
import os
import pathlib
import random
import re
import shutil
import sys
import tempfile
import warnings

import numpy as np
import torch
from fuzz_calls import CALLS, FOLDER, WEIGHTS, WRITES, World
from fuzz_values import Mine, describe, interrupts, junk, plain, spoiled

from infini_attn import KeySums, SegmentMap, State, infini_attention, reference, set_num_threads

ERRORS = (TypeError, ValueError, IndexError, RuntimeError, MemoryError, OverflowError, OSError, BufferError, Mine)
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}


class Call:
    """Call number `index`: the function, its arguments, and what it comes to."""

    def __init__(self, seed, index):
        self.rng = rng = random.Random(seed << 64 | index)
        self.name = rng.choices(*zip(*WEIGHTS.items()))[0]
        self.world = World(rng)
        self.function, make = CALLS[self.name]
        args, kwargs = make(self.world)
        self.args, self.kwargs = list(args), dict(kwargs)
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            self.mutate()
        self.result = self.error = None

    def mutate(self):
        rng = self.rng
        places = [*range(len(self.args)), *self.kwargs]
        if not places or rng.random() < 0.1:
            way = rng.randrange(3)
            if way == 0 and self.args:
                self.args.pop()
            elif way == 1:
                self.args.append(junk(rng))
            else:
                self.kwargs[rng.choice(("state", "slots", "x"))] = junk(rng)
            return
        place = rng.choice(places)
        arguments = self.kwargs if isinstance(place, str) else self.args
        arguments[place] = spoiled(rng, arguments[place])

    def __str__(self):
        args = [describe(a) for a in self.args] + [f"{n}={describe(a)}" for n, a in self.kwargs.items()]
        return f"{self.name}({', '.join(args)})"

    def values(self, but_out=False):
        return [*self.args, *(v for name, v in self.kwargs.items() if name != "out" or not but_out)]

    def attempt(self):
        try:
            self.result = self.function(*self.args, **self.kwargs)
        except BaseException as e:
            self.error = e

    def run(self):
        """Makes the call, now and then while its state is in use, and checks what it came to."""
        # An output that is given is written to, unless the call is refused.
        before, given = (freeze(self.values(True)), files(self.name)), freeze(self.kwargs.get("out"))
        states = [v for v in self.values() if type(v) is State]
        if states and self.rng.random() < 0.05:
            while_in_use(self.rng.choice((State.flush, State.fork)), states[0], self.attempt)
        else:
            self.attempt()
        writes = self.error is None and (self.name in WRITES or bool(self.kwargs.get("inplace")))
        values = self.values(True)
        assert freeze(values, but_states=writes) == thawed(before[0], values, writes), "an argument has changed"
        self.check_error()
        if self.error is not None:
            assert files(self.name) == before[1], "a refused call has changed a file"
            assert freeze(self.kwargs.get("out")) == given, "a refused call has changed its output"
        elif self.name == "infini_attention":
            self.check_result()
        elif self.name == "State.save" and self.args[1] in (FOLDER / "state", "fuzz/new", b"fuzz/bytes"):
            assert freeze(State.load(self.args[1])) == freeze(self.args[0]), "another state was saved"

    def check_error(self):
        interrupt = next(interrupts(self.values()), None)
        if interrupt is not None:
            assert self.error is interrupt, f"an interrupt was lost: {self.error!r}"
        elif self.error is not None:
            assert isinstance(self.error, ERRORS), f"{type(self.error)}: {self.error}"
            text = str(self.error)
            if not isinstance(self.error, Mine):
                empty = isinstance(self.error, TypeError) and re.search(r":\s+given|\bint given, an integer|str given, a string", text)
                assert text and not empty, f"{type(self.error)} says {text!r}"

    def check_result(self):
        """What the operator returns: kinds, shapes, and sometimes the numbers."""
        q, v, asked = self.args[0], self.args[2], self.kwargs
        first = self.result[0] if isinstance(self.result, tuple) else self.result
        assert first is asked.get("out", first), "another output"
        results = list(self.result) if isinstance(self.result, tuple) else [self.result]
        flags = [True, asked.get("return_state", True), *[asked.get("return_lse", False)], *[asked.get("return_parts", False)] * 2]
        kept = dict(zip([n for n, f in zip(("out", "state", "lse", "a_dot", "a_mem"), flags) if f], results, strict=True))
        shape = (*q.shape[:-1], v.shape[-1])
        for name in {"out", "a_dot", "a_mem"} & kept.keys():
            array = kept[name]
            assert isinstance(array, torch.Tensor) == isinstance(q, torch.Tensor), name
            assert tuple(array.shape) == shape and array.dtype == q.dtype, f"{name}: {describe(array)}"
        if "lse" in kept:
            assert tuple(kept["lse"].shape) == (*shape[:-3], shape[-2], shape[-3]), "lse"
        if "state" in kept and asked.get("state") is not None:
            assert (kept["state"] is asked["state"]) == bool(asked.get("inplace")), "which state is returned"
        if self.rng.random() < 0.1:
            self.compare(kept)

    def compare(self, kept):
        """The same streams through the reference."""
        if any(getattr(x, "requires_grad", False) for x in self.args):
            return  # Tests of gradients compare those.
        asked, state = {**self.kwargs}, None
        asked.pop("out", None)
        if asked.pop("inplace", None) is not None or asked.get("state") is not None:
            if asked.get("state") not in (None, self.world.streams):
                return
        numbers = [doubles(x) for x in (*self.args, *(asked.get("rope") or ()))]
        if not all(np.isfinite(x).all() and np.abs(x).max(initial=0) < 100 for x in numbers):
            return
        if asked.get("state") is not None:
            for args, options in self.world.history or [empty(self.world)]:
                _, state = reference.infini_attention(*args, state=state, **options, **self.world.policies)
        expected = reference.infini_attention(
            *self.args, **asked | dict(state=state, return_state=True, return_lse=True, return_parts=True))
        expected = dict(zip(("out", "state", "lse", "a_dot", "a_mem"), expected))
        scale = max(rms(x) for x in (*numbers, expected["a_mem"], expected["a_dot"], 1e-3))
        tolerance = TOLERANCE[str(self.args[0].dtype).removeprefix("torch.")]
        for name in {"out", "a_dot", "a_mem"} & kept.keys():
            assert_near(name, doubles(kept[name]), expected[name], tolerance * scale)
        if "state" in kept:
            got, right = kept["state"], expected["state"]
            assert_near("M", got.M, right.M, 1e-5 * max(rms(right.M), scale))
            assert_near("z", got.z, right.z, 1e-5 * max(rms(right.z), 1))
            assert all((getattr(got, n) == getattr(right, n)).all() for n in ("tokens", "committed", "open_len"))
        COMPARED[0] += 1


COMPARED = [0]


def empty(w):
    """A call that brings no tokens."""
    shapes = [(w.batch, 0, w.heads, w.key_dim), (w.batch, 0, w.kv_heads, w.key_dim), (w.batch, 0, w.kv_heads, w.value_dim)]
    return [np.zeros(shape, np.float32) for shape in shapes] + [[0.0] * w.heads], {}


def doubles(a):
    return a.double().numpy() if isinstance(a, torch.Tensor) else np.asarray(a, float)


def rms(a):
    return float(np.sqrt(np.mean(np.square(a)))) if np.size(a) else 0.0


def assert_near(name, got, right, most):
    assert got.shape == right.shape, f"{name}: shape {got.shape}, {right.shape} expected"
    error = rms(got - right)
    assert error <= most, f"{name}: off by {error:.2e}, at most {most:.2e} expected"


def while_in_use(method, state, work):
    """Runs `work` while a method of the state, which waits for its slots, has locked it."""

    class Slots:
        def __array__(self, *args, **kwargs):
            work()
            raise Mine("no slots")

    try:
        method(state, Slots())
    except (TypeError, Mine):
        pass


def freeze(value, but_states=False):
    """The bits of a value, so far as a call could change them."""
    if but_states and holds_states(value):
        return "a state"
    if isinstance(value, np.ndarray):
        return None if value.dtype.hasobject else np.asarray(value).tobytes()
    if isinstance(value, torch.Tensor):
        if not plain(value):
            return None
        return value.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
    if isinstance(value, State):
        return "a state" if but_states else value.__reduce__()[1][0]
    if isinstance(value, reference.State):
        return "a state" if but_states else [x.tobytes() for x in (value.M, value.z, value.tokens, value.committed)]
    if isinstance(value, KeySums):
        return [x.tobytes() for x in (value.sums, value.tokens)]
    if isinstance(value, SegmentMap):
        return [x.tobytes() for x in (value.A, value.B, value.dz, value.tokens)]
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if type(value) in (list, tuple):
        return [freeze(x, but_states) for x in value]
    return None


def thawed(frozen, values, but_states):
    """What was frozen, without the states that a call may write."""
    written = lambda v: isinstance(v, (State, reference.State)) or holds_states(v)
    return ["a state" if but_states and written(v) else f for f, v in zip(frozen, values)]


def holds_states(value):
    """Whether it may be the memory of states."""
    if isinstance(value, torch.Tensor):
        return plain(value) and value.dtype == torch.uint8 and value.dim() == 1
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1


def files(name):
    if name not in ("State.save", "State.load"):
        return None
    return {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir())}


def resident():
    """Bytes of memory the process holds; 0 where the system does not say."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def main(seed, first, count, folder):
    os.chdir(folder)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    set_num_threads(1)
    counts, warm = {name: [0, 0] for name in CALLS}, 0
    number = os.open("number", os.O_WRONLY | os.O_CREAT)
    for index in range(first, first + count):
        os.pwrite(number, b"%20d" % index, 0)
        if index - first == count // 4:
            warm = resident()
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir()
        call = None
        try:
            call = Call(seed, index)
            if count == 1:
                print(call, file=sys.stderr, flush=True)
            call.run()
        except BaseException:
            print(f"call {index} of seed {seed}: {call}", file=sys.stderr)
            raise
        counts[call.name][call.error is not None] += 1
    print(json.dumps(dict(counts=counts, compared=COMPARED[0], growth=resident() - warm)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(*map(int, sys.argv[1:4]), *(sys.argv[4:] or [scratch]))
