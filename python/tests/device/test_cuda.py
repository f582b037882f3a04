"""The package on PyTorch's CUDA device; what does not ask for hardware also on the simulator in its
place."""

import copy
import pickle

import pytest
import torch

import infini_attn
from infini_attn import infini_attention
from infini_attn.torch import State

pytestmark = pytest.mark.cuda
HQ, HKV, D, N = 4, 2, 64, 32
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


def tensors(b, t, dtype=torch.bfloat16, seed=0, h=(HQ, HKV), d=D):
    generator = torch.Generator().manual_seed(seed)
    new = lambda heads: torch.randn(b, t, heads, d, generator=generator).to(dtype)
    return new(h[0]), new(h[1]), new(h[1]), torch.linspace(-1, 1, h[0])


def reference(q, k, v, beta, n=N, **options):
    wide = [x.float().numpy() for x in (q, k, v, beta)]
    function = infini_attn.reference.infini_attention
    return torch.from_numpy(function(*wide, segment_len=n, return_state=False, **options))


def assert_close(got, want, dtype=torch.bfloat16, limit=None):
    assert got.shape == want.shape
    got, want = got.cpu().double(), want.double()
    error = ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()
    assert error < (limit or TOLERANCE[dtype]), f"relative RMS error {error:.2e}"


def problem(dtype="bf16", n=N):
    return infini_attn.Problem(heads=HQ, kv_heads=HKV, key_dim=D, segment_len=n, dtype=dtype)


TEXT = infini_attn._core._problem_text(problem())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_prompt_and_tokens(cuda, dtype):
    inputs = tensors(2, 75, dtype)
    q, k, v, beta = (x.to(cuda.device) for x in inputs)
    first = [x[:, :70] for x in (q, k, v)]
    out, state, lse = infini_attention(*first, beta, segment_len=N, return_lse=True)
    assert out.device == lse.device == state.device == cuda.device and isinstance(state, State)
    outs = [out]
    for t in range(70, 75):
        step = [x[:, t : t + 1] for x in (q, k, v)]
        outs.append(infini_attention(*step, beta, state=state, inplace=True, return_state=False))
    assert_close(torch.cat(outs, 1), reference(*inputs), dtype)
    assert state.tokens.tolist() == [75, 75] and state.committed.tolist() == [64, 64]
    assert state.open_len.tolist() == [11, 11]
    assert state.problem.dtype == ("bf16" if dtype == torch.bfloat16 else "f16")


def test_parts(cuda):
    inputs = tensors(1, 40)
    q, k, v, beta = (x.to(cuda.device) for x in inputs)
    out, _, *parts = infini_attention(q, k, v, beta, segment_len=N, return_parts=True)
    wide = [x.double() for x in inputs]
    expected = infini_attn.reference.infini_attention(*wide, segment_len=N, return_parts=True)
    assert len(parts) == 2
    for got, want in zip((out, *parts), (expected[0], *expected[2:]), strict=True):
        assert_close(got, torch.from_numpy(want))


def test_functional_calls_leave_the_state_as_it_was(cuda):
    inputs = tensors(1, 40)
    q, k, v, beta = (x.to(cuda.device) for x in inputs)
    _, state = infini_attention(*(x[:, :37] for x in (q, k, v)), beta, segment_len=N)
    before = state.buffer.clone()
    a, after = infini_attention(*(x[:, 37:] for x in (q, k, v)), beta, state=state)
    b, _ = infini_attention(*(x[:, 37:] for x in (q, k, v)), beta, state=state)
    assert torch.equal(state.buffer, before) and torch.equal(a, b)
    assert state.tokens.tolist() == [37] and after.tokens.tolist() == [40]
    assert_close(a, reference(*inputs)[:, 37:])


def test_batches(cuda):
    inputs = tensors(2, 50)
    q, k, v, beta = (x.to(cuda.device) for x in inputs)
    whole = reference(*inputs)
    short = reference(*(x[1:, 12:] for x in inputs[:3]), inputs[3])
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, :12] = 0
    for mask in (mask, mask.to(cuda.device)):
        out, state = infini_attention(q, k, v, beta, segment_len=N, attention_mask=mask)
        assert_close(out[0], whole[0])
        assert_close(out[1, 12:], short[0])
        assert not out[1, :12].any().item() and state.tokens.tolist() == [50, 38]
    packed = [torch.cat([x[0], x[1, 12:]]) for x in (q, k, v)]
    cu = torch.tensor([0, 50, 88])
    state = State(problem(), 3, device=cuda.device)
    out = infini_attention(
        *packed, beta, state=state, cu_seqlens=cu, slots=[2, 0], inplace=True, return_state=False
    )
    assert_close(out[:50], whole[0])
    assert_close(out[50:], short[0])
    assert state.tokens.tolist() == [38, 0, 50]


def test_rotation(cuda):
    inputs = tensors(1, 40)
    angles = torch.arange(40)[:, None] * 10000 ** (-torch.arange(D // 2) / (D // 2))
    tables = angles.cos(), angles.sin()
    want = reference(*inputs, rope=tuple(x.numpy() for x in tables))
    q, k, v, beta = (x.to(cuda.device) for x in inputs)
    rope = tuple(x.to(cuda.device) for x in tables)
    out, state = infini_attention(*(x[:, :36] for x in (q, k, v)), beta, segment_len=N, rope=rope)
    rest = [x[:, 36:] for x in (q, k, v)]
    positions = torch.arange(36, 40)
    for positions in (None, positions, positions.to(cuda.device)):
        more = infini_attention(
            *rest, beta, state=state, rope=rope, positions=positions, return_state=False
        )
        assert_close(torch.cat([out, more], 1), want)


def test_what_the_state_is_made_of(cuda):
    q, k, v, beta = (x.to(cuda.device) for x in tensors(2, 40))
    _, state = infini_attention(q, k, v, beta, segment_len=N)
    host = state.to_state()
    assert torch.equal(state.memory.cpu(), torch.from_numpy(host.M))
    assert torch.equal(state.normalizer.cpu(), torch.from_numpy(host.z))
    assert state.counters[:, :2].cpu().tolist() == [[40, 32], [40, 32]]
    assert torch.equal(state.open_k[:, :, :8].cpu(), k[:, 32:].transpose(1, 2).cpu())
    assert torch.equal(state.open_v[:, :, :8].cpu(), v[:, 32:].transpose(1, 2).cpu())
    assert state.nbytes == state.buffer.numel() and state.buffer.device == cuda.device


def test_states_move(cuda, tmp_path):
    inputs = tensors(2, 44)
    q, k, v, beta = (x.to(cuda.device) for x in inputs)
    prompt, rest = ([x[:, a:b] for x in (q, k, v)] for a, b in ((0, 40), (40, 44)))
    _, state = infini_attention(*prompt, beta, segment_len=N)
    go_on = lambda state: infini_attention(*rest, beta, state=state, return_state=False)
    want = go_on(state)
    on_cpu = state.cpu()
    assert on_cpu.device.type == "cpu" and on_cpu.tokens.tolist() == [40, 40]
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors", device=cuda.device)
    for other in (
        on_cpu.to(cuda.device),
        loaded,
        State.from_state(infini_attn.State.load(tmp_path / "state.safetensors"), device=cuda.device),
        state.clone(),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        state.fork([0, 1]),
        State.concat([state[0], state[1]]),
    ):
        assert other.device == cuda.device and other.tokens.tolist() == [40, 40]
        assert torch.equal(go_on(other), want)
    swapped = state.index_select([1, 0, 1])
    swapped.reset([2])
    assert swapped.tokens.tolist() == [40, 40, 0]
    swapped.copy_slots(state, [(0, 2)])
    swapped.truncate(2, 36)
    swapped.flush([1])
    assert swapped.tokens.tolist() == [40, 40, 36] and swapped.open_len.tolist() == [8, 0, 4]
    with pytest.raises(ValueError, match="committed"):
        swapped.truncate(2, 3)
    assert torch.equal(go_on(swapped[[1, 1]]), go_on(swapped[1:2].fork([0, 0])))


def test_writes_that_the_host_was_not_told_of(cuda):
    """Where the streams stand is read again from the device."""
    q, k, v, beta = (x.to(cuda.device) for x in tensors(1, 80))
    part = lambda a, b: [x[:, a:b] for x in (q, k, v)]
    _, state = infini_attention(*part(0, 40), beta, segment_len=N)
    ahead, behind = state.clone(), state.clone()
    infini_attention(*part(40, 60), beta, state=ahead, inplace=True)
    want = infini_attention(*part(60, 80), beta, state=ahead, return_state=False)
    # As an offloaded state comes back.
    behind.buffer.copy_(ahead.buffer)
    assert behind.tokens.tolist() == [60]
    assert torch.equal(infini_attention(*part(60, 80), beta, state=behind, return_state=False), want)


def test_operators_on_a_buffer_alone(cuda):
    """The state's own knowledge follows what operators do to its buffer, by whatever view of it."""
    inputs = tensors(2, 80)
    q, k, v, beta = (x.to(cuda.device) for x in inputs)
    operators, whole = torch.ops.infini_attn, reference(*inputs)
    state = State(problem(), 2, device=cuda.device)
    arguments = state.sequences, TEXT, state.rotation
    part = lambda a, b: [x[:, a:b] for x in (q, k, v)]
    o, _ = operators.prefill_(*part(0, 30), beta, state.buffer, *arguments)
    o1, _ = operators.decode_(*part(30, 38), beta, state.buffer[:], *arguments)
    assert state.tokens.tolist() == [38, 38]
    o2, _ = operators.prefill_(*part(38, 70), beta, state.buffer.detach(), *arguments)
    slots = torch.tensor([0, 1]).to(cuda.device)
    o3, _ = operators.decode_(*part(70, 72), beta, state.buffer, *arguments, seq_slots=slots)
    o4, _, new = operators.prefill(*part(72, 80), beta, state.buffer, *arguments)
    assert_close(torch.cat([o, o1, o2, o3, o4], 1), whole)
    assert state.tokens.tolist() == [72, 72]
    assert State.from_buffer(new, problem(), 2).tokens.tolist() == [80, 80]


def test_merge_partials(cuda):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(1, 5, 2, 64, generator=generator).bfloat16() for _ in range(3)]
    logs = [torch.randn(1, 2, 5, generator=generator) for _ in range(3)]
    want, want_lse = torch.ops.infini_attn.merge_partials(parts, logs)
    on = lambda xs: [x.to(cuda.device) for x in xs]
    got, got_lse = torch.ops.infini_attn.merge_partials(on(parts), on(logs))
    assert_close(got, want)
    assert torch.allclose(got_lse.cpu(), want_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(infini_attn.merge_partials(on(parts), on(logs)).cpu(), got.cpu())


def test_out_and_autocast(cuda):
    inputs = tensors(1, 20)
    q, k, v, beta = (x.to(cuda.device) for x in inputs)
    out = torch.zeros(1, 20, HQ, D, dtype=torch.bfloat16, device=cuda.device)
    got = infini_attention(q, k, v, beta, segment_len=N, out=out, return_state=False)
    assert got is out
    assert_close(out, reference(*inputs))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        mixed = infini_attention(q, k, v.float(), beta, segment_len=N, return_state=False)
    assert torch.equal(mixed, out)


def test_refusals(cuda):
    q, k, v, beta = (x.to(cuda.device) for x in tensors(1, 20))
    _, state = infini_attention(q, k, v, beta, segment_len=N)
    before = state.buffer.clone()
    cpu = State(problem(), 1)
    for error, text, call in [
        (
            TypeError,
            r"q: .*float32.* given, .*bf16 or f16.*\.cpu\(\)",
            lambda: (q.float(), k.float(), v.float()),
        ),
        (ValueError, "k: device cpu given, cuda:0", lambda: (q, k.cpu(), v)),
        (ValueError, "q: strides", lambda: (padded(q), k, v)),
        (ValueError, "q: shape", lambda: (q[0], k[0], v[0])),
    ]:
        with pytest.raises(error, match=text):
            infini_attention(*call(), beta, segment_len=N)
    for error, text, options in [
        (ValueError, "state: device cpu given, cuda:0", {"state": cpu}),
        (TypeError, "state: an infini_attn.State given", {"state": cpu.to_state()}),
        (ValueError, r"slots\[0\]: 1 given", {"state": state, "slots": [1], "inplace": True}),
        (ValueError, "segment_len", {"state": state, "segment_len": 64, "inplace": True}),
        (ValueError, "seq_lens", {"state": state, "seq_lens": [21], "inplace": True}),
        (ValueError, "beta: shape", {"state": state, "beta": beta[:3], "inplace": True}),
        (
            ValueError,
            "out: memory that overlaps that of q given",
            {"state": state, "out": q, "inplace": True},
        ),
        (ValueError, "out: shape", {"state": state, "out": k.clone(), "inplace": True}),
    ]:
        with pytest.raises(error, match=text):
            infini_attention(q, k, v, options.pop("beta", beta), **options)
    with pytest.raises(ValueError, match="requires grad"):
        infini_attention(q.clone().requires_grad_(), k, v, beta, segment_len=N)
    assert torch.equal(state.buffer, before) and state.tokens.tolist() == [20]


def padded(x):
    """The same values in rows that do not start at multiples of 16 bytes."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    wide[..., :-1] = x
    return wide[..., :-1]


def test_generate(cuda):
    """A model of transformers on the device, against the same on the CPU in float32."""
    transformers = pytest.importorskip("transformers", minversion="5.17")
    from infini_attn import hf

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = hf.convert(transformers.LlamaForCausalLM(config).eval(), segment_len=16)
    ids = torch.randint(1, 128, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    new = 20 if cuda.real else 3
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[mask.bool()]
        there = copy.deepcopy(model).to(cuda.device, torch.bfloat16)
        prompt = dict(attention_mask=mask.to(cuda.device), max_new_tokens=new)
        got = there(ids.to(cuda.device), attention_mask=prompt["attention_mask"]).logits
        error = (got.float().cpu()[mask.bool()] - want).norm() / want.norm()
        assert error < 2e-2, error
        beams = there.generate(ids.to(cuda.device), num_beams=2, **prompt)
        greedy = there.generate(ids.to(cuda.device), do_sample=False, **prompt).cpu()
        assert beams.shape == greedy.shape == (2, 40 + new) and beams.device == cuda.device
        # Every token was the best one, or within rounding of it, when all others are known.
        mask = torch.cat([mask, torch.ones(2, new - 1, dtype=mask.dtype)], 1)
        logits = model(greedy[:, :-1], attention_mask=mask).logits[:, 39:]
    chosen = logits.gather(-1, greedy[:, 40:, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 0.05 * logits.std()


def test_module(cuda):
    from infini_attn.nn import InfiniAttention

    torch.manual_seed(0)
    layer = InfiniAttention(embed_dim=64, heads=2, kv_heads=1, head_dim=32, segment_len=16).eval()
    hidden = torch.randn(2, 43, 64)
    with torch.no_grad():
        want, _ = layer(hidden)
        there = copy.deepcopy(layer).to(cuda.device, torch.bfloat16)
        hidden = hidden.to(cuda.device, torch.bfloat16)
        first, state = there(hidden[:, :40])
        outs = [first] + [there(hidden[:, t : t + 1], state=state)[0] for t in range(40, 43)]
    got = torch.cat(outs, 1).float().cpu()
    assert (got - want).norm() / want.norm() < 1e-2
    assert state.device == cuda.device and state.tokens.tolist() == [43, 43]


# ---- what asks for hardware


@pytest.fixture
def card(cuda):
    if not cuda.real:
        pytest.skip("asks for a GPU: streams, graphs and compilers are not simulated")
    return cuda.device


def decoder(device, b=2, prompt=40):
    """A state that has seen a prompt, and a token to come."""
    q, k, v, beta = (x.to(device) for x in tensors(b, prompt))
    _, state = infini_attention(q, k, v, beta, segment_len=N)
    token = [x.to(device) for x in tensors(b, 1, seed=1)[:3]]
    return state, token, beta


def test_a_side_stream_waits_for_its_producer(card):
    """The inputs come late, on the stream that the call goes to; nothing else orders them."""
    inputs = tensors(1, 64)
    want, side = reference(*inputs), torch.cuda.Stream()
    source = [x.to(card) for x in inputs]
    warm, _ = infini_attention(*source, segment_len=N)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = [torch.zeros_like(x) for x in source]
        torch.cuda._sleep(200_000_000)
        for into, x in zip(late, source):
            into.copy_(x)
        out, _ = infini_attention(*late, segment_len=N)
        assert not side.query(), "the call has waited"
    side.synchronize()
    assert_close(out, want)
    assert torch.equal(out, warm)


def test_a_graph_of_a_token(card):
    """Replays over the ends of segments; then a prompt, for which the counters are read again."""
    state, token, beta = decoder(card)
    plain = state.clone()
    step = lambda state: infini_attention(*token, beta, state=state, inplace=True, return_state=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(state.clone())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(state)
    for _ in range(70):
        graph.replay()
        torch.testing.assert_close(out, step(plain), rtol=2e-2, atol=2e-2)
    assert state.tokens.tolist() == [110, 110] == plain.tokens.tolist()
    assert_close(state.memory, plain.memory.cpu())
    q, k, v, _ = (x.to(card) for x in tensors(2, 50, seed=2))
    more = [infini_attention(q, k, v, beta, state=s, return_state=False) for s in (state, plain)]
    assert_close(more[0], more[1].cpu())
    state.check_status()


def test_a_graph_holds_no_prompt(card):
    """And goes on unharmed."""
    state, _, beta = decoder(card)
    q, k, v, _ = (x.to(card) for x in tensors(2, 50, seed=2))
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(3, device=card)
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="capture"):
            infini_attention(q, k, v, beta, state=state, inplace=True)
        x += 1
    graph.replay()
    assert x.tolist() == [1, 1, 1] and state.tokens.tolist() == [40, 40]


def test_a_graph_of_a_document(card):
    """From an empty state, which the graph makes: every replay gives the same."""
    inputs = tensors(1, 96)
    q, k, v, beta = (x.to(card) for x in inputs)
    call = lambda: infini_attention(q, k, v, beta, segment_len=N, return_state=False)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert_close(out, reference(*inputs))


def test_memory_stays_what_it_was(card):
    state, token, beta = decoder(card)
    q, k, v, _ = (x.to(card) for x in tensors(2, 48, seed=2))

    def step():
        infini_attention(*token, beta, state=state, inplace=True, return_state=False)

    def prompt():
        infini_attention(q, k, v, beta, state=state, inplace=True, return_state=False)

    for _ in range(20):
        step(), prompt()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for i in range(10_000):
        step() if i % 10 else prompt()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.filterwarnings("ignore:.*Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device(card):
    """PyTorch is asked, and the stream: it is still asleep when the calls have returned."""
    state, token, beta = decoder(card)
    q, k, v, _ = (x.to(card) for x in tensors(2, 48, seed=2))

    def calls():
        infini_attention(*token, beta, state=state, inplace=True, return_state=False)
        infini_attention(q, k, v, beta, state=state, inplace=True, return_state=False)
        infini_attention(q, k, v, beta, segment_len=N)
        state.reset([0]), state.flush(), state.fork([1, 0]), state.tokens

    calls()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(400_000_000)
        calls()
        assert not torch.cuda.current_stream().query(), "a call has waited"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


# Of what is compiled besides.
COMPILER = pytest.mark.filterwarnings("ignore")


@COMPILER
def test_compiled(card):
    state, token, beta = decoder(card)
    plain = state.clone()

    @torch.compile(fullgraph=True)
    def step(q, k, v, state):
        return infini_attention(q * 1.0, k, v, beta, state=state, inplace=True, return_state=False) + 1

    for _ in range(3):
        got = step(*token, state)
        want = infini_attention(*token, beta, state=plain, inplace=True, return_state=False) + 1
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert state.tokens.tolist() == plain.tokens.tolist() == [43, 43]


@COMPILER
def test_compiled_into_graphs(card):
    state, token, beta = decoder(card)
    plain = state.clone()
    torch._dynamo.mark_static_address(state.buffer)

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def step(q, k, v, buffer):
        arguments = buffer, state.sequences, TEXT, state.rotation
        return torch.ops.infini_attn.decode_(q * 1.0, k, v, beta, *arguments)[0] * 1.0

    for _ in range(40):
        got = step(*token, state.buffer).clone()
        want = infini_attention(*token, beta, state=plain, inplace=True, return_state=False)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert state.tokens.tolist() == plain.tokens.tolist() == [80, 80]


def test_streams_of_two_threads(card):
    """Each with a stream and a state of its own."""
    import threading

    inputs = tensors(1, 90)
    want, results = reference(*inputs), {}

    def run(name):
        with torch.cuda.stream(torch.cuda.Stream()):
            source = [x.to(card) for x in inputs]
            for _ in range(20):
                out, _ = infini_attention(*source, segment_len=N)
            results[name] = out.cpu()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for out in results.values():
        assert_close(out, want)
    assert len(results) == 2


def test_full_shapes(card):
    """Against PyTorch's own attention of every segment, the gates closed."""
    q, k, v, _ = (x.to(card) for x in tensors(1, 8192, h=(32, 8), d=128))
    closed = torch.full((32,), -torch.inf).to(card)
    out, state = infini_attention(q, k, v, closed, segment_len=2048)
    fold = lambda x: x.unflatten(1, (4, 2048))[0].transpose(1, 2)
    local = torch.nn.functional.scaled_dot_product_attention(
        *map(fold, (q, k, v)), is_causal=True, enable_gqa=True
    )
    # Both are rounded.
    assert_close(out, local.transpose(1, 2).reshape(1, 8192, 32, 128).cpu(), limit=8e-3)
    assert state.committed.tolist() == [8192]
