"""What a call from Python costs besides its arithmetic: `pytest benches/python_calls.py`.

Needs the package, PyTorch and pytest-benchmark (`pip install "./python[bench]"`). The baselines are in
the same run: `sdpa` is PyTorch's attention over as many keys; `tensor state` is a call with an
`infini_attn.torch.State`, `operator` one of the operator below it; `inplace` what decoding costs without the
semantics of a value. In `beside a prompt` look at the largest time, in `interrupt` subtract the 0.3 s
until the signal is sent.
"""

import mmap
import os
import signal
import threading

import numpy as np
import pytest
import torch

import infini_attn
from infini_attn import Problem, State, _core, infini_attention
from infini_attn import torch as tensors


@pytest.fixture(params=[1, 2])
def threads(request):
    infini_attn.set_num_threads(request.param)
    torch.set_num_threads(request.param)
    yield request.param
    infini_attn.set_num_threads(os.cpu_count())


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.benchmark(group="small call: 8 heads of 64, one token, N = 128")
@pytest.mark.parametrize("kind", ["torch", "numpy", "tensor state", "operator", "sdpa"])
def test_small(benchmark, threads, kind):
    q, k, v = normal(3, 1, 1, 8, 64)
    state = State(Problem(heads=8, key_dim=64, segment_len=128))
    beta = torch.zeros(8)
    if kind == "numpy":
        q, k, v, beta = (x.numpy() for x in (q, k, v, beta))
    if kind == "tensor state":
        state = tensors.State.from_state(state)
    if kind == "operator":
        state = tensors.State.from_state(state)
        call = state.buffer, 1, _core._problem_text(state.problem), True
        benchmark(torch.ops.infini_attn.decode_, q, k, v, beta, *call)
    elif kind == "sdpa":
        keys = normal(1, 8, 128, 64)
        q = q.transpose(1, 2)
        benchmark(torch.nn.functional.scaled_dot_product_attention, q, keys, keys)
    else:
        benchmark(infini_attention, q, k, v, beta, state=state, inplace=True)


SHAPES = {"8 x 64, N 512": (8, 64, 512, 100), "8 x 128, N 2048": (8, 128, 2048, 1000), "8 x 64, N 8192": (8, 64, 8192, 1000)}


@pytest.mark.benchmark(group="decode of one token")
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "value"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(benchmark, shape, inplace):
    heads, dim, n, seen = SHAPES[shape]
    x, beta = normal(1, seen, heads, dim), torch.zeros(heads)
    _, state = infini_attention(x, x, x, beta, segment_len=n)
    token, held = x[:, :1], [state]

    def step():
        _, held[0] = infini_attention(token, token, token, beta, state=held[0], inplace=inplace)

    benchmark.pedantic(step, rounds=300, warmup_rounds=20)


@pytest.fixture(scope="module")
def large():
    """A state of 256 MiB with an eighth of its rows in use."""
    x = normal(1, 4000, 8, 128)
    return infini_attention(x, x, x, torch.zeros(8), segment_len=32768)[1]


@pytest.mark.benchmark(group="copies of a state of 256 MiB, 4000 of 32768 rows in use")
@pytest.mark.parametrize("what", ["fork()", "fork([0])", "the rows into new memory"])
def test_copies(benchmark, large, what):
    rows = np.ones(2 * 4000 * 8 * 128, np.float32)

    def memcpy():
        with mmap.mmap(-1, rows.nbytes) as memory:
            np.frombuffer(memory, np.float32)[:] = rows

    copy = {"fork()": large.fork, "fork([0])": lambda: large.fork([0])}
    benchmark.pedantic(copy.get(what, memcpy), rounds=30, warmup_rounds=2)


@pytest.mark.benchmark(group="decode of one token beside a prompt in another thread")
@pytest.mark.parametrize("n", [128, 8192], ids=["little work", "work for threads"])
def test_beside_a_prompt(benchmark, n):
    x, beta, stop = normal(1, 60_000, 8, 64), torch.zeros(8), threading.Event()
    prompt = lambda: [infini_attention(x, x, x, beta, segment_len=2048) for _ in iter(stop.is_set, True)]
    seen = x[:, : n // 2]
    _, state = infini_attention(seen, seen, seen, beta, segment_len=n)
    token = x[:, :1]
    thread = threading.Thread(target=prompt)
    thread.start()
    step = lambda: infini_attention(token, token, token, beta, state=state, inplace=True)
    try:
        benchmark.pedantic(step, rounds=30, iterations=1, warmup_rounds=1)
    finally:
        stop.set()
        thread.join()


@pytest.mark.benchmark(group="interrupt 0.3 s after the begin of a call of tens of seconds")
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "value"])
def test_interrupt(benchmark, inplace):
    x = normal(1, 50_000, 4, 64)
    state = State(Problem(heads=4, key_dim=64, segment_len=60_000))

    def call():
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            infini_attention(x, x, x, torch.zeros(4), state=state, inplace=inplace)

    # A shell's background jobs begin with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    benchmark.pedantic(call, rounds=3)
