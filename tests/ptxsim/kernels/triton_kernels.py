"""Kernels written in Triton, compiled to PTX for the simulator's tests; no GPU is needed.

    python triton_kernels.py OUTDIR

writes one `.ptx` per kernel, configuration and architecture, and `manifest.json`: a list of launches,
each with the file, the kernel's name, `arch`, `grid`, `block` (threads), `shared` (bytes of dynamic
shared memory), the `buffers` with element type and shape, the `args` in the order of the kernel's
parameters, and the `reference` the outputs are to be compared with. An argument is one of
    {"buffer": NAME}   {"i32": VALUE}   {"i64": VALUE}   {"f32": VALUE}
    {"tensor_map": {"buffer", "dtype", "dims", "strides", "box", "element_strides", "swizzle", "oob"}}
    {"scratch": BYTES_PER_BLOCK, "align": ALIGN}     # 0 bytes: a null pointer
(tensor maps: dimensions and box innermost first, strides in bytes without the innermost one.)
A buffer's `role` is "input" (to be filled by the caller), "steps" (to be filled with multiples of 1/1024,
whose sum is exact in any order), "output" (starts uninitialised) or "zero".
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python triton_kernels.py OUTDIR")
    os.environ["TRITON_CACHE_DIR"] = str(Path(sys.argv[1]).resolve() / "cache")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ELEMENT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
TRITON_NAME = {"f16": "fp16", "bf16": "bf16", "f32": "fp32"}


# Kernels. Matrices are row-major; the leading dimension is the number of columns.


@triton.jit
def matmul(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b, one tile per program, loads software-pipelined over k."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    a_tile = a + rows[:, None] * k + inner[None, :]
    b_tile = b + inner[:, None] * n + cols[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, k, BK):
        x = tl.load(a_tile, mask=(rows[:, None] < m) & (inner[None, :] < k - k0), other=0.0)
        y = tl.load(b_tile, mask=(inner[:, None] < k - k0) & (cols[None, :] < n), other=0.0)
        acc = tl.dot(x, y, acc, input_precision="tf32")
        a_tile += BK
        b_tile += BK * n
    out = c + rows[:, None] * n + cols[None, :]
    tl.store(out, acc.to(c.dtype.element_ty), mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def matmul_nt(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a bᵀ with b stored as [n][k]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, k, BK):
        ks = k0 + inner
        x = tl.load(a + rows[:, None] * k + ks[None, :], mask=(rows[:, None] < m) & (ks[None, :] < k), other=0.0)
        y = tl.load(b + cols[:, None] * k + ks[None, :], mask=(cols[:, None] < n) & (ks[None, :] < k), other=0.0)
        acc = tl.dot(x, y.T, acc, input_precision="tf32")
    out = c + rows[:, None] * n + cols[None, :]
    tl.store(out, acc.to(c.dtype.element_ty), mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def matmul_persistent(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """c = a b; each program walks over tiles, in groups of GROUP tile rows."""
    tiles_m = tl.cdiv(m, BM)
    tiles_n = tl.cdiv(n, BN)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        group = tile // (GROUP * tiles_n)
        height = min(tiles_m - group * GROUP, GROUP)
        within = tile % (GROUP * tiles_n)
        rows = (group * GROUP + within % height) * BM + tl.arange(0, BM)
        cols = (within // height) * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, k, BK):
            ks = k0 + tl.arange(0, BK)
            x = tl.load(a + rows[:, None] * k + ks[None, :], mask=(rows[:, None] < m) & (ks[None, :] < k), other=0.0)
            y = tl.load(b + ks[:, None] * n + cols[None, :], mask=(ks[:, None] < k) & (cols[None, :] < n), other=0.0)
            acc = tl.dot(x, y, acc)
        out = c + rows[:, None] * n + cols[None, :]
        tl.store(out, acc.to(c.dtype.element_ty), mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def matmul_tma(a, b, c, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b; a, b and c are tensor maps made by the host."""
    row = tl.program_id(0) * BM
    col = tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, k, BK):
        acc = tl.dot(a.load([row, k0]), b.load([k0, col]), acc)
    c.store([row, col], acc.to(c.dtype))


@triton.jit
def matmul_device_tma(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b; the kernel itself writes the tensor maps, into global scratch memory."""
    a_map = tl.make_tensor_descriptor(a, [m, k], [k, 1], [BM, BK])
    b_map = tl.make_tensor_descriptor(b, [k, n], [n, 1], [BK, BN])
    c_map = tl.make_tensor_descriptor(c, [m, n], [n, 1], [BM, BN])
    row = tl.program_id(0) * BM
    col = tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, k, BK):
        acc = tl.dot(a_map.load([row, k0]), b_map.load([k0, col]), acc)
    c_map.store([row, col], acc.to(c.dtype.element_ty))


@triton.jit
def softmax(x, y, columns, BLOCK: tl.constexpr):
    """Each program normalises one row."""
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * columns
    v = tl.load(x + row + at, mask=at < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(y + row + at, (e / tl.sum(e, axis=0)).to(y.dtype.element_ty), mask=at < columns)


@triton.jit
def attention(q, k, v, o, scale, tokens, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr):
    """Flash attention, forward: one query tile of one head per program, online softmax over key tiles."""
    first = tl.program_id(0) * BM
    head = tl.program_id(1).to(tl.int64) * tokens * D
    rows = first + tl.arange(0, BM)
    dims = tl.arange(0, D)
    query = tl.load(q + head + rows[:, None] * D + dims[None, :], mask=rows[:, None] < tokens, other=0.0)
    top = tl.full((BM,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    acc = tl.zeros((BM, D), dtype=tl.float32)
    last = min(first + BM, tokens) if CAUSAL else tokens
    for start in range(0, last, BN):
        keys = start + tl.arange(0, BN)
        inside = keys < tokens
        key = tl.load(k + head + keys[None, :] * D + dims[:, None], mask=inside[None, :], other=0.0)
        s = tl.dot(query, key) * (scale * 1.4426950408889634)
        visible = inside[None, :] & (rows[:, None] >= keys[None, :]) if CAUSAL else inside[None, :]
        s = tl.where(visible, s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        value = tl.load(v + head + keys[:, None] * D + dims[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype.element_ty), value, acc * shrink[:, None])
        top = new_top
    out = o + head + rows[:, None] * D + dims[None, :]
    tl.store(out, (acc / total[:, None]).to(o.dtype.element_ty), mask=rows[:, None] < tokens)


@triton.jit
def sum_atomic(x, total, n, BLOCK: tl.constexpr):
    """total += Σ x, one atomic addition per program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total, tl.sum(tl.load(x + at, mask=at < n, other=0.0), axis=0))


@triton.jit
def histogram_atomic(x, bins, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """bins[x[i] mod BINS] += 1: scattered atomic additions."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.atomic_add(bins + tl.load(x + at, mask=inside, other=0) % BINS, 1, mask=inside, sem="relaxed")


# Launches: what to compile, and how the test is to call it.


def buffer(dtype, *shape, role="input"):
    return {"dtype": dtype, "shape": list(shape), "role": role}


def divisible(value):
    return value % 16 == 0


class Launch:
    """One kernel with its constants, run-time arguments and grid."""

    def __init__(self, label, kernel, *, archs=("sm_80", "sm_90a"), grid, buffers, scalars, constants, options, reference):
        self.label, self.kernel, self.archs, self.grid = label, kernel, archs, list(grid)
        self.buffers, self.scalars, self.constants = buffers, scalars, constants
        self.options, self.reference = options, reference
        self.tiles = {}  # buffers passed as tensor maps: the tile each map moves

    def source(self):
        """What Triton compiles: argument types, constants, and which values are multiples of 16."""
        signature, hints = {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
            elif name in self.tiles:
                dtype = TRITON_NAME[self.buffers[name]["dtype"]]
                signature[name] = f"tensordesc<{dtype}{self.tiles[name]}>"
            elif name in self.buffers:
                dtype = self.buffers[name]["dtype"]
                signature[name] = "*" + TRITON_NAME.get(dtype, dtype)
                hints[(i,)] = [["tt.divisibility", 16]]
            else:
                kind, value = self.scalars[name]
                signature[name] = {"f32": "fp32"}.get(kind, kind)
                if kind != "f32" and divisible(value):
                    hints[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs=self.constants, attrs=hints)

    def arguments(self, metadata):
        """The kernel's parameters in order, the scratch pointers Triton appends included."""
        maps = iter(metadata.tensordesc_meta or [])
        args = []
        for name in self.kernel.arg_names:
            if name in self.tiles:
                shape = self.buffers[name]["shape"]
                args.append({"tensor_map": tensor_map(name, self.buffers[name], next(maps))})
                # The shape and the strides follow every map once more.
                args += [{"i32": extent} for extent in shape]
                args += [{"i64": shape[1]}, {"i64": 1}]
            elif name in self.buffers:
                args.append({"buffer": name})
            elif name in self.scalars:
                kind, value = self.scalars[name]
                args.append({kind: value})
        args.append({"scratch": metadata.global_scratch_size, "align": metadata.global_scratch_align})
        args.append({"scratch": metadata.profile_scratch_size, "align": metadata.profile_scratch_align})
        return args


def tensor_map(name, described, meta):
    """The tensor map of a row-major matrix, for the tile and swizzle the compiler chose."""
    rows, columns = described["shape"]
    swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[meta["swizzle"]]
    return {
        "buffer": name,
        "dtype": described["dtype"],
        "dims": [columns, rows],
        "strides": [columns * ELEMENT_BYTES[described["dtype"]]],
        "box": list(reversed(meta["block_size"])),
        "element_strides": [1, 1],
        "swizzle": swizzle,
        "oob": "zero",
    }


def matmul_launch(label, kernel, dtype, m, n, k, tile, *, warps, stages, out=None, b_rows_are_n=False, programs=None, **rest):
    bm, bn, bk = tile
    out = out or dtype
    grid = (programs, 1, 1) if programs else (triton.cdiv(m, bm), triton.cdiv(n, bn), 1)
    constants = {"BM": bm, "BN": bn, "BK": bk} | ({"GROUP": 2} if programs else {})
    return Launch(
        f"{label}_{dtype}_{bm}x{bn}x{bk}_s{stages}_w{warps}",
        kernel,
        grid=grid,
        buffers={
            "a": buffer(dtype, m, k),
            "b": buffer(dtype, n, k) if b_rows_are_n else buffer(dtype, k, n),
            "c": buffer(out, m, n, role="output"),
        },
        scalars={"m": ("i32", m), "n": ("i32", n), "k": ("i32", k)},
        constants=constants,
        options={"num_warps": warps, "num_stages": stages},
        reference={"name": "matmul_nt" if b_rows_are_n else "matmul", "m": m, "n": n, "k": k, "tf32": dtype == "f32"},
        **rest,
    )


def attention_launch(dtype, tokens, heads, d, bm, bn, *, causal, warps, stages):
    kind = "causal" if causal else "full"
    return Launch(
        f"attention_{kind}_{dtype}_t{tokens}_d{d}_{bm}x{bn}_s{stages}_w{warps}",
        attention,
        grid=(triton.cdiv(tokens, bm), heads, 1),
        buffers={x: buffer(dtype, heads, tokens, d) for x in "qkv"} | {"o": buffer(dtype, heads, tokens, d, role="output")},
        scalars={"scale": ("f32", d**-0.5), "tokens": ("i32", tokens)},
        constants={"BM": bm, "BN": bn, "D": d, "CAUSAL": causal},
        options={"num_warps": warps, "num_stages": stages},
        reference={"name": "attention", "heads": heads, "tokens": tokens, "d": d, "causal": causal, "scale": d**-0.5},
    )


def launches():
    yield matmul_launch("matmul", matmul, "f16", 128, 128, 128, (64, 64, 32), warps=4, stages=2)
    yield matmul_launch("matmul", matmul, "f16", 128, 128, 256, (128, 64, 64), warps=4, stages=3)
    yield matmul_launch("matmul", matmul, "bf16", 256, 128, 192, (128, 128, 32), warps=8, stages=4)
    yield matmul_launch("matmul", matmul, "bf16", 120, 88, 104, (32, 64, 32), warps=4, stages=3, out="f32")
    yield matmul_launch("matmul", matmul, "bf16", 61, 35, 77, (16, 32, 16), warps=2, stages=1, out="f32")
    yield matmul_launch("matmul", matmul, "f32", 128, 96, 128, (64, 32, 32), warps=4, stages=3)
    yield matmul_launch("matmul_nt", matmul_nt, "bf16", 128, 128, 128, (64, 128, 64), warps=4, stages=3, b_rows_are_n=True)
    yield matmul_launch("matmul_nt", matmul_nt, "f32", 64, 64, 96, (32, 32, 32), warps=2, stages=2, b_rows_are_n=True)
    yield matmul_launch("persistent", matmul_persistent, "f16", 320, 192, 128, (64, 64, 64), warps=4, stages=3, programs=4)

    for dtype, warps, tile in (("bf16", 4, (64, 128, 64)), ("f16", 8, (128, 64, 32))):
        made = matmul_launch("tma", matmul_tma, dtype, 128, 256, 192, tile, warps=warps, stages=3, archs=("sm_90a",))
        bm, bn, bk = tile
        made.tiles = {"a": [bm, bk], "b": [bk, bn], "c": [bm, bn]}
        yield made
    yield matmul_launch("device_tma", matmul_device_tma, "bf16", 128, 128, 128, (64, 64, 64), warps=4, stages=2, archs=("sm_90a",))

    for dtype, rows, columns, block, warps in (("f32", 7, 300, 512, 4), ("bf16", 16, 1024, 1024, 8)):
        yield Launch(
            f"softmax_{dtype}_{rows}x{columns}_w{warps}",
            softmax,
            grid=(rows, 1, 1),
            buffers={"x": buffer(dtype, rows, columns), "y": buffer(dtype, rows, columns, role="output")},
            scalars={"columns": ("i32", columns)},
            constants={"BLOCK": block},
            options={"num_warps": warps, "num_stages": 1},
            reference={"name": "softmax", "rows": rows, "columns": columns},
        )

    yield attention_launch("f16", 256, 2, 64, 64, 32, causal=True, warps=4, stages=2)
    yield attention_launch("bf16", 200, 2, 128, 128, 64, causal=True, warps=8, stages=3)
    yield attention_launch("bf16", 129, 1, 64, 64, 64, causal=False, warps=4, stages=2)

    yield Launch(
        "sum_atomic",
        sum_atomic,
        grid=(10, 1, 1),
        buffers={"x": buffer("f32", 5000, role="steps"), "total": buffer("f32", 1, role="zero")},
        scalars={"n": ("i32", 5000)},
        constants={"BLOCK": 512},
        options={"num_warps": 4, "num_stages": 1},
        reference={"name": "sum", "n": 5000},
    )
    yield Launch(
        "histogram_atomic",
        histogram_atomic,
        grid=(8, 1, 1),
        buffers={"x": buffer("i32", 2000), "bins": buffer("i32", 37, role="zero")},
        scalars={"n": ("i32", 2000)},
        constants={"BINS": 37, "BLOCK": 256},
        options={"num_warps": 4, "num_stages": 1},
        reference={"name": "histogram", "n": 2000, "bins": 37},
    )


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    manifest = []
    for launch in launches():
        for arch in launch.archs:
            target = GPUTarget("cuda", {"sm_80": 80, "sm_90a": 90}[arch], 32)
            compiled = triton.compile(launch.source(), target=target, options=launch.options)
            file = f"{launch.label}.{arch}.ptx"
            (out / file).write_text(compiled.asm["ptx"])
            metadata = compiled.metadata
            manifest.append({
                "label": f"{launch.label}.{arch}",
                "file": file,
                "kernel": metadata.name,
                "arch": arch,
                "grid": launch.grid,
                "block": 32 * metadata.num_warps,
                "shared": metadata.shared,
                "buffers": {k: v for k, v in launch.buffers.items()},
                "args": launch.arguments(metadata),
                "reference": launch.reference,
            })
    # Written last: a manifest means that every file is there.
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
