"""PyTorch transforms operations: refused, never a tangent lost. What records them is
in test_compile.py; here, what else sees a call."""

import subprocess
import sys

import pytest
import torch
from oracle import tables, tensors
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import infini_attn.torch
from infini_attn import Problem, State, infini_attention, key_sums

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
Q, K, V, BETA = tensors(1, 12, 2, 2, 8)
ROPE = tables(12, torch.tensor([1.0, 0.1]))


def attend(q=Q, beta=BETA, rope=None):
    return infini_attention(q, K, V, beta, segment_len=4, rope=rope, return_state=False)


def attend_by_operators(q):
    return infini_attn.torch.infini_attention(q, K, V, BETA, segment_len=4, return_state=False)


EXPECTED = attend()


TRANSFORMS = {
    "vmap": lambda f: torch.vmap(f)(Q[None]),
    "grad": lambda f: torch.func.grad(lambda q: f(q).sum())(Q),
    "jvp": lambda f: torch.func.jvp(f, (Q,), (Q,)),
}


@pytest.mark.parametrize("function", [attend, attend_by_operators])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform, function):
    with pytest.raises(ValueError, match="q: a tensor within a transform of torch.func given, a call outside"):
        TRANSFORMS[transform](function)


def test_what_is_not_the_first_argument():
    with pytest.raises(ValueError, match="q: a tensor within a transform"):
        torch.vmap(lambda beta: attend(beta=beta))(BETA[None])
    with pytest.raises(ValueError, match="k: a tensor within a transform"):
        torch.vmap(lambda k: key_sums(Problem(heads=2, key_dim=8), k))(K[None])


def test_what_transforms_leave_behind():
    left = []
    torch.vmap(lambda x: left.append(x) or x)(Q)
    torch.func.grad(lambda x: left.append(x) or x.sum())(Q)
    torch.func.functionalize(lambda x: left.append(x) or x)(Q)
    assert len(left) == 3
    for tensor in left:
        with torch.no_grad(), pytest.raises(TypeError, match="q: a tensor that a transform of torch.func has left"):
            attend(tensor)


def test_tangents_are_not_dropped():
    with forward_ad.dual_level():
        dual = lambda x: forward_ad.make_dual(x, x)
        for name, options in dict(
            q=dict(q=dual(Q)),
            beta=dict(beta=dual(BETA)),
            **{"rope.cos": dict(rope=(dual(ROPE[0]), ROPE[1])), "rope.sin": dict(rope=(ROPE[0], dual(ROPE[1])))},
        ).items():
            with pytest.raises(ValueError, match=f"^{name}: a tensor with a forward-mode tangent given"):
                attend(**options)
        with pytest.raises(ValueError, match="^q: a tensor with a forward-mode tangent given"):
            attend_by_operators(dual(Q))
        learned = Q.clone().requires_grad_()
        for function in (attend, attend_by_operators):
            with pytest.raises(ValueError, match="^q: a tensor with a forward-mode tangent given"):
                function(dual(learned))
        with pytest.raises(ValueError, match="^beta: a tensor with a forward-mode tangent given"):
            attend(learned, beta=dual(BETA))
        assert torch.equal(attend(), EXPECTED)
        assert torch.equal(attend(dual(Q).detach()), EXPECTED)


def test_what_is_differentiated_cannot_be_traced():
    learned = Q.clone().requires_grad_()
    for function in (attend, attend_by_operators):
        with pytest.raises(ValueError, match="^q: tensors that require grad within torch.jit.trace given"):
            torch.jit.trace(function, (learned,))
        with torch.no_grad():
            assert torch.equal(torch.jit.trace(function, (learned,))(Q), EXPECTED)


def test_operators_without_gradients_refuse_what_requires_grad():
    text = infini_attn._core._problem_text(Problem(heads=2, key_dim=8, segment_len=4))
    with pytest.raises(ValueError, match="^v: a tensor that requires grad given"):
        torch.ops.infini_attn.prefill(Q, K, V.clone().requires_grad_(), BETA, None, 1, text, False)


def test_modes_that_only_watch_are_no_hindrance():
    with FlopCounterMode(display=False):
        assert torch.equal(attend(), EXPECTED)


def test_a_state_outside_of_pytorch_cannot_be_recorded():
    state = State(Problem(heads=2, key_dim=8, segment_len=4))
    expected = "state: an infini_attn.State given, an infini_attn.torch.State expected"
    with pytest.raises(TypeError, match=expected):
        torch.jit.trace(lambda q: infini_attention(q, K, V, BETA, state=state)[0], (Q,))
    assert state.tokens.tolist() == [0]


def test_graphs_break_where_the_operators_are_not_imported():
    program = """
import torch, warnings, infini_attn

def layer(q):
    return infini_attn.infini_attention(q * 2, q, q, [0.0], segment_len=4, return_state=False) + 1

q = torch.randn(1, 12, 1, 8)
warnings.simplefilter("ignore")  # Dynamo says that it breaks its graph.
assert torch.equal(torch.compile(layer, backend="aot_eager")(q), layer(q))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_other_functions_cannot_be_recorded():
    with pytest.raises(ValueError, match="k: a tensor within torch.jit.trace given, a call outside"):
        torch.jit.trace(lambda k: key_sums(Problem(heads=2, key_dim=8), k), (K,))
