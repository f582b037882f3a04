"""Sequences of several lengths in one call: packed, padded on either side, in any slots of a state."""

import numpy as np
import pytest
import torch
from oracle import assert_close, tables, tensors

from infini_attn import Problem, State, infini_attention, reference

N = 8
LENS = [19, 0, 21, 30]  # all in the same way through the operator as alone: by prefill
ASKED = dict(return_lse=True, return_parts=True)
ROPE = tables(64, torch.tensor([1.0, 0.3, 0.05]))


def streams(lens, dtype=torch.float32):
    """q, k, v [1, T, H, D] of each sequence, and the gate of all."""
    made = [tensors(1, n, 4, 2, 16, 8, dtype=dtype, seed=n) for n in lens]
    return [x[:3] for x in made], tensors(1, 1, 4, 2, 16)[3]


def packed(streams):
    return [torch.cat(x, dim=1)[0] for x in zip(*streams)]


def padded(streams, ranges, t):
    """[B, T, H, D] with the streams at `ranges`, NaN elsewhere: padding is never read."""
    batch = [torch.full((len(streams), t, *x.shape[2:]), torch.nan).to(x.dtype) for x in streams[0]]
    for b, (stream, at) in enumerate(zip(streams, ranges)):
        for to, x in zip(batch, stream):
            to[b, at] = x[0]
    return batch


def alone(streams, beta, states=None, **options):
    """Each sequence by a call of its own."""
    states = states or [None] * len(streams)
    return [
        infini_attention(*x, beta, segment_len=N, state=s, **options, **ASKED) for x, s in zip(streams, states)
    ]


def assert_same(results, b, at, expected):
    """Results of sequence `b`, which lie at `at` (an index of o; the last of it counts tokens)."""
    out, _, lse, a_dot, a_mem = results
    heads = (*at[:-1], slice(None), at[-1])
    for got, right in zip((out[at], lse[heads], a_dot[at], a_mem[at]), (expected[0], *expected[2:])):
        assert np.array_equal(got, right[0])
    for name in ("M", "z", "tokens", "committed", "open_len"):
        assert np.array_equal(getattr(results[1], name)[b], getattr(expected[1], name)[0]), name


FORMS = [list, lambda x: np.array(x, np.int32), np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rope", [None, ROPE])
def test_packed_sequences_are_those_of_calls_of_their_own(dtype, rope):
    sequences, beta = streams(LENS, dtype)
    cu = np.cumsum([0, *LENS]).tolist()
    expected = alone(sequences, beta, rope=rope)
    for given in FORMS:
        results = infini_attention(
            *packed(sequences), beta, segment_len=N, cu_seqlens=given(cu), rope=rope, **ASKED
        )
        assert results[0].shape == (70, 4, 8) and results[2].shape == (4, 70)
        assert results[1].sequences == 4 and results[1].tokens.tolist() == LENS
        for b in range(4):
            at = (slice(cu[b], cu[b + 1]),)
            out, state, lse, *parts = results
            right = expected[b]
            for got, r in zip((out[at], *(p[at] for p in parts)), (right[0], *right[3:])):
                assert torch.equal(got, r[0])
            assert torch.equal(lse[:, at[0]], right[2][0])
            assert np.array_equal(state.M[b], right[1].M[0])


def test_packed_numpy_arrays_and_single_tokens():
    lens = [1, 3, 0, 16]
    sequences, beta = streams(lens)
    arrays = [x.numpy() for x in packed(sequences)]
    cu = np.cumsum([0, *lens])
    state = infini_attention(*arrays, beta.numpy(), segment_len=N, cu_seqlens=cu)[1]
    out, _ = infini_attention(*arrays, beta, state=state, cu_seqlens=cu.tolist(), inplace=True)
    assert isinstance(out, np.ndarray) and out.shape == (20, 4, 8)
    assert state.tokens.tolist() == [2, 6, 0, 32]
    twice = [infini_attention(*x, beta, segment_len=N)[1] for x in sequences]
    for b, x in enumerate(sequences):
        right = infini_attention(*x, beta, state=twice[b])[0]
        assert np.array_equal(out[cu[b] : cu[b + 1]], right[0])


def test_packed_positions():
    sequences, beta = streams(LENS)
    cu = np.cumsum([0, *LENS]).tolist()
    options = dict(segment_len=N, cu_seqlens=cu, rope=ROPE)
    expected = infini_attention(*packed(sequences), beta, **options)[0]
    each = [t for n in LENS for t in range(n)]
    for positions in (each, np.array(each), torch.tensor(each, dtype=torch.int32)):
        same = infini_attention(*packed(sequences), beta, positions=positions, **options)[0]
        assert torch.equal(same, expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("given", FORMS)
def test_slots_are_the_streams_that_advance(given, inplace):
    problem = Problem(heads=4, kv_heads=2, key_dim=16, value_dim=8, segment_len=N)
    first, beta = streams([17, 18, 19, 20, 21])
    states = [infini_attention(*x, beta, segment_len=N)[1] for x in first]
    pool = State.concat(states)
    assert pool.problem == problem
    before = pool.fork()
    sequences, _ = streams([30, 40, 50])
    slots, cu = [4, 0, 2], [0, 30, 70, 120]
    expected = alone(sequences, beta, [states[s] for s in slots])
    out, state, *_ = infini_attention(
        *packed(sequences), beta, state=pool, slots=given(slots), cu_seqlens=cu, inplace=inplace, **ASKED
    )
    assert (state is pool) == inplace and len(state) == 5
    for b, slot in enumerate(slots):
        assert torch.equal(out[cu[b] : cu[b + 1]], expected[b][0][0])
        assert np.array_equal(state.M[slot], expected[b][1].M[0])
        assert np.array_equal(state.tokens[slot], expected[b][1].tokens[0])
    for slot in (1, 3) if inplace else range(5):
        assert pool[slot].__reduce__()[1] == before[slot].__reduce__()[1]


def test_slots_of_full_and_padded_batches():
    q, k, v, beta = tensors(2, 20, 4, 2, 16)
    pool = State(Problem(heads=4, kv_heads=2, key_dim=16, segment_len=N), 4)
    expected = infini_attention(q, k, v, beta, segment_len=N)
    out, state = infini_attention(q, k, v, beta, state=pool, slots=[3, 1])
    assert torch.equal(out, expected[0]) and state.tokens.tolist() == [0, 20, 0, 20]
    assert np.array_equal(state.M[[3, 1]], expected[1].M) and not state.M[[0, 2]].any()
    lens = [18, 20]
    out, state = infini_attention(q, k, v, beta, state=pool, slots=[3, 1], seq_lens=lens)
    assert state.tokens.tolist() == [0, 20, 0, 18]
    # Without a state there are as many streams as sequences.
    _, state = infini_attention(q, k, v, beta, segment_len=N, slots=[1, 0])
    assert np.array_equal(state.M[[1, 0]], expected[1].M)


MASKS = [
    lambda m: m,
    lambda m: m.bool(),
    lambda m: m.int(),
    lambda m: m.float(),
    lambda m: m.bfloat16(),
    lambda m: m.numpy().astype(bool),
    lambda m: m.numpy().astype(np.float64)[:, ::-1].copy()[:, ::-1],
    lambda m: m.numpy().astype(np.uint8),
    lambda m: m.tolist(),
    lambda m: m.bool().tolist(),
    lambda m: m.t().contiguous().t(),
]


def mask_of(ranges, t):
    mask = torch.zeros(len(ranges), t, dtype=torch.int64)
    for b, at in enumerate(ranges):
        mask[b, at] = 1
    return mask


# Left, none, all, right, both sides.
RANGES = [slice(11, 30), slice(4, 4), slice(0, 30), slice(0, 21), slice(5, 23)]


@pytest.mark.parametrize("rope", [None, ROPE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_sequences_are_those_of_calls_of_their_own(dtype, rope):
    lens = [at.stop - at.start for at in RANGES]
    sequences, beta = streams(lens, dtype)
    expected = alone(sequences, beta, rope=rope)
    batch, mask = padded(sequences, RANGES, 30), mask_of(RANGES, 30)
    for given in MASKS:
        results = infini_attention(
            *batch, beta, segment_len=N, attention_mask=given(mask), rope=rope, **ASKED
        )
        out, state, lse, a_dot, a_mem = (x.float().numpy() if isinstance(x, torch.Tensor) else x for x in results)
        right = [[x.float().numpy() if isinstance(x, torch.Tensor) else x for x in e] for e in expected]
        for b, at in enumerate(RANGES):
            assert_same((out, state, lse, a_dot, a_mem), b, (b, at), right[b])
        for x in (out, a_dot, a_mem):
            assert not x[mask.numpy() == 0].any()
        assert (lse.transpose(0, 2, 1)[mask.numpy() == 0] == -np.inf).all()
        assert state.tokens.tolist() == lens


def test_generation_from_prompts_padded_on_the_left():
    """As Hugging Face's generate calls: a padded prompt, then a token of each sequence by a mask that
    grows."""
    lens = [33, 18, 27]
    sequences, beta = streams([n + 5 for n in lens])
    ranges = [slice(33 - n, 38) for n in lens]
    q, k, v = padded(sequences, ranges, 38)
    mask = mask_of(ranges, 38)
    whole = alone(sequences, beta, rope=ROPE)
    alone_states = [infini_attention(*(x[:, :n] for x in s), beta, segment_len=N, rope=ROPE)[1] for s, n in zip(sequences, lens)]
    prompt = [x[:, :33] for x in (q, k, v)]
    _, state = infini_attention(*prompt, beta, segment_len=N, attention_mask=mask[:, :33], rope=ROPE)
    assert state.tokens.tolist() == lens
    for t in range(33, 38):
        step = [x[:, t : t + 1] for x in (q, k, v)]
        # The mask of one token is of ones.
        out, _ = infini_attention(
            *step, beta, state=state, attention_mask=mask[:, : t + 1][:, -1:], rope=ROPE, inplace=True
        )
        for b, n in enumerate(lens):
            own = [x[:, t - 33 + n : t - 32 + n] for x in sequences[b]]
            right, _ = infini_attention(*own, beta, state=alone_states[b], rope=ROPE, inplace=True)
            assert torch.equal(out[b], right[0])
            assert_close(right, whole[b][0][:, t - 33 + n : t - 32 + n])
    # The places that generate gives with a mask are what positions continue to.
    at = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    options = dict(segment_len=N, attention_mask=mask, rope=ROPE, return_state=False)
    continued = infini_attention(q, k, v, beta, **options)
    assert torch.equal(infini_attention(q, k, v, beta, positions=at, **options), continued)
    # One list for all goes by place in the row, and only distances count.
    shared = infini_attention(q, k, v, beta, positions=range(38), **options)
    assert_close(shared, continued)


def test_right_padding_is_that_of_seq_lens():
    q, k, v, beta = tensors(3, 30, 4, 2, 16)
    lens = [30, 0, 17]
    mask = mask_of([slice(0, n) for n in lens], 30)
    by_lens = infini_attention(q, k, v, beta, segment_len=N, seq_lens=lens, **ASKED)
    by_mask = infini_attention(q, k, v, beta, segment_len=N, attention_mask=mask, **ASKED)
    for i in (0, 2, 3, 4):
        assert torch.equal(by_lens[i], by_mask[i])
    assert by_lens[1].__reduce__()[1] == by_mask[1].__reduce__()[1]


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_the_reference_takes_the_same(update):
    lens = [5, 0, 21]
    sequences, beta = streams(lens)
    options = dict(segment_len=N, update=update, **ASKED)
    cu = np.cumsum([0, *lens])
    ranges = [slice(16, 21), slice(0, 0), slice(0, 21)]
    batch, mask = padded(sequences, ranges, 21), mask_of(ranges, 21)
    for args, layout in [
        (packed(sequences), dict(cu_seqlens=cu)),
        ([x.nan_to_num() for x in batch], dict(attention_mask=mask)),
    ]:
        got = infini_attention(*args, beta, **layout, **options)
        expected = reference.infini_attention(*args, beta, **layout, **options)
        for i in (0, 3, 4):
            assert_close(got[i], expected[i])
        finite = np.isfinite(expected[2])
        assert np.array_equal(finite, np.isfinite(got[2].numpy()))
        assert_close(got[2].numpy()[finite], expected[2][finite])
        assert_close(got[1].M, expected[1].M)
        # On, in other slots.
        got = infini_attention(*args, beta, state=got[1], slots=[2, 0, 1], **layout)
        expected = reference.infini_attention(*args, beta, state=expected[1], slots=[2, 0, 1], **layout)
        assert_close(got[0], expected[0])
        assert got[1].tokens.tolist() == expected[1].tokens.tolist() == [5, 21, 26]


def test_no_sequences():
    q, k, v, beta = tensors(1, 0, 4, 2, 16)
    out, state, lse, *_ = infini_attention(q[0], k[0], v[0], beta, cu_seqlens=[0], **ASKED)
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0) and len(state) == 0
    out, state = infini_attention(q, k, v, beta, attention_mask=torch.ones(1, 0))
    assert out.shape == (1, 0, 4, 16) and state.tokens.tolist() == [0]
