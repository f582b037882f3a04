"""Memory that is not there is a MemoryError that says what for: never the end of the process."""

import sys

import numpy as np
import pytest
from test_threads import run

from infini_attn import Problem, State, infini_attention

PROBLEM = Problem(heads=8, key_dim=64, segment_len=256)


@pytest.mark.parametrize("rope", [False, True])
def test_state_bytes_are_known_beforehand(rope):
    assert PROBLEM.state_bytes() == State(PROBLEM).nbytes
    state, table = State(PROBLEM, 3), np.ones((4, 8), np.float32)
    q = np.ones((3, 1, 8, 64), np.float32)
    infini_attention(q, q, q, np.zeros(8), state=state, inplace=True, rope=(table, table) if rope else None)
    assert PROBLEM.state_bytes(3, rotation=rope) == state.nbytes
    with pytest.raises(MemoryError, match=f"a state of {2**61} slots: {2**61 * State(PROBLEM).nbytes} B"):
        PROBLEM.state_bytes(2**61)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_that_is_not_there():
    run("""
import copy, resource, numpy as np, infini_attn
from infini_attn import KeySums, Problem, State, infini_attention, reference

def refused(start, call, *args, **options):
    try:
        call(*args, **options)
    except MemoryError as e:
        assert str(e).startswith(start) and "B asked for" in str(e), e
    else:
        raise AssertionError(f"{start}: there is so much memory")

infini_attn.set_num_threads(2)
p = Problem(heads=8, key_dim=64, segment_len=256)
q = np.ones((1, 300, 8, 64), np.float32)
call = lambda q, **options: infini_attention(q, q, q, np.zeros(8), **options)
call(q)
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
refused(f"a state of {2**61} slots: ", State, p, 2**61)
refused(f"a state of {2**20} slots: ", State, p, 2**20)
refused("key sums: ", KeySums.zero, p, 2**61)
# [T, B, H, D] taken for [B, T, H, D]
refused("a state of 32768 slots: ", call, np.broadcast_to(q[:, :1], (32768, 1, 8, 64)))
refused("a reference state of 1048576 slots: ", reference.infini_attention,
        *3 * (np.broadcast_to(q[:, :1], (1 << 20, 1, 8, 64)),), np.zeros(8))

large = State(p, (1200 << 20) // p.state_bytes())
slots = large.sequences
x = np.ones((slots, 1, 8, 64), np.float32)
twin = large.fork()
for copies in (lambda: large.fork(np.arange(slots)), lambda: large[:], large.flush):
    refused(f"a state of {slots} slots: ", copies)
assert large.tokens.max() == 0
# A copy takes no memory, nor do the tokens that one of all copies appends; those of a second do.
call(x, state=large, inplace=True)
refused(f"a state of {slots} slots: ", call, x, state=twin)
assert call(x, state=copy.deepcopy(large))[1].tokens.min() == 2
assert large.tokens.min() == 1 and twin.tokens.max() == 0
""")
