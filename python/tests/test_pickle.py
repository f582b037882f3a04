"""Problems, key sums and segment maps as values: equal, copied, pickled, put together from their parts."""

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from oracle import tensors

import infini_attn
from infini_attn import KeySums, Problem, SegmentMap, infini_attention, key_sums, segment_map

PROBLEMS = [
    Problem(heads=4, key_dim=8),
    Problem(heads=4, kv_heads=2, key_dim=8, value_dim=6, segment_len=16, update="linear", scale=0.3,
            empty_memory="bypass", denominator=["clamp", 1e-10], dtype="bf16"),
    Problem(heads=4, key_dim=8, denominator=("add", 0.1)),
]  # fmt: skip


def values():
    q, k, v, beta = tensors(2, 40, 4, 2, 8, 6)
    _, state = infini_attention(q, k, v, beta, segment_len=16)
    sums = key_sums(state.problem, k)
    return dict(problem=state.problem, sums=sums, map=segment_map(state.problem, k, v, sums), state=state)


def same(a, b):
    if isinstance(a, infini_attn.State):
        return a.__reduce__() == b.__reduce__()
    return a == b and not a != b


def test_values():
    for name, value in values().items():
        for other in (pickle.loads(pickle.dumps(value, protocol)) for protocol in (2, 5)):
            assert type(other) is type(value) and same(value, other), name
        if name != "state":
            assert copy.copy(value) is value and copy.deepcopy(value) is value
            assert value != 1 and value != PROBLEMS[1]


def test_problems_are_keys():
    for p in PROBLEMS:
        again = pickle.loads(pickle.dumps(p))
        assert again == p and hash(again) == hash(p) and eval(repr(p)) == p
    assert {p: i for i, p in enumerate(PROBLEMS)}[copy.copy(PROBLEMS[1])] == 1
    assert len(set(PROBLEMS)) == 3
    assert PROBLEMS[1].denominator == ("clamp", 1e-10)


def test_key_sums_and_maps_are_no_keys():
    _, sums, map, _ = values().values()
    for value in (sums, map):
        with pytest.raises(TypeError, match="unhashable"):
            hash(value)


def test_from_parts():
    problem, sums, map, _ = values().values()
    assert sums.problem == map.problem == problem
    assert KeySums(problem, sums=sums.sums, tokens=sums.tokens) == sums
    assert KeySums(problem, sums=torch.from_numpy(sums.sums), tokens=[40, 40]) == sums
    assert KeySums(problem, sums=sums.sums * 2, tokens=sums.tokens) != sums
    assert sums + KeySums.zero(problem, 2) == sums
    parts = dict(A=map.A, B=map.B, dz=map.dz, tokens=map.tokens)
    assert map.before == sums and SegmentMap(sums, **parts) == map
    for name, part in parts.items():
        assert SegmentMap(sums, **{**parts, name: part * 2}) != map


def test_torch_load_of_weights_only():
    given, file = values(), io.BytesIO()
    torch.save(given, file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    with torch.serialization.safe_globals(infini_attn.SAFE_GLOBALS):
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert loaded.keys() == given.keys() and all(same(given[n], loaded[n]) for n in given)


@pytest.mark.parametrize("name", ["sums", "map"])
def test_spoiled_pickles_are_refused(name):
    make, (first, *parts) = values()[name].__reduce__()
    for i, part in enumerate(parts):
        for bad in (part[:-1], part[:-8], part + bytes(8), b""):
            with pytest.raises(ValueError):
                make(first, *parts[:i], bad, *parts[i + 1 :])
    with pytest.raises(TypeError):
        make(None, *parts)


def test_a_spawned_worker_loads_them():
    given = values()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        back = pool.apply(dict, (given,))
    assert all(same(given[name], back[name]) for name in given)


def test_counts_beyond_a_stream_s_are_refused():
    p = PROBLEMS[0]
    before = KeySums(p, sums=np.ones((1, 4, 8)), tokens=[2**62])
    parts = dict(A=np.zeros((1, 4, 8, 8)), B=np.zeros((1, 4, 8, 8)), dz=np.ones((1, 4, 8)))
    with pytest.raises(ValueError, match="run .sequence 0.: 1 tokens after 4611686018427387904"):
        SegmentMap(before, tokens=[1], **parts)
