"""infini_attn.nn: the module against float64, in pieces, padded, converted."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, tables

import infini_attn.torch
from infini_attn import nn, reference

N, E = 8, 24
ODD = dict(heads=4, kv_heads=2, head_dim=10, segment_len=N)  # head_dim * heads is not E


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["own", "in a tensor"])
def states(request, monkeypatch):
    """Either kind of state; on devices they are tensors."""
    if request.param != "own":
        monkeypatch.setattr(nn, "infini_attention", infini_attn.torch.infini_attention)


def module(**options):
    torch.manual_seed(0)
    made = nn.InfiniAttention(E, **(ODD | options)).eval()
    made.beta.uniform_(-1, 1)
    return made


def hidden(batch, t, seed=0):
    return torch.randn(batch, t, E, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [
    {}, {"update": "linear", "empty_memory": "bypass"},
    {"rope_theta": None}, {"bias": True, "rope_theta": 100.0},
], ids=str)
def test_against_float64(options):
    made, x = module(**options), hidden(2, 3 * N + 5)
    weights = {name: p.double() for name, p in made.named_parameters()}

    def project(x, name):
        return F.linear(x, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias"))

    q, k, v = (project(x.double(), name).unflatten(-1, (-1, 10)).numpy() for name in "qkv")
    theta = options.get("rope_theta", 10000.0)
    rope = theta and tables(x.shape[1], theta ** (-torch.arange(5).double() / 5))
    out = reference.infini_attention(
        q, k, v, made.beta.numpy(), segment_len=N, update=options.get("update"),
        empty_memory=options.get("empty_memory"), return_state=False,
        rope=rope and [t.float().numpy() for t in rope],
    )
    assert_close(made(x)[0], project(torch.as_tensor(out).flatten(-2), "o"))


@pytest.mark.parametrize("pieces", [[10, 1, 13, 17, 1], [1] * 42], ids=["chunks", "tokens"])
def test_pieces_are_the_whole(states, pieces):
    made, x = module(), hidden(2, 42)
    state, outs = None, []
    for piece in x.split(pieces, dim=1):
        before = state
        out, state = made(piece, state=state)
        assert before is None or state is before
        outs.append(out)
    whole, after = made(x)
    assert_close(torch.cat(outs, 1), whole)
    memory = "M" if hasattr(after, "M") else "memory"
    assert_close(getattr(state, memory), getattr(after, memory))
    assert made(x, return_state=False)[1] is None


def test_streams_at_different_places_and_padding(states):
    """Two streams of a batch grow by different lengths; padding is on the left, then on the right."""
    made, x = module(), hidden(2, 40)
    state, lens = None, [0, 0]
    calls = [((21, 9), "left"), ((3, 1), "right"), ((1, 1), None), ((2, 6), "left"), ((5, 5), None)]
    for new, side in calls:
        width = max(new)
        call, mask = torch.full((2, width, E), torch.nan), torch.zeros(2, width)
        at = [slice(width - n, width) if side == "left" else slice(n) for n in new]
        for b, n in enumerate(new):
            call[b, at[b]], mask[b, at[b]] = x[b, lens[b] : lens[b] + n], 1
        # Of what `generate` hands over, the columns of earlier calls as well.
        mask = torch.cat([torch.ones(2, 4), mask], 1) if side == "left" else mask
        out, state = made(call, attention_mask=side and mask, state=state)
        lens = [n + more for n, more in zip(lens, new)]
        for b, n in enumerate(new):
            assert_close(out[b, at[b]], made(x[b : b + 1, : lens[b]])[0][0, -n:])
    assert np.array_equal(state.tokens, lens)


def test_no_tokens(states):
    made, x = module(), hidden(2, 5)
    out, state = made(x[:, :0])
    assert out.shape == (2, 0, E)
    out, state = made(x[:0])
    assert out.shape == (0, 5, E) and len(state) == 0
    before = made(x)[1]
    assert made(x[:, :0], attention_mask=torch.ones(2, 5), state=before)[0].shape == (2, 0, E)
    assert before.tokens.tolist() == [5, 5]


def test_position_embeddings_of_models():
    made, x = module(), hidden(2, 3 * N)
    expected = made(x)[0]
    cos, sin = (t.repeat(1, 1, 2) for t in made.tables(torch.arange(3 * N)[None]))
    for embeddings in [(cos, sin), (cos.expand(2, -1, -1), sin.expand(2, -1, -1))]:
        assert_close(made(x, position_embeddings=embeddings)[0], expected)
    with pytest.raises(ValueError, match=r"^position_embeddings: shapes \[1, 23, 10\] and"):
        made(x, position_embeddings=(cos[:, 1:], sin[:, 1:]))


def test_places_of_millions():
    """The rotation is exact where float32 no longer counts."""
    cos, sin = module().tables(torch.tensor([2**24 + 1, 2**24 + 2]))
    assert_close(cos[1, 0] * cos[0, 0] + sin[1, 0] * sin[0, 0], torch.tensor(1.0).cos(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_stay_float32(dtype):
    made, x = module(), hidden(1, 3 * N)
    gate, expected = made.beta.clone(), made(x)[0]
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made):
        other.to(dtype)
        assert other.beta.dtype == torch.float32 and torch.equal(other.beta, gate)
        out, _ = other(x.to(dtype))
        assert out.dtype == dtype
        assert_close(out, expected, 3e-2)
    assert made.beta._no_weight_decay and not hasattr(made.q_proj.weight, "_no_weight_decay")
    assert made.double().beta.dtype == torch.float32
    made.beta.grad = torch.ones_like(made.beta)
    assert made.to(dtype).beta.grad.dtype == torch.float32
    empty = nn.InfiniAttention(E, **ODD, device="meta", dtype=dtype).to_empty(device="cpu")
    assert empty.beta.dtype == torch.float32 and empty.q_proj.weight.dtype == dtype
    empty.load_state_dict(made.state_dict())
    assert torch.equal(empty.beta, gate)


def test_autocast():
    made, x = module(), hidden(2, 3 * N)
    expected = made(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = made(x)
        made(x[:, :1], state=state)
    assert out.dtype == torch.bfloat16 and state.problem.dtype == "bf16"
    assert_close(out, expected, 3e-2)


def test_what_is_refused():
    for options, text in [
        ({"heads": 5, "head_dim": None}, "^heads: 5 given, a divisor of embed_dim = 24 expected"),
        ({"heads": 0, "head_dim": None}, "^heads: 0 given"),
        ({"kv_heads": 3}, "^kv_heads: 3 given, a divisor of heads = 4"),
        ({"segment_len": 0}, "^segment_len: 0 given"),
        ({"update": "none"}, "^update: 'none' given"),
    ]:
        with pytest.raises(ValueError, match=text):
            module(**options)
    made, x = module(), hidden(2, N)
    for x, options, text in [
        (x[0], {}, r"^hidden: shape \[8, 24\] given, \[B, T, 24\] expected"),
        (x[..., 1:], {}, r"^hidden: shape \[2, 8, 23\] given"),
        (x, {"attention_mask": torch.ones(N)}, r"^attention_mask: shape \[8\] given"),
        (x, {"attention_mask": torch.ones(2, N - 1)}, r"^attention_mask: shape \[2, 7\] given"),
        (x, {"attention_mask": torch.full((2, N), 0.5)}, "^attention_mask"),
    ]:
        with pytest.raises(ValueError, match=text):
            made(x, **options)
    state = made(hidden(3, N), attention_mask=torch.ones(3, N).tril(5))[1]
    for wrong in (state, state[:2].fork([0, 0, 1])):
        for options in ({}, {"attention_mask": torch.ones(2, N)}):
            with pytest.raises(ValueError, match="^state: .*3"):
                made(hidden(2, N), state=wrong, **options)
    with pytest.raises(TypeError, match="^state: .* given, an infini_attn.State expected"):
        made(hidden(2, N), state=3)


def test_a_mask_of_another_batch_is_refused():
    made, x = module(), hidden(2, 5)
    for mask in (torch.ones(3, 5), [[1] * 5] * 3, torch.ones(2)):
        with pytest.raises(ValueError, match=r"attention_mask: shape .* given, \[B, T\] = \[2, 5\]"):
            made(x, attention_mask=mask)
    as_list, _ = made(x, attention_mask=[[1] * 5] * 2)
    assert torch.equal(as_list, made(x)[0])
