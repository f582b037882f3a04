"""PyTorch records, transforms or differentiates operations: refused, never a graph that replays memory
which nobody writes, never a tangent lost."""

import warnings

import pytest
import torch
from oracle import tables, tensors
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from infini_attn import Problem, infini_attention, key_sums

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
Q, K, V, BETA = tensors(1, 12, 2, 2, 8)
ROPE = tables(12, torch.tensor([1.0, 0.1]))


def attend(q=Q, beta=BETA, rope=None):
    return infini_attention(q, K, V, beta, segment_len=4, rope=rope, return_state=False)


EXPECTED = attend()


def fake(q):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return attend(q)


RECORDERS = {
    "torch.jit.trace": lambda f: torch.jit.trace(f, (Q,)),
    "ProxyTorchDispatchMode": lambda f: make_fx(f)(Q),
    "ProxyTorchDispatchMode ": lambda f: make_fx(f, tracing_mode="fake")(Q),
    "FakeTensorMode": lambda f: fake(Q),
    "FakeTensorMode ": lambda f: torch.export.export(Module(f), (Q,), strict=False),
    "a transform of torch.func": lambda f: torch.vmap(f)(Q[None]),
    "a transform of torch.func ": lambda f: torch.func.grad(lambda q: f(q).sum())(Q),
    "a transform of torch.func  ": lambda f: torch.func.jvp(f, (Q,), (Q,)),
    "a transform of torch.func   ": lambda f: torch.func.functionalize(f)(Q),
}


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("within", RECORDERS)
def test_within(within):
    with pytest.raises(ValueError, match=f"q: a tensor within {within.strip()} given, a call outside of it"):
        RECORDERS[within](lambda q: attend(q))


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
        assert torch.equal(attend(), EXPECTED)
        assert torch.equal(attend(dual(Q).detach()), EXPECTED)


def test_modes_that_only_watch_are_no_hindrance():
    with FlopCounterMode(display=False):
        assert torch.equal(attend(), EXPECTED)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_call_it_between_their_graphs(backend):
    def layer(q, beta):
        return attend(q * 2, beta + 1) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo says that it breaks its graph.
        compiled = torch.compile(layer, backend=backend)
        for scale in (1, 3):
            assert torch.equal(compiled(Q * scale, BETA), layer(Q * scale, BETA))
        q = Q.clone().requires_grad_()
        with pytest.raises(ValueError, match="q: a tensor that requires grad"):
            compiled(q, BETA)
        with torch.no_grad():
            assert torch.equal(compiled(q, BETA), layer(Q, BETA))
    torch._dynamo.reset()
