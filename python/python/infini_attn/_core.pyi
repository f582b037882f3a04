from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar, Literal, Protocol, TypedDict, TypeVar, final, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Unpack

__all__ = [
    "KeySums",
    "MAX_DECODE_TOKENS",
    "Problem",
    "ReferenceState",
    "SegmentMap",
    "State",
    "__version__",
    "_advance",
    "_advance_float64",
    "_backward",
    "_backward_float64",
    "_call_problem",
    "_cuda_status",
    "_flush_slots",
    "_host_layout",
    "_key_sums_from_bytes",
    "_problem_from_fields",
    "_problem_from_text",
    "_problem_text",
    "_reset_slots",
    "_row_len",
    "_segment_map_from_bytes",
    "_state_from_buffer",
    "_state_from_bytes",
    "_state_into_buffer",
    "_truncate_slot",
    "apply",
    "compose",
    "get_num_threads",
    "infini_attention",
    "key_sums",
    "merge_memories",
    "merge_partials",
    "reference_infini_attention",
    "segment_map",
    "set_num_threads",
    "simd_level",
]

class _DLPack(Protocol):
    """A NumPy array, a PyTorch CPU tensor, or another array in CPU memory."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

class _TensorState(Protocol):
    """An `infini_attn.torch.State`."""

    buffer: Any
    sequences: int
    rotation: bool

_Tensor = TypeVar("_Tensor", bound=_DLPack)
_Update = Literal["delta", "linear"]
_EmptyMemory = Literal["gate", "bypass"]
_Denominator = Literal["exact"] | tuple[Literal["clamp", "add"], float] | list[Any]
_DType = Literal["f32", "f16", "bf16"]
_Floats = _DLPack | ArrayLike
_Ints = _DLPack | ArrayLike
_Tables = tuple[_DLPack, _DLPack] | list[Any]
_Path = str | bytes | PathLike[str] | PathLike[bytes]

class _Tokens(TypedDict, total=False):
    """What the operators of `infini_attn.torch` say of tokens."""

    seq_slots: _Ints | None
    seq_lens: _Ints | None
    attention_mask: _Floats | None
    cu_seqlens: _Ints | None
    cos: _DLPack | None
    sin: _DLPack | None
    positions: _Ints | None
    interleaved: bool

MAX_DECODE_TOKENS: int
__version__: str

@final
class Problem:
    def __new__(
        cls,
        *,
        heads: int,
        key_dim: int,
        kv_heads: int | None = None,
        value_dim: int | None = None,
        segment_len: int | None = None,
        update: _Update | None = None,
        scale: float | None = None,
        empty_memory: _EmptyMemory | None = None,
        denominator: _Denominator | None = None,
        dtype: _DType | None = None,
    ) -> Problem: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def segment_len(self) -> int: ...
    @property
    def update(self) -> _Update: ...
    @property
    def scale(self) -> float: ...
    @property
    def empty_memory(self) -> _EmptyMemory: ...
    @property
    def denominator(self) -> Literal["exact"] | tuple[Literal["clamp", "add"], float]: ...
    @property
    def dtype(self) -> _DType: ...
    def state_bytes(self, sequences: int | None = None, *, rotation: bool = False) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __copy__(self) -> Problem: ...
    def __deepcopy__(self, _memo: Any) -> Problem: ...
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]: ...

@final
class State:
    def __new__(cls, problem: Problem, sequences: int | None = None) -> State: ...
    @staticmethod
    def from_arrays(
        M: _DLPack,
        z: _DLPack,
        tokens: _Ints,
        committed: _Ints | None = None,
        *,
        heads: int | None = None,
        segment_len: int | None = None,
        update: _Update | None = None,
        scale: float | None = None,
        empty_memory: _EmptyMemory | None = None,
        denominator: _Denominator | None = None,
        dtype: _DType | None = None,
    ) -> State: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def M(self) -> NDArray[np.float32]: ...
    @property
    def z(self) -> NDArray[np.float32]: ...
    @property
    def tokens(self) -> NDArray[np.int64]: ...
    @property
    def committed(self) -> NDArray[np.int64]: ...
    @property
    def open_len(self) -> NDArray[np.int64]: ...
    @property
    def position(self) -> NDArray[np.int64]: ...
    @property
    def sequences(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def flush(self, slots: _Ints | None = None) -> None: ...
    def reset(self, slots: _Ints | None = None) -> None: ...
    def truncate(self, slot: int, tokens: int) -> None: ...
    def fork(self, slots: _Ints | None = None) -> State: ...
    @staticmethod
    def concat(states: Sequence[State]) -> State: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int | slice | _Ints, /) -> State: ...
    def save(self, path: _Path) -> None: ...
    @staticmethod
    def load(path: _Path, problem: Problem | None = None) -> State: ...
    def __copy__(self) -> State: ...
    def __deepcopy__(self, _memo: Any) -> State: ...
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]: ...

@overload
def infini_attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    beta: _Floats,
    *,
    segment_len: int | None = None,
    update: _Update | None = None,
    scale: float | None = None,
    empty_memory: _EmptyMemory | None = None,
    denominator: _Denominator | None = None,
    state: State | None = None,
    slots: _Ints | None = None,
    seq_lens: _Ints | None = None,
    attention_mask: _Floats | None = None,
    cu_seqlens: _Ints | None = None,
    rope: _Tables | None = None,
    positions: _Ints | None = None,
    rope_interleaved: bool = False,
    inplace: bool = False,
    out: _DLPack | None = None,
    return_state: Literal[True] = True,
    return_lse: Literal[False] = False,
    return_parts: Literal[False] = False,
    bptt_segments: int | None = None,
) -> tuple[_Tensor, State]: ...
@overload
def infini_attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    beta: _Floats,
    *,
    segment_len: int | None = None,
    update: _Update | None = None,
    scale: float | None = None,
    empty_memory: _EmptyMemory | None = None,
    denominator: _Denominator | None = None,
    state: State | None = None,
    slots: _Ints | None = None,
    seq_lens: _Ints | None = None,
    attention_mask: _Floats | None = None,
    cu_seqlens: _Ints | None = None,
    rope: _Tables | None = None,
    positions: _Ints | None = None,
    rope_interleaved: bool = False,
    inplace: bool = False,
    out: _DLPack | None = None,
    return_state: Literal[False],
    return_lse: Literal[False] = False,
    return_parts: Literal[False] = False,
    bptt_segments: int | None = None,
) -> _Tensor: ...
@overload
def infini_attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    beta: _Floats,
    *,
    segment_len: int | None = None,
    update: _Update | None = None,
    scale: float | None = None,
    empty_memory: _EmptyMemory | None = None,
    denominator: _Denominator | None = None,
    state: State | _TensorState | None = None,
    slots: _Ints | None = None,
    seq_lens: _Ints | None = None,
    attention_mask: _Floats | None = None,
    cu_seqlens: _Ints | None = None,
    rope: _Tables | None = None,
    positions: _Ints | None = None,
    rope_interleaved: bool = False,
    inplace: bool = False,
    out: _DLPack | None = None,
    return_state: bool = True,
    return_lse: bool = False,
    return_parts: bool = False,
    bptt_segments: int | None = None,
) -> Any: ...

@final
class KeySums:
    def __new__(cls, problem: Problem, *, sums: _Floats, tokens: _Ints) -> KeySums: ...
    @staticmethod
    def zero(problem: Problem, batch: int | None = None) -> KeySums: ...
    @staticmethod
    def from_state(state: State) -> KeySums: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def sums(self) -> NDArray[np.float32]: ...
    @property
    def tokens(self) -> NDArray[np.int64]: ...
    def __add__(self, other: KeySums, /) -> KeySums: ...
    def __radd__(self, other: KeySums, /) -> KeySums: ...
    def __eq__(self, other: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __copy__(self) -> KeySums: ...
    def __deepcopy__(self, _memo: Any) -> KeySums: ...
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]: ...

@final
class SegmentMap:
    def __new__(
        cls, before: KeySums, *, A: _Floats, B: _Floats, dz: _Floats, tokens: _Ints
    ) -> SegmentMap: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def before(self) -> KeySums: ...
    @property
    def A(self) -> NDArray[np.float32]: ...
    @property
    def B(self) -> NDArray[np.float32]: ...
    @property
    def dz(self) -> NDArray[np.float32]: ...
    @property
    def tokens(self) -> NDArray[np.int64]: ...
    def __eq__(self, other: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __copy__(self) -> SegmentMap: ...
    def __deepcopy__(self, _memo: Any) -> SegmentMap: ...
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]: ...

def key_sums(problem: Problem, k: _DLPack) -> KeySums: ...
def segment_map(problem: Problem, k: _DLPack, v: _DLPack, before: KeySums) -> SegmentMap: ...
def compose(first: SegmentMap, second: SegmentMap) -> SegmentMap: ...
def apply(map: SegmentMap, state: State, *, inplace: bool = False) -> State: ...
@overload
def merge_partials(
    a_dot: list[_Tensor], lse: list[_Tensor], *, return_lse: Literal[False] = False
) -> _Tensor: ...
@overload
def merge_partials(
    a_dot: list[_Tensor], lse: list[_Tensor], *, return_lse: Literal[True]
) -> tuple[_Tensor, _Tensor]: ...
def merge_memories(states: list[State]) -> State: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def simd_level() -> str: ...
def _state_from_bytes(bytes: bytes) -> State: ...
def _problem_from_fields(
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    segment_len: int,
    update: _Update,
    scale: float,
    empty_memory: _EmptyMemory,
    denominator: _Denominator,
    dtype: _DType,
) -> Problem: ...
def _problem_text(problem: Problem) -> str: ...
def _problem_from_text(text: str) -> Problem: ...
def _call_problem(
    base: str | None,
    extents: Sequence[int],
    dtype: str,
    segment_len: int | None,
    update: str | None,
    scale: float | None,
    empty_memory: str | None,
    denominator: Any,
) -> str: ...
def _host_layout(
    problem: str, slots: int, rotation: bool
) -> tuple[list[tuple[str, str, list[int], int]], int]: ...
def _advance(
    q: _DLPack,
    k: _DLPack,
    v: _DLPack,
    beta: _Floats,
    state: _DLPack,
    slots: int,
    problem: str,
    rotation: bool,
    *,
    short: bool = False,
    out: _DLPack | None = None,
    parts: bool = False,
    inplace: bool = True,
    **tokens: Unpack[_Tokens],
) -> tuple[Any, ...]: ...
def _backward(
    q: _DLPack,
    k: _DLPack,
    v: _DLPack,
    beta: _Floats,
    state: _DLPack | None,
    d_state: _DLPack | None,
    slots: int,
    problem: str,
    rotation: bool,
    o: _DLPack,
    lse: _DLPack,
    d_o: _DLPack,
    *,
    d_lse: _DLPack | None = None,
    a_dot: _DLPack | None = None,
    d_a_dot: _DLPack | None = None,
    d_a_mem: _DLPack | None = None,
    bptt_segments: int | None = None,
    **tokens: Unpack[_Tokens],
) -> list[Any]: ...
def _advance_float64(
    q: _DLPack,
    k: _DLPack,
    v: _DLPack,
    beta: _Floats,
    rows: _DLPack | None,
    slots: int,
    problem: str,
    **tokens: Unpack[_Tokens],
) -> list[Any]: ...
def _backward_float64(
    q: _DLPack,
    k: _DLPack,
    v: _DLPack,
    beta: _Floats,
    rows: _DLPack | None,
    slots: int,
    problem: str,
    d_o: _DLPack | None,
    d_lse: _DLPack | None,
    d_rows: _DLPack | None,
    d_a_dot: _DLPack | None,
    d_a_mem: _DLPack | None,
    *,
    bptt_segments: int | None = None,
    **tokens: Unpack[_Tokens],
) -> list[Any]: ...
def _row_len(problem: str) -> int: ...
def _flush_slots(
    state: _DLPack, slots: int, problem: str, rotation: bool, seq_slots: _Ints | None
) -> None: ...
def _reset_slots(
    state: _DLPack, slots: int, problem: str, rotation: bool, seq_slots: _Ints | None
) -> None: ...
def _truncate_slot(
    state: _DLPack, slots: int, problem: str, rotation: bool, slot: int, tokens: int
) -> None: ...
def _state_from_buffer(state: _DLPack, slots: int, problem: str, rotation: bool) -> State: ...
def _state_into_buffer(
    source: State, state: _DLPack, slots: int, problem: str, rotation: bool
) -> None: ...
def _key_sums_from_bytes(problem: Problem, sums: bytes, tokens: bytes) -> KeySums: ...
def _segment_map_from_bytes(
    before: KeySums, A: bytes, B: bytes, dz: bytes, tokens: bytes
) -> SegmentMap: ...

@final
class ReferenceState:
    @property
    def M(self) -> NDArray[np.float64]: ...
    @property
    def z(self) -> NDArray[np.float64]: ...
    @property
    def tokens(self) -> NDArray[np.int64]: ...
    @property
    def committed(self) -> NDArray[np.int64]: ...
    @property
    def open_len(self) -> NDArray[np.int64]: ...
    def flush(self) -> None: ...

def reference_infini_attention(
    q: _DLPack,
    k: _DLPack,
    v: _DLPack,
    beta: _Floats,
    *,
    segment_len: int | None = None,
    update: _Update | None = None,
    scale: float | None = None,
    empty_memory: _EmptyMemory | None = None,
    denominator: _Denominator | None = None,
    state: ReferenceState | None = None,
    slots: _Ints | None = None,
    seq_lens: _Ints | None = None,
    attention_mask: _Floats | None = None,
    cu_seqlens: _Ints | None = None,
    rope: _Tables | None = None,
    positions: _Ints | None = None,
    rope_interleaved: bool = False,
    return_state: bool = True,
    return_lse: bool = False,
    return_parts: bool = False,
) -> Any: ...

def _cuda_status() -> str: ...
