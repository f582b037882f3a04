"""A CUDA device for PyTorch whose memory is the simulator's: tensors of the class `Cuda` say that they
are on cuda:0, their elements lie in the simulator's memory, and what PyTorch does with them it does on
copies on the CPU. This package's own operators run as on a GPU."""

import types

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .simulated import Memory

DEVICE = torch.device("cuda", 0)
driver = None  # set by `installed`
# What is allocated while a graph is captured, for as long as that may run; PyTorch keeps it by itself.
kept = []


class Cuda(torch.Tensor):
    @staticmethod
    def __new__(cls, memory, like):
        """In `memory`, of the type, shape, strides and offset of `like`."""
        layout = {"strides": like.stride(), "storage_offset": like.storage_offset()}
        new = torch.Tensor._make_wrapper_subclass
        self = new(cls, like.size(), dtype=like.dtype, device=DEVICE, **layout)
        self.memory = memory
        return self

    def data_ptr(self):
        return self.memory.address + self.storage_offset() * self.element_size()

    def host(self, copies):
        """A copy on the CPU; tensors that share memory share the copy of it."""
        return self.layout_in(copies.setdefault(id(self.memory), Host(self.memory)).bytes)

    def layout_in(self, data):
        usable = data[: data.numel() // self.element_size() * self.element_size()]
        typed = usable.view(self.dtype)
        return typed.as_strided(self.size(), self.stride(), self.storage_offset())

    def tolist(self):
        return self.host({}).tolist()

    def __repr__(self):
        return f"Cuda({self.host({})})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Host:
    """The bytes of a memory, copied to the CPU."""

    def __init__(self, memory):
        self.memory = memory
        self.bytes = torch.from_numpy(memory.driver.download(memory.address, memory.size))

    def write_back(self):
        self.memory.driver.upload(self.memory.address, self.bytes.numpy())


def run(function, args, kwargs):
    if function.namespace == "infini_attn":
        from infini_attn.torch import _cuda

        # Within a mode there is none.
        with OnDevice():
            return getattr(_cuda, function._schema.name.split("::")[1])(*args, **kwargs)
    with OnDevice():
        parts = function.decompose(*args, **kwargs)
    if parts is not NotImplemented:
        return parts
    if function.is_view:
        source = args[0]
        meta = torch.empty(source.memory.size, dtype=torch.uint8, device="meta")
        seen = function(source.layout_in(meta), *args[1:], **kwargs)
        return tree_map_only(torch.Tensor, lambda view: Cuda(source.memory, view), seen)
    copies = {}
    on_cpu = lambda x: x.host(copies) if isinstance(x, Cuda) else x
    host_args = tree_map_only(torch.Tensor, on_cpu, (args, kwargs))
    target = kwargs.get("device")
    to_cuda = (
        any(isinstance(x, Cuda) for x in tree_leaves((args, kwargs)))
        if target is None
        else (torch.device(target).type == "cuda")
    )
    if target is not None:
        host_args[1]["device"] = torch.device("cpu")
    if host_args[1].get("pin_memory"):
        host_args[1]["pin_memory"] = False
    result = function(*host_args[0], **host_args[1])
    if function._schema.is_mutable:
        for copy in copies.values():
            copy.write_back()
        first = args[0] if args else None
        if (
            isinstance(first, torch.Tensor)
            and function._schema.name.rstrip("_") != function._schema.name
        ):
            return first
    return tree_map_only(torch.Tensor, upload, result) if to_cuda else result


def upload(tensor):
    """A tensor on the device with the elements, shape and strides of one on the CPU."""
    dense = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    dense.copy_(tensor)
    size = dense.untyped_storage().nbytes()
    memory = Memory(driver, size)
    data = torch.empty(0, dtype=torch.uint8).set_(dense.untyped_storage())
    driver.upload(memory.address, data.numpy().astype(np.uint8, copy=False))
    if torch.cuda.is_current_stream_capturing():
        kept.append(memory)
    return Cuda(memory, dense)


class OnDevice(TorchDispatchMode):
    """New tensors for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return run(function, args, kwargs)
        return function(*args, **kwargs)


def by_way_of_the_cpu(make):
    """What asks for the device past all modes."""

    def made(*args, device=None, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


class Stream(types.SimpleNamespace):
    """What PyTorch calls a stream."""


def installed(simulated, monkeypatch, stream=0):
    """Makes the simulator PyTorch's CUDA device, for as long as the mode that is returned is entered."""
    global driver
    driver = simulated
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # Parameters are replaced, for what they are of changes.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    monkeypatch.setattr(torch, "tensor", by_way_of_the_cpu(torch.tensor))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(cuda_stream=stream))
    return OnDevice()
