from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal, Protocol, TypeVar, final, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

class _DLPack(Protocol):
    """A NumPy array or a PyTorch CPU tensor."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

_Tensor = TypeVar("_Tensor", bound=_DLPack)
_Update = Literal["delta", "linear"]
_EmptyMemory = Literal["gate", "bypass"]
_Denominator = Literal["exact"] | tuple[Literal["clamp", "add"], float]
_DType = Literal["f32", "f16", "bf16"]
_Floats = _DLPack | ArrayLike
_Ints = _DLPack | ArrayLike
_Path = str | bytes | PathLike[str] | PathLike[bytes]

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
    def denominator(self) -> _Denominator: ...
    @property
    def dtype(self) -> _DType: ...
    def state_bytes(self, sequences: int | None = None, *, rotation: bool = False) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...

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
    seq_lens: _Ints | None = None,
    rope: tuple[_DLPack, _DLPack] | None = None,
    positions: _Ints | None = None,
    rope_interleaved: bool = False,
    inplace: bool = False,
    return_state: Literal[True] = True,
    return_lse: Literal[False] = False,
    return_parts: Literal[False] = False,
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
    seq_lens: _Ints | None = None,
    rope: tuple[_DLPack, _DLPack] | None = None,
    positions: _Ints | None = None,
    rope_interleaved: bool = False,
    inplace: bool = False,
    return_state: Literal[False],
    return_lse: Literal[False] = False,
    return_parts: Literal[False] = False,
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
    state: State | None = None,
    seq_lens: _Ints | None = None,
    rope: tuple[_DLPack, _DLPack] | None = None,
    positions: _Ints | None = None,
    rope_interleaved: bool = False,
    inplace: bool = False,
    return_state: bool = True,
    return_lse: bool = False,
    return_parts: bool = False,
) -> Any: ...

@final
class KeySums:
    @staticmethod
    def zero(problem: Problem, batch: int | None = None) -> KeySums: ...
    @staticmethod
    def from_state(state: State) -> KeySums: ...
    @property
    def sums(self) -> NDArray[np.float32]: ...
    @property
    def tokens(self) -> NDArray[np.int64]: ...
    def __add__(self, other: KeySums, /) -> KeySums: ...

@final
class SegmentMap:
    @property
    def A(self) -> NDArray[np.float32]: ...
    @property
    def B(self) -> NDArray[np.float32]: ...
    @property
    def dz(self) -> NDArray[np.float32]: ...
    @property
    def tokens(self) -> NDArray[np.int64]: ...

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
    seq_lens: _Ints | None = None,
    rope: tuple[_DLPack, _DLPack] | None = None,
    positions: _Ints | None = None,
    rope_interleaved: bool = False,
    return_state: bool = True,
    return_lse: bool = False,
    return_parts: bool = False,
) -> Any: ...
