"""Ctrl-C ends a long call: state and outputs are those of the tokens taken in."""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from oracle import tensors

import infini_attn.torch
from infini_attn import (
    KeySums,
    Problem,
    State,
    get_num_threads,
    infini_attention,
    key_sums,
    reference,
    segment_map,
    set_num_threads,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals to a thread")


@pytest.fixture(autouse=True)
def handler():
    """A shell's background jobs begin with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def interrupted(after):
    """SIGINT to the main thread in so many seconds; how long it was until it got through."""
    seconds, sent = [], []

    def send():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after, send)
    timer.start()
    try:
        yield seconds
    finally:
        seconds.append(time.perf_counter() - sent[0] if sent else None)
        timer.cancel()
        timer.join()


@pytest.fixture
def slow():
    """The arguments of a call of one segment that takes half a minute or more, and a state."""
    q, k, v, beta = tensors(1, 50_000, 4, 2, 64)
    return (q, k, v, beta), State(Problem(heads=4, kv_heads=2, key_dim=64, segment_len=60_000))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("threads", [2, 3])
def test_a_call_within_its_first_segment(slow, inplace, threads):
    arguments, state = slow
    before = get_num_threads()
    set_num_threads(threads)
    try:
        with pytest.raises(KeyboardInterrupt) as info, interrupted(0.3) as seconds:
            infini_attention(*arguments, state=state, inplace=inplace)
    finally:
        set_num_threads(before)
    # No bound of time, but one that tells it from the whole call.
    assert seconds[0] < 5
    assert state.tokens.item() == 0 and not state.M.any()
    if inplace:
        assert info.value.tokens_taken == [0]
    else:
        assert not hasattr(info.value, "tokens_taken")


def test_gradients(slow):
    """Of a call that is not made: any outputs take as long."""
    (q, k, v, beta), state = slow
    o, lse, text = torch.rand_like(q), torch.rand(1, 4, 50_000), infini_attn._core._problem_text(state.problem)
    call = q, k, v, beta, None, 1, text, False, o, lse, None, o, None, None, None, None, False
    with pytest.raises(KeyboardInterrupt), interrupted(0.3) as seconds:
        torch.ops.infini_attn.prefill_backward(*call)
    assert seconds[0] < 5


@pytest.mark.parametrize("hkv", [2, 1])
def test_a_call_in_place_says_what_it_has_done(hkv):
    q, k, v, beta = tensors(1, 400_000, 2, hkv, 16)
    whole, after = infini_attention(q, k, v, beta, segment_len=64)
    state, done, outs, cut = State(after.problem), 0, [], 0
    for attempt in range(400):
        try:
            with interrupted(0.03 * (attempt % 12)):
                rest = (x[:, done:] for x in (q, k, v))
                out, same = infini_attention(*rest, beta, state=state, inplace=True)
        except KeyboardInterrupt as e:
            if not hasattr(e, "tokens_taken"):
                # Before the call, or after it but before its results had a name: Python's own gap.
                state, done, outs = State(after.problem), 0, []
                continue
            (taken,), (out, same) = e.tokens_taken, e.results
            assert same is state and state.tokens.item() == done + taken
            if sys.version_info >= (3, 11):
                assert f"[{taken}] tokens" in e.__notes__[0]
            outs.append(out[:, :taken])
            done += taken
            cut += taken > 0
        else:
            outs.append(out)
            if cut:
                break
            state, done, outs = State(after.problem), 0, []
    else:
        raise AssertionError("never done")
    assert torch.equal(torch.cat(outs, dim=1), whole)
    assert np.array_equal(state.M, after.M) and np.array_equal(state.tokens, after.tokens)


def test_a_state_in_a_tensor():
    q, k, v, beta = tensors(1, 400_000, 2, 1, 16)
    whole, after = infini_attn.torch.infini_attention(q, k, v, beta, segment_len=64)
    for attempt in range(1, 100):
        state, before = infini_attn.torch.State(after.problem, rotation=False), None
        try:
            with interrupted(0.02 * attempt):
                infini_attn.torch.infini_attention(q, k, v, beta, state=state, inplace=True)
        except KeyboardInterrupt as e:
            (taken,), before = getattr(e, "tokens_taken", [0]), e
        if before is not None and taken:
            break
    else:
        raise AssertionError("never cut short")
    out, _ = before.results
    assert state.tokens.item() == taken and torch.equal(out[:, :taken], whole[:, :taken])
    rest = (x[:, taken:] for x in (q, k, v))
    out, _ = infini_attn.torch.infini_attention(*rest, beta, state=state, inplace=True)
    assert torch.equal(out, whole[:, taken:])
    assert state.to_state().__reduce__() == after.to_state().__reduce__()


def test_a_state_in_a_tensor_given_stays_as_it_was():
    """And nothing is said of tokens that it has not taken in."""
    q, k, v, beta = tensors(1, 2_000_000, 1, 1, 16)
    _, state = infini_attn.torch.infini_attention(*(x[:, :100] for x in (q, k, v)), beta, segment_len=64)
    with pytest.raises(KeyboardInterrupt) as caught, interrupted(0.1):
        while True:
            infini_attn.torch.infini_attention(q, k, v, beta, state=state)
    assert state.tokens.item() == 100 and not hasattr(caught.value, "tokens_taken")


def test_a_state_given_stays_as_it_was():
    q, k, v, beta = tensors(1, 2_000_000, 1, 1, 16)
    _, state = infini_attention(q[:, :100], k[:, :100], v[:, :100], beta, segment_len=64)
    memory = state.M
    with pytest.raises(KeyboardInterrupt), interrupted(0.1):
        while True:
            infini_attention(q, k, v, beta, state=state)
    assert state.tokens.item() == 100 and np.array_equal(state.M, memory)


def test_a_handler_that_returns_ends_nothing():
    q, k, v, beta = tensors(1, 20_000, 2, 2, 16)
    want = infini_attention(q, k, v, beta, segment_len=256, return_state=False)
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with interrupted(0.02):
            while not seen:
                got = infini_attention(q, k, v, beta, segment_len=256, return_state=False)
                assert torch.equal(got, want)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_exception_of_the_program_s_own():
    class Stop(Exception):
        __slots__ = ()

    def handler(*_):
        raise Stop

    before = signal.signal(signal.SIGINT, handler)
    try:
        q, k, v, beta = tensors(1, 60_000, 2, 2, 64)
        with pytest.raises(Stop), interrupted(0.2):
            infini_attention(q, k, v, beta, segment_len=60_000)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("which", ["reference", "segment_map", "key_sums"])
def test_other_long_calls(which):
    p = Problem(heads=2, key_dim=128, segment_len=64)
    tokens = {"reference": 3_000, "segment_map": 1_000_000, "key_sums": 1 << 30}[which]
    row = np.ones((1, 1, 2, 128), np.float32)
    k = np.broadcast_to(row, (1, tokens, 2, 128))
    call = {
        "reference": lambda: reference.infini_attention(k, k, k, [0.0, 0.0], segment_len=tokens),
        "segment_map": lambda: segment_map(p, k, k, KeySums.zero(p)),
        "key_sums": lambda: key_sums(p, k),
    }[which]
    with pytest.raises(KeyboardInterrupt), interrupted(0.3) as seconds:
        call()
    assert seconds[0] < 2


def test_a_thread_goes_on():
    """Signals are the main thread's; a call of another one is not ended by them."""
    q, k, v, beta = tensors(1, 60_000, 2, 2, 16)
    results = []
    call = lambda: results.append(infini_attention(q, k, v, beta, segment_len=128)[1].tokens.item())
    thread = threading.Thread(target=call)
    with pytest.raises(KeyboardInterrupt), interrupted(0.05):
        thread.start()
        time.sleep(10)
    thread.join()
    assert results == [60_000]
