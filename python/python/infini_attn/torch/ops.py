"""`torch.ops.infini_attn`: the operators that PyTorch can record.

A state is a tensor of bytes ([`State.buffer`]) beside what says how to read it: its `slots`, the
`problem` as text and whether it has room for rotated keys (`rotation`). Sequence b belongs to slot
`seq_slots[b]`. PyTorch differentiates `prefill_train`, by `prefill_backward`, and their likes of float64.
"""

import torch

from .. import _core
from . import _cpu, _float64, _layout, _train

_CALL = f"{_train.CALL}, *, {_train.TOKENS}"
_STATE = "Tensor(a!) state, SymInt slots, str problem, bool rotation"
_IN_PLACE = _CALL.replace("Tensor? state", "Tensor(a!) state")
SCHEMAS = {
    "prefill": f"({_CALL}) -> (Tensor o, Tensor lse, Tensor new_state)",
    "prefill_": f"({_IN_PLACE}) -> (Tensor o, Tensor lse)",
    "decode_": f"({_IN_PLACE}) -> (Tensor o, Tensor lse)",
    "flush_": f"({_STATE}, *, Tensor? seq_slots=None) -> ()",
    "reset_": f"({_STATE}, *, Tensor? seq_slots=None) -> ()",
    "truncate_": f"({_STATE}, SymInt slot, SymInt tokens) -> ()",
    "merge_partials": "(Tensor[] a_dot, Tensor[] lse) -> (Tensor o, Tensor lse)",
}
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

_library = torch.library.Library("infini_attn", "DEF")


def _fake_outputs(q, v):
    *batch, tokens, heads, _ = q.shape
    lse = q.new_empty((*batch, heads, tokens), dtype=torch.float32)
    return q.new_empty((*batch, tokens, heads, v.shape[-1])), lse


def _fake_prefill(q, k, v, beta, state, slots, problem, rotation, **options):
    size = _layout.total(problem, slots, rotation, q.device.type)
    return *_fake_outputs(q, v), q.new_empty(size, dtype=torch.uint8)


def _fake_in_place(q, k, v, beta, state, slots, problem, rotation, **options):
    return _fake_outputs(q, v)


def _fake_nothing(*args, **options):
    return None


def _fake_merge(a_dot, lse):
    return a_dot[0].new_empty(a_dot[0].shape), lse[0].new_empty(lse[0].shape)


_FAKES = dict(
    prefill=_fake_prefill, prefill_=_fake_in_place, decode_=_fake_in_place, merge_partials=_fake_merge
)


def _on_cuda(name):
    def call(first, *args, **options):
        from . import _cuda

        # Whether a graph is captured is asked of the current device.
        device = first[0].device if isinstance(first, list) and first else getattr(first, "device", None)
        with torch.cuda.device(device):
            return getattr(_cuda, name)(first, *args, **options)

    return call


def cast(x, dtype):
    """As autocast does: floating-point numbers, but float64."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _under_autocast(name, device):
    """q, k and v as the problem has them, whatever autocast's own type is: the state's layout follows
    it."""

    def call(q, k, v, beta, state, slots, problem, *args, **options):
        dtype = _DTYPES[_core._problem_from_text(problem).dtype]
        q, k, v = (cast(x, dtype) for x in (q, k, v))
        with torch.autocast(device.lower(), enabled=False):
            operator = getattr(torch.ops.infini_attn, name).default
            return operator(q, k, v, beta, state, slots, problem, *args, **options)

    return call


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, getattr(_cpu, _name), "CPU")
    _library.impl(_name, _on_cuda(_name), "CUDA")
    torch.library.register_fake(f"infini_attn::{_name}", _FAKES.get(_name, _fake_nothing), lib=_library)
    if _schema.startswith("(Tensor q"):
        for _device in ("CPU", "CUDA"):
            _library.impl(_name, _under_autocast(_name, _device), f"Autocast{_device}")

for _module in (_train, _float64):
    _module.register(_library)
    SCHEMAS |= _module.SCHEMAS
_library.impl("prefill_train", _under_autocast("prefill_train", "CPU"), "AutocastCPU")


def merge(a_dot, lse):
    """`merge_partials` of lists of tensors: (o, lse)."""
    return tuple(torch.ops.infini_attn.merge_partials(list(a_dot), list(lse)))
