"""`python -m infini_attn.bench`: the operator's prefill and decode beside PyTorch's attention.

Three ways with the same random inputs: this package; the same operator composed of PyTorch's own
operations; and plain causal attention over all tokens, which is what Infini-attention stands in for. The
composition has all segments in one call of scaled_dot_product_attention and nothing but the memory's
recurrence in a loop. Outputs are compared before anything is timed.

Decodes go on behind half a segment and take in what they decode: our times have the ends of segments
in them, those of the others are for one length.
"""

import argparse
import functools
import platform
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.benchmark

from . import __version__, get_num_threads, infini_attention, set_num_threads
from ._core import simd_level

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Of our output, against the composition in float32.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}

OURS, COMPOSED, FULL = "infini_attn", "the same, composed", "full attention"


class Shape(NamedTuple):
    """Streams B, tokens T, heads Hq and Hkv, their width D, segment length N."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    segment_len: int

    @property
    def prompt(self) -> int:
        """Tokens before a decode: about T, and half a segment is open."""
        return self.tokens // self.segment_len * self.segment_len + self.segment_len // 2


class Inputs(NamedTuple):
    """q [B, T, Hq, D], k and v [B, T, Hkv, D], gate logits [Hq]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor

    def part(self, start: int, end: int) -> "Inputs":
        return Inputs(*(x[:, start:end] for x in self[:3]), self.beta)

    def heads_first(self) -> "Inputs":
        """[B, H, T, D], the layout that PyTorch likes best."""
        return Inputs(*(x.transpose(1, 2).contiguous() for x in self[:3]), self.beta)


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Random tokens for a prefill, and for a prompt and the token after it."""
    make = torch.Generator(device).manual_seed(0)
    tokens = max(shape.tokens, shape.prompt + 1)
    new = lambda heads: torch.randn(shape.batch, tokens, heads, shape.dim, generator=make, device=device)
    q, k, v = (new(heads).to(dtype) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    return Inputs(q, k, v, torch.randn(shape.heads, generator=make, device=device))


# ---- The operator in PyTorch, delta rule. Heads first; S segments of N tokens.


def sigma(x: torch.Tensor) -> torch.Tensor:
    """Of the memory's products. On a CPU PyTorch has those of 16-bit numbers in float32 sooner."""
    return F.elu(x.float() if x.device.type == "cpu" else x) + 1


def mix(local: torch.Tensor, memory: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    gate = beta.sigmoid()[:, None, None]
    return (gate * memory + (1 - gate) * local).to(local.dtype)


def fold(x: torch.Tensor, n: int) -> torch.Tensor:
    """[B, H, T, D] as [S, B, H, N, D], the last segment filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % n)).unflatten(2, (-1, n)).movedim(2, 0)


def memories(sk: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory [S, B, Hkv, D, D] and normaliser [S, B, Hkv, D, 1] before each segment."""
    v, sums = v.to(sk.dtype), sk.float().sum(3)
    z = (sums.cumsum(0) - sums).to(sk.dtype).unsqueeze(-1)
    norms, m = sk @ z, torch.zeros(*sk.shape[1:3], sk.shape[4], v.shape[4], device=sk.device)
    before = [m]
    for i in range(sk.shape[0] - 1):
        new = v[i] - (sk[i] @ m.to(v.dtype)) / norms[i] if i else v[i]
        m = m + (sk[i].mT @ new).float()
        before.append(m)
    return torch.stack(before).to(sk.dtype), z


def composed(q, k, v, beta, n: int) -> torch.Tensor:
    """Prefill: q [B, Hq, T, D], k and v [B, Hkv, T, D]."""
    tokens, kv_heads = q.shape[2], k.shape[1]
    q, k, v = (fold(x, n) for x in (q, k, v))
    flat = (x.flatten(0, 1) for x in (q, k, v))
    local = F.scaled_dot_product_attention(*flat, is_causal=True, enable_gqa=True).view_as(q)
    m, z = memories(sigma(k), v)
    sq = sigma(q[1:]).unflatten(2, (kv_heads, -1)).flatten(3, 4)
    read = ((sq @ m[1:]) / (sq @ z[1:])).view_as(q[1:])
    out = mix(local, torch.cat([torch.zeros_like(q[:1]), read]), beta)
    return out.movedim(0, 2).flatten(2, 3)[:, :, :tokens]


def composed_token(q, k, v, beta, memory, keys, values) -> torch.Tensor:
    """Decode: memory (m, z), the open segment's keys and values with room at the end for the token's."""
    keys[:, :, -1:], values[:, :, -1:] = k, v
    # Heads that share keys are rows of one.
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    local = F.scaled_dot_product_attention(rows, keys, values)
    m, z = memory
    read = (sigma(rows) @ m) / (sigma(rows) @ z) if m is not None else torch.zeros_like(local)
    return mix(local.view_as(q), read.view_as(q), beta)


def full_token(q, k, v, keys, values) -> torch.Tensor:
    keys[:, :, -1:], values[:, :, -1:] = k, v
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    return F.scaled_dot_product_attention(rows, keys, values).view_as(q)


# ---- What is called: functions without arguments that give [B, T, Hq, D], by the name of the way.


def prefills(shape: Shape, given: Inputs) -> dict[str, Callable[[], torch.Tensor]]:
    given = given.part(0, shape.tokens)
    q, k, v, beta = given.heads_first()
    causal = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return {
        OURS: lambda: infini_attention(*given, segment_len=shape.segment_len, return_state=False),
        COMPOSED: lambda: composed(q, k, v, beta, shape.segment_len).transpose(1, 2),
        FULL: lambda: causal().transpose(1, 2),
    }


def decodes(shape: Shape, given: Inputs) -> dict[str, Callable[[], torch.Tensor]]:
    """Of the token after a prompt; ours goes on from token to token."""
    prompt, token = given.part(0, shape.prompt), given.part(shape.prompt, shape.prompt + 1)
    # Made when it is asked for: devices do not take the float32 that errors are measured against.
    state = functools.cache(lambda: infini_attention(*prompt, segment_len=shape.segment_len)[1])
    _, keys, values, _ = given.part(0, shape.prompt + 1).heads_first()
    q, k, v, beta = token.heads_first()
    start = shape.prompt - shape.prompt % shape.segment_len
    open_keys, open_values = (x[:, :, start:].clone() for x in (keys, values))
    memory = (None, None)
    if start:
        m, z = memories(sigma(fold(keys, shape.segment_len)), fold(values, shape.segment_len))
        memory = m[-1].clone(), z[-1].clone()
    return {
        OURS: lambda: infini_attention(*token, state=state(), inplace=True, return_state=False),
        COMPOSED: lambda: composed_token(q, k, v, beta, memory, open_keys, open_values).transpose(1, 2),
        FULL: lambda: full_token(q, k, v, keys, values).transpose(1, 2),
    }


def errors(kind: Callable, shape: Shape, given: Inputs) -> dict[str, float]:
    """Relative root-mean-square errors of the ways that compute the same, against it in float32."""
    ways, exact = kind(shape, given), kind(shape, Inputs(*(x.float() for x in given)))[COMPOSED]()
    off = {name: ways[name]().float() - exact for name in (OURS, COMPOSED)}
    return {name: (x.norm() / exact.norm()).item() for name, x in off.items()}


# ---- Times, in seconds.


def on_cpu(call: Callable, seconds: float) -> float:
    timer = torch.utils.benchmark.Timer("call()", globals={"call": call}, num_threads=get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def on_cuda(call: Callable, seconds: float) -> float:
    from triton.testing import do_bench

    return do_bench(call, rep=int(seconds * 1e3), return_mode="median") / 1e3


def graphed(call: Callable) -> Callable:
    """The call in a CUDA graph, where launches cost next to nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def cell(measure: Callable[[], float]) -> str:
    """Milliseconds, or why there are none."""
    try:
        return f"{measure() * 1e3:.4g} ms"
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error).splitlines()[0][:80]


def table(kind: Callable, shape: Shape, given: Inputs, seconds: float) -> None:
    """Checks the outputs and prints a row per way, or ends the program."""
    device = given.q.device.type
    found = errors(kind, shape, given)
    if not found[OURS] <= TOLERANCE[given.q.dtype]:
        sys.exit(f"{kind.__name__}: the outputs differ, relative error {found[OURS]:.1e}")
    graph = " in a graph |" if device == "cuda" else ""
    print(f"\n| {kind.__name__} | time |{graph} relative error |")
    print("|---|---|---|---|" if graph else "|---|---|---|")
    for name, call in kind(shape, given).items():
        cells = [name, cell(lambda: (on_cuda if device == "cuda" else on_cpu)(call, seconds))]
        if graph:
            cells.append(cell(lambda: on_cuda(graphed(call), seconds)))
        cells.append(f"{found[name]:.1e}" if name in found else "")
        print("| " + " | ".join(cells) + " |", flush=True)


def machine(device: str) -> str:
    """What it runs on, and with."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({simd_level()}), {get_num_threads()} threads"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m infini_attn.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", default="1,8192,8,2,64", metavar="B,T,Hq,Hkv,D", help="%(default)s")
    parser.add_argument("--segment-len", type=int, default=2048, metavar="N", help="%(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="f32 on the CPU, else bf16")
    parser.add_argument("--threads", type=int, help="of the CPU, for all ways")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure, %(default)s")
    options = parser.parse_args(argv)
    try:
        extents = [int(x) for x in options.shape.split(",")]
        options.shape = Shape(*extents, options.segment_len)
    except (TypeError, ValueError):
        parser.error(f"--shape: {options.shape} given, B,T,Hq,Hkv,D expected")
    if min(options.shape) < 1 or options.shape.heads % options.shape.kv_heads:
        parser.error(f"--shape: {options.shape} given, numbers from 1 and Hkv a divisor of Hq expected")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: {options.threads} given, at least 1 expected")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda given, but PyTorch finds no CUDA device on this machine")
    return options


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    shape, threads = options.shape, options.threads or get_num_threads()
    set_num_threads(threads)
    torch.set_num_threads(threads)
    dtype = DTYPES[options.dtype or ("f32" if options.device == "cpu" else "bf16")]
    given = inputs(shape, dtype, options.device)
    print(f"{machine(options.device)}; torch {torch.__version__}, infini_attn {__version__}, "
          f"{time.strftime('%Y-%m-%d')}")
    print(f"{shape}, dtype={str(dtype).removeprefix('torch.')}")
    _, state = infini_attention(*given.part(0, 1), segment_len=shape.segment_len)
    cache = 2 * shape.batch * shape.prompt * shape.kv_heads * shape.dim * dtype.itemsize
    print(f"state {state.nbytes / 2**20:.1f} MiB, keys and values of {shape.prompt} tokens "
          f"{cache / 2**20:.1f} MiB")
    for kind in (prefills, decodes):
        table(kind, shape, given, options.seconds)


if __name__ == "__main__":
    main()
