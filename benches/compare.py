"""infini_attn against PyTorch: same inputs, dtype and machine, in one run.

    python benches/compare.py [--threads 2] [--rounds 7] [--json FILE]           on the CPU
    python benches/compare.py --device cuda --ours EXE [--seconds 600] [--json FILE]
    python benches/compare.py --check                                 the baselines themselves

The operator in PyTorch, delta rule, in three ways (functions below): a loop over segments as one
writes it down; all segments folded into the batch of one SDPA call with only the memory in a loop;
and PyTorch at its best, where the memory is batched over all segments as well, by prefix sums and
affine maps. Both parts call the Python package; on a GPU also inside a CUDA graph, and EXE besides, the
benchmark executable (`cargo bench --features cuda --bench cuda --no-run`), whose times are what the
others' are divided by. There every baseline runs eagerly, compiled, and compiled inside a CUDA graph, next to local attention
alone by each SDPA backend and to a copy for the bandwidth. Prints Markdown tables.
"""

import argparse
import ctypes
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Of the time that --seconds gives, importing PyTorch takes its part.
START = time.monotonic()

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# (Hq, Hkv, D, N, T)
CPU_SHAPES = [(8, 8, 64, 512, 16384), (8, 2, 128, 2048, 16384), (8, 8, 128, 256, 16384)]
CUDA_SHAPES = [
    (32, 8, 128, 2048, 131072),
    (32, 8, 128, 2048, 32768),
    (32, 8, 128, 8192, 131072),
    (32, 8, 128, 512, 32768),
    (32, 8, 128, 256, 32768),
    (32, 8, 64, 2048, 32768),
]


# Limit of one call of our executable: it must not use up the time of the others.
OURS_SECONDS = 20


def local_flops(hq, hkv, d, n, t):
    """Causal local branch; a multiply-add is two."""
    return t // n * hq * 2 * n * n * d


def flops(hq, hkv, d, n, t):
    """Local branch, retrieval, update and delta retrieval."""
    return local_flops(hq, hkv, d, n, t) + t * (hq * 2 * d * d + hkv * 4 * d * d)


# ---- the operator in PyTorch. q [1, Hq, T, D], k, v [1, Hkv, T, D], beta [Hq] -> [1, Hq, T, D]


def sigma(x):
    return F.elu(x) + 1


def wide(x):
    """Accumulator type: f32, or f64 when that is what comes in."""
    return x if x.dtype == torch.float64 else x.float()


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def gated(a_dot, a_mem, gate):
    return (gate * a_mem + (1 - gate) * a_dot).to(a_dot.dtype)


def fold(x, n):
    """[1, H, T, D] as [S, H, N, D]."""
    return x[0].unflatten(1, (-1, n)).transpose(0, 1)


def unfold(x):
    """[S, H, N, D] as [1, H, T, D]."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def retrieve(s, m, z):
    """s [.., N, D], m [.., D, D] and z [.., D] wide: operands in the input's dtype."""
    den = wide(s @ z.to(s.dtype).unsqueeze(-1))
    return wide(s @ m.to(s.dtype)) / den


def memory_step(q, k, v, m, z):
    """Retrieves for q [Hq, N, D] and writes k, v [Hkv, N, D] by the delta rule."""
    (hq, n, d), hkv = q.shape, k.shape[0]
    sq, sk = sigma(q).reshape(hkv, hq // hkv * n, d), sigma(k)
    if m is None:
        a_mem, u = wide(torch.zeros_like(q)), v
        m, z = wide(k.new_zeros(hkv, d, d)), wide(k.new_zeros(hkv, d))
    else:
        a_mem = retrieve(sq, m, z).reshape(hq, n, d)
        u = (v - retrieve(sk, m, z)).to(v.dtype)
    return a_mem, m + wide(sk.mT @ u), z + wide(sk).sum(1)


def segment_step(q, k, v, gate, m, z):
    """One segment: q [1, Hq, N, D], k, v [1, Hkv, N, D]."""
    a_dot = sdpa(q, k, v)
    a_mem, m, z = memory_step(q[0], k[0], v[0], m, z)
    return gated(a_dot[0], a_mem, gate), m, z


def segment_loop(q, k, v, beta, n, step=segment_step):
    gate, m, z, out = torch.sigmoid(beta)[:, None, None], None, None, torch.empty_like(q)
    for s in range(0, q.shape[2], n):
        qs, ks, vs = (x[:, :, s : s + n] for x in (q, k, v))
        out[0, :, s : s + n], m, z = step(qs, ks, vs, gate, m, z)
    return out


def segments_folded(q, k, v, beta, n):
    """All segments in one SDPA batch, the memory in a loop."""
    gate, m, z, out = torch.sigmoid(beta)[:, None, None], None, None, torch.empty_like(q)
    qf, kf, vf = (fold(x, n) for x in (q, k, v))
    a_dot = sdpa(qf, kf, vf)
    for s in range(qf.shape[0]):
        a_mem, m, z = memory_step(qf[s], kf[s], vf[s], m, z)
        out[0, :, s * n : (s + 1) * n] = gated(a_dot[s], a_mem, gate)
    return out


def scan_serial(g, b):
    """M before every segment of M <- M - G M + B: g [S - 1, Hkv, D, D] belongs to the segments
    from the second on, b [S, Hkv, D, D] to all."""
    before = [torch.zeros_like(b[0]), b[0]]
    for s in range(1, b.shape[0] - 1):
        before.append(torch.baddbmm(before[-1] + b[s], g[s - 1], before[-1], alpha=-1))
    return torch.stack(before[: b.shape[0]])


def scan_doubling(g, b):
    """The same by doubling: segment i takes over the affine map of segment i - step."""
    count, step = b.shape[0] - 1, 1
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device).expand(1, *b.shape[1:])
    a, b = torch.cat([eye, eye - g])[:count], b[:count]
    while step < count:
        b = torch.cat([b[:step], b[step:] + a[step:] @ b[:-step]])
        a = torch.cat([a[:step], a[step:] @ a[:-step]])
        step *= 2
    return torch.cat([torch.zeros_like(b[:1]), b])


def at_its_best(q, k, v, beta, n, scan=scan_serial):
    """Everything batched over segments: z by a prefix sum, M by affine maps (M <- M - G M + B with
    G = sigma(K)t D^-1 sigma(K), D = sigma(K) z, and B = sigma(K)t V), products in the input's
    dtype."""
    qf, kf, vf = (fold(x, n) for x in (q, k, v))
    a_dot, gate = sdpa(qf, kf, vf), torch.sigmoid(beta)[:, None, None]
    (count, hq, _, d), hkv = qf.shape, kf.shape[1]
    sq, sk = sigma(qf).reshape(count, hkv, hq // hkv * n, d), sigma(kf)
    b, sums = wide(sk.mT @ vf), wide(sk).sum(2)
    z = sums.cumsum(0) - sums
    den = wide(sk[1:] @ z[1:].to(sk.dtype).unsqueeze(-1))
    # Scaled so that the small weights of long prefixes keep their digits in 16 bits.
    weights = (sk[1:] * (n / den)).to(sk.dtype)
    m = scan(wide(weights.mT @ sk[1:]) / n, b)
    a_mem = retrieve(sq[1:], m[1:], z[1:]).reshape(count - 1, hq, n, d)
    a_mem = torch.cat([torch.zeros_like(a_mem[:1]), a_mem]) if count > 1 else wide(a_dot) * 0
    return unfold(gated(a_dot, a_mem, gate))


def local_only(q, k, v, beta, n):
    return unfold(sdpa(*(fold(x, n) for x in (q, k, v))))


def token_loop(q, k, v, beta, n):
    """The formulas one token after another, in float64: what the others are checked against."""
    q, k, v = (x[0].double() for x in (q, k, v))
    gate, out = torch.sigmoid(beta.double()), torch.empty_like(q)
    for h in range(q.shape[0]):
        kv = h // (q.shape[0] // k.shape[0])
        m, z = torch.zeros(q.shape[2], v.shape[2]).double(), torch.zeros(q.shape[2]).double()
        for start in range(0, q.shape[1], n):
            new_m, new_z = m.clone(), z.clone()
            for t in range(start, start + n):
                scores = k[kv, start : t + 1] @ q[h, t] * q.shape[2] ** -0.5
                a_dot = torch.softmax(scores, 0) @ v[kv, start : t + 1]
                sq, sk = sigma(q[h, t]), sigma(k[kv, t])
                a_mem = sq @ m / (sq @ z) if start else 0 * a_dot
                found = sk @ m / (sk @ z) if start else 0 * a_dot
                out[h, t] = gate[h] * a_mem + (1 - gate[h]) * a_dot
                new_m += torch.outer(sk, v[kv, t] - found)
                new_z += sk
            m, z = new_m, new_z
    return out.unsqueeze(0)


best_serial = functools.partial(at_its_best, scan=scan_serial)
best_doubling = functools.partial(at_its_best, scan=scan_doubling)
BASELINES = {"loop": segment_loop, "folded": segments_folded, "best, serial scan": best_serial,
             "best, doubling": best_doubling}


def inputs(shape, dtype, device="cpu"):
    """Stored [1, T, H, D], which SDPA and our operator both take as it is."""
    hq, hkv, d, n, t = shape
    make = torch.Generator(device).manual_seed(0)
    randn = lambda *size: torch.randn(*size, generator=make, device=device)
    q, k, v = (randn(1, t, h, d).to(dtype).transpose(1, 2) for h in (hq, hkv, hkv))
    return q, k, v, randn(hq).to(torch.promote_types(dtype, torch.float32)), n


def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


# Against float64. The loops round V - R to 16 bits, as one writes it: hence 6e-2.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 6e-2}


def check(device, compiled):
    """Every baseline at tiny shapes against the loop over tokens; gates half open, open, closed."""
    shapes = [(4, 2, 16, 8, 40), (2, 2, 8, 16, 16), (6, 2, 32, 4, 36), (3, 1, 8, 5, 10)]
    types, worst = list(TOLERANCE), {}
    if compiled:  # every shape is a compilation of a minute
        shapes, types = shapes[:1], [torch.bfloat16]

    def one(name, f, args, want):
        error, dtype = relative_error(f(*args).cpu(), want), args[0].dtype
        worst[name, dtype] = max(worst.get((name, dtype), 0.0), error)
        assert error < TOLERANCE[dtype], f"{name} {dtype}: error {error:.2e}"

    for dtype in types:
        for shape in shapes:
            q, k, v, beta, n = inputs(shape, dtype, device)
            # The same function object throughout: compiled once.
            functions = {name: compile_baseline(f) if compiled else f
                         for name, f in BASELINES.items()}
            for gate in (beta, beta + 5, torch.full_like(beta, -torch.inf)):
                want = token_loop(q.cpu(), k.cpu(), v.cpu(), gate.cpu(), n)
                for name, f in functions.items():
                    one(name, f, (q, k, v, gate, n), want)
            one("local attention", local_only, (q, k, v, gate, n), want)
    for (name, dtype), error in worst.items():
        print(f"{name:18} {str(dtype).removeprefix('torch.'):9} largest error {error:.2e}")
    print(f"{len(shapes)} shapes x {len(types)} types checked on {device}"
          + (", compiled" if compiled else ""))


def compile_baseline(f):
    """The loop is compiled segment by segment, the others whole."""
    if f is segment_loop:
        return functools.partial(segment_loop, step=torch.compile(segment_step))
    return torch.compile(f)


# ---- CPU


def cpu_ours(q, k, v, beta, n):
    import infini_attn

    views = (x.transpose(1, 2) for x in (q, k, v))
    out = infini_attn.infini_attention(*views, beta, segment_len=n, return_state=False)
    return out.transpose(1, 2)


def set_threads(n):
    import infini_attn

    torch.set_num_threads(n)
    infini_attn.set_num_threads(n)


def measure(functions, args, rounds, clock):
    """Median seconds of each function, called in turns."""
    times = {name: [] for name in functions}
    for f in functions.values():
        f(*args)
    for _ in range(rounds):
        for name, f in functions.items():
            start = clock()
            f(*args)
            times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def compare_cpu(shape, dtype, threads, rounds):
    # The baseline gets the layout it likes best here: [1, H, T, D].
    args = [x.contiguous() if torch.is_tensor(x) else x for x in inputs(shape, dtype)]
    functions = {"ours": cpu_ours, "loop": segment_loop, "folded": segments_folded}
    results = {name: f(*args) for name, f in functions.items()}
    for name in ("loop", "folded"):
        error = relative_error(results["ours"], results[name])
        assert error < (1e-4 if dtype == torch.float32 else 3e-2), f"{name}: {error:.1e}"
    set_threads(threads)
    wall = measure(functions, args, rounds, time.perf_counter)
    set_threads(1)
    cpu = measure(functions, args, max(1, rounds // 3), time.process_time)
    best = min(("loop", "folded"), key=wall.get)
    rate = lambda name: flops(*shape) / wall[name] / 1e9
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "ours_gflops": rate("ours"),
        "loop_gflops": rate("loop"),
        "folded_gflops": rate("folded"),
        "ratio": wall[best] / wall["ours"],
        "ours_cpu_s": cpu["ours"],
        "torch_cpu_s": min(cpu["loop"], cpu["folded"]),
    }


def main_cpu(options):
    import infini_attn

    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
          f"infini_attn {infini_attn.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| (Hq, Hkv, D, N, T) | dtype | infini_attn GF/s | torch loop | torch folded "
          "| ratio to the faster | 1-thread CPU: ours | torch | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in CPU_SHAPES:
            r = compare_cpu(shape, dtype, options.threads, options.rounds)
            print(f"| {shape} | {r['dtype']} | {r['ours_gflops']:.0f} | {r['loop_gflops']:.0f} "
                  f"| {r['folded_gflops']:.0f} | **{r['ratio']:.2f} ×** | {r['ours_cpu_s']:.3f} s "
                  f"| {r['torch_cpu_s']:.3f} s | {r['torch_cpu_s'] / r['ours_cpu_s']:.2f} × |",
                  flush=True)
            write_line(options.json, r)


def write_line(path, row):
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


# ---- CUDA


def event_us(f, rounds):
    """Median microseconds of a call, by events on the stream; two calls warm up."""
    for _ in range(2):
        f()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        start.record()
        f()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3


def graphed(f):
    """f inside a CUDA graph: no launch costs are left."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def eager_ways(args):
    """(name, a function that gives a call to time) of what PyTorch does without compiling."""
    for name, f in BASELINES.items():
        yield f"{name}, eager", lambda f=f: functools.partial(f, *args)
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION),
                          ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        def local(backend=backend):
            folded = [fold(x, args[4]) for x in args[:3]]
            def call():
                with sdpa_kernel(backend):
                    return sdpa(*folded)
            return call
        yield f"local attention, {name}", local


def package_ways(args):
    """The same of the Python package: what its call costs the host included, and in a graph."""
    def call():
        import infini_attn

        views = (x.transpose(1, 2) for x in args[:3])
        out = infini_attn.infini_attention(*views, args[3], segment_len=args[4], return_state=False)
        return out.transpose(1, 2)

    yield "infini_attn, Python", lambda: call
    yield "infini_attn, Python, graph", lambda: graphed(call)


def compiled_ways(args):
    """The same for what is compiled first, a minute and more per shape."""
    bound = lambda f: functools.partial(compile_baseline(f), *args)
    for name, f in BASELINES.items():
        yield f"{name}, compiled", lambda f=f: bound(f)
        yield f"{name}, compiled, graph", lambda f=f: graphed(bound(f))


def copy_bandwidth(rounds):
    """GB/s read and written by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / event_us(lambda: target.copy_(source), rounds) / 1e3


def matmul_tflops(rounds, n=8192):
    """Of an n x n x n product in bf16 on random data."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / event_us(lambda: torch.mm(a, b, out=out), rounds) / 1e6


def ours(executable, shape, *more):
    """What the benchmark executable prints about this shape."""
    command = [executable, "--measure", "prefill", "--shape", ",".join(map(str, shape)), *more]
    run = subprocess.run(command, capture_output=True, text=True, timeout=OURS_SECONDS)
    if run.returncode:
        raise RuntimeError((run.stderr or run.stdout).strip() or f"status {run.returncode}")
    return run.stdout


def ours_us(executable, shape):
    return json.loads(ours(executable, shape).strip().splitlines()[-1])["us"]


def stored_bytes(x):
    x = x.cpu().contiguous()
    return ctypes.string_at(x.data_ptr(), x.numel() * x.element_size())


def ours_error(executable, shape):
    """Our output on PyTorch's inputs against the segment loop in float32."""
    args = inputs(shape, torch.bfloat16, "cuda")
    with tempfile.TemporaryDirectory() as folder:
        for name, x in zip(("q", "k", "v"), args):
            (Path(folder) / name).write_bytes(stored_bytes(x.transpose(1, 2)))
        (Path(folder) / "gate").write_bytes(stored_bytes(args[3]))
        ours(executable, shape, "--inputs", folder)
        raw = bytearray((Path(folder) / "o").read_bytes())
    hq, _, d, _, t = shape
    got = torch.frombuffer(raw, dtype=torch.bfloat16).view(1, t, hq, d).transpose(1, 2)
    want = segment_loop(*(x.float() for x in args[:3]), *args[3:])
    return relative_error(got, want.cpu())


def compare_cuda(shape, some_ways, wanted, rounds, deadline, executable):
    """Yields one row per way; `wanted` keeps the shapes' first outputs, for what is compiled."""
    args = inputs(shape, torch.bfloat16, "cuda")
    ways = list(some_ways(args))
    if some_ways is eager_ways:
        ways = [*([("infini_attn", None)] if executable else []), *package_ways(args), *ways]
    for name, make in ways:
        row = {"shape": shape, "dtype": "bfloat16", "way": name}
        left = deadline - time.monotonic()
        if left < 0:
            yield row | {"skipped": "the time budget is spent"}
            continue
        try:
            if make is None:
                us = ours_us(executable, shape)
            else:
                if some_ways is compiled_ways:
                    torch._dynamo.reset()
                call = make()
                us = event_us(call, rounds)
                if (out := call()) is not None and not name.startswith("local"):
                    row["difference"] = relative_error(out, wanted.setdefault(shape, out))
            work = local_flops(*shape) if name.startswith("local") else flops(*shape)
            yield row | {"us": us, "tflops": work / us / 1e6}
        except Exception as e:  # a backend or compiler that refuses is a row, not the end
            lines = str(e).strip().splitlines() or [type(e).__name__]
            yield row | {"failed": lines[0][:200]}


def checked(executable, path):
    """The executable, if its output is right: else the others are measured without it."""
    shape = (8, 2, 128, 256, 1024)
    try:
        error = ours_error(executable, shape)
    except Exception as e:
        failed = (str(e).strip().splitlines() or [type(e).__name__])[-1][:200]
    else:
        print(f"Our output against PyTorch's in float32, {shape}: error {error:.1e}\n")
        write_line(path, {"shape": shape, "ours_error": error})
        if error < 1e-2:
            return executable
        failed = f"the output is wrong: error {error:.1e}"
    print(f"infini_attn is not measured: {failed}\n")
    write_line(path, {"shape": shape, "way": "infini_attn", "failed": failed})
    return None


def main_cuda(options):
    if not torch.cuda.is_available():
        sys.exit("compare: PyTorch finds no CUDA device on this machine; nothing was measured")
    torch.set_float32_matmul_precision("high")
    deadline = START + options.seconds
    device = torch.cuda.get_device_properties(0)
    copy, product = copy_bandwidth(options.rounds), matmul_tflops(options.rounds)
    print(f"{device.name}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
          f"{time.strftime('%Y-%m-%d')}; a copy moves {copy:.0f} GB/s, a bf16 product of 8192^3 on "
          f"random data runs at {product:.0f} TFLOP/s\n")
    write_line(options.json, {"device": device.name, "torch": torch.__version__,
                              "copy_gbs": copy, "matmul_tflops": product,
                              "l2_bytes": device.L2_cache_size})
    executable = checked(options.ours, options.json) if options.ours else None
    print("| (Hq, Hkv, D, N, T) | | ms | TFLOP/s | x ours |\n|---|---|---|---|---|")
    times, wanted = {}, {}
    # What compiles comes last, in what time is left after every shape had the rest.
    for ways, shape in itertools.product((eager_ways, compiled_ways), CUDA_SHAPES):
        for row in compare_cuda(shape, ways, wanted, options.rounds, deadline, executable):
            us = row.get("us")
            if us and row["way"] == "infini_attn":
                times[shape] = us
            ratio = f"{us / times[shape]:.2f}" if us and shape in times else ""
            figures = f"{us / 1e3:.3f} | {row['tflops']:.0f} | {ratio}" if us else \
                f"{row.get('failed') or row.get('skipped')} | |"
            print(f"| {shape} | {row['way']} | {figures} |", flush=True)
            write_line(options.json, row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--check", action="store_true", help="check the baselines, time nothing")
    parser.add_argument("--compiled", action="store_true", help="with --check: under torch.compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=600, help="CUDA: time budget")
    parser.add_argument("--ours", metavar="EXE", help="CUDA: the benchmark executable")
    parser.add_argument("--json", help="also append one JSON line per row to this file")
    options = parser.parse_args()
    if options.check:
        check(options.device, options.compiled)
    elif options.device == "cuda":
        main_cuda(options)
    else:
        main_cpu(options)


if __name__ == "__main__":
    main()
