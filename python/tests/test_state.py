"""State: what it shows, copies, files, forks."""

import copy
import errno
import os
import pathlib
import pickle
import weakref

import numpy as np
import pytest
import torch
from oracle import assert_close, runs, tables, tensors

from infini_attn import Problem, State, infini_attention

N = 16


def stream(t, *, dtype=torch.float32, batch=2, **options):
    """A state after `t` tokens, and the tokens that follow."""
    q, k, v, beta = tensors(batch, t + 30, 4, 2, 8, 12, dtype=dtype)
    head, rest = runs([t, 30], q, k, v)
    _, state = infini_attention(*head, beta, segment_len=N, **options)
    return state, (*rest, beta)


def assert_same(a, b, rest):
    """Equal bits, now and in what follows."""
    assert np.array_equal(a.M, b.M) and np.array_equal(a.z, b.z) and a.problem == b.problem
    for name in ("tokens", "committed", "open_len", "position"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    out = [infini_attention(*rest, state=s, return_state=False) for s in (a, b)]
    assert torch.equal(*out)


def test_attributes():
    state, _ = stream(41)
    assert state.M.shape == (2, 2, 8, 12) and state.M.dtype == np.float32
    assert state.z.shape == (2, 2, 8) and state.z.dtype == np.float32
    for name, value in [("tokens", 41), ("committed", 32), ("open_len", 9), ("position", 41)]:
        counts = getattr(state, name)
        assert counts.dtype == np.int64 and counts.tolist() == [value, value]
    assert state.sequences == 2 and state.nbytes > state.M.nbytes + state.z.nbytes
    state.M[:] = 0  # a copy
    assert state.M.any()
    assert "tokens=[41, 41]" in repr(state) and "segment_len=16" in repr(state)


def test_an_input_state_stays_as_it_is_unless_inplace():
    state, rest = stream(41)
    before = state.fork()
    out, after = infini_attention(*rest, state=state)
    assert after is not state and after.tokens.tolist() == [71, 71]
    assert_same(state, before, rest)
    again, same = infini_attention(*rest, state=state, inplace=True)
    assert same is state and torch.equal(again, out)
    assert np.array_equal(state.M, after.M) and state.tokens.tolist() == [71, 71]


def test_none_means_the_state_s_value():
    state, rest = stream(20, update="linear", scale=0.5, denominator=("add", 0.25))
    _, after = infini_attention(*rest, state=state)
    assert after.problem == state.problem
    assert (after.problem.update, after.problem.scale) == ("linear", 0.5)
    options = dict(segment_len=N, update="linear", scale=0.5, denominator=("add", 0.25))
    infini_attention(*rest, state=state, empty_memory="gate", **options)  # the same values pass


def test_flush_and_reset():
    state, rest = stream(41)
    state.flush([1])
    assert state.committed.tolist() == [32, 41] and state.open_len.tolist() == [9, 0]
    state.flush()
    assert state.committed.tolist() == [41, 41] and state.tokens.tolist() == [41, 41]
    state.reset([0])
    assert state.tokens.tolist() == [0, 41] and not state.M[0].any() and state.M[1].any()
    fresh = State(state.problem, 2)
    out = infini_attention(*rest, state=state, return_state=False)
    assert_close(out[0], infini_attention(*rest, state=fresh, return_state=False)[0])


def test_truncate():
    q, k, v, beta = tensors(2, 71, 4, 2, 8)
    kept, drafts, rest = runs([36, 5, 30], q, k, v)
    _, state = infini_attention(*kept, beta, segment_len=N)
    expected = infini_attention(*rest, beta, state=state, return_state=False)
    _, state = infini_attention(*drafts, beta, state=state)
    state.truncate(0, 36)
    state.truncate(slot=np.int64(1), tokens=np.int64(36))
    assert state.tokens.tolist() == [36, 36] and state.open_len.tolist() == [4, 4]
    assert torch.equal(infini_attention(*rest, beta, state=state, return_state=False), expected)
    state.truncate(1, 32)
    assert state.tokens.tolist() == [36, 32] and state.committed.tolist() == [32, 32]
    for slot, tokens, text in [
        (1, 31, "^tokens: 31 given for slot 1, at least 32 expected: what is committed"),
        (0, 37, "^tokens: 37 given, at most the 36 that slot 0 has seen expected"),
        (2, 36, "^slot: 2 given, less than the state's 2 slots expected"),
        (-1, 36, "^slot: -1 given, at least 0 expected"),
        (0, -1, "^tokens: -1 given, at least 0 expected"),
    ]:
        with pytest.raises(ValueError, match=text):
            state.truncate(slot, tokens)
    with pytest.raises(TypeError, match="^tokens: .* given, an integer expected"):
        state.truncate(0, 33.0)
    assert state.tokens.tolist() == [36, 32]


def test_fork_of_some_slots():
    state, rest = stream(41)
    twice = state.fork([1, 1, 0])
    assert twice.sequences == 3
    assert np.array_equal(twice.M, state.M[[1, 1, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [0, 9, 32, 41])
def test_round_trips(tmp_path, t, dtype):
    state, rest = stream(t, dtype=dtype)
    path = tmp_path / "state.safetensors"
    state.save(path)
    for other in (
        State.load(path),
        State.load(str(path), state.problem),
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
        copy.copy(state),
        state.fork(),
    ):
        assert_same(state, other, rest)
    # Copies are independent.
    other = copy.deepcopy(state)
    infini_attention(*rest, state=other, inplace=True)
    assert state.tokens.tolist() == [t, t] and other.tokens.tolist() == [t + 30, t + 30]


def test_round_trip_with_rotated_open_segment(tmp_path):
    q, k, v, beta = tensors(1, 40, 2, 1, 8)
    rope = tables(40, torch.tensor([1.0, 0.1]))
    head, rest = runs([21, 19], q, k, v)
    _, state = infini_attention(*head, beta, segment_len=N, rope=rope)
    state.save(tmp_path / "s")
    loaded = State.load(tmp_path / "s")
    expected = infini_attention(*rest, beta, state=state, rope=rope, return_state=False)
    assert torch.equal(
        infini_attention(*rest, beta, state=loaded, rope=rope, return_state=False), expected
    )
    with pytest.raises(ValueError, match="rope: slot 0 holds an open segment of 5 tokens"):
        infini_attention(*rest, beta, state=loaded)


def test_streams_by_index():
    state, rest = stream(41, batch=3)
    assert len(state) == 3
    q, k, v, beta = rest
    for index, streams in [
        (1, [1]), (-1, [2]), (np.int64(0), [0]), (slice(1, None), [1, 2]), (slice(None, None, -1), [2, 1, 0]),
        ([0, 0, -2], [0, 0, 1]), (torch.tensor([2]), [2]), (slice(0, 0), []),
    ]:
        part = state[index]
        assert len(part) == len(streams)
        assert_same(part, state.fork(streams), ([x[streams] for x in (q, k, v)]) + [beta])
    assert [one.tokens.item() for one in state] == [41, 41, 41]
    for index in (3, -4, [0, 3], 2**63):
        with pytest.raises((IndexError, ValueError), match="index"):
            state[index]
    for index in ("0", 1.5, None):
        with pytest.raises(TypeError, match="^index: "):
            state[index]
    with pytest.raises(ValueError, match=r"^index: shape \[1, 1\]"):
        state[[[0]]]


def test_streams_join_and_leave():
    a, rest = stream(41, batch=2)
    b, _ = stream(7, batch=1)
    both = State.concat([a, b])
    assert both.tokens.tolist() == [41, 41, 7]
    q, k, v, beta = rest
    assert_same(both[:2], a, rest)
    assert_same(State.concat((both[2:], both[0])), State.concat([b, a[0]]), rest)
    other = State(Problem(heads=4, key_dim=8))
    for states, text in [
        ([], "states: 0 elements given, at least one state expected"),
        ([a, other], "state: made for "),
    ]:
        with pytest.raises(ValueError, match=text):
            State.concat(states)
    with pytest.raises(TypeError, match=r"^states\[1\]: "):
        State.concat([a, 1])


def test_weak_references():
    state, _ = stream(3)
    weak = weakref.ref(state)
    assert weak() is state
    del state
    assert weak() is None


def test_slots_are_one_or_a_list():
    state, _ = stream(20, batch=3)
    assert state.fork(1).sequences == 1 and state.fork(np.array(2)).tokens.tolist() == [20]
    state.reset(0)
    assert state.tokens.tolist() == [0, 20, 20]
    for slots in ([[0, 0], [0, 0]], np.zeros((1, 1, 1), int)):
        with pytest.raises(ValueError, match=r"^slots: shape \[.*\] given, one slot or a list \[n\] expected"):
            state.fork(slots)


@pytest.mark.parametrize("torch_tensors", [False, True])
def test_from_arrays(torch_tensors):
    state, rest = stream(32)
    arrays = (state.M, state.z, state.tokens)
    if torch_tensors:
        arrays = tuple(map(torch.from_numpy, arrays))
    made = State.from_arrays(*arrays, heads=4, segment_len=N)
    assert_same(state, made, rest)
    assert State.from_arrays(*arrays, [16, 32], heads=4).committed.tolist() == [16, 32]
    # Any strides.
    turned = np.ascontiguousarray(state.M.swapaxes(2, 3)).swapaxes(2, 3)
    assert np.array_equal(State.from_arrays(turned, *arrays[1:]).M, state.M)


def test_files_that_are_refused(tmp_path):
    state, _ = stream(41)
    path = tmp_path / "state"
    state.save(path)
    other = Problem(heads=4, kv_heads=2, key_dim=8, value_dim=12, segment_len=32)
    with pytest.raises(ValueError, match="segment_len = 16, the call has segment_len = 32"):
        State.load(path, other)
    data = path.read_bytes()
    for bad in (data[:-7], b"", b"not a state", data[: len(data) // 2]):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ValueError, match="bad: not a usable state"):
            State.load(tmp_path / "bad")


@pytest.mark.parametrize("form", [str, os.fsencode, pathlib.Path])
def test_errors_of_files_are_python_s_own(tmp_path, form):
    state = State(Problem(heads=1, key_dim=8))
    (tmp_path / "file").write_bytes(b"no state")
    os.symlink("loop", tmp_path / "loop")
    for kind, code, name in [
        (FileNotFoundError, errno.ENOENT, "no/folder"),
        (NotADirectoryError, errno.ENOTDIR, "file/below"),
        (IsADirectoryError, errno.EISDIR, "."),
        (OSError, errno.ELOOP, "loop"),
    ]:
        path = form(os.path.join(tmp_path, name))
        for call in (state.save, State.load):
            with pytest.raises(OSError) as refused:
                call(path)
            error = refused.value
            assert type(error) is kind and error.errno == code
            assert error.filename == os.fspath(path) and error.strerror == os.strerror(code)
            assert str(error) == f"[Errno {code}] {os.strerror(code)}: {os.fspath(path)!r}"
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]
    for path in (None, 3, [b"x"]):
        with pytest.raises(TypeError, match="^path: .* given, a str, bytes or os.PathLike expected"):
            State.load(path)
    with pytest.raises(ValueError, match="NUL"):
        state.save("a\0b")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root can be somebody else")
def test_files_of_others(tmp_path):
    state = State(Problem(heads=1, key_dim=8))
    shared, own = tmp_path / "shared", tmp_path / "own"
    for folder in (*list(tmp_path.parents)[:2], tmp_path):
        folder.chmod(0o755)
    shared.mkdir()
    shared.chmod(0o777)
    own.mkdir(0o700)
    for path, mode in [(shared / "a", 0o660), (shared / "b", 0o664), (shared / "c", 0o600)]:
        state.save(path)
        path.chmod(mode)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        for call in (state.save, State.load):
            with pytest.raises(PermissionError) as refused:
                call(own / "state")
            assert refused.value.filename == str(own / "state")
        for name in "abc":
            state.save(shared / name)
    finally:
        os.seteuid(0)
        os.setegid(0)
    # What the old file's group could do, the new one's may not unless all may.
    for name, mode in [("a", 0o600), ("b", 0o644), ("c", 0o600)]:
        found = (shared / name).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (65534, 65534, mode)


def test_names_of_any_bytes(tmp_path):
    state = State(Problem(heads=1, key_dim=8))
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    state.save(path)
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff\xfe"]
    for name in (path, os.fsdecode(path), pathlib.Path(os.fsdecode(path))):
        assert State.load(name).problem == state.problem
    with pytest.raises(FileNotFoundError) as refused:
        State.load(path + b"no")
    assert refused.value.filename == path + b"no"


def test_problem():
    p = Problem(heads=8, kv_heads=2, key_dim=64, denominator=("clamp", 1e-10), dtype="bf16")
    assert (p.heads, p.kv_heads, p.key_dim, p.value_dim) == (8, 2, 64, 64)
    assert (p.segment_len, p.update, p.scale, p.empty_memory) == (2048, "delta", 0.125, "gate")
    assert p.denominator == ("clamp", 1e-10) and p.dtype == "bf16"
    assert eval(repr(p)) == p and p != Problem(heads=8, key_dim=64)
    state = State(p, 3)
    assert state.problem == p and state.tokens.tolist() == [0, 0, 0]
