"""Training: what PyTorch and transformers do around gradients."""

import gc

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from oracle import assert_close, tensors
from test_gradients import N, ROPE, compare, expected, leaves, weights
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import infini_attn
from infini_attn.nn import InfiniAttention
from infini_attn.torch import BatchInfiniAttention, chunk_infini_attention, infini_attention

WIDTH = 24


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # There is nothing to share in layers of this size.
    yield
    torch.set_num_threads(threads)


class Document(torch.nn.Module):
    """A layer that reads a text in pieces, each with the state that the one before has left."""

    def __init__(self, pieces=(13, 20), **options):
        super().__init__()
        torch.manual_seed(0)
        self.pieces, self.layer = list(pieces), InfiniAttention(WIDTH, 4, 2, segment_len=N, **options)
        torch.nn.init.uniform_(self.layer.beta, -1, 1)

    def forward(self, x):
        outs, state = [], None
        for piece in x.split(self.pieces, dim=1):
            out, state = self.layer(piece, state=state)
            outs.append(out)
        return torch.cat(outs, dim=1), state


def text(batch=2, tokens=33, seed=0):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def trained(model, *given):
    """The gradients of all parameters."""
    model.zero_grad()
    model(*given)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def same(got, wanted, tolerance=1e-5):
    assert got.keys() == wanted.keys()
    for name in got:
        assert wanted[name].any() and got[name].dtype == wanted[name].dtype
        assert_close(got[name], wanted[name], tolerance)


def test_a_layer_in_pieces_is_the_whole():
    same(trained(Document(), text()), trained(Document([33]), text()))


def test_a_layer_that_truncates():
    class Whole(Document):
        def forward(self, x):
            return self.layer(x, bptt_segments=1)

    class Cut(Document):
        def forward(self, x):
            outs, state = [], None
            for piece in x.split(N, dim=1):
                out, state = self.layer(piece, state=state and state.detach())
                outs.append(out)
            return torch.cat(outs, dim=1), state

    same(trained(Whole(), text()), trained(Cut(), text()))


@pytest.mark.parametrize("training, grad", [(True, True), (True, False), (False, True), (False, False)])
def test_when_a_layer_advances_a_state_itself(training, grad):
    layer = Document().layer.train(training)
    with torch.set_grad_enabled(grad):
        out, state = layer(text())
        _, after = layer(text(tokens=1), state=state)
    assert (after is state) == (not training and not grad) and out.requires_grad == grad
    assert getattr(after, "requires_grad", False) == grad


def step(q, k, v, beta, state=None, **options):
    """Two calls among operations that are compiled."""
    first, rest = ([x[:, a:b] for x in (q * 2, k, v)] for a, b in ((0, 9), (9, None)))
    out, state = infini_attn.infini_attention(*first, beta, segment_len=N, state=state, **options)
    more, state = infini_attn.infini_attention(*rest, beta, state=state, **options)
    return torch.cat([out, more], 1) + 1, state


def step_gradients(function, *inputs, **options):
    out, state = function(*inputs, **options)
    out, state = function(*inputs, state=state, **options)
    return torch.autograd.grad(out.square().sum() + state.memory.sum(), inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_steps():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (20, 33, 17):
        inputs = leaves(*tensors(3, tokens, 4, 2, 16, 6))
        for got, wanted in zip(step_gradients(function, *inputs), step_gradients(step, *inputs)):
            assert torch.equal(got, wanted)
    # One without a state and one with one.
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [dict(rope=ROPE), dict(return_parts=True)], ids=["rope", "parts"])
def test_compiled_calls(options):
    def parts(*inputs):
        return infini_attn.infini_attention(*inputs, segment_len=N, return_state=False, **options)

    inputs, results = leaves(*tensors(2, 20, 4, 2, 16, 6)), []
    for function in (parts, torch.compile(parts, fullgraph=True, backend="aot_eager")):
        outs = function(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in outs), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()


def test_exported_and_recorded_programs():
    inputs = leaves(*tensors(2, 20, 4, 2, 16, 6))

    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.beta = torch.nn.Parameter(inputs[3].detach())

        def forward(self, q, k, v):
            return infini_attn.infini_attention(q, k, v, self.beta, segment_len=N)

    out, state = Learned()(*inputs[:3])
    program = torch.export.export(Learned(), tuple(inputs[:3])).module()
    exported, after = program(*inputs[:3])
    assert torch.equal(exported, out) and torch.equal(after.buffer, state.buffer)

    def gradients(*inputs):
        out, state = infini_attention(*inputs, segment_len=N)
        return torch.autograd.grad(out.sum() + state.memory.square().sum(), inputs)

    recorded = make_fx(gradients)(*inputs)
    names = [str(node.target) for node in recorded.graph.nodes]
    assert "infini_attn.prefill_train.default" in names and "infini_attn.prefill_backward.default" in names
    assert all(torch.equal(a, b) for a, b in zip(recorded(*inputs), gradients(*inputs)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    """Activations that are computed again, with a state that came from outside."""
    class Again(Document):
        def forward(self, x):
            first, state = self.layer(x[:, :13])
            run = lambda x, constant: self.layer(x, state=constant)[0]
            rest = checkpoint(run, x[:, 13:], state.detach(), use_reentrant=reentrant)
            return torch.cat([first, rest], dim=1), state

    class Once(Again):
        def forward(self, x):
            first, state = self.layer(x[:, :13])
            return torch.cat([first, self.layer(x[:, 13:], state=state.detach())[0]], dim=1), state

    x = text().requires_grad_()
    wanted, from_x = trained(Once(), x), x.grad.clone()
    x.grad = None
    same(trained(Again(), x), wanted, 0.0)
    assert torch.equal(x.grad, from_x)


def test_checkpoints_that_states_pass_through():
    class Again(Document):
        def forward(self, x):
            first, state = self.layer(x[:, :13])
            run = lambda x: self.layer(x, state=state)
            rest, after = checkpoint(run, x[:, 13:], use_reentrant=False)
            return torch.cat([first, rest], dim=1), after

    same(trained(Again(), text()), trained(Document(), text()), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    inputs = leaves(*tensors(2, 29, 4, 2, 16, 6))
    for call in (infini_attention, infini_attn.infini_attention):
        with torch.autocast("cpu", dtype):
            out, state = call(*inputs, segment_len=N, rope=ROPE)
        assert out.dtype == dtype and state.requires_grad
        (w,) = weights(out)
        got = torch.autograd.grad((out * w).sum(), inputs)
        assert all(x.dtype == torch.float32 for x in got)
        rounded = [*(x.detach().to(dtype) for x in inputs[:3]), inputs[3]]
        compare(got, expected([w], rounded, rope=ROPE), dtype)


def one_of_two(rank, store, expected_by):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(Document())
    gradients = trained(model, text(batch=4)[2 * rank : 2 * rank + 2])
    same({name.removeprefix("module."): x for name, x in gradients.items()}, torch.load(expected_by))
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    torch.save(trained(Document(), text(batch=4)), tmp_path / "gradients")
    args = str(tmp_path / "store"), str(tmp_path / "gradients")
    torch.multiprocessing.spawn(one_of_two, args=args, nprocs=2)


def resident():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * 4096


def test_memory_does_not_grow():
    model, x = Document([9, 12]), text(tokens=21)
    state, sizes = None, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(1000):
        out, state = model.layer(x, state=state)
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
        state = state.detach()
        if i % 100 == 99:
            gc.collect()
            sizes.append(resident())
    # A state of every step would be 3 MiB.
    assert sizes[-1] - sizes[1] < 3 * 2**19, sizes


def test_chunks_as_of_flash_linear_attention():
    inputs = leaves(*tensors(2, 29, 4, 2, 16, 6))
    first, rest = ([x[:, a:b] for x in inputs[:3]] for a, b in ((0, 11), (11, None)))
    o, state = chunk_infini_attention(*first, inputs[3], segment_len=N, output_final_state=True)
    more, _ = chunk_infini_attention(*rest, inputs[3], initial_state=state)
    out = torch.cat([o, more], dim=1)
    (w,) = weights(out)
    compare(torch.autograd.grad((out * w).sum(), inputs), expected([w], inputs))


def test_batches_of_steps_are_for_inference():
    batch = BatchInfiniAttention()
    batch.plan()
    q, k, v, beta = leaves(*tensors(1, 4, 4, 2, 16, 6))
    _, state = infini_attention(*tensors(1, 4, 4, 2, 16, 6), segment_len=N)
    with pytest.raises(ValueError, match="^inplace: True given, False expected of a call that is recorded"):
        batch.run(q, k, v, beta, state)


def model_of(kind, dtype=torch.float32):
    test_hf = pytest.importorskip("test_hf")
    with torch.no_grad():
        return test_hf.converted(kind).to(dtype).train(), test_hf


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_converted_models(kind):
    """All weights, with caches and without, in pieces, and with activations computed again."""
    model, test_hf = model_of(kind)
    ids = test_hf.tokens(2, 3 * N + 2)

    def gradients(**options):
        model.zero_grad()
        model(ids, labels=ids, **options).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    wanted = gradients(use_cache=False)
    assert all(x.any() for x in wanted.values()) and any(name.endswith(".beta") for name in wanted)
    same(gradients(use_cache=True), wanted)
    same(gradients(attention_mask=torch.ones_like(ids)), wanted)
    # Its name since transformers 5.2x, and before.
    again = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    for reentrant in (False, True):
        again({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        same(gradients(use_cache=False), wanted)


def test_caches_carry_gradients():
    model, test_hf = model_of("llama")
    ids = test_hf.tokens(2, 3 * N + 2)
    logits = model(ids).logits
    wanted = torch.autograd.grad(logits.square().sum(), model.model.embed_tokens.weight)
    cache = infini_attn.hf.InfiniCache(model.config)
    pieces = [model(piece, **{test_hf.CACHE: cache}).logits for piece in ids.split([5, 9, 12], dim=1)]
    got = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), model.model.embed_tokens.weight)
    assert_close(got[0], wanted[0])
    cut = infini_attn.hf.InfiniCache(model.config)
    pieces = []
    for piece in ids.split([5, 9, 12], dim=1):
        cut.detach()
        pieces.append(model(piece, **{test_hf.CACHE: cut}).logits)
    (less,) = torch.autograd.grad(pieces[-1].square().sum(), model.model.embed_tokens.weight)
    seen = ids[:, 14:].unique()
    assert less[seen].any() and not less[torch.tensor([i not in seen for i in range(64)])].any()
    with pytest.raises(ValueError, match="^truncate: a state that requires grad given"):
        cache.crop(-1)


def test_drafts_are_taken_back_beside_gradients():
    """What is left has the gradients of a text without the draft; behind detach there is nothing to take back."""
    model, test_hf = model_of("llama")
    ids, weight = test_hf.tokens(2, 3 * N), model.model.embed_tokens.weight
    given = lambda cache, ids: model(ids, **{test_hf.CACHE: cache}).logits
    drafted, plain = (infini_attn.hf.InfiniCache(model.config) for _ in range(2))
    for layer in drafted.layers:
        layer.activate_past_recording()
    gradients = []
    for cache in (drafted, plain):
        first = given(cache, ids[:, : N - 3])
        second = given(cache, ids[:, N - 3 : N + 5] if cache is drafted else ids[:, N - 3 : N - 1])
        if cache is drafted:
            cache.crop(-6)  # Into the memory.
        out = given(cache, ids[:, N - 1 :])
        gradients.append(torch.autograd.grad(sum(x.square().sum() for x in (first, second[:, :2], out)), weight)[0])
    assert_close(*gradients)
    drafted.detach()
    with pytest.raises(ValueError, match="^tokens_to_remove: -1 given"):
        drafted.crop(-1)


def test_states_made_without_gradients_go_on():
    """A long prefix is read under no_grad; then training begins."""
    layer, x = InfiniAttention(WIDTH, 4, 2, segment_len=N), text(tokens=30)
    with torch.no_grad():
        _, state = layer(x[:, :17])
        assert isinstance(state, infini_attn.State)
    layer(x[:, 17:], state=state)[0].square().sum().backward()
    got = {name: p.grad.clone() for name, p in layer.named_parameters()}
    assert state.tokens.tolist() == [17, 17]
    layer.zero_grad()
    layer(x[:, 17:], state=infini_attn.torch.State.from_state(state))[0].square().sum().backward()
    same(got, {name: p.grad for name, p in layer.named_parameters()}, 0)


def test_what_changes_before_the_backward_pass():
    """Arrays of NumPy are copied; of tensors PyTorch notices."""
    q, k, v = leaves(*tensors(1, 20, 4, 2, 8)[:3])
    positions, beta = np.arange(20), np.zeros(4, dtype=np.float32)
    rope = torch.randn(2, 40, 2).unbind()

    def gradient(change):
        given = dict(segment_len=N, rope=rope, positions=positions, return_state=False)
        out = infini_attention(q, k, v, beta, **given)
        change()
        return torch.autograd.grad(out.square().sum(), q)[0]

    wanted = gradient(lambda: None)

    def later():
        positions[:] += 5
        beta[:] = 3

    assert torch.equal(gradient(later), wanted)

    out, w = torch.empty(1, 20, 4, v.shape[-1]), torch.ones(1, requires_grad=True)
    plain = [x.detach() for x in (q, k, v)]
    for function in (infini_attn.infini_attention, infini_attention):
        function(*plain, 0.0, segment_len=N, out=out, return_state=False)
        loss = (out * w).sum()
        function(*plain, 1.0, segment_len=N, out=out, return_state=False)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_compiled_layer_with_a_state():
    layer = InfiniAttention(WIDTH, 4, 2, segment_len=N)
    step = torch.compile(lambda x, state: layer(x, state=state), backend="aot_eager", fullgraph=True)
    x, state = text(tokens=20), infini_attn.torch.State(
        infini_attn.Problem(heads=4, kv_heads=2, key_dim=WIDTH // 4, segment_len=N), 2
    )
    out, after = step(x, state)
    wanted, _ = layer(x, state=state)
    assert torch.equal(out, wanted) and after.tokens.tolist() == [20, 20]
