"""What the host remembers of a buffer, and when it must not (infini_attn.torch._held): for CUDA devices,
but it is all host code."""

from types import SimpleNamespace

import pytest
import torch

from infini_attn import Problem, _core
from infini_attn.torch import State, _cpu, _held

KEY = "a problem", 2, True


class Host:
    """Stands for the host's side of a state."""

    copies = 0

    def copy(self):
        copy = Host()
        copy.copies = self.copies + 1
        return copy


@pytest.fixture
def buffer():
    buffer = torch.zeros(64, dtype=torch.uint8)
    _held.note(buffer, KEY, Host())
    return buffer


def test_it_is_known_until_somebody_writes(buffer):
    host = _held.known(buffer, KEY)
    assert host is not None and _held.known(buffer, KEY) is host
    assert _held.known(buffer, ("a problem", 3, True)) is None
    buffer.clone(), buffer[3:].sum(), buffer.view(torch.int32)
    assert _held.known(buffer, KEY) is host
    _held.note(buffer, KEY, host)
    assert _held.known(buffer, KEY) is host
    _held.note(buffer, KEY, None)
    assert _held.known(buffer, KEY) is None
    _held.note(buffer, KEY, host)
    _held.forget(buffer)
    assert _held.known(buffer, KEY) is None


@pytest.mark.parametrize("write", [
    lambda buffer: buffer.copy_(torch.ones_like(buffer)),
    lambda buffer: buffer.detach().zero_(),
    lambda buffer: torch.add(buffer, 1, out=buffer),
    # An operator that was given another view of the same memory.
    lambda buffer: _held.note(buffer[:], KEY, Host()),
])  # fmt: skip
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_others_that_write(buffer, write, mode):
    with mode():
        write(buffer)
    assert _held.known(buffer, KEY) is None


def test_parts_that_are_written_to(buffer):
    buffer[8:16].view(torch.int64).fill_(3)
    assert _held.known(buffer, KEY) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("read", [False, True], ids=["in place", "read before"])
def test_a_compiled_graph_that_writes(mode, backend, read, monkeypatch):
    """Whether the operator is given the buffer itself, or a copy that is written back."""
    problem = Problem(heads=1, key_dim=8, segment_len=4)
    state, x = State(problem, 1), torch.randn(1, 1, 1, 8)
    key = _core._problem_text(problem), 1, True

    def advance(*arguments, **options):
        _held.meet(arguments[4], key)
        results = _core._advance(*arguments, **options)
        _held.note(arguments[4], key, "moved by the operator")
        return results

    monkeypatch.setattr(_cpu, "_core", SimpleNamespace(_advance=advance))

    @torch.compile(fullgraph=True, backend=backend)
    def step(x, buffer):
        before = buffer + 0 if read else None
        o, _ = torch.ops.infini_attn.decode_(x * 2, x, x, torch.zeros(1), buffer, 1, key[0], True)
        return o + 1, before

    with mode():
        for count in (1, 2, 3):
            _held.note(state.buffer, key, "not told")
            step(x, state.buffer)
            assert state.tokens.tolist() == [count]
            assert _held.known(state.buffer, key) in (None, "moved by the operator")
    torch._dynamo.reset()


def test_a_buffer_that_nobody_told_of(buffer):
    """A call on what may be a copy of any of the same problem."""
    other = torch.zeros(64, dtype=torch.uint8)
    _held.note(other, ("another problem", 2, True), Host())
    _held.meet(buffer, KEY)
    assert _held.known(buffer, KEY) is not None
    _held.meet(torch.zeros(64, dtype=torch.uint8), KEY)
    assert _held.known(buffer, KEY) is None
    assert _held.known(other, ("another problem", 2, True)) is not None


def test_a_graph_is_never_known_again(buffer):
    _held.join_graph(buffer[:])
    assert _held.known(buffer, KEY) is None
    _held.note(buffer, KEY, Host())
    assert _held.known(buffer, KEY) is None


def test_copies_and_what_is_gone(buffer):
    copy = buffer.clone()
    assert _held.known(copy, KEY) is None
    _held.copy(copy, buffer, KEY)
    assert _held.known(copy, KEY).copies == 1
    other = torch.zeros(64, dtype=torch.uint8)
    _held.copy(other, torch.zeros(64), KEY)
    assert _held.known(other, KEY) is None
    before = len(_held._held)
    del copy
    assert len(_held._held) < before


def test_inference_tensors_are_not_remembered():
    with torch.inference_mode():
        buffer = torch.zeros(64, dtype=torch.uint8)
        _held.note(buffer, KEY, Host())
        assert _held.known(buffer, KEY) is None
        # States are made of tensors that know when they are written to.
        assert not State(Problem(heads=1, key_dim=8, segment_len=4), 1).buffer.is_inference()
