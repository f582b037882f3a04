"""The operators of calls whose gradients are wanted: `prefill_train`, which PyTorch differentiates by
`prefill_backward`. Both read a state as float32, which is the same memory as its bytes."""

import torch
from torch.autograd import forward_ad

from .. import _core
from . import _layout

TOKENS = (
    "Tensor? seq_slots=None, Tensor? seq_lens=None, Tensor? attention_mask=None,"
    " Tensor? cu_seqlens=None, Tensor? cos=None, Tensor? sin=None, Tensor? positions=None,"
    " bool interleaved=False"
)
CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? state, SymInt slots, str problem, bool rotation"
)
SCHEMAS = {
    "prefill_train": (
        f"({CALL}, bool parts=False, SymInt? bptt_segments=None, {TOKENS})"
        " -> (Tensor o, Tensor lse, Tensor new_state, Tensor a_dot, Tensor a_mem)"
    ),
    "prefill_backward": (
        f"({CALL}, Tensor o, Tensor lse, Tensor? a_dot, Tensor? d_o, Tensor? d_lse, Tensor? d_state,"
        f" Tensor? d_a_dot, Tensor? d_a_mem, bool state_grad, SymInt? bptt_segments=None, {TOKENS})"
        " -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_beta, Tensor d_state)"
    ),
}
NAMES = tuple(argument.split()[-1].split("=")[0] for argument in TOKENS.split(","))
# Arguments before the tokens.
_BEFORE = 10


def bytes_of(state):
    """A state as the inference operators know it."""
    if state is not None and state.dtype != torch.float32:
        raise TypeError(f"state: dtype {state.dtype} given, torch.float32 expected")
    return None if state is None else state.view(torch.uint8)


def prefill_train(
    q, k, v, beta, state, slots, problem, rotation, parts=False, bptt_segments=None, *tokens
):
    options = dict(zip(NAMES, tokens))
    if state is None:
        new = _layout.empty(problem, slots, rotation, q.device).view(torch.float32)
    else:
        new = state.clone()
    o, lse, *both = _core._advance(
        q, k, v, beta, bytes_of(new), slots, problem, rotation, parts=parts, inplace=False, **options
    )
    return o, lse, new, *(both or (o.new_empty(0), o.new_empty(0)))


def fake_train(
    q, k, v, beta, state, slots, problem, rotation, parts=False, bptt_segments=None, *tokens
):
    size = _layout.total(problem, slots, rotation, q.device.type)
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    new = q.new_empty(size // 4, dtype=torch.float32)
    return o, lse, new, *(o.new_empty(o.shape if parts else 0) for _ in range(2))


def prefill_backward(
    q, k, v, beta, state, slots, problem, rotation, o, lse, a_dot, d_o, d_lse, d_state, d_a_dot,
    d_a_mem, state_grad, bptt_segments=None, *tokens,
):  # fmt: skip
    # A copy: what was handed in stays as it is.
    if d_state is not None:
        d_state = d_state.clone(memory_format=torch.contiguous_format)
    elif state_grad:
        size = _layout.total(problem, slots, rotation, q.device.type) // 4
        d_state = torch.zeros(size, dtype=torch.float32)
    gradients = _core._backward(
        q, k, v, beta, bytes_of(state), bytes_of(d_state), slots, problem, rotation, o, lse,
        # A row of zeros is all of them.
        _rows(o.new_zeros(o.shape[-1]).expand(o.shape) if d_o is None else d_o),
        d_lse=None if d_lse is None else _rows(d_lse),
        a_dot=a_dot if d_a_dot is not None else None,
        d_a_dot=None if d_a_dot is None else _rows(d_a_dot),
        d_a_mem=None if d_a_mem is None else _rows(d_a_mem),
        bptt_segments=bptt_segments,
        **dict(zip(NAMES, tokens)),
    )  # fmt: skip
    return *gradients, d_state if state_grad else q.new_empty(0, dtype=torch.float32)


def _rows(x):
    """Whose last dimension is contiguous, as the core wants it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def fake_backward(
    q, k, v, beta, state, slots, problem, rotation, o, lse, a_dot, d_o, d_lse, d_state, d_a_dot,
    d_a_mem, state_grad, bptt_segments=None, *tokens,
):  # fmt: skip
    size = _layout.total(problem, slots, rotation, q.device.type) // 4 if state_grad else 0
    floats = lambda size: q.new_empty(size, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, v)), floats(q.shape[-2]), floats(size)


def _save(ctx, inputs, output):
    q, k, v, beta, state, *ctx.reading, parts, ctx.bptt_segments = inputs[:_BEFORE]
    *tokens, ctx.interleaved = inputs[_BEFORE:]
    o, lse, _, a_dot, _ = output
    ctx.save_for_backward(q, k, v, beta, state, o, lse, a_dot if parts else None, *tokens)
    # Of what nobody used no zeros are made.
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_o, d_lse, d_state, d_a_dot, d_a_mem):
    q, k, v, beta, state, o, lse, a_dot, *tokens = ctx.saved_tensors
    if a_dot is None:
        d_a_dot = d_a_mem = None
    *gradients, d_state = torch.ops.infini_attn.prefill_backward(
        q, k, v, beta, state, *ctx.reading, o, lse, a_dot, d_o, d_lse, d_state, d_a_dot, d_a_mem,
        ctx.needs_input_grad[4], ctx.bptt_segments, *tokens, ctx.interleaved,
    )  # fmt: skip
    d_state = d_state if ctx.needs_input_grad[4] else None
    return *gradients, d_state, *[None] * (_BEFORE - 5 + len(NAMES))


def refuse(ctx, *gradients):
    raise RuntimeError(
        "infini_attention: a gradient of its gradients asked for, first gradients alone expected (the "
        "operator prefill_backward has none)"
    )


def register(library):
    """The two operators, in the library of the others."""
    define(library, "prefill_train", SCHEMAS, prefill_train, fake_train, _gradients, _save)
    define(library, "prefill_backward", SCHEMAS, prefill_backward, fake_backward, refuse)


def define(library, name, schemas, function, fake, backward, setup=None):
    """An operator of the CPU that has gradients."""
    library.define(name + schemas[name], tags=torch.Tag.pt2_compliant_tag)
    library.impl(name, function, "CPU")
    name = f"infini_attn::{name}"
    torch.library.register_fake(name, fake, lib=library)
    torch.library.register_autograd(name, backward, setup_context=setup, lib=library)


def wants_gradients(*tensors):
    """Whether PyTorch records what is done with any of these."""
    return torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in tensors
    )


RECORDED = "of a call that is recorded for its gradients (or use torch.no_grad())"


def check(named, *, rope, out, inplace, of=RECORDED):
    """Refuses what a call that PyTorch differentiates cannot have."""
    compiling, device = torch.compiler.is_compiling(), named["q"].device
    if of == RECORDED and not compiling and torch._C._get_tracing_state() is not None:
        # Which knows no float32 in the memory of bytes.
        given = "tensors that require grad within torch.jit.trace"
        raise ValueError(f"q: {given} given, a call under torch.no_grad() expected")
    for name, x in named.items():
        if device.type == "cuda" and isinstance(x, torch.Tensor) and x.requires_grad:
            given = f"a tensor that requires grad in a call on {device}"
            raise ValueError(
                f"{name}: {given} given, one on the CPU expected (gradients are computed there alone: "
                "use torch.no_grad() or tensor.detach())"
            )
        if not compiling and _has_tangent(x):
            raise ValueError(
                f"{name}: a tensor with a forward-mode tangent given, no tangent (this operator computes "
                "none: use tensor.detach()) expected"
            )
    for name, table in zip(("rope.cos", "rope.sin"), rope):
        if table is not None and table.requires_grad:
            raise ValueError(
                f"{name}: a tensor that requires grad given, no gradient (tables are constants: use "
                "tensor.detach()) expected"
            )
    if out is not None:
        raise ValueError(f"out: a tensor given, None expected {of}")
    if inplace:
        raise ValueError(
            f"inplace: True given, False expected {of}: the state that it returns goes on"
        )


def _has_tangent(x):
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def gate(beta, heads, dtype=torch.float32):
    """The gate's logits, [Hq], differentiably."""
    if not isinstance(beta, torch.Tensor) or beta.dtype == torch.bool or beta.is_complex():
        given = getattr(beta, "dtype", type(beta).__name__)
        raise TypeError(f"beta: {given} given, numbers expected")
    longer = [extent for extent in beta.shape if extent != 1]
    # One by one: to a compiler extents are symbols.
    if len(longer) > 1 or any(extent != heads for extent in longer):
        expected = f"[Hq] = [{heads}], extents of 1 besides, or one number"
        raise ValueError(f"beta: shape {list(beta.shape)} given, {expected} expected")
    return beta.to(dtype).reshape(-1).expand(heads)
