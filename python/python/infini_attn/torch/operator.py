"""The operator over `torch.ops.infini_attn`: what PyTorch can compile, export and record."""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch

from .. import _core
from . import _cpu, _cuda, _float64, _layout, _train
from .ops import DTYPES, cast
from .state import State

_NAMED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def infini_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: Any,
    *,
    segment_len: int | None = None,
    update: str | None = None,
    scale: float | None = None,
    empty_memory: str | None = None,
    denominator: Any = None,
    state: State | None = None,
    slots: Any = None,
    seq_lens: Any = None,
    attention_mask: Any = None,
    cu_seqlens: Any = None,
    rope: Sequence[torch.Tensor] | None = None,
    positions: Any = None,
    rope_interleaved: bool = False,
    inplace: bool = False,
    out: torch.Tensor | None = None,
    return_state: bool = True,
    return_lse: bool = False,
    return_parts: bool = False,
    bptt_segments: int | None = None,
) -> Any:
    """`infini_attn.infini_attention` of PyTorch's tensors on any device, with a State of this package.

    Arguments, results and errors are the same. torch.compile (also of whole
    graphs, with shapes that vary), torch.export, make_fx and torch.jit.trace record it. Under autocast
    q, k and v are cast, to the state's dtype or, without a state, to autocast's.

    Where q, k, v, beta or the state requires grad (with grad enabled, on the CPU), PyTorch can
    differentiate the results, the state among them, of which another call continues. Tensors of float64
    on the CPU are computed by the reference, slowly, for checks; their state is a Float64State.
    """
    _check_tensors(q, k, v, cu_seqlens is not None)
    for name, flag in (
        ("rope_interleaved", rope_interleaved),
        ("inplace", inplace),
        ("return_state", return_state),
        ("return_lse", return_lse),
        ("return_parts", return_parts),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: {type(flag).__name__} given, True or False expected")
    if isinstance(state, _core.State) and not _is_float64(q) and _train.wants_gradients(q, k, v, beta):
        # Recorded calls leave it as it is.
        state = State.from_state(state)
    if state is not None:
        _check_state(state, q)
    problem = _problem_of(q, k, v, state, (segment_len, update, scale, empty_memory, denominator))
    cos, sin = _tables(rope)
    if positions is not None and rope is None:
        raise ValueError("positions: without rope given, rope=(cos, sin) with them expected")
    options = dict(
        seq_slots=_integers("slots", slots),
        seq_lens=_integers("seq_lens", seq_lens),
        attention_mask=_numbers("attention_mask", attention_mask),
        cu_seqlens=_integers("cu_seqlens", cu_seqlens),
        cos=cos,
        sin=sin,
        positions=_integers("positions", positions),
        interleaved=rope_interleaved,
    )
    gate, beta = beta, _numbers("beta", beta, torch.float32)
    bptt_segments = _segments(bptt_segments)
    for name, x in (("beta", beta), *options.items()):
        # PyTorch would take the whole call for one without values.
        if isinstance(x, torch.Tensor) and x.is_meta and not q.is_meta:
            raise ValueError(f"{name}: device meta given, {q.device} expected")
    if state is not None:
        sequences = state.sequences
    else:
        sequences = q.shape[0] if cu_seqlens is None else _count(options["cu_seqlens"])
    learned, inplace = dict(q=q, k=k, v=v, beta=beta), inplace and state is not None
    call = q, k, v, beta, state, sequences, problem
    if _is_float64(q):
        _train.check(learned, rope=(cos, sin), out=out, inplace=inplace, of="of float64 tensors")
        o, state, lse, *parts = _float64.attend(*call, bptt_segments, options)
    elif _train.wants_gradients(q, k, v, beta, None if state is None else state._tracked):
        _train.check(learned, rope=(cos, sin), out=out, inplace=inplace)
        given = (slots, seq_lens, attention_mask, cu_seqlens, *(rope or (None, None)), positions)
        kept = {name: _kept(x, g) for (name, x), g in zip(options.items(), (*given, rope_interleaved))}
        call = q, k, v, _kept(beta, gate), state, sequences, problem
        o, state, lse, *parts = _recorded(*call, return_parts, bptt_segments, kept)
    else:
        o, state, lse, *parts = _advanced(*call, inplace, out, return_parts, options)
    parts = parts if return_parts else []
    results = (o,) + ((state,) if return_state else ()) + ((lse,) if return_lse else ()) + tuple(parts)
    return results if len(results) > 1 else o


def _recorded(q, k, v, beta, state, sequences, problem, parts, bptt_segments, options):
    """(out, state, lse, a_dot, a_mem), which PyTorch differentiates."""
    floats, rotation = None, options["cos"] is not None
    if state is not None:
        floats, rotation = state._floats(), state.rotation
    o, lse, new, *parts = torch.ops.infini_attn.prefill_train(
        q, k, v, _train.gate(beta, q.shape[-2]), floats, sequences, problem, rotation, parts,
        bptt_segments, *options.values(),
    )  # fmt: skip
    return o, State._of_tracked(new, problem, sequences, rotation), lse, *parts


def _advanced(q, k, v, beta, state, sequences, problem, inplace, out, parts, options):
    """(out, state, lse), and the parts if they are asked for, without gradients."""
    buffer, rotation = None, options["cos"] is not None
    if state is not None:
        buffer, rotation = state.buffer, state.rotation
    operators: Any = torch.ops.infini_attn
    if out is not None:
        _check_out(out, (*q.shape[:-1], v.shape[-1]), _dtype(problem), q.device, buffer)
    if (out is not None or parts) and _is_eager(q):
        # Past PyTorch's dispatcher, which hands out new tensors only, and always as many; and so past
        # autocast.
        operators = _cuda if q.device.type == "cuda" else _cpu
        options = options | dict(out=out, parts=parts)
        q, k, v = (cast(x, _dtype(problem)) for x in (q, k, v))
    elif parts:
        raise ValueError("return_parts: True given, False expected of a call that PyTorch records")
    call = q, k, v, beta, buffer, sequences, problem, rotation
    if inplace:
        o, lse, *both = operators.prefill_(*call, **options)
        state._changed()
    else:
        o, lse, buffer, *both = operators.prefill(*call, **options)
        state = State._of(buffer, problem, sequences, rotation)
    if out is not None and operators is torch.ops.infini_attn:
        o = out.copy_(o)
    return o, state, lse, *both


def _kept(x, given):
    """What was given, until gradients are computed: arrays of others may change meanwhile, which PyTorch
    notices of tensors alone."""
    return x.clone() if isinstance(x, torch.Tensor) and x is not given else x


def _segments(bptt_segments):
    if bptt_segments is None:
        return None
    if isinstance(bptt_segments, bool):
        raise TypeError("bptt_segments: bool given, an integer expected")
    try:
        segments = index(bptt_segments)
    except TypeError:
        given = type(bptt_segments).__name__
        raise TypeError(f"bptt_segments: {given} given, an integer expected") from None
    if segments < 1:
        raise ValueError(f"bptt_segments: {segments} given, at least 1 expected")
    return segments


def _check_tensors(q, k, v, packed):
    if not torch.compiler.is_compiling():
        _check_transforms()
    names, rank = ("[total, Hq, Dk], as cu_seqlens is given", 3) if packed else ("[B, T, Hq, Dk]", 4)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: {type(x).__name__} given, a PyTorch tensor expected")
        if x.device != q.device:
            raise ValueError(f"{name}: device {x.device} given, {q.device} as q has expected")
        if x.dim() != rank:
            raise ValueError(f"{name}: shape {list(x.shape)} given, rank {rank} {names} expected")


def _check_transforms():
    top = torch._C._functorch.peek_interpreter_stack()
    if top is not None and top.key() != torch._C._functorch.TransformType.Functionalize:
        expected = "a call outside of it (this operator cannot be transformed)"
        raise ValueError(f"q: a tensor within a transform of torch.func given, {expected} expected")


def _is_float64(q):
    """Whether a call is one for the reference."""
    return q.dtype == torch.float64 and q.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _check_state(state, q):
    wanted: Any = _float64.Float64State if _is_float64(q) else State
    if not isinstance(state, wanted):
        given = "an infini_attn.State" if isinstance(state, _core.State) else type(state).__name__
        raise TypeError(f"state: {given} given, an infini_attn.torch.{wanted.__name__} expected")
    if wanted is State and state.buffer.device != q.device:
        raise ValueError(f"state: device {state.buffer.device} given, {q.device} as q has expected")


def _problem_of(q, k, v, state, policies):
    """The problem of a call as text."""
    base = None if state is None else state._text
    dtype = q.dtype
    if q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        if base is not None:
            dtype = _dtype(base)
    else:
        for name, x in (("k", k), ("v", v)):
            if x.dtype != dtype:
                raise TypeError(f"{name}: dtype {x.dtype} given, {dtype} as q has expected")
    known = DTYPES | ({torch.float64: "f32"} if _is_float64(q) else {})
    if dtype not in known:
        raise TypeError(f"q: dtype {dtype} given, f32, f16 or bf16 expected")
    # The index of a symbol is a number: heads and channels do not vary in a graph.
    extents = tuple(map(index, (q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])))
    return _text(base, extents, known[dtype], policies)


def _dtype(problem):
    return _NAMED[problem.rsplit("dtype=", 1)[1]]


@torch.compiler.assume_constant_result
def _text(base, extents, dtype, policies):
    return _core._call_problem(base, extents, dtype, *policies)


def _tables(rope):
    if rope is None:
        return None, None
    if not isinstance(rope, (tuple, list)):
        raise TypeError(f"rope: {type(rope).__name__} given, a tuple (cos, sin) expected")
    if len(rope) != 2:
        raise ValueError(f"rope: {len(rope)} tables given, a tuple (cos, sin) expected")
    return _numbers("rope.cos", rope[0]), _numbers("rope.sin", rope[1])


def _integers(name, x):
    if isinstance(x, torch.Tensor):
        return x
    x = _numbers(name, list(x) if isinstance(x, range) else x)
    return x if x is None or x.numel() else x.long()


def _numbers(name, x, dtype=None):
    """Tensors as they are, others in the processor's memory, whatever the default device."""
    if x is None or isinstance(x, torch.Tensor):
        return x
    try:
        return torch.as_tensor(x, dtype=dtype, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: {type(x).__name__} given, numbers expected ({error})") from None


def _count(cu_seqlens):
    """Sequences in a packed batch."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: shape {list(cu_seqlens.shape)} given, [B + 1] expected")
    return cu_seqlens.shape[0] - 1


def _check_out(out, shape, dtype, device, buffer):
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out: {type(out).__name__} given, a PyTorch tensor expected")
    if out.dtype != dtype or out.device != device:
        raise TypeError(f"out: {out.dtype} on {out.device} given, {dtype} on {device} expected")
    if out.shape != shape:
        raise ValueError(f"out: shape {list(out.shape)} given, {list(shape)} expected")
    if buffer is not None and _is_eager(out) and _layout.overlap(out, buffer):
        raise ValueError("out: memory that overlaps that of state given, memory of its own expected")


def _is_eager(q):
    """Whether PyTorch runs what it is given, and records or changes nothing."""
    plain = type(q) in (torch.Tensor, torch.nn.Parameter) and not q.is_meta
    plain = plain and not torch.compiler.is_compiling()
    return plain and torch._C._get_tracing_state() is None and not torch._C._len_torch_dispatch_stack()


# Where PyTorch compiles, the package's own function is this one; its types are others.
_own: Any = _core.infini_attention
torch.compiler.substitute_in_graph(_own, skip_signature_check=True)(infini_attention)


def chunk_infini_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: Any,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    segment_len: int | None = None,
    update: str | None = None,
    empty_memory: str | None = None,
    denominator: Any = None,
    rope: Sequence[torch.Tensor] | None = None,
    positions: Any = None,
) -> tuple[torch.Tensor, State | None]:
    """`infini_attention` as flash-linear-attention's functions are called: q, k, v [B, T, H, D], with
    cu_seqlens [1, total, H, D]. Returns (o, final state or None); `initial_state` stays as it was."""
    packed = cu_seqlens is not None
    if packed:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4 or x.shape[0] != 1:
                raise ValueError(
                    f"{name}: shape {list(x.shape)} given, [1, total, H, D] (cu_seqlens) expected"
                )
        q, k, v = q[0], k[0], v[0]
    o, state = infini_attention(
        q,
        k,
        v,
        beta,
        segment_len=segment_len,
        update=update,
        scale=scale,
        empty_memory=empty_memory,
        denominator=denominator,
        state=initial_state,
        cu_seqlens=cu_seqlens,
        rope=rope,
        positions=positions,
    )
    return o[None] if packed else o, state if output_final_state else None


class BatchInfiniAttention:
    """A step of a model: one batch for many layers, each with a state of its own.

    `plan` says once which tokens belong to which slots; `run` computes a layer and advances its state in
    place.
    """

    def __init__(self) -> None:
        self._batch: dict[str, Any] | None = None

    def plan(
        self,
        *,
        cu_seqlens: Any = None,
        seq_lens: Any = None,
        slots: Any = None,
        rope: Sequence[torch.Tensor] | None = None,
        positions: Any = None,
        rope_interleaved: bool = False,
    ) -> None:
        """The batch of the calls of `run` that follow: arguments as of `infini_attention`."""
        lens = {
            "cu_seqlens": _integers("cu_seqlens", cu_seqlens),
            "seq_lens": _integers("seq_lens", seq_lens),
            "slots": _integers("slots", slots),
        }
        rope = None if rope is None else _tables(rope)
        self._batch = dict(
            lens,
            rope=rope,
            positions=_integers("positions", positions),
            rope_interleaved=rope_interleaved,
        )

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: Any,
        state: State,
        *,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """One layer: out, or (out, lse). `state` advances."""
        if self._batch is None:
            raise RuntimeError("plan: nothing given, a call of plan before run expected")
        if not isinstance(state, State):
            given = type(state).__name__
            raise TypeError(f"state: {given} given, an infini_attn.torch.State expected")
        options = dict(self._batch, state=state, inplace=True, out=out)
        return infini_attention(q, k, v, beta, return_state=False, return_lse=return_lse, **options)
