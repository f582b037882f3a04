"""What PyTorch compiles, exports and records of the operator: the same bits as a call outside of it."""

import pytest
import torch
import torch._dynamo.testing
from oracle import tables, tensors
from torch.fx.experimental.proxy_tensor import make_fx
from torch._subclasses.fake_tensor import FakeTensorMode

import infini_attn
from infini_attn import Problem
from infini_attn.torch import BatchInfiniAttention, State, infini_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
N = 8
PROBLEM = Problem(heads=4, kv_heads=2, key_dim=16, value_dim=6, segment_len=N)
ROPE = tables(256, torch.tensor([1.0, 0.3, 0.05]))
MASK = torch.tensor([[0] * 5 + [1] * 15, [1] * 20])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(t=20, b=2, **options):
    return tensors(b, t, 4, 2, 16, 6, **options)


def layer(q, k, v, beta, **options):
    """A call of the package's own function between operations that are compiled."""
    out, state = infini_attn.infini_attention(q * 2, k, v, beta, segment_len=N, **options)
    return out + 1, state


def generate(q, k, v, beta, state):
    """A prompt and two tokens, in place."""
    outs = []
    for at in (slice(0, -2), slice(-2, -1), slice(-1, None)):
        x = [x[:, at] for x in (q, k, v)]
        outs.append(infini_attn.infini_attention(*x, beta, state=state, rope=ROPE, inplace=True)[0])
    return torch.cat(outs, dim=1)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_layer(backend):
    for options in (dict(), dict(rope=ROPE, attention_mask=MASK)):
        out, state = compiled(layer, backend)(*inputs(), **options)
        expected, own = layer(*inputs(), **options)
        assert torch.equal(out, expected) and isinstance(state, State)
        assert state.to_state().__reduce__() == own.__reduce__()
        assert state.problem == own.problem and state.rotation == ("rope" in options)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_state_advances_in_place(backend):
    state, own = State(PROBLEM, 2), State(PROBLEM, 2)
    function = compiled(generate, backend)
    for seed in range(2):
        assert torch.equal(function(*inputs(seed=seed), state), generate(*inputs(seed=seed), own))
        assert torch.equal(state.buffer, own.buffer)


def test_lengths_and_batches_that_vary_take_one_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    # An extent that is like another at first (2 of the heads) is one with it for the compiler.
    for t, b in ((20, 3), (33, 5), (7, 8)):
        out, state = function(*inputs(t, b))
        expected, own = layer(*inputs(t, b))
        assert torch.equal(out, expected) and state.sequences == b
        assert state.to_state().__reduce__() == own.__reduce__()
    assert counter.frame_count == 1


def test_packed_batches_that_vary():
    def step(q, k, v, beta, cu, slots, state):
        return (
            infini_attention(q, k, v, beta, cu_seqlens=cu, slots=slots, state=state, inplace=True)[0] * 2
        )

    state, own = State(PROBLEM, 6), State(PROBLEM, 6)
    function = compiled(step, dynamic=True)
    for cu, slots in (
        ([0, 3, 20], [4, 1]),
        ([0, 1, 2, 3], [0, 1, 4]),
        ([0, 17, 30, 40, 55], [5, 4, 3, 2]),
    ):
        q, k, v, beta = inputs(cu[-1], 1)
        x = q[0], k[0], v[0], beta, torch.tensor(cu), torch.tensor(slots)
        assert torch.equal(function(*x, state), step(*x, own)) and torch.equal(state.buffer, own.buffer)


def test_methods_of_a_state():
    def work(state):
        state.flush([1])
        fork = state.fork([1, 0, 1])
        state.reset()
        return fork, state.memory.sum() + fork.counters[0, 0], State.concat([fork, state])

    states = []
    for function in (work, compiled(work)):
        state = State(PROBLEM, 2)
        generate(*inputs(), state)
        fork, total, both = function(state)
        states.append((state.buffer, fork.buffer, total, both.buffer))
    assert all(torch.equal(a, b) for a, b in zip(*states))


def test_plan_and_run():
    def step(q, k, v, beta, state, cu):
        batch = BatchInfiniAttention()
        batch.plan(cu_seqlens=cu)
        return batch.run(q[0], k[0], v[0], beta, state)

    state, own, cu = State(PROBLEM, 2), State(PROBLEM, 2), torch.tensor([0, 9, 20])
    assert torch.equal(compiled(step)(*inputs(b=1), state, cu), step(*inputs(b=1), own, cu))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    q, k, v, beta = inputs()
    project = torch.nn.Linear(16, 16, bias=False)

    def function(q, k, v):
        with torch.autocast("cpu", dtype), torch.no_grad():
            return layer(project(q), k, v, beta)[0]

    assert torch.equal(compiled(function)(q, k, v), function(q, k, v))
    assert function(q, k, v).dtype == dtype


# The messages stand apart from the calls: PyTorch quotes the line of a call.
REFUSED = {
    "bptt_segments: 0 given, at least 1": dict(q=inputs()[0].requires_grad_(), bptt_segments=0),
    "k: dtype torch.float64 given, torch.float32": dict(k=inputs()[1].double()),
    "update: 'x' given, linear or delta": dict(update="x"),
    "an infini_attn.torch.State expected": dict(state=infini_attn.State(PROBLEM, 2)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_errors_while_compiling(message):
    names = dict(zip(("q", "k", "v", "beta"), inputs())) | REFUSED[message]
    with pytest.raises(Exception, match=message):
        compiled(lambda: layer(**names), "eager")()


class Module(torch.nn.Module):
    def forward(self, q, k, v, beta, state=None):
        out, state = infini_attn.infini_attention(q, k, v, beta, segment_len=N, state=state, rope=ROPE)
        return out, state


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = dict(q={1: length}, k={1: length}, v={1: length}, beta=None)
    program = torch.export.export(Module(), inputs(), strict=strict, dynamic_shapes=shapes)
    for t in (20, 37):
        out, state = program.module()(*inputs(t))
        expected, own = Module()(*inputs(t))
        assert torch.equal(out, expected) and state.to_state().__reduce__() == own.__reduce__()


def test_export_with_a_state():
    _, state = infini_attention(*inputs(), segment_len=N, rope=ROPE)
    program = torch.export.export(Module(), (*inputs(1), state), strict=False)
    out, after = program.module()(*inputs(1, seed=3), state)
    expected, right = Module()(*inputs(1, seed=3), state)
    assert torch.equal(out, expected) and torch.equal(after.buffer, right.buffer)


def attend(q, k, v, beta):
    return infini_attn.infini_attention(q, k, v, beta, segment_len=N, return_state=False)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    graph = make_fx(attend, tracing_mode=mode)(*inputs())
    for t in (20, 31) if mode == "symbolic" else (20,):
        assert torch.equal(graph(*inputs(t, seed=1)), attend(*inputs(t, seed=1)))
    assert "infini_attn.prefill" in graph.code


def test_jit_trace():
    traced = torch.jit.trace(attend, inputs())
    assert torch.equal(traced(*inputs(31, seed=1)), attend(*inputs(31, seed=1)))


def test_fake_and_meta_tensors():
    with FakeTensorMode() as mode:
        out, state = layer(*(mode.from_tensor(x) for x in inputs()))
    assert (
        out.shape == (2, 20, 4, 6) and out.device.type == "cpu" and state.memory.shape == (2, 2, 16, 6)
    )
    out, state = layer(*(x.to("meta") for x in inputs()))
    assert out.device.type == state.device.type == "meta" and state.open_v.shape == (2, 2, N, 6)


def test_functionalize():
    assert torch.equal(torch.func.functionalize(attend)(*inputs()), attend(*inputs()))
