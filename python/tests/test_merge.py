"""Merging: partial attentions, linear memories, maps of delta memories."""

import numpy as np
import pytest
import torch
from oracle import TOLERANCE, assert_close, runs, tensors

from infini_attn import (
    KeySums,
    State,
    apply,
    compose,
    infini_attention,
    key_sums,
    merge_memories,
    merge_partials,
    segment_map,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_partials(dtype):
    torch.manual_seed(0)
    logits, v = torch.randn(2, 4, 10, 30).double() * 4, torch.randn(2, 4, 30, 8).double()
    logits[:, :, 3, :12] = -torch.inf  # a row the first part has nothing for
    logits[:, :, 5] = -torch.inf  # and one that nobody has anything for
    a_dot, lse = [], []
    for part in (slice(0, 12), slice(12, 13), slice(13, 30)):
        weights = logits[..., part].softmax(-1).nan_to_num()
        a_dot.append((weights @ v[:, :, part]).transpose(1, 2).to(dtype))
        lse.append(logits[..., part].logsumexp(-1).float())
    out, total = merge_partials(a_dot, lse, return_lse=True)
    expected = (logits.softmax(-1).nan_to_num() @ v).transpose(1, 2)
    assert out.dtype == dtype and total.dtype == torch.float32
    assert_close(out, expected, 2 * TOLERANCE[dtype])
    assert (out[:, 5] == 0).all() and (total[:, :, 5] == -torch.inf).all()
    rows = [t for t in range(10) if t != 5]
    assert_close(total[:, :, rows], logits.logsumexp(-1)[:, :, rows])
    assert torch.equal(merge_partials(a_dot, lse), out)
    if dtype != torch.bfloat16:
        arrays = merge_partials([x.numpy() for x in a_dot], [x.numpy() for x in lse])
        assert isinstance(arrays, np.ndarray) and np.array_equal(arrays, out.numpy())


def test_linear_memories_add():
    q, k, v, beta = tensors(2, 90, 4, 2, 8, 6)
    _, whole = infini_attention(q, k, v, beta, segment_len=16, update="linear")
    states = []
    for run in runs([32, 16, 42], q, k, v):
        states.append(infini_attention(*run, beta, segment_len=16, update="linear")[1])
    merged = merge_memories(states)
    assert_close(merged.M, whole.M)
    assert_close(merged.z, whole.z)
    assert merged.tokens.tolist() == [90, 90] and merged.open_len.tolist() == [10, 10]
    rest = tensors(2, 20, 4, 2, 8, 6, seed=1)
    out = [infini_attention(*rest[:3], beta, state=s, return_state=False) for s in (merged, whole)]
    assert_close(*out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_memories_compose(dtype):
    q, k, v, beta = tensors(2, 112, 4, 2, 8, 6, dtype=dtype)
    first, *others = runs([32, 32, 16, 32], q, k, v)
    _, state = infini_attention(*first, beta, segment_len=16)
    _, whole = infini_attention(q, k, v, beta, segment_len=16)
    assert whole.open_len.tolist() == [0, 0]
    problem, before, maps = state.problem, KeySums.from_state(state), []
    for _, keys, values in others:
        maps.append(segment_map(problem, keys, values, before))
        before = before + key_sums(problem, keys)
    assert before.tokens.tolist() == [112, 112]
    assert_close(before.sums, whole.z)
    total = compose(maps[0], compose(maps[1], maps[2]))
    assert total.tokens.tolist() == [80, 80]
    assert total.A.shape == (2, 2, 8, 8) and total.B.shape == (2, 2, 8, 6)
    assert_close(total.dz, whole.z - state.z)
    after = apply(total, state)
    assert state.tokens.tolist() == [32, 32] and after.tokens.tolist() == [112, 112]
    assert_close(after.M, whole.M)
    assert_close(after.z, whole.z)
    assert_close(total.A @ state.M + total.B, whole.M)
    for part in maps:
        assert apply(part, state, inplace=True) is state
    assert_close(state.M, whole.M)


def test_the_first_run_finds_nothing():
    _, k, v, _ = tensors(1, 48, 2, 2, 8)
    _, whole = infini_attention(k, k, v, [0.0, 0.0], segment_len=16)
    problem = whole.problem
    part = segment_map(problem, k.numpy(), v.numpy(), KeySums.zero(problem))
    after = apply(part, State(problem))
    assert_close(after.M, whole.M)
