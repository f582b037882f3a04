"""What the host knows of states on the device, graphs, and indices that lie on the device: on the
simulator, whose streams capture."""

import ctypes
import threading

import pytest
import torch

from infini_attn import infini_attention
from infini_attn.torch import State, _cuda, _held

from .test_cuda import HKV, N, TEXT, D, assert_close, problem, reference, tensors
from .torch_device import installed


pytestmark = pytest.mark.cuda


@pytest.fixture
def device(driver, monkeypatch):
    """A stream that is not the default one, and says itself whether it captures."""
    from infini_attn.torch import operator

    stream = driver.stream()
    monkeypatch.setattr(operator, "_is_eager", lambda q: True)

    def capturing():
        status = ctypes.c_int()
        driver("cuStreamIsCapturing", ctypes.c_void_p(stream), ctypes.byref(status))
        return status.value == 1

    with installed(driver, monkeypatch, stream):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
        yield Graphs(driver, stream)


class Graphs:
    def __init__(self, driver, stream):
        self.driver, self.stream = driver, ctypes.c_void_p(stream)

    def on(self, inputs):
        return [x.to("cuda") for x in inputs]

    def capture(self, step):
        """The graph of a step, and what it returned."""
        self.driver("cuStreamBeginCapture_v2", self.stream, 0)
        graph, run = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            result = step()
        finally:
            self.driver("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        self.driver("cuGraphInstantiateWithFlags", ctypes.byref(run), graph, ctypes.c_uint64(0))
        return result, lambda: self.driver("cuGraphLaunch", run, self.stream)


def known(state):
    return _held.known(state.buffer, state._key())


def test_a_graph_of_a_token(device):
    """After one step outside; over the end of a segment, then a prompt."""
    q, k, v, beta = device.on(tensors(2, 60))
    token = lambda t: [x[:, t : t + 1] for x in (q, k, v)]
    _, state = infini_attention(*(x[:, :28] for x in (q, k, v)), beta, segment_len=N)
    plain = state.clone()
    step = lambda state, inputs: infini_attention(
        *inputs, beta, state=state, inplace=True, return_state=False
    )
    step(state.clone(), token(0))
    inputs = [x.clone() for x in token(28)]
    out, replay = device.capture(lambda: step(state, inputs))
    assert known(state) is None and plain.tokens.tolist() == [28, 28]
    for t in range(28, 36):
        for into, x in zip(inputs, token(t)):
            into.copy_(x)
        replay()
        assert_close(out, step(plain, token(t)).cpu())
        assert known(state) is None
    assert state.tokens.tolist() == plain.tokens.tolist() == [36, 36]
    replay()
    step(plain, token(35))
    assert state.tokens.tolist() == plain.tokens.tolist() == [37, 37]
    rest = [x[:, 36:] for x in (q, k, v)]
    assert torch.equal(step(state, rest), step(plain, rest))


def test_a_graph_of_a_packed_step(device):
    q, k, v, beta = device.on(tensors(1, 3))
    packed = [x[0] for x in (q, k, v)]
    state, plain = (State(problem(), 2, device="cuda") for _ in range(2))
    cu = torch.tensor([0, 2, 3])

    def step(state):
        arguments = state.buffer, 2, TEXT, state.rotation
        return torch.ops.infini_attn.decode_(*packed, beta, *arguments, cu_seqlens=cu)[0]

    step(state.clone())
    out, replay = device.capture(lambda: step(state))
    for _ in range(20):
        replay()
        assert_close(out, step(plain).cpu())
    assert state.tokens.tolist() == plain.tokens.tolist() == [40, 20]


def test_what_no_graph_holds(device):
    q, k, v, beta = device.on(tensors(2, 40))
    _, state = infini_attention(q, k, v, beta, segment_len=N)
    token = [x[:, :1] for x in (q, k, v)]
    infini_attention(*token, beta, state=state.clone(), inplace=True)
    before = state.buffer.clone()
    mask = torch.ones(2, 1).to("cuda")
    for text, call in [
        ("state: reset given", state.reset),
        ("state: flush given", state.flush),
        ("state: truncate given", lambda: state.truncate(0, 39)),
        ("state: a copy of slots given", lambda: state.fork([0])),
        ("state: a look at its counters given", lambda: state.tokens),
        ("state: a copy to the host given", state.cpu),
        ("state: a look at its status", state.check_status),
        (
            r"q: a call with q \[2, 40, 4, 64\] given",
            lambda: infini_attention(q, k, v, beta, state=state),
        ),
        ("beta: device cpu given", lambda: infini_attention(*token, [0.0] * 4, state=state)),
        (
            "attention_mask: device cuda:0",
            lambda: infini_attention(*token, beta, state=state, attention_mask=mask),
        ),
    ]:
        with pytest.raises(RuntimeError, match=text):
            device.capture(call)
    assert state.tokens.tolist() == [40, 40] and torch.equal(state.buffer, before)


def test_a_copy_in_a_graph_is_not_known(device):
    q, k, v, beta = device.on(tensors(1, 20))
    _, state = infini_attention(q, k, v, beta, segment_len=N)
    (copy, new), _ = device.capture(lambda: (state.clone(), State(problem(), 1, device="cuda")))
    for made in (copy, new):
        assert known(state) is not None and known(made) is None
        # Read, and still not known: the next replay writes it again.
        made.tokens
        assert known(made) is None


def test_states_of_layers_stay_known(device):
    """Whichever begin after them, by calls from nothing."""
    q, k, v, beta = device.on(tensors(1, 20))
    layers = [infini_attention(q, k, v, beta, segment_len=N)[1] for _ in range(3)]
    layers.append(State(problem(), 1, device="cuda"))
    assert all(known(state) and known(state.clone()) and known(state.fork([0])) for state in layers)
    token = [x[:, :1] for x in (q, k, v)]
    for state in layers:
        infini_attention(*token, beta, state=state, inplace=True)
        infini_attention(*token, beta, state=state)
    assert all(known(state) for state in layers)
    assert [state.tokens.item() for state in layers] == [21, 21, 21, 1]
    # A buffer that nobody told of, refused, changes nothing.
    stranger = layers[0].buffer[:]
    with pytest.raises(ValueError, match="slots"):
        torch.ops.infini_attn.decode_(
            *token, beta, stranger, 1, TEXT, layers[0].rotation, seq_slots=torch.tensor([4])
        )
    assert all(known(state) for state in layers)
    layers[1].refresh()
    assert known(layers[1]) is None and layers[1].tokens.item() == 21


def test_one_memory_by_two_names(device):
    """Copies within it are refused as such."""
    q, k, v, beta = device.on(tensors(3, 20))
    _, state = infini_attention(q, k, v, beta, segment_len=N)
    same = State.from_buffer(state.buffer[:], problem(), 3, rotation=state.rotation)
    for source in (state, same):
        with pytest.raises(ValueError, match="1 given"):
            state.copy_slots(source, [(0, 1), (1, 2)])
    state.copy_slots(same, [(0, 2)])
    assert torch.equal(state.memory[2], state.memory[0])


def test_threads_that_begin_states(device):
    failures = []

    def run():
        try:
            for i in range(300):
                buffer = torch.zeros(8, dtype=torch.uint8)
                _held.meet(buffer, "a key")
                _held.note(buffer, "a key", "a host")
                _held.known(buffer, "a key")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


def test_slots_and_lengths_on_the_device(device):
    q, k, v, beta = device.on(tensors(2, 3))
    call = lambda state, **options: infini_attention(
        q, k, v, beta, state=state, inplace=True, return_state=False, **options
    )
    there = lambda *numbers: torch.tensor(numbers).to("cuda")
    state, plain = (State(problem(), 4, device="cuda") for _ in range(2))
    got = call(state, slots=there(2, 0), seq_lens=there(3, 1))
    want = call(plain, slots=[2, 0], seq_lens=[3, 1])
    assert torch.equal(got, want) and state.tokens.tolist() == [1, 0, 3, 0]
    # A mask says where rows begin: that is for the host.
    mask = [[1, 1, 0], [0, 1, 1]]
    for mask in (mask, there(*mask)):
        got = call(state, slots=there(2, 0), attention_mask=mask)
        want = call(plain, slots=[2, 0], attention_mask=[[1, 1, 0], [0, 1, 1]])
        assert torch.equal(got, want) and state.tokens.tolist() == plain.tokens.tolist()
    with pytest.raises(ValueError, match="attention_mask: beside seq_lens given"):
        call(state, seq_lens=there(1, 1), attention_mask=mask)
    # From nothing: a state that the call makes.
    out, fresh = infini_attention(q, k, v, beta, segment_len=N, seq_lens=there(3, 1))
    assert fresh.tokens.tolist() == [3, 1] and not out[1, 1:].any().item()
    lens = there(3, 1)
    device.capture(lambda: infini_attention(q, k, v, beta, segment_len=N, seq_lens=lens))
    state = State(problem(), 4, device="cuda")
    call(state, slots=[2, 0], seq_lens=[3, 1])
    mixed = call(state, slots=there(1, 3), seq_lens=[1, 2])
    assert state.tokens.tolist() == [1, 1, 3, 2] and not mixed[0, 1:].any().item()
    state.check_status()

    for error, text, options in [
        (ValueError, r"slots: shape \[1\] given", {"slots": there(0)}),
        (TypeError, "slots: dtype torch.float32 given", {"slots": there(0.9, 1.7)}),
        (TypeError, "seq_lens: dtype torch.bool given", {"seq_lens": there(True, False)}),
        (ValueError, r"seq_lens: shape \[3\] given", {"seq_lens": there(1, 2, 3), "slots": there(0, 1)}),
    ]:
        with pytest.raises(error, match=text):
            call(state, **options)
    before = state.tokens.tolist()
    # What only the device sees: twice the same, outside the state, and beyond 32 bits.
    for slots, seen in [((1, 1), 3), ((7, 1), 3), ((2**32 + 1, 1), 3)]:
        call(state, slots=there(*slots))
        with pytest.raises(RuntimeError, match="slot"):
            state.check_status()
        before[1] += seen
        assert state.tokens.tolist() == before
    call(state, slots=there(-1, 1))
    state.check_status()


def test_tables_and_positions(device):
    q, k, v, beta = device.on(tensors(1, 3))
    table = torch.zeros(8, D // 2).to("cuda")
    state = State(problem(), 1, device="cuda")
    arguments = state.buffer, 1, TEXT, True
    positions = torch.arange(3).to("cuda")
    for error, text, options in [
        (ValueError, "rope: one table given", {"cos": table}),
        (ValueError, "positions: without rope", {"positions": positions}),
        (TypeError, "positions: dtype", {"cos": table, "sin": table, "positions": positions + 0.5}),
        (ValueError, "positions: shape", {"cos": table, "sin": table, "positions": positions[:2]}),
    ]:
        with pytest.raises(error, match=text):
            torch.ops.infini_attn.decode_(q, k, v, beta, *arguments, **options)
    assert state.tokens.tolist() == [0]


def test_tables_shorter_than_a_call(device):
    """Positions name their rows."""
    q, k, v, beta = device.on(tensors(1, 3))
    table = torch.ones(2, D // 2).to("cuda")
    for positions in ([0, 1, 0], torch.tensor([0, 1, 0]).to("cuda")):
        _cuda._loaded.clear()
        out = infini_attention(
            q,
            k,
            v,
            beta,
            segment_len=N,
            rope=(table, 0 * table),
            positions=positions,
            return_state=False,
        )
        assert_close(out, reference(*(x.cpu() for x in (q, k, v, beta))))


def test_nothing_is_loaded_by_a_call_of_no_tokens(device):
    _cuda._loaded.clear()
    q, k, v, beta = device.on(tensors(1, 0))
    state = State(problem(), 1, device="cuda")
    infini_attention(q, k, v, beta, state=state, inplace=True)
    assert not _cuda._loaded


def test_copies_in_inference_mode_are_known(device):
    q, k, v, beta = device.on(tensors(1, 20))
    with torch.inference_mode():
        _, state = infini_attention(q, k, v, beta, segment_len=N)
        others = [state.clone(), state.fork(), state.to("cuda"), state.fork([0])]
    assert all(known(other) for other in (state, *others))


def test_parts_of_the_output(device):
    inputs = tensors(2, 40)
    q, k, v, beta = device.on(inputs)
    out, state, a_dot, a_mem = infini_attention(q, k, v, beta, segment_len=N, return_parts=True)
    gate = beta.float().sigmoid()[:, None]
    assert_close(out, (gate * a_mem.float() + (1 - gate) * a_dot.float()).cpu())
    assert_close(out, reference(*inputs))
    assert state.memory.shape == (2, HKV, D, D)


def test_the_kernels_of_graphs_are_loaded_once(device, monkeypatch):
    q, k, v, beta = device.on(tensors(1, 1))
    loads = []
    load = _cuda._load
    monkeypatch.setattr(_cuda, "_load", lambda *a: (loads.append(len(_cuda._loaded)), load(*a)))
    state = State(problem(), 1, device="cuda")
    for _ in range(3):
        infini_attention(q, k, v, beta, state=state, inplace=True)
    assert (0, TEXT, "table") in _cuda._loaded and loads[1] == loads[2] == len(_cuda._loaded)
