"""infini_attention against PyTorch, a public implementation, the reference and itself."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from infini_transformer_pytorch.infini_transformer import CausalAttention, FastweightMemory
from oracle import TOLERANCE, assert_close, oracle, runs, tables, tensors

import infini_attn
from infini_attn import State, infini_attention, reference

# (B, T, Hq, Hkv, Dk, Dv, N): grouped heads, Dk != Dv, T below, at and above a segment's end, N = 1.
SHAPES = [
    (1, 64, 1, 1, 16, 16, 16),
    (2, 100, 4, 2, 32, 16, 32),
    (1, 257, 8, 2, 64, 64, 128),
    (3, 31, 6, 2, 8, 24, 32),
    (2, 32, 2, 2, 5, 7, 32),
    (1, 20, 2, 1, 8, 8, 1),
    (1, 7, 3, 3, 16, 16, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("update", ["delta", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_operator_in_torch(shape, update, dtype):
    *shape, n = shape
    q, k, v, beta = tensors(*shape, dtype=dtype)
    out, state = infini_attention(q, k, v, beta, segment_len=n, update=update)
    expected, m, z = oracle(q, k, v, beta, n, delta=update == "delta")
    assert out.dtype == dtype and isinstance(out, torch.Tensor)
    assert_close(out, expected, TOLERANCE[dtype])
    if state.committed.all():
        assert_close(state.M, m)
        assert_close(state.z, z)
    full = shape[1] // n * n
    assert (state.committed == full).all() and (state.open_len == shape[1] - full).all()


@pytest.mark.parametrize(
    "policy, denominator",
    [
        (("clamp", 40.0), lambda d: d.clamp(min=40.0)),
        (("add", 3.5), lambda d: d + 3.5),
        ("exact", lambda d: d),
    ],
)
@pytest.mark.parametrize("empty_memory", ["gate", "bypass"])
def test_policies(policy, denominator, empty_memory):
    q, k, v, beta = tensors(2, 50, 4, 2, 8)
    bypass = empty_memory == "bypass"
    expected, m, _ = oracle(q, k, v, beta, 16, bypass=bypass, denominator=denominator)
    out, state = infini_attention(
        q, k, v, beta, segment_len=16, denominator=policy, empty_memory=empty_memory
    )
    assert_close(out, expected)
    assert_close(state.M, m)
    assert state.problem.denominator == policy and state.problem.empty_memory == empty_memory


# What the public package computes.
PUBLIC = dict(empty_memory="bypass", denominator=("clamp", 1e-10))


@pytest.mark.parametrize("delta", [True, False])
@torch.no_grad()
def test_equals_fastweight_memory_of_a_public_package(delta):
    q, k, v, beta = tensors(2, 48, 4, 4, 16)
    memory = FastweightMemory(heads=4, use_mem_delta_rule=delta).double()
    memory.head_gates.copy_(-beta)  # its gate weighs the local branch
    out, past = [], None
    for segment in zip(*(x.double().transpose(1, 2).split(16, dim=2) for x in (q, k, v))):
        local = F.scaled_dot_product_attention(*segment, is_causal=True)
        out.append(memory.retrieve_and_add_to_output(local, segment[0], past))
        past = memory.create_new_memories(segment[1], segment[2], past)
    update = "delta" if delta else "linear"
    got, state = infini_attention(q, k, v, beta, segment_len=16, update=update, **PUBLIC)
    assert_close(got, torch.cat(out, dim=2).transpose(1, 2))
    assert_close(state.M, past.kv_mem)
    assert_close(state.z, past.k_norm)


@torch.no_grad()
def test_equals_the_attention_layer_of_a_public_package():
    """Rotation included: theirs restarts in every segment, which the local branch cannot tell."""
    torch.manual_seed(0)
    layer = CausalAttention(32, dim_head=16, heads=2, use_mem_delta_rule=True).double()
    layer.fastweight_mem.head_gates.copy_(torch.tensor([0.3, -0.8]))
    x = torch.randn(2, 36, 32).double()
    expected, past = [], None
    for segment in x.split(12, dim=1):
        out, _, past = layer(segment, past_memories=past, return_new_memories=True)
        expected.append(out)
    q, k, v = (y.transpose(1, 2).float() for y in layer.split_heads(layer.to_qkv(layer.norm(x))))
    rope = tables(36, layer.rotary_emb.freqs.detach().float())
    beta = -layer.fastweight_mem.head_gates
    out, state = infini_attention(
        q, k, v, beta, segment_len=12, rope=rope, rope_interleaved=True, **PUBLIC
    )
    assert_close(layer.to_out(out.double().flatten(2)), torch.cat(expected, dim=1))
    assert_close(state.M, past.kv_mem)


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_equals_the_reference_in_every_result(update):
    q, k, v, beta = tensors(2, 45, 4, 2, 16, 8)
    q[0, :, :, 3] -= 200.0  # sigma(q) underflows where it may
    options = dict(segment_len=16, update=update, scale=0.3, return_lse=True, return_parts=True)
    got = infini_attention(q, k, v, beta, **options)
    expected = reference.infini_attention(q, k, v, beta, **options)
    assert len(got) == len(expected) == 5
    for i in (0, 2, 3, 4):
        assert expected[i].dtype == np.float64
        assert_close(got[i], expected[i])
    assert_close(got[1].M, expected[1].M)
    assert_close(got[1].z, expected[1].z)
    assert (got[1].tokens == expected[1].tokens).all()


def in_runs(operator, lengths, q, k, v, beta, n):
    """The outputs of the runs, and the state after the last one."""
    state, outputs = None, []
    for run in runs(lengths, q, k, v):
        out, state = operator(*run, beta, segment_len=None if outputs else n, state=state)
        outputs.append(out)
    return outputs, state


def test_the_reference_carries_its_state():
    q, k, v, beta = tensors(1, 40, 2, 1, 8)
    whole, end = reference.infini_attention(q, k, v, beta, segment_len=8)
    parts, state = in_runs(reference.infini_attention, [3, 13, 0, 24], q, k, v, beta, 8)
    assert_close(np.concatenate(parts, axis=1), whole, 1e-14)
    assert_close(state.M, end.M, 1e-14)
    with pytest.raises(ValueError, match="state: made for"):
        reference.infini_attention(q, k, v, beta, segment_len=4, state=state)


def test_returns_only_what_is_asked_for_in_order():
    q, k, v, beta = tensors(1, 20, 2, 1, 8)
    call = lambda **options: infini_attention(q, k, v, beta, segment_len=8, **options)
    out, state = call()
    assert isinstance(out, torch.Tensor) and isinstance(state, State)
    alone = call(return_state=False)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, out)
    out, lse = call(return_state=False, return_lse=True)
    assert lse.shape == (1, 2, 20) and lse.dtype == torch.float32
    out, a_dot, a_mem = call(return_state=False, return_parts=True)
    g = beta.sigmoid().view(1, 1, 2, 1)
    assert_close(g * a_mem + (1 - g) * a_dot, out)
    assert (a_mem[:, :8] == 0).all() and not (a_mem[:, 8:] == 0).any()
    results = call(return_lse=True, return_parts=True)
    assert isinstance(results, tuple) and len(results) == 5 and isinstance(results[1], State)
    logits = torch.einsum("thd,shd->hts", q[0], k[0].expand(-1, 2, -1))[:, :8, :8] * 8**-0.5
    mask = torch.ones(8, 8, dtype=torch.bool).triu(1)
    assert_close(results[2][0, :, :8], logits.masked_fill(mask, -torch.inf).logsumexp(-1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_in_numpy_out(dtype):
    *qkv, beta = tensors(2, 40, 4, 2, 8, dtype=torch.float32)
    arrays = [x.numpy().astype(dtype) for x in qkv]
    out, lse = infini_attention(
        *arrays, beta, segment_len=16, return_state=False, return_lse=True
    )
    assert isinstance(out, np.ndarray) and out.dtype == dtype and isinstance(lse, np.ndarray)
    same = infini_attention(*map(torch.from_numpy, arrays), beta, segment_len=16)[0]
    assert np.array_equal(out, same.numpy())


def test_read_only_and_odd_numpy_arrays():
    *qkv, beta = tensors(1, 40, 2, 1, 8)
    q, k, v = (x.numpy() for x in qkv)
    expected = infini_attention(q, k, v, beta, segment_len=16, return_state=False)
    for array in (q, k, v):
        array.flags.writeable = False
    assert np.array_equal(infini_attention(q, k, v, beta, segment_len=16)[0], expected)
    backwards = [np.ascontiguousarray(x[:, ::-1])[:, ::-1] for x in (q, k, v)]
    assert backwards[0].strides[1] < 0
    assert np.array_equal(infini_attention(*backwards, beta, segment_len=16)[0], expected)


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("t", [1, 5, 75])
def test_strides_are_free(numpy, t):
    q, k, v, beta = tensors(2, t, 4, 2, 16)
    expected = infini_attention(q, k, v, beta, segment_len=32, return_state=False)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    padded = [F.pad(x, (3, 6, 1, 0)) for x in heads_first]
    for strided in (
        [x.transpose(1, 2) for x in heads_first],
        [x[:, :, 1:, 3:-6].transpose(1, 2) for x in padded],
    ):
        assert not strided[0].is_contiguous() or t == 1
        if numpy:
            strided = [x.numpy() for x in strided]
        out = infini_attention(*strided, beta, segment_len=32, return_state=False)
        assert torch.equal(torch.as_tensor(out), expected)


class OldTensor(torch.Tensor):
    """Exports as before DLPack 1.0."""

    def __dlpack__(self, stream=None):
        return self.as_subclass(torch.Tensor).__dlpack__(stream=stream)


def test_unversioned_dlpack():
    q, k, v, beta = tensors(1, 40, 2, 1, 8)
    expected = infini_attention(q, k, v, beta, segment_len=16)[0]
    old = [x.transpose(1, 2).contiguous().transpose(1, 2).as_subclass(OldTensor) for x in (q, k, v)]
    assert torch.equal(infini_attention(*old, beta, segment_len=16)[0], expected)


def test_memory_is_given_back():
    q = np.ones((1, 20, 2, 8), np.float32)
    state = infini_attention(q, q, q, [0.0, 0.0])[1]
    before = sys.getrefcount(q)
    for _ in range(3):
        infini_attention(q, q, q, [0.0, 0.0], state=state)
        with pytest.raises(ValueError):
            infini_attention(q, q, q, [0.0] * 3, state=state)
    assert sys.getrefcount(q) == before


def test_broadcast_dimensions_are_not_expanded():
    q, k, v, beta = tensors(1, 40, 2, 1, 8)
    three = [x.expand(3, -1, -1, -1) for x in (q, k, v)]
    assert three[0].stride(0) == 0
    out, state = infini_attention(*three, beta, segment_len=16)
    one = infini_attention(q, k, v, beta, segment_len=16)[0]
    assert all(torch.equal(out[b : b + 1], one) for b in range(3)) and state.sequences == 3


@pytest.mark.parametrize(
    "beta",
    [
        [0.5, -1.5],
        np.array([0.5, -1.5]),
        np.array([0.5, -1.5], np.float16),
        torch.tensor([0.5, -1.5], dtype=torch.bfloat16),
        torch.tensor([0.5, 9.0, -1.5, 9.0], dtype=torch.float64)[::2],
    ],
)
def test_beta_of_any_float_type(beta):
    q, k, v, _ = tensors(1, 20, 2, 1, 8)
    expected = infini_attention(q, k, v, torch.tensor([0.5, -1.5]), segment_len=8)[0]
    assert torch.equal(infini_attention(q, k, v, beta, segment_len=8)[0], expected)


def test_gate_at_its_ends():
    q, k, v, _ = tensors(1, 24, 2, 2, 8)
    both = dict(segment_len=8, return_state=False, return_parts=True)
    out, a_dot, a_mem = infini_attention(q, k, v, [float("-inf"), float("inf")], **both)
    assert torch.equal(out[:, :, 0], a_dot[:, :, 0]) and torch.equal(out[:, :, 1], a_mem[:, :, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [[100] * 2, [1] * 200, [31, 1, 32, 136], [16, 17, 0, 95, 72]])
def test_any_split_of_a_stream_gives_the_same(cuts, dtype):
    q, k, v, beta = tensors(2, 200, 4, 2, 16, dtype=dtype)
    whole, end = infini_attention(q, k, v, beta, segment_len=32)
    parts, state = in_runs(infini_attention, cuts, q, k, v, beta, 32)
    assert_close(torch.cat(parts, dim=1), whole, TOLERANCE[dtype])
    assert_close(state.M, end.M)
    assert_close(state.z, end.z)
    assert state.tokens.tolist() == [200, 200] and state.open_len.tolist() == [8, 8]


def test_no_tokens():
    q, k, v, beta = tensors(2, 0, 4, 2, 16)
    out, state, lse, a_dot, a_mem = infini_attention(
        q, k, v, beta, return_lse=True, return_parts=True
    )
    assert out.shape == a_dot.shape == a_mem.shape == (2, 0, 4, 16) and lse.shape == (2, 4, 0)
    assert state.tokens.tolist() == [0, 0] and not state.M.any()
    q, k, v = (x.numpy() for x in (q, k, v))
    assert infini_attention(q, k, v, beta, state=state)[0].shape == (2, 0, 4, 16)


@pytest.mark.parametrize("t", [12, 70])
def test_padded_sequences(t):
    q, k, v, beta = tensors(3, t, 4, 2, 16)
    lens = [t, 0, 5]
    for x in (q, k, v):
        for b, n in enumerate(lens):
            x[b, n:] = torch.nan  # padding is never read
    options = dict(segment_len=32, return_lse=True)
    for given in (lens, np.array(lens, np.int32), torch.tensor(lens)):
        out, state, lse = infini_attention(q, k, v, beta, seq_lens=given, **options)
        assert state.tokens.tolist() == lens
        for b, n in enumerate(lens):
            alone = infini_attention(*(x[b : b + 1, :n] for x in (q, k, v)), beta, **options)
            if n:
                assert_close(out[b : b + 1, :n], alone[0])
            assert (out[b, n:] == 0).all() and (lse[b, :, n:] == -torch.inf).all()
            assert np.array_equal(state.M[b], alone[1].M[0])


def rotate(x, cos, sin):
    """Rotate-half of the first channels, [B, T, H, D]."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def test_rotation_is_local_and_partial():
    q, k, v, beta = tensors(2, 60, 4, 2, 16)
    rope = tables(80, torch.tensor([1.0, 0.3, 0.05]))
    cos, sin = (1.2 * x for x in rope)  # tables may carry a factor
    options = dict(segment_len=16, return_parts=True)
    out, state, a_dot, a_mem = infini_attention(q, k, v, beta, rope=(cos, sin), **options)
    turned = [rotate(x, cos[:60], sin[:60]) for x in (q, k)]
    assert_close(a_dot, infini_attention(*turned, v, beta, **options)[2])
    plain = infini_attention(q, k, v, beta, **options)
    assert torch.equal(a_mem, plain[3]) and np.array_equal(state.M, plain[1].M)

    at = torch.arange(60) + 7
    moved = infini_attention(q, k, v, beta, rope=(cos, sin), positions=at, **options)
    assert_close(moved[0], out)  # only distances count
    assert not torch.equal(moved[0], out)
    shared = np.arange(60)
    each = np.stack([shared, shared]).astype(np.int32)
    for positions in (shared, each, shared.tolist()):
        same = infini_attention(q, k, v, beta, rope=(cos, sin), positions=positions, **options)
        assert torch.equal(same[0], out)
    backwards = np.stack([shared, 59 - shared])
    mixed = infini_attention(q, k, v, beta, rope=(cos, sin), positions=backwards, **options)
    assert torch.equal(mixed[0][0], out[0]) and not torch.allclose(mixed[0][1], out[1])
    # Positions count on from the state.
    head, rest = runs([23, 37], q, k, v)
    first, state = infini_attention(*head, beta, segment_len=16, rope=(cos, sin))
    second, _ = infini_attention(*rest, beta, state=state, rope=(cos.numpy(), sin.numpy()))
    assert_close(torch.cat([first, second], dim=1), out)


def test_tensors_that_require_grad_pass_without_grad():
    q, k, v, beta = tensors(1, 20, 2, 1, 8)
    expected = infini_attention(q, k, v, beta, segment_len=8)[0]
    with torch.no_grad():
        given = [x.clone().requires_grad_() for x in (q, k, v, beta)]
        given = [torch.nn.Parameter(x) for x in given]
        assert torch.equal(infini_attention(*given, segment_len=8)[0], expected)


def test_results_are_on_the_cpu_whatever_the_default_device():
    q, k, v, beta = tensors(1, 20, 2, 1, 8)
    with torch.device("meta"):
        out, _ = infini_attention(q, k, v, beta, segment_len=8)
    assert out.device.type == "cpu" and out.isfinite().all()


def test_version_is_the_package_s():
    from importlib.metadata import version

    assert infini_attn.__version__ == version("infini-attn")
