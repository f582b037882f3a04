"""Threads: the interpreter lock is released, states are protected, pools survive a fork."""

import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from oracle import tensors

from infini_attn import Problem, State, get_num_threads, infini_attention, set_num_threads


@pytest.fixture
def work():
    """The tensors of a call that takes about half a second."""
    q, k, v, beta = tensors(1, 4096, 4, 4, 64)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        infini_attention(q, k, v, beta)
        seconds.append(time.perf_counter() - start)
    repeat = int(0.5 / min(seconds)) + 1
    return *(x.repeat(1, repeat, 1, 1) for x in (q, k, v)), beta


def test_other_threads_run_meanwhile(work):
    seconds = []

    def call():
        start = time.perf_counter()
        infini_attention(*work)
        seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=call)
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert seconds[0] > 0.1 and longest < seconds[0] / 2


def test_a_state_is_not_used_by_two_calls_at_once(work):
    q, k, v, beta = work
    state = State(infini_attention(q[:, :1], k[:, :1], v[:, :1], beta)[1].problem)
    started = threading.Event()

    def call():
        started.set()
        infini_attention(*work, state=state, inplace=True)

    thread = threading.Thread(target=call)
    thread.start()
    started.wait()
    time.sleep(0.05)
    for use in (lambda: state.M, state.flush, state.fork, call, lambda: pickle.dumps(state)):
        with pytest.raises(RuntimeError, match="state: in use by another call"):
            use()
    thread.join()
    assert state.tokens.item() == q.shape[1] and np.isfinite(state.M).all()


def test_many_threads_read_one_state():
    q, k, v, beta = tensors(1, 300, 2, 2, 16)
    _, state = infini_attention(q, k, v, beta, segment_len=64)
    expected, failed = infini_attention(q, k, v, beta, state=state)[0], []

    def call():
        for _ in range(10):
            if not torch.equal(infini_attention(q, k, v, beta, state=state)[0], expected):
                failed.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed


def test_set_num_threads():
    q, k, v, beta = tensors(2, 300, 4, 2, 16)
    expected = infini_attention(q, k, v, beta, segment_len=64)[0]
    before = get_num_threads()
    try:
        for n in (1, 3):
            set_num_threads(n)
            assert get_num_threads() == n
            assert torch.equal(infini_attention(q, k, v, beta, segment_len=64)[0], expected)
    finally:
        set_num_threads(before)


def run(code):
    """A program of its own, which must end by itself."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("setting", ["", "infini_attn.set_num_threads(2)"])
def test_calls_work_after_a_fork(setting):
    run(f"""
import os, numpy as np, infini_attn
{setting}
q = np.ones((1, 300, 4, 16), np.float32)
expected = infini_attn.infini_attention(q, q, q, np.zeros(4), segment_len=64)[0]
child = os.fork()
if child == 0:
    out = infini_attn.infini_attention(q, q, q, np.zeros(4), segment_len=64)[0]
    os._exit(0 if np.array_equal(out, expected) else 1)
assert os.waitpid(child, 0)[1] == 0
""")


def test_every_operation_works_after_a_fork():
    """Each on its own, and in tasks enough for a pool: one that waited for the parent's threads would
    never end."""
    run("""
import os, signal, numpy as np, infini_attn
from infini_attn import *
p = Problem(heads=4, key_dim=64, segment_len=64, update="linear")
q = np.ones((1, 100, 4, 64), np.float32)
attend = lambda **options: infini_attention(q, q, q, np.zeros(4), segment_len=64, update="linear", **options)
state = attend()[1]
state.flush()
sums = key_sums(p, q)
map = segment_map(p, q, q, KeySums.zero(p))
_, _, lse, a_dot, _ = attend(return_lse=True, return_parts=True)
operations = dict(
    infini_attention=attend,
    flush=lambda: attend()[1].flush(),
    reset=lambda: state.fork().reset(),
    key_sums=lambda: key_sums(p, q),
    segment_map=lambda: segment_map(p, q, q, sums),
    compose=lambda: compose(map, segment_map(p, q, q, sums)),
    apply=lambda: apply(map, State(p)),
    merge_partials=lambda: merge_partials([a_dot, a_dot], [lse, lse]),
    merge_memories=lambda: merge_memories([state, state]),
)
for name, operation in operations.items():
    operation()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        operation()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
""")


def test_merge_memories_keeps_to_the_threads_set():
    run("""
import numpy as np, os, infini_attn
from infini_attn import Problem, State, merge_memories, set_num_threads
set_num_threads(1)
before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
states = [State(Problem(heads=8, key_dim=64, segment_len=8, update="linear")) for _ in "ab"]
merge_memories(states)
after = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
assert after == before, (before, after)
""")


def test_nothing_is_copied():
    """Inputs whose copy would take gigabytes: one token seen 2^19 times."""
    run("""
import resource, numpy as np, infini_attn
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokens, dim = 1 << 19, 512
q = np.broadcast_to(np.ones(dim, np.float32), (1, tokens, 1, dim))
v = np.ones((1, tokens, 1, 1), np.float32)
call = lambda t: infini_attn.infini_attention(
    q[:, :t], q[:, :t], v[:, :t], [0.0], segment_len=64, update="linear", return_state=False)
call(1024)
before = peak()
assert np.allclose(call(tokens)[:, 64:], 1)
assert peak() - before < q.nbytes / 8, (peak() - before, q.nbytes)
""")


def test_torch_is_not_imported():
    run("""
import sys, numpy as np, infini_attn
q = np.ones((1, 40, 2, 8), np.float32)
infini_attn.infini_attention(q, q, q, [0.0, 0.0])
assert "torch" not in sys.modules
""")


def test_a_token_does_not_wait_for_a_prompt(work):
    """A decode that needs threads finds some while a long call keeps those of its own busy."""
    q, k, v, beta = tensors(8, 200, 8, 8, 64)
    _, state = infini_attention(q, k, v, beta, segment_len=4096)
    token = [x[:, :1] for x in (q, k, v)]
    infini_attention(*token, beta, state=state)
    thread = threading.Thread(target=infini_attention, args=work)
    thread.start()
    time.sleep(0.05)
    decoded = 0
    while thread.is_alive():
        infini_attention(*token, beta, state=state)
        decoded += thread.is_alive()
    # One that had to wait would be the only one.
    assert decoded >= 5


def test_copies_do_not_hold_up_other_threads():
    """What takes a while runs without the interpreter lock: another thread gets on meanwhile."""
    state = State(Problem(heads=8, key_dim=128, segment_len=64), 400)
    out = {}

    def count():
        ticks = 0
        while not out:
            ticks += 1
            time.sleep(0)
        out["ticks"] = ticks

    for name, copy in [
        ("slice", lambda: state[:]),
        ("concat", lambda: State.concat([state, state])),
        ("pickle", lambda: pickle.dumps(state)),
        ("reset of a copy", lambda: state.fork().reset()),
        ("M", lambda: state.M),
    ]:
        out.clear()
        thread = threading.Thread(target=count)
        thread.start()
        start = time.perf_counter()
        copy()
        seconds = time.perf_counter() - start
        out["done"] = True
        thread.join()
        # The lock is asked for every 5 ms.
        assert out["ticks"] > seconds / 0.02, (name, seconds, out)


@pytest.mark.parametrize("setting", ["set", "variable"])
def test_more_threads_than_anybody_wants(setting):
    if setting == "set":
        with pytest.raises(ValueError, match=r"^n: 65536 given, 1 to \d+ expected$"):
            set_num_threads(65536)
        return
    run("""
import os
os.environ["RAYON_NUM_THREADS"] = "100000"
import numpy as np, infini_attn
q = np.ones((1, 300, 4, 64), np.float32)
try:
    infini_attn.infini_attention(q, q, q, np.zeros(4))
except ValueError as e:
    assert str(e).startswith("RAYON_NUM_THREADS: 100000 given, 1 to "), e
else:
    raise AssertionError("so many threads")
infini_attn.set_num_threads(2)
infini_attn.infini_attention(q, q, q, np.zeros(4))
""")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_threads_that_cannot_be_started():
    run("""
import os, resource
# Stacks so large that some are refused while there is memory for all else.
os.environ |= {"RAYON_NUM_THREADS": "200", "RUST_MIN_STACK": str(300 << 20)}
import numpy as np, infini_attn
p = infini_attn.Problem(heads=4, key_dim=64)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), limit[1]))
q = np.ones((1, 300, 4, 64), np.float32)
for call in (lambda: infini_attn.infini_attention(q, q, q, np.zeros(4), segment_len=64),
             lambda: infini_attn.key_sums(p, q), lambda: infini_attn.set_num_threads(150)):
    try:
        call()
    except RuntimeError as e:
        assert str(e).startswith("threads: ") and "could not be started" in str(e), e
    else:
        raise AssertionError("so many threads")
resource.setrlimit(resource.RLIMIT_AS, limit)
infini_attn.set_num_threads(2)
infini_attn.infini_attention(q, q, q, np.zeros(4), segment_len=64)
""")
