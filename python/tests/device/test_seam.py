"""What the extension does with pointers of a device: planned, checked and enqueued on the stream that it
is given, in memory that it is given."""

import ctypes
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import infini_attn
from infini_attn import Problem, _core

from .simulated import Memory, Place, Tensor

BF16 = ml_dtypes.bfloat16
HQ, HKV, D, N = 2, 1, 32, 16
BETA = np.array([0.4, -0.7], np.float32)


def problem(dtype="bf16"):
    return Problem(heads=HQ, kv_heads=HKV, key_dim=D, segment_len=N, dtype=dtype)


TEXT = _core._problem_text(problem())


def arrays(b, t, seed=1, dtype=BF16):
    new = np.random.default_rng(seed).standard_normal
    return [new((b, t, h, D)).astype(dtype) for h in (HQ, HKV, HKV)]


def expected(q, k, v):
    """In float64: out, lse."""
    wide = [np.asarray(x, np.float32) for x in (q, k, v)]
    results = infini_attn.reference.infini_attention(*wide, BETA, segment_len=N, return_lse=True)
    return results[0], results[2]


def rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))


class Streams:
    """A state on the device, and calls on it."""

    def __init__(self, driver, slots=2, stream=0, rotation=False):
        self.driver, self.place = driver, Place(driver, stream)
        self.host = _core._DeviceState(TEXT, slots, rotation)
        self.parts, size = _core._device_layout(TEXT, slots, rotation)
        self.memory = Memory(driver, size)
        # Empty streams: zeros, and scales of 1.
        driver.upload(self.memory.address, np.zeros(size, np.uint8))
        scale = next(part for part in self.parts if part[0] == "snapshot_scale")
        driver.upload(self.memory.address + scale[3], np.ones(scale[2], np.float32))

    def tensors(self, q, k, v, lead=None):
        upload = lambda x: Tensor.of(self.driver, x)
        out = np.full((*q.shape[:-1], D), 9, q.dtype)
        lse = np.full((*q.shape[:-3], HQ, q.shape[-3]), 9, np.float32)
        every = dict(q=upload(q), k=upload(k), v=upload(v), beta=upload(BETA), out=upload(out))
        return SimpleNamespace(**every, lse=upload(lse), a_dot=None, a_mem=None, cos=None, sin=None)

    def plan(self, kind, tensors, **batch):
        return _core._DevicePlan.plan(self.place, self.host, kind, tensors, **batch)

    def run(self, plan, tensors, **more):
        plan.run(self.place, self.host, self.memory.address, tensors, **more)
        return tensors.out.numpy(), tensors.lse.numpy()

    def call(self, kind, q, k, v, **batch):
        tensors = self.tensors(q, k, v)
        return self.run(self.plan(kind, tensors, **batch), tensors)

    def bytes(self):
        return self.driver.download(self.memory.address, self.memory.size).tobytes()


def calls(driver):
    """How often each of the driver's functions was called since `forget`."""
    text = ctypes.create_string_buffer(1 << 16)
    driver.library.ptxsim_calls(text, ctypes.c_size_t(len(text)))
    return {name: int(n) for name, n in (line.split() for line in text.value.decode().splitlines())}


def refuse(driver, function=None, nth=0):
    """Forgets the calls so far; the nth call of a function from here on is refused."""
    name = function and function.encode()
    driver.library.ptxsim_refuse(name, ctypes.c_uint64(nth))


def test_a_prompt_and_tokens_after_it(driver):
    q, k, v = arrays(2, 45)
    out, lse = expected(q, k, v)
    streams = Streams(driver)
    first = streams.call("forward", *(x[:, :40] for x in (q, k, v)))
    second = streams.call("decode", *(x[:, 40:44] for x in (q, k, v)))
    third = streams.call("replay", *(x[:, 44:] for x in (q, k, v)))
    got = np.concatenate([first[0], second[0], third[0]], axis=1)
    assert rms(got, out) < 4e-3
    assert rms(np.concatenate([first[1], second[1], third[1]], axis=2), lse) < 4e-3
    assert streams.host.tokens == [45, 45] and streams.host.committed == [32, 32]
    assert streams.host.open_len == [13, 13]


def test_nothing_is_copied_allocated_or_waited_for(driver):
    """On a stream that is not the default one; tensors stored [B, H, T, D] come in by strides."""
    stream = driver.stream()
    q, k, v = arrays(2, 40)
    streams = Streams(driver, stream=stream)
    tensors = streams.tensors(q, k, v)
    stored = Tensor.of(driver, np.ascontiguousarray(q.transpose(0, 2, 1, 3)))
    tensors.q = stored.transpose(1, 2)
    streams.run(streams.plan("forward", tensors), tensors)  # loads the kernels
    streams.host.reset(streams.place, streams.memory.address)
    plan = streams.plan("forward", tensors)
    streams.place.given.clear()
    refuse(driver)
    plan.run(streams.place, streams.host, streams.memory.address, tensors)
    seen = calls(driver)
    assert len(streams.place.given) == 1
    allowed = {"cuLaunchKernel", "cuLaunchKernelEx", "cuMemsetD8Async", "cuTensorMapEncodeTiled"}
    context = {"cuInit", "cuCtxGetCurrent", "cuCtxSetCurrent"}
    allocator = {"cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuMemAlloc_v2", "cuMemFree_v2"}
    assert set(seen) <= allowed | context | allocator, seen
    # The one allocation is the test's own allocator.
    assert seen["cuMemAlloc_v2"] == 1
    assert rms(tensors.out.numpy(), expected(q, k, v)[0]) < 4e-3


def test_the_context_that_was_current_is_current_again(driver):
    streams, (q, k, v) = Streams(driver), arrays(2, 3)
    assert driver.context() == driver.primary
    other = ctypes.c_void_p()
    driver("cuCtxCreate_v2", ctypes.byref(other), 0, 0)
    try:
        assert driver.context() == other.value != driver.primary
        tensors = streams.tensors(q, k, v)
        plan = streams.plan("decode", tensors)
        assert driver.context() == other.value
        streams.run(plan, tensors)
        assert driver.context() == other.value
        streams.host.to_host(streams.place, streams.memory.address)
        assert driver.context() == other.value
        with pytest.raises(ValueError, match="slots"):
            streams.host.reset(streams.place, streams.memory.address, [7])
        assert driver.context() == other.value
    finally:
        driver("cuCtxDestroy_v2", other)
        driver("cuCtxSetCurrent", ctypes.c_void_p(driver.primary))


def test_a_table_in_device_memory_names_slots_and_lengths(driver):
    q, k, v = arrays(2, 2)
    streams, plain = Streams(driver, slots=3), Streams(driver, slots=3)
    table = np.array([[0, 0, 2, 0, 1, 0], [0, 0, -1, 1, 2, 0]], np.int32)
    table = Tensor.of(driver, table)
    blank = _core._DeviceState(TEXT, 3, False)
    tensors = streams.tensors(q, k, v)
    plan = _core._DevicePlan.plan(streams.place, blank, "table", tensors, slots=[0, 1])
    with pytest.raises(ValueError, match="plan: a plan with a table"):
        plan.run(streams.place, streams.host, streams.memory.address, tensors, table=table)
    with pytest.raises(ValueError, match="state: none given"):
        once = streams.plan("decode", tensors, slots=[0, 1])
        once.run(streams.place, None, streams.memory.address, tensors)
    plan.run(streams.place, None, streams.memory.address, tensors, table=table)
    out = tensors.out.numpy()
    want, _ = plain.call("decode", q[:1, :1], k[:1, :1], v[:1, :1], slots=[2])
    assert (out[0, :1] == want[0]).all() and not out[0, 1].any() and not out[1].any()
    counters = next(part for part in streams.parts if part[0] == "counters")
    at = streams.memory.address + counters[3]
    read = _core._DeviceState(TEXT, 3, False, driver.download(at, 32 * 3).tobytes())
    assert read.tokens == [0, 0, 1]


def test_a_plan_serves_layers_that_stand_alike(driver):
    layers = [Streams(driver), Streams(driver)]
    prompts = [arrays(2, 20, seed) for seed in (3, 4)]
    plan = None
    for layer, (q, k, v) in zip(layers, prompts):
        tensors = layer.tensors(q, k, v)
        plan = plan or layer.plan("forward", tensors)
        got, _ = layer.run(plan, tensors)
        assert rms(got, expected(q, k, v)[0]) < 4e-3
    moved = layers[0].tensors(*prompts[0])
    with pytest.raises(ValueError, match="state .slot 0.: 20 tokens seen"):
        layers[0].run(plan, moved)
    with pytest.raises(ValueError, match=r"q: bf16 \[2, 19, 2, 32\], .* given, .* as planned"):
        layers[0].run(plan, layers[0].tensors(*arrays(2, 19)))
    moved.lse = None
    with pytest.raises(ValueError, match="lse: none given"):
        layers[0].run(plan, moved)


@pytest.mark.parametrize("side", ["left", "packed"])
def test_batches(driver, side):
    q, k, v = arrays(2, 24)
    out, _ = expected(q, k, v)
    short, _ = expected(*(x[1:, 8:] for x in (q, k, v)))
    streams = Streams(driver)
    if side == "left":
        mask = np.ones((2, 24), np.int64)
        mask[1, :8] = 0
        got, lse = streams.call("forward", q, k, v, attention_mask=mask)
        assert rms(got[0], out[0]) < 4e-3 and rms(got[1, 8:], short[0]) < 4e-3
        assert not got[1, :8].any() and np.isneginf(lse[1, :, :8]).all()
    else:
        packed = [np.concatenate([x[0], x[1, 8:]]) for x in (q, k, v)]
        got, _ = streams.call("forward", *packed, cu_seqlens=[0, 24, 40], slots=[1, 0])
        assert rms(got[:24], out[0]) < 4e-3 and rms(got[24:], short[0]) < 4e-3
        assert streams.host.tokens == [16, 24]


def test_host_and_device(driver):
    q, k, v = arrays(2, 40)
    streams, back = Streams(driver), Streams(driver)
    streams.call("forward", q, k, v)
    host = streams.host.to_host(streams.place, streams.memory.address)
    assert host.tokens.tolist() == [40, 40] and host.problem == problem()
    back.host.overwrite(back.place, back.memory.address, host)
    assert back.host.open_len == [8, 8]
    more = arrays(2, 3, 9)
    assert (streams.call("decode", *more)[0] == back.call("decode", *more)[0]).all()
    other = infini_attn.State(Problem(heads=HQ, kv_heads=HKV, key_dim=D, segment_len=N), 2)
    with pytest.raises((TypeError, ValueError), match="dtype"):
        back.host.overwrite(back.place, back.memory.address, other)


def test_slots(driver):
    q, k, v = arrays(2, 20)
    streams, other = Streams(driver, slots=2), Streams(driver, slots=3)
    streams.call("forward", q, k, v)
    address = streams.memory.address
    other.host.copy_slots(other.place, other.memory.address, streams.host, address, [(1, 0), (1, 2)])
    assert other.host.tokens == [20, 0, 20]
    other.host.copy_slots(other.place, other.memory.address, other.host, 0, [(2, 1)])
    other.host.truncate(other.place, other.memory.address, 1, 18)
    assert other.host.tokens == [20, 18, 20]
    with pytest.raises(ValueError, match="committed"):
        other.host.truncate(other.place, other.memory.address, 1, 3)
    other.host.flush(other.place, other.memory.address, [0])
    assert other.host.open_len == [0, 2, 4]
    other.host.reset(other.place, other.memory.address, [2])
    assert other.host.tokens == [20, 18, 0]
    host = other.host.to_host(other.place, other.memory.address)
    assert host.tokens.tolist() == [20, 18, 0] and host.committed.tolist() == [20, 16, 0]


def test_what_cannot_be_is_refused_before_anything_is_enqueued(driver):
    q, k, v = arrays(2, 4)
    streams = Streams(driver)
    before = streams.bytes()
    rows = Tensor.of(driver, np.zeros((2, 4, HQ, D + 1), BF16))
    bad = streams.tensors(q, k, v)
    bad.q = Tensor(rows.memory, rows.dtype, q.shape, rows.strides)
    with pytest.raises(ValueError, match="q: strides .* multiples of 8"):
        streams.plan("forward", bad)
    f32 = streams.tensors(*(x.astype(np.float32) for x in (q, k, v)))
    with pytest.raises(TypeError, match="q: dtype f32 given, bf16"):
        streams.plan("forward", f32)
    with pytest.raises(TypeError, match="q: dtype torch.int64 given, f16 or bf16"):
        wrong = streams.tensors(q, k, v)
        wrong.q = Tensor.of(driver, np.zeros(q.shape, np.int64))
        streams.plan("forward", wrong)
    with pytest.raises(ValueError, match="17 given, 0 to 16 new tokens"):
        streams.call("decode", *arrays(2, 17))
    with pytest.raises(ValueError, match="kind"):
        streams.call("backward", q, k, v)
    with pytest.raises(ValueError, match="slots"):
        streams.call("forward", q, k, v, slots=[0, 2])
    for address in (streams.memory.address + 8, 0):
        plan = streams.plan("decode", tensors := streams.tensors(q, k, v))
        with pytest.raises(ValueError, match="state"):
            plan.run(streams.place, streams.host, address, tensors)
    wide = Problem(heads=1, key_dim=80, dtype="bf16")
    with pytest.raises(ValueError, match="80"):
        _core._DeviceState(_core._problem_text(wide), 1, False)
    assert streams.host.tokens == [0, 0] and streams.bytes() == before


def test_a_call_that_the_driver_ends_midway_leaves_its_slots_unfinished(driver):
    q, k, v = arrays(2, 40)
    streams = Streams(driver, slots=3)
    streams.call("forward", q, k, v, slots=[0, 1])
    streams.host.reset(streams.place, streams.memory.address)
    plan = streams.plan("forward", tensors := streams.tensors(q, k, v), slots=[0, 1])
    refuse(driver, "cuLaunchKernel", 3)
    try:
        with pytest.raises(RuntimeError, match="launch"):
            streams.run(plan, tensors)
    finally:
        refuse(driver)
    with pytest.raises(RuntimeError, match="slot 0"):
        streams.call("decode", *(x[:1, :1] for x in (q, k, v)), slots=[0])
    streams.call("decode", *(x[:1, :1] for x in (q, k, v)), slots=[2])
    streams.host.reset(streams.place, streams.memory.address, [0, 1])
    got, _ = streams.call("forward", q, k, v, slots=[0, 1])
    assert rms(got, expected(q, k, v)[0]) < 4e-3
