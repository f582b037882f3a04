"""Gradients into and out of states: documents in pieces, learned memories, and what is done with states."""

import pytest
import torch
from oracle import assert_close, tensors
from test_gradients import N, ROPE, compare, composite, expected, gradients, leaves, loss, weights

import infini_attn
from infini_attn import Problem
from infini_attn.torch import State, infini_attention

PROBLEM = Problem(heads=4, kv_heads=2, key_dim=16, value_dim=6, segment_len=N)


def document(inputs, pieces, state=None, between=lambda state: state, **options):
    """A document in calls of so many tokens: all outputs, and the last state."""
    *qkv, beta = inputs
    outs = []
    for piece in zip(*(x.split(pieces, dim=1) for x in qkv)):
        options |= {} if state is None else {"state": between(state)}
        out, state = infini_attn.infini_attention(*piece, beta, segment_len=N, **options)
        outs.append(out)
    return torch.cat(outs, dim=1), state


@pytest.mark.parametrize("options", [{}, dict(rope=ROPE), dict(update="linear", empty_memory="bypass")],
                         ids=["delta", "rope", "linear"])
@pytest.mark.parametrize("pieces", [[29], [5, 3, 8, 13], [1] * 9 + [20], [16, 13]], ids=str)
def test_a_loop_over_calls_is_one_call(pieces, options):
    inputs = leaves(*tensors(2, 29, 4, 2, 16, 6))
    out, state = document(inputs, pieces, **options)
    results = out, state.memory, state.normalizer
    given = weights(*results)
    compare(gradients(results, given, inputs), expected(given, inputs, memory=True, **options))


@pytest.mark.parametrize("segments", [1, 2])
def test_detached_between_calls_is_bptt_segments(segments):
    inputs = leaves(*tensors(2, 45, 4, 2, 16, 6))
    out, _ = infini_attention(*inputs, segment_len=N, bptt_segments=segments)
    given = weights(out)
    whole = gradients([out], given, inputs)
    out, state = document(inputs, segments * N, between=State.detach)
    assert state.requires_grad and not state.detach().requires_grad
    compare(gradients([out], given, inputs), whole)
    compare(whole, expected(given, inputs, cut=segments))


def test_open_segments_carry_gradients():
    """A loss on what the open segment of an earlier call is attended with, and on the segment itself."""
    inputs = leaves(*tensors(1, 13, 4, 2, 16, 6))
    _, state = infini_attention(*(x[:, :5] for x in inputs[:3]), inputs[3], segment_len=N, rope=ROPE)
    out, after = infini_attention(*(x[:, 5:] for x in inputs[:3]), inputs[3], state=state, rope=ROPE)
    (w,) = weights(out)
    padded = torch.cat([torch.zeros(1, 5, 4, 6), w], dim=1)
    compare(torch.autograd.grad((out * w).sum(), inputs, retain_graph=True), expected([padded], inputs, rope=ROPE))
    # Behind open_len there is nothing.
    v = after.open_v
    (d_v,) = torch.autograd.grad((v[:, :, :5] * 2).sum() + v[:, :, 5:].sum(), inputs[2])
    assert d_v[:, 8:].eq(2).all() and not d_v[:, :8].any()


def test_a_learned_memory():
    inputs, generator = leaves(*tensors(2, 20, 4, 2, 16, 6)), torch.Generator().manual_seed(3)
    memory = torch.randn(2, 2, 16, 6, generator=generator).requires_grad_()
    normalizer = (20 + torch.rand(2, 2, 16, generator=generator)).requires_grad_()
    state = State.from_memory(PROBLEM, memory, normalizer, tokens=16)
    assert state.tokens.tolist() == state.committed.tolist() == [16, 16] and state.requires_grad
    out, _ = infini_attention(*inputs, state=state, rope=ROPE)
    given = weights(out)
    got = gradients([out], given, [*inputs, memory, normalizer])
    twins = [x.detach().double().requires_grad_() for x in (*inputs, memory, normalizer)]
    q, k, v, beta, m, z = twins
    outs = [composite(q[b], k[b], v[b], beta, memory=(m[b], z[b]), seen=16, rope=ROPE)[0] for b in range(2)]
    wanted = torch.autograd.grad(loss([torch.stack(outs)], given), twins)
    compare(got[:4], wanted[:4])
    assert_close(got[4], wanted[4]), assert_close(got[5], wanted[5])
    assert not State.from_memory(PROBLEM, memory.detach(), normalizer.detach()).requires_grad
    for wrong, text in ((dict(tokens=0), "^tokens: 0 given"), (dict(memory=memory[:, :1]), r"^memory: shape")):
        with pytest.raises(ValueError, match=text):
            State.from_memory(**dict(problem=PROBLEM, memory=memory, normalizer=normalizer) | wrong)
    with pytest.raises(TypeError, match="^normalizer: torch.float64 on cpu given"):
        State.from_memory(PROBLEM, memory, normalizer.double())


def test_the_gradient_of_a_state():
    q, k, v, beta = tensors(2, 20, 4, 2, 16, 6)
    _, state = infini_attention(*(x[:, :13] for x in (q, k, v)), beta, segment_len=N)
    assert not state.requires_grad and state.grad is None
    before = state.buffer.clone()
    state.requires_grad_()
    out, after = infini_attention(*(x[:, 13:] for x in (q, k, v)), beta, state=state)
    assert after.requires_grad and after.tokens.tolist() == [20, 20]
    out.square().sum().backward()
    grad = state.grad
    assert torch.equal(state.buffer, before) and grad.open_k_rotated is None
    # By differences of the memory, in the direction of its gradient.
    h, outs = 1e-2, []
    for sign in (h, -h):
        moved = State.from_buffer(before.clone(), state.problem, 2, rotation=False)
        moved.memory.add_(sign * grad.memory / grad.memory.norm())
        out, _ = infini_attention(*(x[:, 13:].double().float() for x in (q, k, v)), beta, state=moved)
        outs.append(out.double().square().sum())
    assert_close((outs[0] - outs[1]) / (2 * h), grad.memory.norm(), 1e-3)
    assert grad.memory.any() and grad.normalizer.any()
    assert grad.open_v[:, :, :5].any() and after.grad is None
    constant = state.detach()
    assert not constant.requires_grad and constant.buffer.data_ptr() == state.buffer.data_ptr()
    # A change in place is one of what is recorded.
    with torch.no_grad():
        state.reset()
    assert state.requires_grad and state.memory.requires_grad and not state.memory.any()


def test_slots_that_a_call_does_not_name_pass_gradients_on():
    inputs = leaves(*tensors(1, 20, 4, 2, 16, 6))
    state = State(PROBLEM, 3).requires_grad_()
    _, after = infini_attention(*inputs, state=state, slots=[1])
    ((after.memory * torch.arange(3.0).view(3, 1, 1, 1)).sum()).backward()
    assert state.grad.memory[0].eq(0).all() and state.grad.memory[2].eq(2).all()
    assert inputs[1].grad.any() and not inputs[0].grad.any()


MOVES = {
    "index_select": (lambda state: state.index_select([1, 0, 1]), [1, 0, 1]),
    "item": (lambda state: state[-1], [1]),
    "slice": (lambda state: state[0:1], [0]),
    "fork": (lambda state: state.fork(), [0, 1]),
    "clone": (lambda state: state.clone(), [0, 1]),
    "concat": (lambda state: State.concat([state, State(PROBLEM, 1), state[:1]]), [0, 1, 2, 0]),
    "behind a constant": (lambda state: State.concat([State(PROBLEM, 1, rotation=False), state]), [2, 0, 1]),
}


@pytest.mark.parametrize("name", MOVES)
def test_streams_move_differentiably(name):
    move, order = MOVES[name]
    inputs = leaves(*tensors(2, 13, 4, 2, 16, 6))
    _, state = infini_attention(*inputs, segment_len=N)
    moved = move(state)
    with torch.no_grad():
        own = move(state)
    assert moved.requires_grad and not own.requires_grad and torch.equal(moved.buffer, own.buffer)
    assert moved.rotation == own.rotation and moved.buffer.data_ptr() != state.buffer.data_ptr()
    w = torch.randn(moved.memory.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((moved.memory * w).sum(), inputs[1:3])
    summed = torch.zeros(3, *w.shape[1:]).index_add(0, torch.tensor(order), w)[:2]
    wanted = torch.autograd.grad((infini_attention(*inputs, segment_len=N)[1].memory * summed).sum(), inputs[1:3])
    for a, b in zip(got, wanted):
        assert_close(a, b)


@pytest.mark.parametrize("tokens", [2**31 - 2**23 + 1, 2**55 + 1, 1])
def test_counters_survive_whatever_floats_they_would_be(tokens):
    """Signalling NaNs and denormals among them."""
    memory, normalizer = torch.rand(2, 2, 16, 6).requires_grad_(), torch.rand(2, 2, 16)
    state = State.from_memory(PROBLEM, memory, normalizer, tokens=tokens)
    for made in (state, state.clone(), state[[1, 0]], State.concat([state[:1], state[1:]])):
        assert made.requires_grad and made.tokens.tolist() == [tokens, tokens]
    out, after = infini_attention(*tensors(2, 3, 4, 2, 16, 6), state=state)
    assert after.tokens.tolist() == [tokens + 3] * 2
    (out.sum() + after.memory.sum()).backward()
    assert memory.grad.isfinite().all()


def test_in_place_changes_are_refused():
    inputs = leaves(*tensors(2, 13, 4, 2, 16, 6))
    _, state = infini_attention(*inputs, segment_len=N)
    before, text = state.buffer.clone(), "a state that requires grad given, one that does not expected .*detach"
    plain = State(state.problem, 2, rotation=False)
    for name, change in {
        "reset": state.reset,
        "flush": state.flush,
        "truncate": lambda: state.truncate(0, 10),
        "copy_slots": lambda: state.copy_slots(plain, [(0, 1)]),
        "source": lambda: plain.copy_slots(state, [(0, 1)]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: {text}"):
            change()
    with pytest.raises(ValueError, match="^inplace: True given, False expected"):
        infini_attention(*tensors(2, 1, 4, 2, 16, 6), state=state, inplace=True)
    with pytest.raises(ValueError, match="^device: meta for a state that requires grad on cpu given"):
        state.to("meta")
    assert torch.equal(state.buffer, before) and state.to("cpu") is state
    with torch.no_grad():
        with pytest.raises(ValueError, match="^slot"):
            state.flush([7])
        assert state.requires_grad
    for change, tokens in [
        (State.reset, [0, 0]),
        (State.flush, [13, 13]),
        (lambda state: state.truncate(0, 10), [10, 13]),
        (lambda state: state.copy_slots(plain, [(0, 1)]), [13, 0]),
        (lambda state: infini_attention(*inputs, state=state, inplace=True), [26, 26]),
    ]:
        _, state = infini_attention(*inputs, segment_len=N)
        with torch.no_grad():
            change(state)
        assert not state.requires_grad and state.tokens.tolist() == tokens
    # PyTorch notices that what backward needs has changed.
    _, state = infini_attention(*inputs, segment_len=N)
    state = state.detach()
    out, _ = infini_attention(*inputs, state=state)
    state.reset()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_operators_refuse():
    q, k, v, beta = tensors(1, 9, 4, 2, 16, 6)
    text, buffer = infini_attn._core._problem_text(PROBLEM), State(PROBLEM).buffer
    operators = torch.ops.infini_attn
    with pytest.raises(TypeError, match="^state: dtype torch.uint8 given, torch.float32"):
        operators.prefill_train(q, k, v, beta, buffer, 1, text, True)
    o, lse, state, a_dot, _ = operators.prefill_train(q, k, v, beta, buffer.view(torch.float32), 1, text, True, True)
    reading, outputs = (q, k, v, beta, state, 1, text, True), (o, lse, a_dot)
    for error, message, gradients in [
        (ValueError, "^d_o: shape", (o[:, 1:], None, None, None, None)),
        (ValueError, "^d_lse: shape", (o, lse[..., 1:], None, None, None)),
        (ValueError, "^state: .* bytes", (o, None, state[1:], None, None)),
        (TypeError, "^state: dtype torch.float64", (o, None, state.double(), None, None)),
        (ValueError, "^d_a_mem: shape", (o, None, None, None, o[..., 1:])),
    ]:
        with pytest.raises(error, match=message):
            operators.prefill_backward(*reading, *outputs, *gradients, True)
    with pytest.raises(ValueError, match="^d_a_dot: without a_dot given"):
        operators.prefill_backward(*reading, o, lse, None, o, None, None, o, None, True)


def test_as_a_tree_of_tensors():
    inputs = leaves(*tensors(1, 13, 4, 2, 16, 6))
    _, state = infini_attention(*inputs, segment_len=N)
    found, spec = torch.utils._pytree.tree_flatten(state)
    again = torch.utils._pytree.tree_unflatten(found, spec)
    assert found[0].requires_grad and again.requires_grad and torch.equal(again.buffer, state.buffer)
    constant = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state)
    assert not constant.requires_grad and torch.equal(constant.buffer, state.buffer)
