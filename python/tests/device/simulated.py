"""Tensors in the memory of the simulator's driver: what PyTorch's CUDA tensors say of themselves
(`data_ptr`, `shape`, `stride`, `dtype`), without PyTorch."""

import ctypes
import math

import ml_dtypes
import numpy as np

DTYPES = {
    "torch.float32": np.dtype("float32"),
    "torch.float16": np.dtype("float16"),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.uint8": np.dtype("uint8"),
    "torch.int32": np.dtype("int32"),
    "torch.int64": np.dtype("int64"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Driver:
    """The driver's library, and the primary context of its one device, current in this thread."""

    def __init__(self, library):
        self.library = library
        self("cuInit", 0)
        context = ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self("cuCtxSetCurrent", context)
        self.primary = context.value

    def __call__(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        assert code == 0, f"{name}: error {code}"

    def context(self):
        current = ctypes.c_void_p()
        self("cuCtxGetCurrent", ctypes.byref(current))
        return current.value

    def stream(self):
        stream = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(stream), 1)
        return stream.value

    def in_primary(self, *call):
        self("cuCtxPushCurrent_v2", ctypes.c_void_p(self.primary))
        try:
            self(*call)
        finally:
            self("cuCtxPopCurrent_v2", None)

    def allocate(self, size):
        address = ctypes.c_uint64()
        self.in_primary("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address):
        self.in_primary("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address, array):
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        if data.size:
            pointer = ctypes.c_void_p(data.ctypes.data)
            arguments = ctypes.c_uint64(address), pointer, ctypes.c_size_t(data.size), None
            self("cuMemcpyHtoDAsync_v2", *arguments)

    def download(self, address, size):
        data = np.empty(size, np.uint8)
        if size:
            pointer = ctypes.c_void_p(data.ctypes.data)
            arguments = pointer, ctypes.c_uint64(address), ctypes.c_size_t(size), None
            self("cuMemcpyDtoHAsync_v2", *arguments)
        return data


class Memory:
    """An allocation, freed with its last tensor."""

    def __init__(self, driver, size):
        self.driver, self.size, self.address = driver, size, driver.allocate(size)

    def __del__(self):
        self.driver.free(self.address)


class Tensor:
    """A tensor on the simulator's device."""

    def __init__(self, memory, dtype, shape, strides=None, offset=0):
        self.memory, self.dtype, self.shape, self.offset = memory, dtype, tuple(shape), offset
        contiguous = [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        self.strides = tuple(contiguous if strides is None else strides)

    @classmethod
    def of(cls, driver, array):
        memory = Memory(driver, array.nbytes)
        driver.upload(memory.address, array)
        return cls(memory, NAMES[array.dtype], array.shape)

    def data_ptr(self):
        return self.memory.address + self.offset

    def stride(self):
        return self.strides

    def transpose(self, a, b):
        shape, strides = list(self.shape), list(self.strides)
        shape[a], shape[b] = shape[b], shape[a]
        strides[a], strides[b] = strides[b], strides[a]
        return Tensor(self.memory, self.dtype, shape, strides, self.offset)

    def numpy(self):
        """A copy of the elements."""
        dtype = DTYPES[self.dtype]
        size = self.memory.size - self.offset
        data = self.memory.driver.download(self.data_ptr(), size).view(dtype)
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(data, self.shape, strides).copy()


class Place:
    """A stream of the device, and an allocator that notes what it gives."""

    ordinal = 0

    def __init__(self, driver, stream=0):
        self.driver, self.stream, self.given = driver, stream, []

    def empty(self, size):
        self.given.append(size)
        return Tensor(Memory(self.driver, size), "torch.uint8", [size])
