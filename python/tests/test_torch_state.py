"""`infini_attn.torch.State`: a state in one tensor, the same to the bit as one of `infini_attn`."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from oracle import tables, tensors

import infini_attn
from infini_attn import Problem, _core
from infini_attn.torch import SAFE_GLOBALS, State, _layout, infini_attention

N = 8
PROBLEM = Problem(heads=4, kv_heads=2, key_dim=16, value_dim=6, segment_len=N)
ROPE = tables(64, torch.tensor([1.0, 0.3, 0.05]))


def filled(tokens=(19, 8, 5), rope=None, **options):
    """A state of three streams, and the same of `infini_attn`."""
    q, k, v, beta = tensors(len(tokens), max(tokens), 4, 2, 16, 6)
    given = dict(seq_lens=list(tokens), rope=rope, segment_len=N)
    state = State(PROBLEM, len(tokens), **options)
    infini_attention(q, k, v, beta, state=state, inplace=True, **given)
    return state, infini_attn.infini_attention(q, k, v, beta, **given)[1]


def same(state, own):
    return state.to_state().__reduce__() == own.__reduce__()


def step(state, seed, rope=None):
    """Some tokens more; the output."""
    q, k, v, beta = tensors(len(state), 3, 4, 2, 16, 6, seed=seed)
    return infini_attn.infini_attention(q, k, v, beta, state=state, inplace=True, rope=rope)[0]


def test_parts_are_views_of_the_buffer():
    state, own = filled(rope=ROPE)
    assert state.memory.shape == (3, 2, 16, 6) and state.normalizer.shape == (3, 2, 16)
    assert state.open_k.shape == state.open_k_rotated.shape == (3, 2, 1, 16, N)
    assert state.open_v.shape == (3, 2, N, 6)
    assert torch.equal(state.memory, torch.from_numpy(own.M))
    assert torch.equal(state.normalizer, torch.from_numpy(own.z))
    assert state.counters.tolist() == [[19, 16, 3, 1], [8, 8, 0, 1], [5, 0, 5, 1]]
    for name in ("tokens", "committed", "open_len", "position"):
        assert getattr(state, name).tolist() == getattr(own, name).tolist(), name
    assert (
        state.nbytes == state.buffer.numel() and state.device == torch.device("cpu") and len(state) == 3
    )
    start = state.buffer.data_ptr()
    for part in (
        state.memory,
        state.normalizer,
        state.open_k,
        state.open_k_rotated,
        state.open_v,
        state.counters,
    ):
        assert 0 <= part.data_ptr() - start < state.nbytes and (part.data_ptr() - start) % 256 == 0
    state.memory.zero_()
    state.counters.zero_()
    assert not state.memory.any() and state.tokens.tolist() == [0, 0, 0]
    assert State(PROBLEM, rotation=False).open_k_rotated is None


@pytest.mark.parametrize("rotation", [False, True])
def test_the_layout_is_that_of_the_core(rotation):
    for heads, dk, dv, n in [
        (1, 1, 1, 1),
        (3, 5, 7, 300),
        (2, 16, 6, 8),
        (1, 64, 64, 2048),
        (8, 128, 128, 256),
    ]:
        problem = Problem(heads=heads, key_dim=dk, value_dim=dv, segment_len=n)
        text = _core._problem_text(problem)
        assert _core._problem_from_text(text) == problem
        for slots in (0, 1, 2, 3, 17):
            parts, size = _core._host_layout(text, slots, rotation)
            assert _layout.total(text, slots, rotation, "cpu") == size
            views = _layout.views(torch.empty(size, dtype=torch.uint8), text, slots, rotation)
            assert [name for name, *_ in parts] == list(views)
            for name, dtype, shape, offset in parts:
                view = views[name]
                assert list(view.shape) == shape and str(view.dtype) == f"torch.{dtype}"
                assert view.storage_offset() * view.itemsize == offset or 0 in shape


@pytest.mark.parametrize("rope", [None, ROPE])
def test_steps_are_those_of_the_other_state(rope):
    state, own = filled(rope=rope)
    assert same(state, own)
    for seed in range(6):
        assert torch.equal(step(state, seed, rope), step(own, seed, rope))
        assert same(state, own)
    for s in (state, own):
        s.flush([2])
        s.reset(torch.tensor([0]))
    assert same(state, own) and torch.equal(step(state, 7, rope), step(own, 7, rope))
    for s in (state, own):
        s.flush()
        s.reset()
    assert same(state, own) and not state.memory.any()


def test_conversion():
    for rope in (None, ROPE):
        state, own = filled(rope=rope)
        again = State.from_state(own)
        assert same(again, own) and again.problem == own.problem
        assert torch.equal(step(again, 1, rope), step(state, 1, rope))
    with pytest.raises(ValueError, match=r"rotated\[0\]: true given, false: the state has no room"):
        State.from_state(own, rotation=False)
    with pytest.raises(TypeError, match="state: int given, an infini_attn.State expected"):
        State.from_state(1)
    assert len(State.from_state(infini_attn.State(PROBLEM, 0))) == 0


def test_streams_taken_out_and_put_together():
    state, own = filled()
    for index in (0, -1, slice(1, 3), slice(None, None, -1), [2, 0], torch.tensor([1])):
        assert same(state[index], own[index])
    assert [part.tokens.tolist() for part in state] == [[19], [8], [5]]
    with pytest.raises(IndexError, match="index: -4 given, one of 3 streams expected"):
        state[-4]
    for index, error, text in [
        (torch.tensor([False, False, True]), TypeError, "index: dtype torch.bool given, integers"),
        ([0.5], TypeError, "index: dtype torch.float32 given, integers"),
        (None, TypeError, "index: NoneType given, integers"),
        ([[0], [1]], ValueError, r"index: shape \[2, 1\] given"),
    ]:
        with pytest.raises(error, match=text):
            state[index]
    with pytest.raises(TypeError, match=r"states\[1\]: int given, an infini_attn.torch.State"):
        State.concat([state, 1])
    twice = [2, 0, 2, 1]
    assert same(state.fork(twice), own.fork(twice)) and same(
        state.index_select(torch.tensor(twice)), own.fork(twice)
    )
    assert same(State.concat([state, state[0]]), infini_attn.State.concat([own, own[0]]))
    mixed = State.concat([filled(rotation=False)[0], filled(rope=ROPE)[0]])
    assert mixed.rotation and same(mixed, infini_attn.State.concat([own, filled(rope=ROPE)[1]]))
    fork = state.fork()
    step(fork, 1)
    assert same(state, own) and not torch.equal(fork.buffer, state.buffer)


def test_slots_copied_and_cut_short():
    state, own = filled()
    other = State(PROBLEM, 4)
    other.copy_slots(state, [(2, 0), (0, 3)])
    assert same(other[0], own[2]) and same(other[3], own[0]) and other.tokens.tolist() == [5, 0, 0, 19]
    state.copy_slots(state, [(0, 1)])
    assert same(state, own.fork([0, 0, 2]))
    state.truncate(2, 3)
    assert state.tokens.tolist() == [19, 19, 3] and state.open_len.tolist() == [3, 3, 3]
    before = state.buffer.clone()
    with pytest.raises(ValueError, match="tokens: 15 given for slot 0, at least 16 expected"):
        state.truncate(0, 15)
    with pytest.raises(
        ValueError, match=r"pairs\[1\] \(to\): 2 given, a slot other than that of pairs\[0\]"
    ):
        state.copy_slots(other, [(0, 2), (1, 2)])
    with pytest.raises(ValueError, match=r"pairs\[0\] \(to\): 1 given, a slot that is not copied"):
        state.copy_slots(state, [(0, 1), (1, 0)])
    with pytest.raises(TypeError, match="source: an infini_attn.State given"):
        state.copy_slots(own, [(0, 0)])
    with pytest.raises(ValueError, match="slot: -1 given, less than the state's 3 slots expected"):
        state.truncate(-1, 0)
    with pytest.raises(ValueError, match="tokens: -1 given, at least 0 expected"):
        state.truncate(1, -1)
    with pytest.raises(ValueError, match="source: .* given, a state of the same problem"):
        state.copy_slots(State(Problem(heads=1, key_dim=8)), [(0, 0)])
    with pytest.raises(ValueError, match=r"slots\[1\]: 3 given, less than the state's 3 slots expected"):
        state.fork([0, 3])
    with pytest.raises(ValueError, match=r"slots\[0\]: 3 given, less than the state's 3 slots expected"):
        state.reset([3])
    with pytest.raises(ValueError, match="states: 0 given, at least 1"):
        State.concat([])
    assert torch.equal(state.buffer, before)


def test_a_number_of_streams_of_any_type():
    for number in (np.int64(2), torch.tensor(2)):
        state = State(PROBLEM, number)
        assert type(state.sequences) is int and int(number) == 2
        assert State.from_buffer(state.buffer, PROBLEM, number).sequences == 2


def test_copies():
    state, own = filled(rope=ROPE)
    file = io.BytesIO()
    torch.save(state, file)
    load = lambda **how: torch.load(io.BytesIO(file.getvalue()), **how)
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        loaded = load(weights_only=True)
    copies = [state.clone(), copy.copy(state), copy.deepcopy(state), loaded, state.fork(),
              load(weights_only=False), pickle.loads(pickle.dumps(state))]  # fmt: skip
    step(state, 1, ROPE)
    for other in copies:
        assert same(other, own) and other.rotation and len(other) == 3
    assert state.to("cpu") is state and state.cpu() is state
    meta = state.to("meta")
    assert meta.device.type == "meta" and meta.memory.shape == state.memory.shape


def test_files_are_those_of_the_other_state(tmp_path):
    state, own = filled(rope=ROPE)
    state.save(tmp_path / "a")
    own.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert same(State.load(tmp_path / "b", PROBLEM), own)
    with pytest.raises(ValueError, match="state: made for heads = 4, the call has heads = 1"):
        State.load(tmp_path / "a", Problem(heads=1, key_dim=8))


def test_a_buffer_of_a_module():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", State(PROBLEM, 3).buffer)

        def forward(self, seed):
            return step(State.from_buffer(self.state, PROBLEM, 3), seed)

    layer, other = Layer(), Layer()
    own = infini_attn.State(PROBLEM, 3)
    for seed in range(4):
        assert torch.equal(layer(seed), step(own, seed))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(9), step(own, 9))
    with pytest.raises(
        ValueError, match=r"buffer: shape \[\d+\] given, \[\d+\] \(contiguous\) expected"
    ):
        State.from_buffer(layer.state, PROBLEM, 2)
    with pytest.raises(TypeError, match="buffer: dtype torch.float32 given, torch.uint8"):
        State.from_buffer(torch.zeros(8), PROBLEM)


def test_spoiled_counters_are_refused():
    state, _ = filled()
    for at, value, message in [
        ((1, 0), -1, r"tokens\[1\]: -1 given, at least 0"),
        ((0, 2), N, r"open_len\[0\]: 8 given, less than segment_len = 8"),
        ((2, 1), 6, r"committed\[2\]: 6 given, at most tokens\[2\] = 5"),
        ((2, 3), 2, r"rotated\[2\]: 2 given, 0 or 1"),
    ]:
        spoiled = state.clone()
        spoiled.counters[at] = value
        before = spoiled.buffer.clone()
        for call in (lambda: step(spoiled, 0), spoiled.flush, spoiled.reset, spoiled.to_state):
            with pytest.raises(ValueError, match=message):
                call()
        assert torch.equal(spoiled.buffer, before)
