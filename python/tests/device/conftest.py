import ctypes
from types import SimpleNamespace

import pytest

from infini_attn import _core


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: on PyTorch's CUDA device, or the simulator in its place")


@pytest.fixture(scope="session")
def driver():
    """The simulator's driver: `LD_LIBRARY_PATH` names its folder."""
    if not hasattr(_core, "_DeviceState"):
        pytest.skip("the extension was built without the feature cuda")
    try:
        library = ctypes.CDLL("libcuda.so")
    except OSError:
        pytest.skip("no libcuda.so")
    if not hasattr(library, "ptxsim_refuse"):
        pytest.skip("the driver is not the simulator's")
    # Needs what a machine with a GPU may lack.
    from .simulated import Driver

    return Driver(library)


@pytest.fixture
def cuda(request, monkeypatch):
    """PyTorch's CUDA device, or the simulator in its place; `real` says which."""
    torch = pytest.importorskip("torch")
    device = torch.device("cuda", 0)
    if torch.cuda.is_available():
        if not hasattr(_core, "_DeviceState"):
            pytest.skip("the extension was built without the feature cuda")
        yield SimpleNamespace(device=device, real=True)
        return
    from infini_attn.torch import operator

    from . import torch_device

    # Its tensors are of a class of their own.
    monkeypatch.setattr(operator, "_is_eager", lambda q: True)
    with torch_device.installed(request.getfixturevalue("driver"), monkeypatch):
        yield SimpleNamespace(device=device, real=False)
