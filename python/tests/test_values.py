"""What comes in besides plain tensors: gates and tables in other forms, arrays of other libraries."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import Array, tables, tensors

from infini_attn import Problem, State, infini_attention, key_sums, merge_partials

Q, K, V, BETA = tensors(2, 20, 4, 2, 8)


def attend(beta=BETA, **options):
    return infini_attention(Q, K, V, beta, segment_len=8, return_state=False, **options)


INTEGERS = [1, -2, 0, 3]


@pytest.mark.parametrize("beta", [
    INTEGERS, tuple(INTEGERS), np.array(INTEGERS, np.int8), torch.tensor(INTEGERS), np.array(INTEGERS, ">f4"),
    np.array(INTEGERS, np.longdouble), np.array(INTEGERS, ml_dtypes.bfloat16), Array(torch.tensor(INTEGERS, dtype=torch.int16)),
    torch.tensor(INTEGERS).view(1, 4, 1, 1), np.array([INTEGERS]).T, torch.tensor([INTEGERS, INTEGERS]).double()[1],
    torch.tensor(INTEGERS, dtype=torch.float16).repeat_interleave(2)[::2], np.array([*INTEGERS, 9.0])[:-1],
    np.frombuffer(b"\0" + np.array(INTEGERS, np.float32).tobytes(), np.uint8)[1:].view(np.float32),
])  # fmt: skip
def test_a_gate_in_any_form(beta):
    assert torch.equal(attend(beta), attend(torch.tensor(INTEGERS, dtype=torch.float32)))


@pytest.mark.parametrize("beta", [
    0.5, np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.nn.Parameter(torch.tensor(0.5), requires_grad=False),
    [0.5], torch.full((1, 1), 0.5), Array(torch.tensor(0.5)),
])  # fmt: skip
def test_one_number_for_all_heads(beta):
    assert torch.equal(attend(beta), attend([0.5] * 4))


def test_the_gate_is_read_anew():
    beta = torch.zeros(4)
    for value in (0.0, 2.0):
        beta.fill_(value)
        assert torch.equal(attend(beta), attend([value] * 4))


@pytest.mark.parametrize("array", [list, np.array, torch.tensor])
def test_a_gate_beyond_f32_is_the_limit(array):
    many = array([1e300, -1e300, 1e39, -1e39])
    assert torch.equal(attend(many), attend([float("inf"), float("-inf")] * 2))


def hugging_face(rows, interleaved):
    """cos and sin [rows, 8], every frequency twice, and the same as [rows, 4]."""
    pair = tables(rows, torch.tensor([1.0, 0.3, 0.1, 0.03]))
    twice = (lambda x: x.repeat_interleave(2, -1)) if interleaved else (lambda x: torch.cat([x, x], -1))
    return [twice(x) for x in pair], pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", ["[T, D]", "[1, T, D]", "[B, T, D]", "[positions, D]", "numpy"])
def test_the_error_about_hugging_face_s_tables_says_how_to_convert_them(form, interleaved, dtype):
    doubled, halves = hugging_face(40 if form == "[positions, D]" else 20, interleaved)
    (cos, sin), halves = ([x.to(dtype) for x in pair] for pair in (doubled, halves))
    if form == "[1, T, D]":
        cos, sin = cos[None], sin[None]
    elif form == "[B, T, D]":
        cos, sin = cos.expand(2, -1, -1), sin.expand(2, -1, -1)
    elif form == "numpy":
        if dtype == torch.bfloat16:
            pytest.skip("NumPy has none")
        cos, sin = cos.numpy().astype(np.float64), sin.numpy().astype(np.float64)
    with pytest.raises(ValueError, match="rope: tables .* that hold every frequency twice") as refused:
        attend(rope=(cos, sin))
    (line,) = re.findall(r"that is (rope=.*) expected$", str(refused.value))
    names = dict(cos=cos, sin=sin, torch=torch, numpy=np, range=range)
    given = eval(f"dict({line})", {"__builtins__": {"dict": dict}}, names)
    assert given.get("rope_interleaved", False) == interleaved
    expected = attend(rope=[x.float() for x in halves], rope_interleaved=interleaved)
    assert torch.equal(attend(**given), expected)


def test_other_tables_of_a_wrong_shape():
    cos, sin = tables(20, torch.arange(1.0, 9.0))
    for pair in [(cos, sin), (cos[None], sin[None]), (cos[None, :5], sin[None, :5])]:
        with pytest.raises(ValueError, match="rope.cos: shape"):
            attend(rope=pair)


def test_arrays_of_other_libraries():
    expected = attend(return_lse=True)
    q, k, v = map(Array, (Q, K, V))
    beta = Array(BETA)
    out, state, lse = infini_attention(q, k, v, beta, segment_len=8, return_lse=True)
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    assert np.array_equal(out, expected[0]) and np.array_equal(lse, expected[1])
    # Beside NumPy's.
    assert np.array_equal(infini_attention(Q.numpy(), k, v, BETA, segment_len=8)[0], out)
    lens = Array(torch.tensor([3, 20], dtype=torch.int32))
    assert infini_attention(q, k, v, beta, seq_lens=lens)[1].tokens.tolist() == [3, 20]
    problem = Problem(heads=4, kv_heads=2, key_dim=8, segment_len=8)
    assert key_sums(problem, k) == key_sums(problem, K)
    assert isinstance(merge_partials([Array(expected[0])], [Array(expected[1])]), np.ndarray)


@pytest.mark.parametrize("array", [lambda x: x.view(torch.int16).numpy().view(ml_dtypes.bfloat16), Array])
def test_bfloat16_in_numpy(array):
    q, k, v = (x.bfloat16() for x in (Q, K, V))
    expected = infini_attention(q, k, v, BETA, segment_len=8)[0]
    out, state = infini_attention(*map(array, (q, k, v)), BETA, segment_len=8)
    assert out.dtype == ml_dtypes.bfloat16 and state.problem.dtype == "bf16"
    assert np.array_equal(out.view(np.int16), expected.view(torch.int16).numpy())


def test_slots_are_one_or_a_list():
    state = State(Problem(heads=1, key_dim=2), 3)
    for slot in (2, np.int64(2), torch.tensor(2), [2]):
        assert state.fork(slot).sequences == 1
