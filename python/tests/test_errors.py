"""Every refusal: its type, the argument's name, both values; and that it changed nothing."""

import numpy as np
import pytest
import torch
from oracle import Array, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from infini_attn import KeySums, Problem, SegmentMap, State, infini_attention, reference, segment_map
from infini_attn import apply, compose, key_sums, merge_memories, merge_partials, set_num_threads

Q, K, V, BETA = tensors(2, 20, 4, 2, 8)
COS = torch.ones(20, 4)


def attend(q=Q, k=K, v=V, beta=BETA, **options):
    return infini_attention(q, k, v, beta, **options)


STATE = attend(segment_len=8)[1]
ONES = torch.ones(2, 20)
PACKED = dict(q=Q[0], k=K[0], v=V[0], cu_seqlens=[0, 5, 20])


def mask(row, *first):
    """Ones, but for the first of a row."""
    mask = ONES.double()
    mask[row, : len(first)] = torch.tensor(first, dtype=torch.float64)
    return mask


def freed(dtype, *shape):
    tensor = torch.ones(shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


class OnDevice:
    """An array of another library, in a device's memory."""

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **kwargs):
        raise AssertionError("handed out")


ODD = np.zeros((2, 20, 4, 8), [("a", np.uint8), ("b", np.float32)])["b"]
with FakeTensorMode():
    FAKE = torch.ones(4)
CONJUGATE = torch.complex(Q, Q).conj().imag

OPERATOR = [
    # Kinds and element types.
    (TypeError, "q: list given, a NumPy array or a PyTorch tensor expected", dict(q=[1.0])),
    (TypeError, "v: NoneType given, a NumPy array or", dict(v=None)),
    (TypeError, "k: a NumPy array given, a PyTorch tensor as q is", dict(k=K.numpy())),
    (TypeError, "k: dtype f64 given, f32 as q has", dict(k=K.double())),
    (TypeError, "q: dtype f64 given, f32, f16 or bf16", dict(q=Q.double(), k=K.double(), v=V.double())),
    (TypeError, "q: dtype i32 given, f32, f16 or bf16", dict(q=Q.int(), k=K.int(), v=V.int())),
    (TypeError, r"q: dtype object \(DLPack.*\) given, f32, f16 or bf16", dict(q=Q.numpy().astype(object))),
    (TypeError, r"q: dtype >f4 \(.*byte order.*\) given, f32", dict(q=Q.numpy().astype(">f4"))),
    (TypeError, "q: numpy.ma.* given", dict(q=np.ma.masked_array(Q.numpy()))),
    (ValueError, r"q: strides \(.*5\) in bytes given, multiples of the 4 bytes of an element", dict(q=ODD)),
    (TypeError, "q: a tensor of layout torch.sparse_coo given, tensor.to_dense", dict(q=Q.to_sparse())),
    (TypeError, "q: a tensor of layout torch._mkldnn given, tensor.to_dense", dict(q=Q.to_mkldnn())),
    (TypeError, "q: a zero tensor without memory given, tensor.clone", dict(q=torch._efficientzerotensor(Q.shape))),
    (TypeError, "q: a FakeTensor given, a tensor whose elements are in memory", dict(q=FAKE)),
    (TypeError, "beta: a FakeTensor given", dict(beta=FAKE)),
    (ValueError, r"q: DLPack device \(2, 0\) given, CPU memory", dict(q=OnDevice())),
    (TypeError, "q: a PyTorch tensor given, an array by DLPack as|k: a PyTorch tensor given, an array by", dict(q=Array(Q))),
    # Gradients, devices, lazy negation.
    (TypeError, "bptt_segments: float given, an integer", dict(bptt_segments=1.5)),
    (ValueError, "bptt_segments: 0 given, at least 1", dict(bptt_segments=0)),
    (ValueError, "k: device meta given, cpu", dict(k=K.to("meta"))),
    (ValueError, "beta: device meta given, cpu", dict(beta=BETA.to("meta"))),
    (ValueError, "q: a tensor with the negative bit given", dict(q=CONJUGATE)),
    # Storage that was freed, as sharded training does with parameters: NumPy would make an array of
    # what lies anywhere.
    (TypeError, "q: a tensor whose memory was freed given", dict(q=freed(torch.float32, 2, 20, 4, 8))),
    (TypeError, "beta: a tensor whose memory was freed given", dict(beta=freed(torch.float32, 4))),
    (TypeError, "beta: a tensor whose memory was freed given", dict(beta=freed(torch.bfloat16, 4))),
    (TypeError, "seq_lens: a tensor whose memory was freed given", dict(seq_lens=freed(torch.int64, 2))),
    # Shapes and strides.
    (ValueError, r"q: shape \[20, 4, 8\] given, rank 4", dict(q=Q[0])),
    (ValueError, r"q: shape \[\] given, rank 4", dict(q=torch.tensor(1.0))),
    (ValueError, r"k: shape \[2, 19, 2, 8\] given, .*\[2, 20, 2, 8\]", dict(k=K[:, 1:])),
    (ValueError, r"k: shape \[2, 20, 2, 7\] given, .*\[2, 20, 2, 8\]", dict(k=K[..., 1:])),
    (ValueError, r"v: shape \[2, 20, 1, 8\] given, .*\[2, 20, 2, 8\]", dict(v=V[:, :, :1])),
    (ValueError, "kv_heads: 3 given, a divisor of heads = 4", dict(k=torch.ones(2, 20, 3, 8), v=torch.ones(2, 20, 3, 8))),
    (ValueError, "heads: 0 given, 1 to", dict(q=Q[:, :, :0], beta=BETA[:0])),
    (ValueError, r"k: strides \[.*2\].* the last dimension must be contiguous", dict(k=torch.ones(2, 20, 2, 16)[..., ::2])),
    (ValueError, "q: memory at 0x.* given, an address divisible by 4", dict(
        q=np.frombuffer(bytes(5121), np.uint8)[1:].view(np.float32).reshape(2, 20, 4, 8), k=K.numpy(), v=V.numpy())),
    # The gate.
    (ValueError, r"beta: shape \[3\] given, \[Hq\] = \[4\]", dict(beta=BETA[:3])),
    (ValueError, r"beta: shape \[2, 2\] given, \[Hq\] = \[4\], extents of 1 besides, or one", dict(beta=BETA.view(2, 2))),
    (ValueError, r"beta: shape \[0\] given", dict(beta=[])),
    (ValueError, r"beta\[2\]: NaN given", dict(beta=[0.0, 1.0, float("nan"), 0.0])),
    (TypeError, "beta: dtype bool given, numbers", dict(beta=[True] * 4)),
    (TypeError, "beta: dtype bool given, numbers", dict(beta=BETA > 0)),
    (TypeError, "beta: dtype complex64 given, numbers", dict(beta=BETA.to(torch.complex64))),
    (TypeError, "beta: .* given, numbers", dict(beta="gate")),
    (TypeError, "beta: .* given, numbers", dict(beta=[[1.0], [1.0, 2.0]])),
    (TypeError, "beta: numpy.ma.MaskedArray given, an array without a mask", dict(beta=np.ma.masked_array(BETA.numpy()))),
    # Policies.
    (ValueError, "segment_len: 0 given, 1 to", dict(segment_len=0)),
    (ValueError, "segment_len: -5 given, at least 1", dict(segment_len=-5)),
    (ValueError, f"segment_len: {2**80} given, an integer of 64 bits", dict(segment_len=2**80)),
    (ValueError, "segment_len: a huge number given, an integer of 64 bits", dict(segment_len=10**5000)),
    (TypeError, "segment_len: float given, an integer", dict(segment_len=16.0)),
    (TypeError, "segment_len: bool given, an integer", dict(segment_len=True)),
    (ValueError, r"update: '\\ud800' given, linear or delta", dict(update="\ud800")),
    (ValueError, "update: 'sum' given, linear or delta", dict(update="sum")),
    (ValueError, "update: '' given, linear or delta", dict(update="")),
    (TypeError, "update: int given, a string", dict(update=1)),
    (ValueError, "scale: NaN given, a finite f32", dict(scale=float("nan"))),
    (TypeError, "scale: str given, a number", dict(scale="1")),
    (ValueError, "empty_memory: 'zero' given, gate or bypass", dict(empty_memory="zero")),
    (ValueError, r"denominator: 'clamp' given, .*\(\"clamp\", eps\)", dict(denominator="clamp")),
    (ValueError, r"denominator: \('mul', 1\) given, \"exact\"", dict(denominator=("mul", 1))),
    (TypeError, "denominator: str given, a number as eps", dict(denominator=("clamp", "x"))),
    (TypeError, "denominator: bool given, a number as eps", dict(denominator=["add", True])),
    (TypeError, "scale: bool given, a number", dict(scale=True)),
    (ValueError, "denominator: add:-1e0 given, a positive, finite epsilon", dict(denominator=("add", -1))),
    # Contradictions with the state.
    (ValueError, "segment_len = 8, the call has segment_len = 4", dict(state=STATE, segment_len=4)),
    (ValueError, "update = delta, the call has update = linear", dict(state=STATE, update="linear")),
    (ValueError, "scale = .*, the call has scale = 1e0", dict(state=STATE, scale=1.0)),
    (ValueError, "empty_memory = gate, the call has empty_memory = bypass", dict(state=STATE, empty_memory="bypass")),
    (ValueError, "denominator = exact, the call has denominator = add:1e0", dict(state=STATE, denominator=("add", 1.0))),
    (ValueError, "heads = 4, the call has heads = 2", dict(state=STATE, q=Q[:, :, :2], beta=BETA[:2])),
    (TypeError, "dtype = f32, the call has dtype = f16", dict(state=STATE, q=Q.half(), k=K.half(), v=V.half())),
    (ValueError, "state: 2 elements given, 1", dict(state=STATE, q=Q[:1], k=K[:1], v=V[:1])),
    (TypeError, "state: int given, an infini_attn.State", dict(state=1)),
    # Lengths, rotation.
    (ValueError, "seq_lens: 3 elements given, 2", dict(seq_lens=[1, 2, 3])),
    (ValueError, r"seq_lens\[1\]: 21 given, 0 to T = 20", dict(seq_lens=[1, 21])),
    (ValueError, r"seq_lens\[0\]: -1 given, 0 to T = 20", dict(seq_lens=[-1, 2])),
    (ValueError, r"seq_lens\[0\]: 8589934592 given", dict(seq_lens=[2**33, 2])),
    (ValueError, r"seq_lens: shape \[2, 1\] given, \[B\]", dict(seq_lens=[[1], [2]])),
    (TypeError, "seq_lens: dtype float64 given, integers", dict(seq_lens=[1.0, 2.0])),
    (TypeError, "seq_lens: .* given, integers", dict(seq_lens="ab")),
    (ValueError, f"seq_lens.0.: {2**64 - 1} given, 0 to T", dict(seq_lens=[2**64 - 1, 2])),
    (TypeError, "seq_lens: numpy.ma.MaskedArray given", dict(seq_lens=np.ma.masked_array([1, 2]))),
    (ValueError, "attention_mask: beside seq_lens given, one of the two", dict(seq_lens=[1, 2], attention_mask=ONES)),
    (ValueError, "cu_seqlens: beside seq_lens given, one of the two", dict(seq_lens=[1, 2], cu_seqlens=[0, 1])),
    (ValueError, "cu_seqlens: beside attention_mask given, one of", dict(attention_mask=ONES, cu_seqlens=[0, 1])),
    (ValueError, r"attention_mask: shape \[2, 19\] given, \[B, T\] = \[2, 20\] expected", dict(attention_mask=ONES[:, 1:])),
    (ValueError, r"attention_mask: shape \[20\] given, \[B, T\] = \[2, 20\] expected", dict(attention_mask=ONES[0])),
    (ValueError, r"attention_mask: shape \[2, 1, 20, 20\] given, \[B, T\]", dict(attention_mask=torch.ones(2, 1, 20, 20))),
    (ValueError, r"attention_mask: shape \[2, 24\] given, \[B, T\] = \[2, 20\], the call's tokens: attention_mask\[:, -20:\]",
     dict(attention_mask=torch.ones(2, 24))),
    (ValueError, r"attention_mask\[1\]: 0 at 5 between ones at 3 and 19 given, ones side by side", dict(attention_mask=mask(1, 0, 0, 0, *[1] * 2, 0))),
    (ValueError, r"attention_mask\[1, 1\]: 0.5 given, 0 or 1", dict(attention_mask=mask(1, 0, 0.5))),
    (ValueError, r"attention_mask\[0, 0\]: 2 given, 0 or 1", dict(attention_mask=mask(0, 2).long())),
    (ValueError, r"attention_mask\[1, 0\]: -1 given, 0 or 1", dict(attention_mask=mask(1, -1).char())),
    (ValueError, r"attention_mask\[0, 1\]: -inf given, 0 or 1", dict(attention_mask=mask(0, 1, -torch.inf).bfloat16())),
    (ValueError, r"attention_mask\[1, 1\]: NaN given, 0 or 1", dict(attention_mask=mask(1, 1, torch.nan).numpy())),
    (ValueError, r"attention_mask\[0, 1\]: 1.0000000000000002 given, 0 or 1", dict(attention_mask=mask(0, 1, 1 + 2**-52))),
    (TypeError, "attention_mask: dtype complex64 given, zeros and ones", dict(attention_mask=ONES.to(torch.complex64))),
    (TypeError, "attention_mask: .* given, zeros and ones", dict(attention_mask="11")),
    (TypeError, "attention_mask: numpy.ma.MaskedArray given", dict(attention_mask=np.ma.masked_array(ONES.numpy()))),
    (ValueError, r"q: shape \[2, 20, 4, 8\] given, rank 3 \[total, Hq, Dk\], as cu_seqlens is given", dict(cu_seqlens=[0, 20])),
    (ValueError, r"k: shape \[2, 20, 2, 8\] given, rank 3 \[total, Hkv, D\]", PACKED | dict(k=K)),
    (ValueError, r"v: shape \[19, 2, 8\] given, .*\[20, 2, 8\]", PACKED | dict(v=V[0, 1:])),
    (ValueError, r"cu_seqlens\[0\]: nothing given, 0", PACKED | dict(cu_seqlens=[])),
    (ValueError, r"cu_seqlens\[0\]: 1 given, 0", PACKED | dict(cu_seqlens=[1, 20])),
    (ValueError, r"cu_seqlens\[2\]: 4 given, at least cu_seqlens\[1\] = 5", PACKED | dict(cu_seqlens=[0, 5, 4, 20])),
    (ValueError, r"cu_seqlens\[1\]: -5 given, at least cu_seqlens\[0\] = 0", PACKED | dict(cu_seqlens=[0, -5, 20])),
    (ValueError, r"cu_seqlens\[2\]: 19 given, total = 20", PACKED | dict(cu_seqlens=np.array([0, 5, 19]))),
    (ValueError, r"cu_seqlens\[1\]: 4294967296 given, 0 to total", PACKED | dict(cu_seqlens=[0, 2**32])),
    (ValueError, r"cu_seqlens\[2\]: -2147483648 given, at least", PACKED | dict(cu_seqlens=[0, 2**31 - 1, -(2**31)])),
    (ValueError, r"cu_seqlens: shape \[1, 2\] given, \[B \+ 1\]", PACKED | dict(cu_seqlens=[[0, 20]])),
    (TypeError, "cu_seqlens: dtype f32 given, integers", PACKED | dict(cu_seqlens=torch.tensor([0.0, 20.0]))),
    (ValueError, r"positions: shape \[1, 20\] given, \[total\] = \[20\]", PACKED | dict(rope=(COS, COS), positions=[[0] * 20])),
    (ValueError, r"positions \(sequence 1, token 4\): 20 given, 0 to 20", PACKED | dict(rope=(COS, COS), positions=[0] * 9 + [20] + [0] * 10)),
    (ValueError, "state: 2 elements given, 3 .*or explicit slots", PACKED | dict(cu_seqlens=[0, 5, 9, 20], state=STATE)),
    (ValueError, "slots: 1 elements given, 2 .the number of sequences", dict(slots=[0], state=STATE)),
    (ValueError, r"slots\[1\]: 2 given, less than the state.s 2 slots", dict(slots=[0, 2], state=STATE)),
    (ValueError, r"slots\[1\]: -1 given, at least 0", dict(slots=[0, -1], state=STATE)),
    (ValueError, r"slots\[1\]: 1 given.*", dict(slots=[1, 1], state=STATE)),
    (ValueError, r"slots\[0\]: 7 given, less than the state.s 2 slots", dict(slots=[7, 1])),
    (ValueError, r"slots: shape \[\] given, \[B\]", dict(slots=1, state=STATE)),
    (TypeError, "slots: dtype bool given, integers", dict(slots=torch.tensor([True, False]), state=STATE)),
    (TypeError, r"rope: int given, a tuple \(cos, sin\)", dict(rope=3)),
    (ValueError, r"rope: 3 tables given, a tuple \(cos, sin\)", dict(rope=[COS, COS, COS])),
    (TypeError, "rope.cos: dtype f64 given, f32", dict(rope=(COS.double(), COS))),
    (TypeError, "rope.sin: NoneType given, a NumPy array", dict(rope=(COS, None))),
    (ValueError, r"rope.sin: shape \[20, 3\] given, .*\[20, 4\]", dict(rope=(COS, COS[:, 1:]))),
    (ValueError, r"rope.cos: shape \[20\] given, \[positions, R/2\]", dict(rope=(COS[:, 0], COS[:, 0]))),
    (ValueError, r"rope.cos: shape \[20, 5\] given, .*Dk = 8", dict(rope=(torch.ones(20, 5),) * 2)),
    (ValueError, r"positions \(sequence 0, token 19\): 19 given, 0 to 19 ", dict(rope=(COS[:19], COS[:19]))),
    (ValueError, r"positions \(sequence 0, token 0\): 20 given, 0 to 20 ", dict(rope=(COS, COS), positions=[20] * 20)),
    (ValueError, r"positions \(sequence 0, token 3\): -1 given", dict(rope=(COS, COS), positions=[0, 0, 0, -1] + [0] * 16)),
    (ValueError, r"positions: shape \[19\] given, \[T\] = \[20\] or \[B, T\] = \[2, 20\]", dict(rope=(COS, COS), positions=range(19))),
    (ValueError, r"positions: shape \[20, 2\] given", dict(rope=(COS, COS), positions=np.zeros((20, 2), int))),
    (TypeError, "positions: dtype f64 given, integers", dict(rope=(COS, COS), positions=np.zeros(20))),
    (ValueError, f"positions.0.: {2**64 - 1} given", dict(rope=(COS, COS), positions=np.full(20, 2**64 - 1, np.uint64))),
    (TypeError, "positions: numpy.ma.MaskedArray given", dict(rope=(COS, COS), positions=np.ma.masked_array(range(20)))),
    (ValueError, "positions: without rope given", dict(positions=range(20))),
]


@pytest.mark.parametrize("exception, message, options", OPERATOR, ids=lambda x: x if isinstance(x, str) else "")
def test_the_operator_refuses(exception, message, options):
    before = STATE.M, STATE.tokens
    with pytest.raises(exception, match=message):
        attend(**options)
    if "state" in options:
        with pytest.raises(exception, match=message):
            attend(**options, inplace=True)
    assert np.array_equal(STATE.M, before[0]) and np.array_equal(STATE.tokens, before[1])


@pytest.mark.parametrize("flag", ["rope_interleaved", "inplace", "return_state", "return_lse", "return_parts"])
@pytest.mark.parametrize("operator", [infini_attention, reference.infini_attention])
def test_flags_are_bools(operator, flag):
    for given, kind in [("yes", "str"), (2, "int"), (None, "NoneType")]:
        if operator is infini_attention or flag != "inplace":
            with pytest.raises(TypeError, match=f"^{flag}: {kind} given, True or False expected"):
                operator(Q, K, V, BETA, **{flag: given})
    assert len(attend(return_lse=np.True_)) == 3


def test_the_reference_refuses_alike():
    with pytest.raises(TypeError, match="q: list given"):
        reference.infini_attention([1.0], K, V, BETA)
    with pytest.raises(ValueError, match="a tensor that requires grad"):
        reference.infini_attention(Q, K, V, torch.nn.Parameter(BETA))
    with pytest.raises(TypeError, match="q: dtype i64 given, f64, f32"):
        reference.infini_attention(Q.long(), K.long(), V.long(), BETA)
    with pytest.raises(TypeError, match="state: infini_attn.State given"):
        reference.infini_attention(Q, K, V, BETA, state=STATE)


DELTA = Problem(heads=2, key_dim=8, segment_len=4)
LINEAR = Problem(heads=2, key_dim=8, segment_len=4, update="linear")
K2 = torch.ones(1, 8, 2, 8)
SUMS = KeySums.zero(DELTA)
MAP = segment_map(DELTA, K2, K2, SUMS)
LSE = torch.zeros(2, 4, 20)
M, Z = np.zeros((1, 2, 8, 8), np.float32), np.zeros((1, 2, 8), np.float32)


def states(update):
    q = torch.ones(1, 8, 2, 8)
    return [infini_attention(q, q, q, [0.0, 0.0], segment_len=4, update=update)[1] for _ in "ab"]


OTHERS = [
    (ValueError, "heads: 0 given", lambda: Problem(heads=0, key_dim=8)),
    (ValueError, "key_dim: -8 given", lambda: Problem(heads=1, key_dim=-8)),
    (ValueError, "dtype: 'f64' given, f32, f16 or bf16", lambda: Problem(heads=1, key_dim=8, dtype="f64")),
    (TypeError, "kv_heads: str given", lambda: Problem(heads=1, key_dim=8, kv_heads="1")),
    (ValueError, "sequences: -1 given", lambda: State(DELTA, -1)),
    (ValueError, r"slots\[0\]: 2 given, .*2 slots", lambda: STATE.fork([2])),
    (ValueError, r"slots\[1\]: -1 given, 0 to", lambda: STATE.fork([0, -1])),
    (ValueError, r"slots\[1\]: 0 given, a slot other than", lambda: STATE.fork().flush([0, 0])),
    (ValueError, r"slots: shape \[1, 1\] given", lambda: STATE.fork([[0]])),
    (ValueError, f"slots.0.: {2**64 - 1} given", lambda: STATE.fork([2**64 - 1])),
    (TypeError, "slots: dtype bool given", lambda: STATE.fork(True)),
    (TypeError, "slots: dtype float64 given", lambda: STATE.fork().reset([0.5])),
    (TypeError, "M: dtype f64 given, f32", lambda: State.from_arrays(M.astype(float), Z, [0])),
    (ValueError, r"M: shape \[1, 2, 8\] given, rank 4", lambda: State.from_arrays(Z, Z, [0])),
    (ValueError, r"z: shape \[1, 2, 7\] given, \[1, 2, 8\]", lambda: State.from_arrays(M, Z[..., 1:], [0])),
    (ValueError, r"tokens: shape \[2\] given, \[B\] = \[1\]", lambda: State.from_arrays(M, Z, [0, 0])),
    (ValueError, r"tokens\[0\]: -3 given, at least 0", lambda: State.from_arrays(M, Z, [-3])),
    (ValueError, f"tokens.0.: {2**63} given, at most", lambda: State.from_arrays(M, Z, [2**63])),
    (TypeError, "rotation: int given, True or False", lambda: DELTA.state_bytes(rotation=1)),
    (TypeError, "return_lse: int given, True or False", lambda: merge_partials([Q], [LSE], return_lse=1)),
    (TypeError, "inplace: int given, True or False", lambda: apply(MAP, STATE, inplace=1)),
    (TypeError, "heads: bool given", lambda: Problem(heads=True, key_dim=8)),
    (ValueError, r"sums: shape \[1, 2, 7\] given, \[1, 2, 8\]", lambda: KeySums(DELTA, sums=Z[..., 1:], tokens=[3])),
    (ValueError, r"tokens\[0\]: 0 given, at least 1: the sums", lambda: KeySums(DELTA, sums=Z + 1, tokens=[0])),
    (ValueError, f"tokens.0.: {2**62 + 1} tokens after 0 given", lambda: KeySums(DELTA, sums=Z, tokens=[2**62 + 1])),
    (ValueError, r"tokens\[0\]: -1 given", lambda: KeySums(DELTA, sums=Z, tokens=[-1])),
    (ValueError, r"A: shape \[1, 2, 8, 7\] given", lambda: SegmentMap(SUMS, A=M[..., 1:], B=M, dz=Z, tokens=[3])),
    (ValueError, r"B: shape \[2, 8, 8\] given", lambda: SegmentMap(SUMS, A=M, B=M[0], dz=Z, tokens=[3])),
    (ValueError, "run: 2 elements given, 1|run: 2", lambda: SegmentMap(SUMS, A=np.zeros((2, 2, 8, 8)), B=np.zeros((2, 2, 8, 8)), dz=np.zeros((2, 2, 8)), tokens=[3, 3])),
    (ValueError, r"committed\[0\]: 9 given", lambda: State.from_arrays(M, Z, [8], [9])),
    (ValueError, "a divisor of heads = 3", lambda: State.from_arrays(M, Z, [0], heads=3)),
    (MemoryError, "slots: no memory for a copy", lambda: STATE.fork(range(2**45))),
    # A length that is only claimed.
    (TypeError, r"a_dot\[0\]: int given, a NumPy array", lambda: merge_partials(range(2**60), [LSE])),
    (TypeError, r"lse\[0\]: int given, a NumPy array", lambda: merge_partials([Q], range(2**60))),
    (TypeError, r"states\[0\]: int given, an infini_attn.State", lambda: merge_memories(range(2**60))),
    (TypeError, "states: list_iterator given, a list", lambda: merge_memories(iter([STATE]))),
    (TypeError, r"states\[1\]: NoneType given", lambda: merge_memories([STATE, None])),
    (ValueError, "a_dot: an empty list given", lambda: merge_partials([], [])),
    (ValueError, "lse: 1 elements given, 2", lambda: merge_partials([Q, Q], [LSE])),
    (ValueError, "lse.*shape", lambda: merge_partials([Q], [LSE[:, 1:]])),
    (TypeError, r"a_dot\[1\]: dtype f16 given, f32", lambda: merge_partials([Q, Q.half()], [LSE, LSE])),
    (TypeError, r"lse\[0\]: dtype f64 given, f32", lambda: merge_partials([Q], [LSE.double()])),
    (TypeError, r"lse\[1\]: a NumPy array given, a PyTorch tensor", lambda: merge_partials([Q, Q], [LSE, LSE.numpy()])),
    (ValueError, "only linear memories add", lambda: merge_memories(states("delta"))),
    (ValueError, "states", lambda: merge_memories([])),
    (ValueError, "update", lambda: merge_memories([states("linear")[0], states("delta")[0]])),
    (TypeError, "k: dtype f16 given, f32", lambda: key_sums(DELTA, K2.half())),
    (TypeError, "k: dtype f64 given", lambda: key_sums(DELTA, K2.double())),
    (ValueError, r"k: shape \[1, 8, 1, 8\] given", lambda: key_sums(DELTA, K2[:, :, :1])),
    (ValueError, "k: a tensor that requires grad", lambda: key_sums(DELTA, K2.clone().requires_grad_())),
    (TypeError, "v: dtype f16 given, f32", lambda: segment_map(DELTA, K2, K2.half(), SUMS)),
    (ValueError, "v: shape", lambda: segment_map(DELTA, K2, K2[:, 1:], SUMS)),
    (ValueError, "update = delta, the call has update = linear", lambda: segment_map(LINEAR, K2, K2, SUMS)),
    (ValueError, "batch: 0|before: 2 elements given", lambda: segment_map(DELTA, K2, K2, KeySums.zero(DELTA, 2))),
    (ValueError, "made for 0 earlier tokens given, one made for 8", lambda: compose(MAP, MAP)),
    (ValueError, "made for 0 earlier tokens given, one made for 8", lambda: apply(MAP, apply(MAP, State(DELTA)))),
    (ValueError, "other: 2 elements given, 1", lambda: SUMS + KeySums.zero(DELTA, 2)),
    (ValueError, "n: 0 given, 1 to", lambda: set_num_threads(0)),
    (TypeError, "n: float given, an integer", lambda: set_num_threads(1.5)),
]


@pytest.mark.parametrize("exception, message, call", OTHERS, ids=lambda x: x if isinstance(x, str) else "")
def test_the_rest_refuses(exception, message, call):
    with pytest.raises(exception, match=message):
        call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_by_name():
    with pytest.raises(TypeError, match="q: a nested tensor given, a padded tensor"):
        attend(q=torch.nested.nested_tensor([Q[0], Q[1]]))


class Interrupted:
    """Ctrl-C while a call asks an argument for its value."""

    def __index__(self, *args, **kwargs):
        raise KeyboardInterrupt

    __array__ = __float__ = __fspath__ = __index__


@pytest.mark.parametrize("call", [
    lambda x: attend(segment_len=x), lambda x: attend(scale=x), lambda x: attend(denominator=("add", x)),
    lambda x: attend(beta=x), lambda x: attend(seq_lens=x), lambda x: STATE.fork(x), lambda x: STATE.save(x),
    lambda x: set_num_threads(x),
])
def test_an_interrupt_stays_one(call):
    with pytest.raises(KeyboardInterrupt):
        call(Interrupted())


def test_an_interrupt_stays_one_while_a_list_is_asked_for():
    class States(list):
        def __len__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_memories(States())
