"""`torch.ops.infini_attn` and `infini_attn.torch.infini_attention`, eager: bits, errors, autocast."""

import numpy as np
import pytest
import torch
from oracle import tables, tensors
from torch.fx.experimental.proxy_tensor import make_fx

import infini_attn
from infini_attn import Problem, _core, merge_partials
from infini_attn.torch import BatchInfiniAttention, State, chunk_infini_attention, infini_attention
from infini_attn.torch.ops import SCHEMAS

N = 8
OPS = torch.ops.infini_attn
PROBLEM = Problem(heads=4, kv_heads=2, key_dim=16, value_dim=6, segment_len=N)
TEXT = _core._problem_text(PROBLEM)
Q, K, V, BETA = tensors(3, 20, 4, 2, 16, 6)
ROPE = tables(64, torch.tensor([1.0, 0.3, 0.05]))
MASK = torch.tensor([[0] * 5 + [1] * 15, [1] * 20, [1] * 7 + [0] * 13])
CU = [0, 9, 9, 20]


def state(tokens=13, sequences=3, rotation=True, dtype=None):
    """A state of three streams in their second segment."""
    problem = Problem(heads=4, kv_heads=2, key_dim=16, value_dim=6, segment_len=N, dtype=dtype)
    made = State(problem, sequences, rotation=rotation)
    q, k, v, beta = tensors(sequences, tokens, 4, 2, 16, 6, dtype=made_of(dtype), seed=1)
    infini_attention(q, k, v, beta, state=made, inplace=True)
    return made


def made_of(dtype):
    return {None: torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]


def same(made, own):
    return made.to_state().__reduce__() == own.__reduce__()


CALLS = {
    "whole": dict(),
    "policies": dict(update="linear", scale=0.3, empty_memory="bypass", denominator=("clamp", 1e-6)),
    "rope": dict(rope=ROPE),
    "positions": dict(rope=ROPE, positions=range(30, 50), rope_interleaved=True),
    "positions [B, T]": dict(rope=list(ROPE), positions=torch.arange(60).reshape(3, 20).int()),
    "lens": dict(seq_lens=[20, 0, 3]),
    "mask": dict(attention_mask=MASK, rope=ROPE),
    "mask of lists": dict(attention_mask=MASK.tolist()),
    "slots": dict(slots=np.array([2, 0, 1])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_the_other_state(name, dtype):
    q, k, v, beta = tensors(3, 20, 4, 2, 16, 6, dtype=dtype)
    options = CALLS[name]
    asked = dict(segment_len=N, return_lse=True)
    o, made, lse = infini_attention(q, k, v, beta, **options, **asked)
    expected, own, expected_lse = infini_attn.infini_attention(q, k, v, beta, **options, **asked)
    assert torch.equal(o, expected) and torch.equal(lse, expected_lse) and same(made, own)
    again = {name: x for name, x in options.items() if name not in ("update", "scale")}
    for inplace in (False, True):
        before = made.buffer.clone()
        o, after = infini_attention(
            q[:, :4], *pair(k, v, 4), beta, state=made, inplace=inplace, **cut(again)
        )
        expected, own_after = infini_attn.infini_attention(
            q[:, :4], *pair(k, v, 4), beta, state=own, **cut(again)
        )
        assert torch.equal(o, expected) and same(after, own_after)
        assert (after is made) == inplace and (inplace or torch.equal(made.buffer, before))


def pair(k, v, t):
    return k[:, :t], v[:, :t]


def cut(options):
    """The options of the first 4 tokens."""
    few = dict(options)
    if "seq_lens" in few:
        few["seq_lens"] = [4, 0, 3]
    if "attention_mask" in few:
        few["attention_mask"] = [[0, 1, 1, 1], [1] * 4, [1, 0, 0, 0]]
    if "positions" in few:
        few["positions"] = [5, 6, 7, 8]
    return few


def test_parts():
    made, own = state(), state().to_state()
    for inplace in (False, True):
        options = dict(inplace=inplace, return_parts=True, return_lse=True)
        got = infini_attention(Q, K, V, BETA, state=made, **options)
        expected = infini_attn.infini_attention(Q, K, V, BETA, state=own, **options)
        assert all(
            torch.equal(a, b)
            for a, b in zip(got[:1] + got[2:], expected[:1] + expected[2:], strict=True)
        )
        assert same(got[1], expected[1]) and (got[1] is made) == inplace
    with pytest.raises(
        ValueError, match="return_parts: True given, False expected of a call that PyTorch records"
    ):
        make_fx(lambda q: infini_attention(q, K, V, BETA, return_parts=True))(Q)


def test_packed_sequences_and_slots():
    q, k, v = (x.flatten(0, 1)[:20] for x in (Q, K, V))
    made, own = state(sequences=5), state(sequences=5).to_state()
    options = dict(cu_seqlens=CU, slots=[4, 0, 2], return_lse=True)
    for got, right in zip(
        infini_attention(q, k, v, BETA, state=made, inplace=True, **options)[::2],
        infini_attn.infini_attention(q, k, v, BETA, state=own, inplace=True, **options)[::2],
    ):
        assert torch.equal(got, right)
    assert same(made, own)
    fresh = infini_attention(q, k, v, BETA, segment_len=N, cu_seqlens=torch.tensor(CU))[1]
    assert fresh.tokens.tolist() == [9, 0, 11] and not fresh.rotation


def test_functions_of_the_top_take_it_too():
    made, own = state(), state().to_state()
    o, after = infini_attn.infini_attention(Q, K, V, BETA, state=made)
    assert isinstance(after, State)
    assert torch.equal(o, infini_attn.infini_attention(Q, K, V, BETA, state=own)[0])
    fast = torch.empty(3, 20, 4, 6)
    assert infini_attn.infini_attention(Q, K, V, BETA, state=made, out=fast, return_state=False) is fast
    assert torch.equal(fast, o)


@pytest.mark.parametrize("call", [infini_attention, infini_attn.infini_attention])
def test_out(call):
    expected = call(Q, K, V, BETA, segment_len=N, return_state=False)
    wide = torch.full((3, 4, 20, 10), 7.0)
    out = wide[..., 2:8].transpose(1, 2)
    assert call(Q, K, V, BETA, segment_len=N, out=out, return_state=False) is out
    assert torch.equal(out, expected) and (wide[..., :2] == 7).all() and (wide[..., 8:] == 7).all()
    for given, error, message in [
        (torch.empty(3, 20, 4, 7), ValueError, r"out: shape \[3, 20, 4, 7\] given, \[3, 20, 4, 6\]"),
        (torch.empty(3, 20, 4, 6).half(), TypeError, "out: .*f(loat)?16.* given"),
        (3, TypeError, "out: .*int given"),
    ]:
        with pytest.raises(error, match=message):
            call(Q, K, V, BETA, segment_len=N, out=given)


def test_out_of_numpy_and_where_it_may_not_lie():
    arrays = [x.numpy() for x in (Q, K, V, BETA)]
    out = np.empty((3, 20, 4, 6), np.float32)
    assert infini_attn.infini_attention(*arrays, segment_len=N, out=out, return_state=False) is out
    assert np.array_equal(out, infini_attn.infini_attention(*arrays, segment_len=N)[0])
    with pytest.raises(TypeError, match="out: a NumPy array given, a PyTorch tensor as q is expected"):
        infini_attn.infini_attention(Q, K, V, BETA, out=out)
    q, k, v, beta = tensors(3, 20, 4, 4, 16)
    for name, x in (("q", q), ("k", k), ("v", v)):
        before = x.clone()
        with pytest.raises(
            ValueError, match=f"out: memory that overlaps that of {name} given, memory of its own"
        ):
            infini_attn.infini_attention(q, k, v, beta, out=x)
        assert torch.equal(x, before)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: a read-only tensor given"):
        infini_attn.infini_attention(*arrays, out=out)


ERRORS = [
    (TypeError, "q: ndarray given, a PyTorch tensor", dict(q=Q.numpy())),
    (ValueError, r"q: shape \[20, 4, 16\] given, rank 4", dict(q=Q[0])),
    (ValueError, "k: device meta given, cpu as q has", dict(k=K.to("meta"))),
    (TypeError, "v: dtype torch.float16 given, torch.float32 as q has", dict(v=V.half())),
    (
        TypeError,
        "state: State given, an infini_attn.torch.Float64State",
        dict(q=Q.double(), k=K.double(), v=V.double()),
    ),
    (ValueError, r"beta: shape \[3\] given, \[Hq\] = \[4\]", dict(beta=BETA[:3])),
    (ValueError, "state: made for segment_len = 8, the call has segment_len = 16", dict(segment_len=16)),
    (
        ValueError,
        "state: made for kv_heads = 2, the call has kv_heads = 4",
        dict(k=K.repeat(1, 1, 2, 1), v=V.repeat(1, 1, 2, 1)),
    ),
    (ValueError, "update: 'x' given, linear or delta", dict(update="x")),
    (ValueError, "positions: without rope given", dict(positions=[0])),
    (ValueError, r"rope: 3 tables given, a tuple \(cos, sin\)", dict(rope=(*ROPE, ROPE[0]))),
    (
        ValueError,
        "rope.cos: a tensor that requires grad",
        dict(rope=(ROPE[0].clone().requires_grad_(), ROPE[1])),
    ),
    (ValueError, r"slots\[2\]: 1 given, a slot other than slots\[1\]", dict(slots=[0, 1, 1])),
    (ValueError, r"slots\[0\]: 3 given, less than the state's 3 slots", dict(slots=[3, 1, 2])),
    (ValueError, r"seq_lens\[1\]: 21 given", dict(seq_lens=[1, 21, 1])),
    (
        ValueError,
        "cu_seqlens: beside seq_lens given",
        dict(seq_lens=[1], cu_seqlens=CU, q=Q[0], k=K[0], v=V[0]),
    ),
    (
        ValueError,
        r"attention_mask\[0\]: 0 at 1 between ones",
        dict(attention_mask=[[1, 0] + [1] * 18] * 3),
    ),
    (
        TypeError,
        "state: an infini_attn.State given, an infini_attn.torch.State",
        dict(state=infini_attn.State(PROBLEM, 3)),
    ),
    (TypeError, "state: int given, an infini_attn.torch.State", dict(state=1)),
    (TypeError, "return_lse: str given, True or False", dict(return_lse="no")),
    (TypeError, "rope_interleaved: int given, True or False", dict(rope_interleaved=1)),
    (TypeError, "beta: str given, numbers", dict(beta="x")),
    (TypeError, "slots: str given, numbers", dict(slots="ab")),
    (TypeError, "attention_mask: str given, numbers", dict(attention_mask="x")),
    (TypeError, "rope.cos: str given, numbers", dict(rope=("a", "b"))),
    (ValueError, "beta: device meta given, cpu expected", dict(beta=BETA.to("meta"))),
    (
        ValueError,
        "seq_slots: device meta given, cpu expected",
        dict(slots=torch.tensor([0, 1, 2], device="meta")),
    ),
    (
        ValueError,
        r"cu_seqlens: shape \[0\] given, \[B \+ 1\]",
        dict(cu_seqlens=[], q=Q[0], k=K[0], v=V[0], state=None),
    ),
    (
        ValueError,
        r"cu_seqlens: shape \[\] given, \[B \+ 1\]",
        dict(cu_seqlens=4, q=Q[0], k=K[0], v=V[0], state=None),
    ),
    (ValueError, "out: strides .* given", dict(out=torch.empty(3, 20, 4, 12)[..., ::2])),
    (ValueError, "state: device meta given, cpu as q has", dict(state=State(PROBLEM, 3).to("meta"))),
]


@pytest.mark.parametrize("error, message, changes", ERRORS, ids=[m[:50] for _, m, _ in ERRORS])
@pytest.mark.parametrize("inplace", [False, True])
def test_errors_leave_the_state_as_it_was(error, message, changes, inplace):
    made = state()
    before = made.buffer.clone()
    call = dict(q=Q, k=K, v=V, beta=BETA, state=made, inplace=inplace) | changes
    with pytest.raises(error, match=f"^{message}"):
        infini_attention(**call)
    assert torch.equal(made.buffer, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_output_within_the_state_is_refused(inplace):
    """Whichever part of it, whether the state is to move or a copy."""
    q, k, v, beta = tensors(1, 4, 2, 2, 16)
    made = State(Problem(heads=2, key_dim=16, segment_len=N), 1)
    infini_attention(q, k, v, beta, state=made, inplace=True)
    before = made.buffer.clone()
    for out in (made.memory.transpose(1, 2)[:, :4], made.open_v[:, :, :4].transpose(1, 2)):
        with pytest.raises(ValueError, match="out: memory that overlaps that of state given"):
            infini_attention(q, k, v, beta, state=made, inplace=inplace, out=out)
    with pytest.raises(ValueError, match="out: memory that overlaps that of state given"):
        text = _core._problem_text(made.problem)
        out = made.open_v[:, :, :4].transpose(1, 2)
        _core._advance(q, k, v, beta, made.buffer, 1, text, True, out=out)
    assert torch.equal(made.buffer, before)


@pytest.mark.parametrize("error, text, given", [
    (TypeError, "unexpected keyword argument 'rope'", dict(rope=ROPE)),
    (ValueError, "^rope: one table given", dict(cos=ROPE[0])),
    (TypeError, "^interleaved: int given, True or False", dict(interleaved=1)),
])  # fmt: skip
def test_keywords_of_the_extension(error, text, given):
    made = state()
    before = made.buffer.clone()
    with pytest.raises(error, match=text):
        _core._advance(Q, K, V, BETA, made.buffer, 3, TEXT, True, **given)
    assert torch.equal(made.buffer, before)
    none = dict.fromkeys(("seq_slots", "seq_lens", "attention_mask", "cu_seqlens", "cos", "sin", "positions"))
    _core._advance(Q, K, V, BETA, made.buffer, 3, TEXT, True, **none)


def test_lists_are_for_the_processor_whatever_the_default_device():
    made, plain = state(), state()
    with torch.device("meta"):
        o, _ = infini_attention(Q, K, V, [0.0] * 4, state=made, slots=[2, 0, 1], inplace=True)
        made.reset([1])
    want, _ = infini_attention(Q, K, V, [0.0] * 4, state=plain, slots=[2, 0, 1], inplace=True)
    plain.reset([1])
    assert torch.equal(o, want) and torch.equal(made.buffer, plain.buffer)


def test_flags_are_told_before_the_state_moves():
    made = state()
    before = made.buffer.clone()
    with pytest.raises(TypeError, match="inplace: str given, True or False expected"):
        infini_attention(Q, K, V, BETA, state=made, inplace="no")
    with pytest.raises(TypeError, match="unexpected keyword argument 'inplace'"):
        chunk_infini_attention(Q, K, V, BETA, initial_state=made, inplace=True)
    step = BatchInfiniAttention()
    step.plan(slots=[0, 1, 2])
    with pytest.raises(TypeError, match="state: NoneType given, an infini_attn.torch.State expected"):
        step.run(Q, K, V, BETA, None)
    assert torch.equal(made.buffer, before)


def test_rotation_without_room():
    made = state(tokens=2 * N, rotation=False)
    before = made.buffer.clone()
    with pytest.raises(ValueError, match="rope: a rotation given, a state with room for rotated keys"):
        infini_attention(Q, K, V, BETA, state=made, rope=ROPE, inplace=True)
    assert torch.equal(made.buffer, before)


def test_operators():
    made, own = state(), state().to_state()
    arguments = made.buffer, 3, TEXT, True
    few = Q[:, :16], K[:, :16], V[:, :16]
    o, lse = OPS.decode_(*few, BETA, *arguments)
    right, _, right_lse = infini_attn.infini_attention(
        *few, BETA, state=own, inplace=True, return_lse=True
    )
    assert torch.equal(o, right) and torch.equal(lse, right_lse) and same(made, own)
    before = made.buffer.clone()
    with pytest.raises(ValueError, match=r"q \(tokens of a sequence\): 20 given, at most 16"):
        OPS.decode_(Q, K, V, BETA, *arguments)
    for spoiled, message in [
        ((made.buffer[8:], 3, TEXT, True), r"state: \d+ elements given, \d+ bytes expected"),
        ((made.buffer, 2, TEXT, True), r"state: \d+ elements given, \d+ bytes expected"),
        ((made.buffer, 3, TEXT, False), r"state: \d+ elements given, \d+ bytes expected"),
        ((made.buffer, 3, "heads=4", True), "kv_heads: nothing given, a value expected"),
        ((made.buffer.view(torch.float32), 3, TEXT, True), "state: dtype f32 given"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            OPS.prefill_(Q, K, V, BETA, *spoiled)
    with pytest.raises(ValueError, match="state: memory that overlaps that of v given"):
        alias = made.memory.view(-1)[: 20 * 2 * 6].view(1, 20, 2, 6).expand(3, 20, 2, 6)
        OPS.prefill_(Q, K, alias, BETA, *arguments)
    assert torch.equal(made.buffer, before)
    version = made.buffer._version
    OPS.flush_(*arguments, seq_slots=torch.tensor([1]))
    OPS.truncate_(*arguments, 0, 28)
    OPS.reset_(*arguments)
    OPS.prefill_(*few, BETA, *arguments)
    OPS.reset_(*arguments)
    assert made.buffer._version == version + 5
    assert not made.counters.any() and not made.memory.any()
    partial = [
        infini_attn.infini_attention(Q, K, V, BETA, segment_len=32, return_lse=True, return_parts=True)
    ] * 2
    a_dot, lse = [p[3] for p in partial], [p[2] for p in partial]
    for got, right in zip(OPS.merge_partials(a_dot, lse), merge_partials(a_dot, lse, return_lse=True)):
        assert torch.equal(got, right)


def samples():
    """Arguments of every operator, again and again."""
    full, padded = (Q, K, V, BETA), dict(attention_mask=MASK, cos=ROPE[0], sin=ROPE[1])
    few = (Q[:, :4], K[:, :4], V[:, :4], BETA)
    here = lambda **options: (state(**options).buffer, 3, TEXT, options.get("rotation", True))
    slots = dict(seq_slots=torch.tensor([2, 0, 1]))
    packed = tuple(x.flatten(0, 1)[:20] for x in full[:3])
    return {
        "prefill": [((*full, None, 3, TEXT, True), padded), ((*full, *here()), slots),
                    ((*packed, BETA, None, 3, TEXT, False), dict(cu_seqlens=torch.tensor(CU)))],
        "prefill_": [((*full, *here()), slots), ((*full, *here(tokens=2 * N)), padded)],
        "decode_": [((*few, *here()), dict(seq_lens=torch.tensor([4, 0, 1])))],
        "flush_": [(here(), slots), (here(rotation=False), {})],
        "reset_": [(here(), {})],
        "truncate_": [((*here(), 1, 10), {})],
        **trained(),
        "merge_partials": [(([torch.rand(3, 20, 4, 6)] * 2, [torch.rand(3, 4, 20)] * 2), {})],
    }  # fmt: skip


def doubles():
    return [*(x.double().requires_grad_() for x in (Q, K, V)), BETA]


def rows():
    return torch.ops.infini_attn.prefill_float64(*doubles(), None, 3, TEXT)[2].detach()


def trained():
    """The same of the operators that gradients are computed by."""
    learned = lambda *tensors: tuple(x.clone().requires_grad_() for x in tensors)
    (q, k, v, beta), before = learned(Q, K, V, BETA), state(tokens=5)._floats().clone()
    reading, slots = (3, TEXT, True), (None, 2, torch.tensor([2, 0, 1]))
    whole = (q, k, v, beta, None, *reading, True, None, None, None, MASK, None, *ROPE)
    out, lse, _, a_dot, a_mem = OPS.prefill_train(*whole)
    return {
        "prefill_train": [
            (whole, {}), ((q, k, v, beta, *learned(before), *reading, False, *slots[1:]), {}),
            ((*learned(*(x.flatten(0, 1)[:20] for x in (Q, K, V))), BETA, None, *reading, False, None, None,
              None, None, torch.tensor(CU)), {}),
        ],
        "prefill_backward": [
            ((*[x.detach() for x in (q, k, v, beta)], before, *reading, *[x.detach() for x in (out, lse, a_dot)],
              torch.rand_like(out), None, torch.rand_like(before), torch.rand_like(out), None, True), {}),
            ((*[x.detach() for x in (q, k, v, beta)], None, *reading, out.detach(), lse.detach(), None,
              torch.rand_like(out), None, None, None, None, False), {}),
        ],
        "prefill_float64": [((*doubles(), None, 3, TEXT, None, None, None, MASK, None, *ROPE), {}),
                            ((*doubles(), rows(), 3, TEXT, 2, torch.tensor([2, 0, 1])), {})],
        "prefill_float64_backward": [
            ((*[x.detach() for x in doubles()], rows(), 3, TEXT, None, torch.rand(3, 4, 20).double(), rows() * 2,
              torch.rand(3, 20, 4, 6).double(), None), {}),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name):
    for args, options in samples()[name]:
        torch.library.opcheck(getattr(OPS, name).default, args, options)


def test_autocast():
    q, k, v, beta = tensors(3, 20, 4, 2, 16, 6)
    half = [x.bfloat16() for x in (q, k, v)]
    expected = infini_attn.infini_attention(*half, beta, segment_len=N, rope=ROPE)
    for call in (infini_attention, infini_attn.infini_attention):
        for mixed in ((q, k, v), (half[0], half[1], v), (q, half[1], half[2])):
            with torch.autocast("cpu", torch.bfloat16):
                o, made = call(*mixed, beta, segment_len=N, rope=ROPE)
            assert o.dtype == torch.bfloat16 and torch.equal(o, expected[0])
            assert isinstance(made, State) == (call is infini_attention)
            with pytest.raises(TypeError, match="dtype"):
                call(half[0], half[1], v, beta)
        # A state's type comes before autocast's; the memory's inputs are never rounded.
        for made in (state(), state().to_state()) if call is not infini_attention else (state(),):
            with torch.autocast("cpu", torch.float16):
                o, _ = call(*half[:2], v, beta, state=made)
            assert o.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        o, lse, _ = OPS.prefill(q, half[1], v, beta, None, 3, TEXT.replace("f32", "bf16"), False)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32


def test_the_face_of_other_libraries():
    o, final = chunk_infini_attention(Q, K, V, BETA, segment_len=N)
    expected, made = infini_attention(Q, K, V, BETA, segment_len=N)
    assert final is None and torch.equal(o, expected)
    o, final = chunk_infini_attention(
        Q, K, V, BETA, initial_state=made, output_final_state=True, scale=16**-0.5
    )
    again, after = infini_attention(Q, K, V, BETA, state=made)
    assert torch.equal(o, again) and torch.equal(final.buffer, after.buffer)
    packed = [x.flatten(0, 1)[None, :20] for x in (Q, K, V)]
    o, final = chunk_infini_attention(
        *packed, BETA, cu_seqlens=torch.tensor(CU), segment_len=N, output_final_state=True
    )
    flat = [x[0] for x in packed]
    expected, _ = infini_attention(*flat, BETA, cu_seqlens=CU, segment_len=N)
    assert torch.equal(o, expected[None]) and final.tokens.tolist() == [9, 0, 11]
    with pytest.raises(ValueError, match=r"q: shape \[3, 20, 4, 16\] given, \[1, total, H, D\]"):
        chunk_infini_attention(Q, K, V, BETA, cu_seqlens=CU)


def test_plan_and_run():
    layers = [state(sequences=5) for _ in range(3)]
    own = [layer.to_state() for layer in layers]
    step = BatchInfiniAttention()
    with pytest.raises(RuntimeError, match="plan: nothing given"):
        step.run(Q, K, V, BETA, layers[0])
    packed = [x.flatten(0, 1)[:20] for x in (Q, K, V)]
    options = dict(cu_seqlens=CU, slots=[4, 0, 2])
    step.plan(**options)
    out = torch.empty(20, 4, 6)
    for layer, right in zip(layers, own):
        got, lse = step.run(*packed, BETA, layer, out=out, return_lse=True)
        expected = infini_attn.infini_attention(
            *packed, BETA, state=right, inplace=True, return_lse=True, **options
        )
        assert (
            got is out
            and torch.equal(out, expected[0])
            and torch.equal(lse, expected[2])
            and same(layer, right)
        )
