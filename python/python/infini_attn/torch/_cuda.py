"""What the operators do on CUDA tensors: on PyTorch's current stream, in memory of its allocator,
without a copy and without waiting for the device.

The functions without an underscore up to `merge_partials` are the operators, each as its schema in
`ops.py`. A `key` is what says how to read a state's buffer: problem, slots, rotation.
"""

from types import SimpleNamespace

import torch

from .. import _core
from . import _held, _layout

# Of the counters of a slot, in bytes.
_COUNTERS = 32
# Devices, problems and kinds of plans for any number of runs whose kernels are loaded.
_loaded: set[tuple[int, str, str]] = set()
# Of a process's problems and numbers of slots, so there are few.
_layouts: dict[tuple[str, int, bool], tuple[list[tuple[str, str, list[int], int]], int]] = {}


class Place:
    """The device of tensors, its current stream, and the allocator behind it."""

    __slots__ = ("device", "ordinal", "stream")

    def __init__(self, device):
        self.device, self.ordinal = device, device.index
        self.stream = torch.cuda.current_stream(device).cuda_stream

    def empty(self, size):
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def require():
    """RuntimeError where the extension has no kernels."""
    if not hasattr(_core, "_DeviceState"):
        raise RuntimeError(
            "infini_attn: this build has no CUDA kernels; install a wheel that has them, or build with "
            "the feature cuda (README)"
        )


def layout(*key):
    """The parts of a state, (name, dtype, shape, offset in bytes), and the bytes of all."""
    if key not in _layouts:
        require()
        _layouts[key] = _core._device_layout(*key)
    return _layouts[key]


def _host_of(key, state, wait=True):
    """The host's side of a state; where it is not known it is read from the device, which is waited
    for."""
    host = _held.known(state, key)
    if host is None and wait:
        host = _core._DeviceState(*key, _counters(key, state))
        _held.note(state, key, host)
    return host


def _counters(key, state):
    """The counters' bytes, from the device."""
    at = next(part[3] for part in layout(*key)[0] if part[0] == "counters")
    return bytes(state[at : at + _COUNTERS * key[1]].cpu().numpy())


def begin(key, state):
    """Notes that a buffer is that of empty streams."""
    if _in_graph():
        _held.join_graph(state)
    _held.note(state, key, _core._DeviceState(*key))


def copied(key, state, of):
    """Notes that a buffer is a copy of another."""
    if _in_graph():
        _held.join_graph(state)
    _held.copy(state, of, key)


forget = _held.forget


def prefill(q, k, v, beta, state, slots, problem, rotation, **options):
    key = problem, slots, rotation
    _check_inputs(q.device, q=q, k=k, v=v)
    # A tensor that says when it is written to, whatever the mode.
    with torch.inference_mode(False):
        if state is None:
            new, host = _layout.empty(*key, q.device), _core._DeviceState(*key)
        else:
            _place(key, state)
            new, host = state.clone(), None
            copied(key, new, state)
    o, lse, *parts = _advance(key, q, k, v, beta, new, fresh=host, **options)
    return o, lse, new, *parts


def prefill_(q, k, v, beta, state, slots, problem, rotation, **options):
    return _advance((problem, slots, rotation), q, k, v, beta, state, **options)


def decode_(q, k, v, beta, state, slots, problem, rotation, **options):
    return _advance((problem, slots, rotation), q, k, v, beta, state, short=True, **options)


def flush_(state, slots, problem, rotation, *, seq_slots=None):
    _change("flush", (problem, slots, rotation), state, _host("slots", seq_slots))


def reset_(state, slots, problem, rotation, *, seq_slots=None):
    _change("reset", (problem, slots, rotation), state, _host("slots", seq_slots))


def truncate_(state, slots, problem, rotation, slot, tokens):
    _change("truncate", (problem, slots, rotation), state, slot, tokens)


def merge_partials(a_dot, lse):
    require()
    if not a_dot:
        raise ValueError("a_dot: an empty list given, at least one partial result expected")
    out = torch.empty(a_dot[0].shape, dtype=a_dot[0].dtype, device=a_dot[0].device)
    out_lse = torch.empty(lse[0].shape, dtype=torch.float32, device=out.device) if lse else out
    for name, tensors in (("a_dot", a_dot), ("lse", lse)):
        for i, tensor in enumerate(tensors):
            _check_device(f"{name}[{i}]", tensor, out.device)
    _core._merge_partials_on(Place(out.device), a_dot, lse, out, out_lse)
    return out, out_lse


def _in_graph():
    return torch.cuda.is_current_stream_capturing()


def _refuse_in_graph(argument, given, expected):
    """What would end the capture, or not be what a replay finds."""
    if _in_graph():
        expected = f"{expected} in the capture of a graph"
        raise RuntimeError(f"{argument}: {given} given, {expected} expected")


def _is_short(q):
    return q.dim() == 4 and q.shape[1] <= _core.MAX_DECODE_TOKENS


def _advance(
    key,
    q,
    k,
    v,
    beta,
    state,
    *,
    seq_slots=None,
    seq_lens=None,
    attention_mask=None,
    cu_seqlens=None,
    cos=None,
    sin=None,
    positions=None,
    interleaved=False,
    short=False,
    out=None,
    parts=False,
    fresh=None,
):
    """Tokens into the streams of a state, in place; (out, lse), and a_dot, a_mem if `parts`. `short`
    refuses more than a decode takes; `fresh` is the host's side of a state that begins with this call.

    Where it is not known where the streams stand, as in a graph, a short call leaves that to the device:
    a plan for any number of runs.
    """
    place = _place(key, state)
    _check_inputs(place.device, q=q, k=k, v=v)
    anywhere = short or _is_short(q)
    if fresh is None and not anywhere:
        given = f"a call with q {list(q.shape)}"
        _refuse_in_graph("q", given, "at most 16 tokens of every sequence (packed: by decode_)")
    on_device = _on_device(seq_slots) or _on_device(seq_lens)
    # A table of slots and lengths serves rows that begin at their first token.
    on_device = on_device and anywhere and q.dim() == 4 and cu_seqlens is attention_mask is None
    kind, table, host = "decode" if short else "forward", None, None if on_device else fresh
    if host is None and not on_device and not _in_graph():
        host = _host_of(key, state, wait=not anywhere)
    planned_for = host
    if host is None:
        kind, planned_for = "replay", _core._DeviceState(*key)
        if on_device:
            kind, table = "table", _table(q, seq_slots, seq_lens)
            seq_slots, seq_lens = list(range(q.shape[0])), None
    new = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=place.device)
    shape = (*q.shape[:-1], v.shape[-1])
    if out is None:
        out = new(shape, q.dtype)
    else:
        _check_out(place.device, out, q=q, k=k, v=v, state=state)
    tensors = SimpleNamespace(
        q=q,
        k=k,
        v=v,
        beta=_gate(beta, q.shape[-2], place.device),
        out=out,
        lse=new((*q.shape[:-3], q.shape[-2], q.shape[-3]), torch.float32),
        a_dot=new(shape, q.dtype) if parts else None,
        a_mem=new(shape, q.dtype) if parts else None,
        cos=None if cos is None else _floats("rope.cos", cos, place.device),
        sin=None if sin is None else _floats("rope.sin", sin, place.device),
    )
    rows = None
    if _on_device(positions):
        positions, rows = None, _positions(positions, list(q.shape[:-2]), place.device)
    batch = dict(
        seq_lens=_host("seq_lens", seq_lens),
        attention_mask=_host("attention_mask", attention_mask),
        cu_seqlens=_host("cu_seqlens", cu_seqlens),
        slots=_host("slots", seq_slots),
        positions=positions,
        device_positions=None if rows is None else rows.numel(),
        interleaved=interleaved,
    )
    plan = _core._DevicePlan.plan(place, planned_for, kind, tensors, **batch)
    if anywhere and q.numel() > 0 and not _in_graph():
        _load(place, key, tensors, batch["slots"], batch["cu_seqlens"])
    if _in_graph():
        _held.join_graph(state)
    if fresh is None:
        _held.meet(state, key)
    plan.run(place, host, state.data_ptr(), tensors, positions=rows, table=table)
    _held.note(state, key, host)
    return (out, tensors.lse) + ((tensors.a_dot, tensors.a_mem) if parts else ())


def _load(place, key, tensors, slots, cu_seqlens):
    """Loads what a graph of a short call would need besides, once."""
    kind = "table" if cu_seqlens is None else "replay"
    calls = place.ordinal, key[0], kind
    if calls not in _loaded:
        host, batch = _core._DeviceState(*key), dict(slots=slots, cu_seqlens=cu_seqlens)
        # The kernels are the same without a rotation.
        tensors = SimpleNamespace(**vars(tensors) | dict(cos=None, sin=None))
        _core._DevicePlan.plan(place, host, kind, tensors, **batch).load(place)
        _loaded.add(calls)


def _change(name, key, state, *arguments):
    place = _place(key, state)
    _refuse_in_graph("state", name, "calls with tokens alone")
    host = _host_of(key, state)
    _held.meet(state, key)
    getattr(host, name)(place, state.data_ptr(), *arguments)
    _held.note(state, key, host)


def counts(key, state):
    """Tokens, committed and open_len of every stream: int64 [B, 3] on the CPU."""
    _place(key, state)
    _refuse_in_graph("state", "a look at its counters", "calls with tokens alone")
    host = _host_of(key, state)
    return torch.tensor([host.tokens, host.committed, host.open_len], dtype=torch.int64).T


def copy_slots(key, state, source_key, source, pairs):
    """Slots of a state continue where those of another, or of this one, stand: (from, to)."""
    place = _place(key, state)
    _check_device("source", source, state.device)
    _refuse_in_graph("state", "a copy of slots", "calls with tokens alone")
    host, other = _host_of(key, state), _host_of(source_key, source)
    _held.meet(state, key)
    host.copy_slots(place, state.data_ptr(), other, source.data_ptr(), pairs)
    _held.note(state, key, host)


def status(key, state):
    """RuntimeError where kernels have met indices in device memory that they could not accept. Waits."""
    place = _place(key, state)
    _refuse_in_graph("state", "a look at its status", "calls with tokens alone")
    _host_of(key, state).status(place, state.data_ptr())


def to_host(key, state):
    """The state as an `infini_attn.State`. Waits for the device."""
    place = _place(key, state)
    _refuse_in_graph("state", "a copy to the host", "calls with tokens alone")
    return _host_of(key, state).to_host(place, state.data_ptr())


def from_host(key, state, source):
    """An `infini_attn.State` of as many slots in the place of all of them. Waits for the device."""
    place = _place(key, state)
    _refuse_in_graph("state", "a copy from the host", "calls with tokens alone")
    host = _core._DeviceState(*key)
    host.overwrite(place, state.data_ptr(), source)
    _held.note(state, key, host)


def _place(key, state):
    """Where a state's buffer is, once it is seen to be one."""
    if state.device.type != "cuda":
        raise ValueError(f"state: device {state.device} given, a CUDA device expected")
    size = layout(*key)[1]
    if state.dtype != torch.uint8 or state.dim() != 1 or not state.is_contiguous():
        got = f"{state.dtype} {list(state.shape)}, strides {list(state.stride())}"
        raise ValueError(f"state: {got} given, torch.uint8 [{size}] without gaps expected")
    if state.numel() < size:
        raise ValueError(f"state: {state.numel()} bytes given, {size} expected")
    return Place(state.device)


def _check_device(name, tensor, device):
    if tensor.device != device:
        raise ValueError(f"{name}: device {tensor.device} given, {device} expected")


def _check_inputs(device, **tensors):
    for name, tensor in tensors.items():
        _check_device(name, tensor, device)
        if tensor.dtype not in (torch.bfloat16, torch.float16):
            expected = "bf16 or f16 on a CUDA device (f32: tensor.cpu())"
            raise TypeError(f"{name}: dtype {tensor.dtype} given, {expected} expected")


def _check_out(device, out, **others):
    _check_device("out", out, device)
    for name, tensor in others.items():
        if _layout.overlap(out, tensor):
            given = f"memory that overlaps that of {name}"
            raise ValueError(f"out: {given} given, memory of its own expected")


def _on_device(argument):
    return isinstance(argument, torch.Tensor) and argument.device.type != "cpu"


def _host(name, argument):
    """A small argument in the processor's memory; one on the device is waited for."""
    if not _on_device(argument):
        return argument
    _refuse_in_graph(name, f"device {argument.device}", "a list or a tensor on the CPU")
    return argument.cpu()


def _floats(name, argument, device):
    """Numbers as float32 on the device, rows without gaps. From the processor's memory they are waited
    for."""
    if not isinstance(argument, torch.Tensor):
        argument = torch.tensor(argument, dtype=torch.float32)
    if argument.device != device:
        _refuse_in_graph(name, f"device {argument.device}", f"device {device}")
    return argument.to(device, torch.float32).contiguous()


def _gate(beta, heads, device):
    """The gate's logits, one per head, or one for all."""
    logits = _floats("beta", beta, device)
    if logits.numel() == 1:
        return logits.reshape(1).expand(heads).contiguous()
    if [n for n in logits.shape if n != 1] != [heads]:
        expected = f"[Hq] = [{heads}], extents of 1 besides, or one number"
        raise ValueError(f"beta: shape {list(logits.shape)} given, {expected} expected")
    return logits.reshape(heads)


def _positions(positions, lead, device):
    """Rows of the rotation tables, to be checked on the device."""
    _check_integers("positions", positions, device)
    if list(positions.shape) not in (lead, lead[-1:]):
        names = f"[total] = {lead}" if len(lead) == 1 else f"[T] = {lead[1:]} or [B, T] = {lead}"
        raise ValueError(f"positions: shape {list(positions.shape)} given, {names} expected")
    return positions.to(torch.int64).contiguous()


def _check_integers(name, tensor, device):
    _check_device(name, tensor, device)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: dtype {tensor.dtype} given, integers expected")


def _table(q, seq_slots, seq_lens):
    """Slots and lengths for the device alone, int32 [B, 6]: first token (64 bits), slot, row, length, 0.
    What does not fit 32 bits and a slot that was named before become what kernels refuse."""
    b, t = q.shape[:2]
    rows = torch.arange(b, dtype=torch.int64, device=q.device)
    columns = {2: rows, 3: rows, 4: torch.full_like(rows, t)}
    for column, name, given in ((2, "slots", seq_slots), (4, "seq_lens", seq_lens)):
        if given is None:
            continue
        given = torch.as_tensor(given)
        if not _on_device(given):
            _refuse_in_graph(name, "device cpu", f"device {q.device}")
            given = given.to(q.device)
        _check_integers(name, given, q.device)
        if list(given.shape) != [b]:
            raise ValueError(f"{name}: shape {list(given.shape)} given, [B] = [{b}] expected")
        columns[column] = given.to(torch.int64).clamp(-2, 2**31 - 1)
    slots = columns[2]
    again = ((slots[:, None] == slots) & (rows[:, None] > rows)).any(1) & (slots >= 0)
    table = torch.zeros(b, 6, dtype=torch.int32, device=q.device)
    table[:, 2] = slots.masked_fill(again, -2)
    table[:, 3], table[:, 4] = columns[3], columns[4]
    return table
