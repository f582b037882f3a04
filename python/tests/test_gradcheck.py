"""float64: the reference as PyTorch's, checked by central differences (`torch.autograd.gradcheck`)."""

import pytest
import torch
from oracle import assert_close, tables, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import infini_attn
from infini_attn import Problem, reference
from infini_attn.torch import Float64State, State, infini_attention

N = 4
ROPE = tables(32, torch.tensor([1.0, 0.3]))


def doubles(b, t, hq=2, hkv=1, dk=4, dv=3):
    return [x.double().requires_grad_() for x in tensors(b, t, hq, hkv, dk, dv)]


CASES = {
    "delta": {},
    "linear": dict(update="linear", rope=ROPE),
    "bypass": dict(empty_memory="bypass", rope=ROPE, rope_interleaved=True),
    "clamp": dict(denominator=("clamp", 9.0)),
    "add": dict(denominator=("add", 0.5), positions=[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], rope=ROPE),
    "left": dict(attention_mask=[[0] * 3 + [1] * 7, [1] * 10]),
    "right": dict(seq_lens=[9, 2], slots=[1, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_call(case):
    def call(*inputs):
        out, state, lse, a_dot, a_mem = infini_attn.infini_attention(
            *inputs, segment_len=N, return_lse=True, return_parts=True, **CASES[case]
        )
        # Of padding it is -inf.
        return out, lse.clamp(min=-9), a_dot, a_mem, state.memory, state.normalizer

    assert gradcheck(call, doubles(2, 10))


def test_packed():
    q, k, v, beta = doubles(1, 10)
    call = lambda q, k, v, beta: infini_attention(
        q[0], k[0], v[0], beta, segment_len=N, cu_seqlens=[0, 3, 10], return_state=False
    )
    assert gradcheck(call, (q, k, v, beta))


@pytest.mark.parametrize("pieces", [[3, 7], [1, 4, 5], [4, 6]], ids=str)
def test_calls_that_a_state_connects(pieces):
    def calls(q, k, v, beta, rows):
        outs, state = [], Float64State(rows, text)
        for piece in zip(*(x.split(pieces, dim=1) for x in (q, k, v))):
            out, state = infini_attention(*piece, beta, state=state, rope=ROPE)
            outs.append(out)
        return torch.cat(outs, dim=1), state.rows[:, :-4]

    inputs = doubles(1, 10)
    _, before = infini_attention(*(x.detach()[:, :6] for x in inputs[:3]), inputs[3], segment_len=N, rope=ROPE)
    text, rows = before._text, before.rows.detach()
    # The counters are no numbers to vary, nor is room without tokens.
    varied = torch.ones_like(rows)
    varied[:, -4:] = 0
    whole = lambda q, k, v, beta, x: calls(q, k, v, beta, rows + x * varied)
    assert gradcheck(whole, (*inputs, torch.zeros_like(rows).requires_grad_()))


def test_truncated():
    """Where memories are constants, differences know no better: against calls that are detached."""
    inputs = doubles(1, 12)
    whole, _ = infini_attention(*inputs, segment_len=N, bptt_segments=1)
    state, outs = None, []
    for piece in zip(*(x.split(N, dim=1) for x in inputs[:3])):
        options = {} if state is None else {"state": state.detach()}
        out, state = infini_attention(*piece, inputs[3], segment_len=N, **options)
        outs.append(out)
    for got, wanted in zip(
        torch.autograd.grad(whole.square().sum(), inputs),
        torch.autograd.grad(torch.cat(outs, 1).square().sum(), inputs),
    ):
        assert_close(got, wanted, 1e-12)


@pytest.mark.parametrize("empty_memory", ["gate", "bypass"])
def test_what_it_computes_is_the_reference(empty_memory):
    q, k, v, beta = (x.detach() for x in doubles(2, 10))
    options = dict(segment_len=N, rope=ROPE, empty_memory=empty_memory, return_lse=True, return_parts=True)
    out, state, *rest = infini_attention(q, k, v, beta, inplace=True, **options)
    own, own_state, *own_rest = reference.infini_attention(q, k, v, beta, **options)
    of_state = [state.memory, state.normalizer], [own_state.M, own_state.z]
    for got, wanted in zip([out, *rest, *of_state[0]], [own, *own_rest, *of_state[1]], strict=True):
        assert_close(got, wanted, 1e-7)
    assert state.tokens.tolist() == [10, 10] and state.sequences == 2 and state.problem.segment_len == N
    assert not state.requires_grad and out.dtype == torch.float64
    for gate in (torch.inf, -torch.inf):
        parts = infini_attention(q, k, v, gate, **options | dict(empty_memory="gate"))
        assert torch.equal(parts[0], parts[4 if gate > 0 else 3])


def test_gradients_agree_with_those_of_float32():
    inputs = doubles(2, 10)
    wanted = torch.autograd.grad(infini_attention(*inputs, segment_len=N)[0].square().sum(), inputs)
    narrow = [x.detach().float().requires_grad_() for x in inputs]
    got = torch.autograd.grad(infini_attention(*narrow, segment_len=N)[0].square().sum(), narrow)
    for a, b in zip(got, wanted):
        assert_close(a, b)


def test_second_gradients_are_refused():
    inputs = doubles(1, 5)
    out, _ = infini_attention(*inputs, segment_len=N)
    (got,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="^infini_attention: a gradient of its gradients asked for"):
        got.sum().backward()


def test_what_is_refused():
    q, k, v, beta = doubles(1, 5)
    problem = Problem(heads=2, kv_heads=1, key_dim=4, value_dim=3, segment_len=N)
    _, state = infini_attention(q, k, v, beta, segment_len=N)
    broken = Float64State(state.rows.detach().clone(), state._text)
    broken.rows[0, -4] = 0.5
    for error, text, options in [
        (TypeError, "^state: State given, an infini_attn.torch.Float64State expected", dict(state=State(problem))),
        (TypeError, "^state: an infini_attn.State given, an infini_attn.torch.Float64State",
         dict(state=infini_attn.State(problem))),
        (TypeError, "^state: Float64State given, an infini_attn.torch.State expected",
         dict(state=state, q=q.float(), k=k.float(), v=v.float())),
        (TypeError, "^k: dtype torch.float32 given, torch.float64 as q has", dict(k=k.float())),
        (ValueError, r"^counters\[0\]: 0.5 given, a whole number", dict(state=broken)),
        (ValueError, "^state: .* given, 1 rows of", dict(state=Float64State(state.rows[:, 1:], state._text))),
        (ValueError, "^state: made for segment_len", dict(state=state, segment_len=5)),
        (ValueError, "^inplace: True given, False expected of float64 tensors", dict(state=state, inplace=True)),
        (ValueError, "^out: a tensor given, None expected of float64", dict(out=torch.empty(1, 5, 2, 3).double())),
        (ValueError, r"^beta: shape \[3\] given", dict(beta=torch.zeros(3))),
        (ValueError, r"^slots\[0\]: 1 given", dict(slots=[1])),
    ]:  # fmt: skip
        with pytest.raises(error, match=text):
            infini_attention(**dict(q=q, k=k, v=v, beta=beta, segment_len=None if "state" in options else N) | options)
    # Which autocast does not cast.
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="^q: dtype f64 given, f32, f16 or bf16"):
        infini_attention(q, k, v, beta, segment_len=N)
    with FakeTensorMode(), pytest.raises(TypeError, match="^q: dtype torch.float64 given, f32, f16 or bf16"):
        q_there = torch.empty(1, 5, 2, 4, dtype=torch.float64, device="cuda")
        infini_attention(q_there, q_there, q_there, torch.zeros(2), segment_len=N)
    # Without gradients infini_attn.infini_attention is for other types.
    with pytest.raises(TypeError, match="^q: dtype f64 given, f32, f16 or bf16"):
        infini_attn.infini_attention(*(x.detach() for x in (q, k, v, beta)), segment_len=N)
