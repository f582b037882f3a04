"""Gradients of the operator in PyTorch against those of plain PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from oracle import TOLERANCE, assert_close, tables, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

import infini_attn
from infini_attn import Problem
from infini_attn.torch import State, infini_attention

N = 8
ROPE = tables(64, torch.tensor([1.0, 0.3, 0.05]))


def rotated(x, rope, positions, interleaved):
    """The first channels of x [H, T, D] rotated by rows of the tables."""
    cos, sin = (table.double()[positions] for table in rope)
    r = 2 * cos.shape[1]
    split = (lambda y: (y[..., ::2], y[..., 1::2])) if interleaved else (lambda y: y.chunk(2, dim=-1))
    a, b = split(x[..., :r])
    turned = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([turned, x[..., r:]], -1)


def composite(q, k, v, beta, *, update="delta", empty_memory="gate", denominator=None, rope=None,
              positions=None, interleaved=False, cut=None, memory=None, seen=0, scale=None):
    """One sequence, q [T, Hq, Dk] and so on: out, a_dot, a_mem [T, Hq, Dv], lse [Hq, T], M and z."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    positions = torch.arange(seen, seen + q.shape[1]) if positions is None else positions
    turn = (lambda x: x) if rope is None else (lambda x: rotated(x, rope, positions, interleaved))
    wide = lambda x: x.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    sigma = lambda x: F.elu(x) + 1
    kind, eps = denominator or ("exact", 0.0)
    bound = (lambda d: d.clamp(min=eps)) if kind == "clamp" else (lambda d: d + eps)
    retrieve = lambda s, m, z: s @ m / bound(s @ z[..., None])
    g = beta.sigmoid().view(-1, 1, 1)
    empty = memory is None
    m, z = memory or (k.new_zeros(k.shape[0], k.shape[2], v.shape[2]), k.new_zeros(k.shape[0], k.shape[2]))
    rows = []
    for i, (qs, qr, ks, kr, vs) in enumerate(zip(*(x.split(N, dim=1) for x in (q, turn(q), k, turn(k), v)))):
        if cut and i % cut == 0:
            m, z = m.detach(), z.detach()
        scores = qr @ wide(kr).mT * (scale or q.shape[-1] ** -0.5)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        a_dot = scores.softmax(-1) @ wide(vs)
        a_mem = torch.zeros_like(a_dot) if empty else retrieve(sigma(qs), wide(m), wide(z))
        out = a_dot if empty and empty_memory == "bypass" else g * a_mem + (1 - g) * a_dot
        rows.append((out, a_dot, a_mem, scores.logsumexp(-1)))
        if ks.shape[1] == N:
            known = 0 if empty or update == "linear" else retrieve(sigma(ks), m, z)
            m, z, empty = m + sigma(ks).mT @ (vs - known), z + sigma(ks).sum(1), False
    *outs, lse = (torch.cat(parts, dim=1) for parts in zip(*rows))
    return *(x.transpose(0, 1) for x in outs), lse, m, z


def leaves(*given):
    return [x.clone().requires_grad_() for x in given]


def weights(*shaped, seed=7):
    """Random weights of a loss, one for each tensor, as both sides round them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in shaped]


def loss(outputs, given):
    return sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, given))


def gradients(outputs, given, inputs):
    return torch.autograd.grad(loss(outputs, given), inputs)


def expected(given, inputs, *, parts=False, lse=False, memory=False, lens=None, **options):
    """The same gradients by the composite, of a batch [B, T, H, D]."""
    twins = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, beta = twins
    outs = []
    for b in range(q.shape[0]):
        first, end = (0, q.shape[1]) if lens is None else lens[b]
        own = options | ({"positions": options["positions"][b]} if "positions" in options else {})
        out, a_dot, a_mem, of_lse, m, z = composite(q[b, first:end], k[b, first:end], v[b, first:end], beta, **own)
        pad = lambda x, dim: F.pad(x, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [first, q.shape[1] - end])
        outs.append([pad(out, 0)] + [pad(of_lse, -1)] * lse + [pad(a_dot, 0), pad(a_mem, 0)] * parts + [m, z] * memory)
    stacked = [torch.stack(x) for x in zip(*outs)]
    return torch.autograd.grad(loss(stacked, given), twins)


def compare(got, wanted, dtype=torch.float32):
    # The gate's is a sum over all tokens, of outputs as they were rounded.
    factors = [1, 1, 1, 2 if dtype == torch.bfloat16 else 1]
    for a, b, factor in zip(got, wanted, factors):
        assert_close(a, b, factor * TOLERANCE[dtype])
    assert len(got) == len(wanted)


CASES = {
    "delta": {},
    "linear": dict(update="linear"),
    "bypass": dict(empty_memory="bypass"),
    "clamp": dict(denominator=("clamp", 40.0)),
    "add": dict(denominator=("add", 0.5), scale=0.4),
    "rope": dict(rope=ROPE),
    "interleaved": dict(rope=ROPE, interleaved=True, update="linear"),
    "positions": dict(rope=ROPE, positions=torch.stack([torch.arange(29), torch.arange(60, 31, -1)])),
    "truncated": dict(cut=1),
    "truncated by two": dict(cut=2, rope=ROPE),
}


def called(options):
    """The operator's names of the composite's options."""
    names = {"interleaved": "rope_interleaved", "cut": "bptt_segments"}
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype):
    """All outputs in the loss, of 29 tokens: three segments and an open one."""
    inputs = leaves(*tensors(2, 29, 4, 2, 16, 6, dtype=dtype))
    out, state, lse, a_dot, a_mem = infini_attn.infini_attention(
        *inputs, segment_len=N, return_lse=True, return_parts=True, **called(CASES[case])
    )
    assert isinstance(state, State)
    results = out, lse, a_dot, a_mem, state.memory, state.normalizer
    given = weights(*results)
    wanted = expected(given, inputs, parts=True, lse=True, memory=True, **CASES[case])
    compare(gradients(results, given, inputs), wanted, dtype)


@pytest.mark.parametrize("used", ["out", "lse", "a_dot", "a_mem", "memory"])
def test_each_output_alone(used):
    inputs = leaves(*tensors(1, 29, 4, 2, 16, 6))
    out, state, lse, a_dot, a_mem = infini_attention(*inputs, segment_len=N, return_lse=True, return_parts=True)
    results = dict(out=out, lse=lse, a_dot=a_dot, a_mem=a_mem, memory=state.memory)
    given = [w if name == used else w * 0 for name, w in zip(results, weights(*results.values()))]
    picked = [w for w in given if w.any()]
    got = torch.autograd.grad(loss([results[used]], picked), inputs)
    z = torch.zeros(1, 2, 16)
    for a, b in zip(got, expected([*given, z], inputs, parts=True, lse=True, memory=True), strict=True):
        assert_close(a, b) if b.any() else torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=0)


def ranges(side):
    return [(0, 29), (12, 29), (29, 29)] if side == "left" else [(0, 17), (0, 29), (0, 1)]


@pytest.mark.parametrize("side", ["left", "right", "seq_lens"])
def test_padding(side):
    inputs, lens = leaves(*tensors(3, 29, 4, 2, 16, 6)), ranges(side)
    mask = torch.zeros(3, 29)
    for row, (first, end) in zip(mask, lens):
        row[first:end] = 1
    options = dict(seq_lens=[end for _, end in lens]) if side == "seq_lens" else dict(attention_mask=mask)
    out = infini_attention(*inputs, segment_len=N, rope=ROPE, return_state=False, **options)
    given = weights(out)
    full = [pair for pair in lens if pair[0] < pair[1]]
    rows = slice(0, len(full))
    wanted = expected([w[rows] for w in given], [*(x[rows] for x in inputs[:3]), inputs[3]], lens=full, rope=ROPE)
    got = gradients([out], given, inputs)
    compare([*(x[rows] for x in got[:3]), got[3]], wanted)
    assert not any(x[~mask.bool()].any() for x in got[:3])


def test_packed():
    q, k, v, beta = tensors(1, 40, 4, 2, 16, 6)
    inputs = leaves(q[0], k[0], v[0], beta)
    cu = [0, 3, 3, 27, 40]
    out, state = infini_attention(*inputs, segment_len=N, cu_seqlens=cu, rope=ROPE)
    given = weights(out)
    twins = [x.detach().double().requires_grad_() for x in inputs]
    runs = [composite(*(x[a:b] for x in twins[:3]), twins[3], rope=ROPE)[0] for a, b in zip(cu, cu[1:]) if a < b]
    compare(gradients([out], given, inputs), torch.autograd.grad(loss([torch.cat(runs)], given), twins))
    assert state.tokens.tolist() == [3, 0, 24, 13]


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4, 1, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gates_of_other_shapes_and_types(shape, dtype):
    q, k, v, beta = tensors(1, 20, 4, 2, 16)
    own = beta[: 4 if 4 in shape else 1].to(dtype).reshape(shape).requires_grad_()
    out = infini_attn.infini_attention(q, k, v, own, segment_len=N, return_state=False)
    given = weights(out)
    (got,) = gradients([out], given, [own])
    assert got.shape == shape and got.dtype == dtype
    whole = own.detach().float().reshape(-1).expand(4).clone()
    wanted = expected(given, [q, k, v, whole])[3]
    wanted = wanted if 4 in shape else wanted.sum()
    assert_close(got.reshape(wanted.shape), wanted, 1e-5 if dtype != torch.bfloat16 else 4e-3)


def test_gradients_of_other_strides():
    """A transposed layout, a loss that broadcasts, and inputs of which some need none."""
    q, k, v, beta = tensors(2, 20, 4, 2, 16)
    turned = leaves(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    out = infini_attention(*(x.transpose(1, 2) for x in turned), beta, segment_len=N, return_state=False)
    got = torch.autograd.grad(out.sum(), turned)
    wanted = expected([torch.ones_like(out)], [q, k, v, beta])
    compare([x.transpose(1, 2) for x in got], wanted[:3])
    out = infini_attention(q, k, *leaves(v), beta, segment_len=N, return_state=False)
    assert out.requires_grad and not infini_attention(q, k, v, beta, segment_len=N)[0].requires_grad
    with torch.no_grad():
        assert not infini_attn.infini_attention(q, k, *leaves(v), beta, segment_len=N)[0].requires_grad


def test_recorded_calls_compute_the_same_bits():
    given = tensors(2, 29, 4, 2, 16, 6)
    options = dict(segment_len=N, rope=ROPE, inplace=True, return_lse=True, return_parts=True)
    out, state, *rest = infini_attention(*leaves(*given), **options)
    own, own_state, *own_rest = infini_attention(*given, **options)
    assert all(torch.equal(a, b) for a, b in zip([out, *rest], [own, *own_rest]))
    assert torch.equal(state.buffer, own_state.buffer)


def test_second_gradients_are_refused():
    inputs = leaves(*tensors(1, 10, 2, 2, 8))
    out = infini_attention(*inputs, segment_len=N, return_state=False)
    got = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="^infini_attention: a gradient of its gradients asked for, first"):
        got[0].sum().backward()


REFUSED = {
    "^out: a tensor given, None expected of a call that is recorded": lambda q: dict(out=torch.empty_like(q)),
    "^inplace: True given, False expected of a call that is recorded": lambda q: dict(
        inplace=True, state=State(Problem(heads=2, key_dim=8, segment_len=N))
    ),
    "^rope.cos: a tensor that requires grad given, no gradient": lambda q: dict(rope=leaves(*tables(9, torch.ones(1)))),
    "^rope.sin: a tensor that requires grad given": lambda q: dict(
        rope=(torch.ones(9, 1), torch.ones(9, 1).requires_grad_())
    ),
    "^bptt_segments: 0 given, at least 1": lambda q: dict(bptt_segments=0),
    "^bptt_segments: True given|^bptt_segments: bool given": lambda q: dict(bptt_segments=True),
    "^bptt_segments: str given, an integer": lambda q: dict(bptt_segments="2"),
    "^beta: torch.bool given, numbers expected": lambda q: dict(beta=torch.ones(2, dtype=torch.bool)),
    "^beta: NoneType given, numbers expected": lambda q: dict(beta=None),
    r"^beta: shape \[3\] given, \[Hq\] = \[2\]": lambda q: dict(beta=torch.zeros(3)),
    "^positions .*: 9 given": lambda q: dict(rope=tables(9, torch.ones(1)), positions=[9] * 9),
}


@pytest.mark.parametrize("name", ["q", "v", "beta"])
def test_other_devices_are_refused(name):
    with FakeTensorMode():
        given = dict(zip(("q", "k", "v"), (torch.empty(1, 9, 2, 8, device="cuda") for _ in range(3))))
        given["beta"] = torch.zeros(2)
        given[name].requires_grad_()
        for function in (infini_attn.infini_attention, infini_attention):
            with pytest.raises(ValueError, match=f"^{name}: a tensor that requires grad in a call on cuda:0 given"):
                function(**given, segment_len=N)


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("function", [infini_attn.infini_attention, infini_attention])
def test_what_is_refused(function, message):
    q, k, v, beta = leaves(*tensors(1, 9, 2, 2, 8))
    options = dict(beta=beta, segment_len=N) | REFUSED[message](q)
    with pytest.raises((ValueError, TypeError), match=message):
        function(q, k, v, **options)
