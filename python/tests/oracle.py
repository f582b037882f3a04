"""The operator in plain PyTorch, float64, what to call it with, and how to compare with it."""

import torch
import torch.nn.functional as F

# Relative root-mean-square error that each element type may show.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def oracle(q, k, v, beta, n, *, delta=True, bypass=False, denominator=lambda d: d):
    """Output [B, T, Hq, Dv] and memory M, z after the last full segment."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    wide = lambda x: x.repeat_interleave(groups, dim=1)
    sigma = lambda x: F.elu(x) + 1
    g = beta.double().sigmoid().view(1, -1, 1, 1)
    m, z = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3]).double(), torch.zeros_like(k[:, :, :1])
    retrieve = lambda s, m, z: s @ m / denominator(s @ z.mT)
    out = []
    for i, (qs, ks, vs) in enumerate(zip(*(x.split(n, dim=2) for x in (q, k, v)))):
        a_dot = F.scaled_dot_product_attention(qs, wide(ks), wide(vs), is_causal=True)
        a_mem = retrieve(sigma(qs), wide(m), wide(z)) if i else torch.zeros_like(a_dot)
        out.append(a_dot if bypass and i == 0 else g * a_mem + (1 - g) * a_dot)
        if ks.shape[2] == n:
            known = retrieve(sigma(ks), m, z) if delta and i else 0
            m, z = m + sigma(ks).mT @ (vs - known), z + sigma(ks).sum(2, keepdim=True)
    return torch.cat(out, dim=2).transpose(1, 2), m, z.squeeze(2)


def tensors(b, t, hq, hkv, dk, dv=None, dtype=torch.float32, seed=0):
    """Random q, k, v and beta."""
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=generator)
    q, k, v = new(b, t, hq, dk), new(b, t, hkv, dk), new(b, t, hkv, dv or dk)
    return q.to(dtype), k.to(dtype), v.to(dtype), new(hq)


class Array:
    """An array that is known by DLPack alone, as other libraries' are."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)


def runs(lengths, *tensors):
    """Runs of so many tokens each, one after another."""
    return zip(*(x.split(lengths, dim=1) for x in tensors))


def tables(positions, frequencies):
    """Cosines and sines, [positions, frequencies]."""
    angles = torch.arange(positions)[:, None] * frequencies
    return angles.cos(), angles.sin()


def error(got, expected):
    """Relative root-mean-square error."""
    got, expected = (torch.as_tensor(x).double() for x in (got, expected))
    assert got.shape == expected.shape
    return ((got - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def assert_close(got, expected, tolerance=1e-5):
    e = error(got, expected)
    assert e <= tolerance, f"relative RMS error {e:.2e} above {tolerance:.0e}"
