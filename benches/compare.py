"""infini_attn against PyTorch on the CPU: same inputs, threads and dtype, in turns, in one run.

    python benches/compare.py [--threads 2] [--rounds 7] [--json FILE]

The baseline is the operator as one writes it in PyTorch, delta rule: scaled_dot_product_attention
for the local branch and matrix products for the memory. Two ways are timed and the faster one
counts: a loop over segments, and all segments folded into the batch of one SDPA call with only the
memory in a loop. Prints a Markdown table; "1-thread CPU" is process time with one thread.
"""

import argparse
import json
import platform
import statistics
import time

import torch
import torch.nn.functional as F

import infini_attn

# (Hq, Hkv, D, N, T)
SHAPES = [(8, 8, 64, 512, 16384), (8, 2, 128, 2048, 16384), (8, 8, 128, 256, 16384)]


def flops(hq, hkv, d, n, t):
    """Causal local branch, retrieval, update and delta retrieval; a multiply-add is two."""
    return t // n * (hq * (2 * n * n * d + 2 * n * d * d) + hkv * 4 * n * d * d)


def sigma(x):
    return F.elu(x) + 1


def retrieve(s, m, z):
    """s [H, N, D], m [H, D, D] and z [H, D] f32: operands in the input's dtype."""
    den = (s @ z.to(s.dtype).unsqueeze(-1)).float()
    return (s @ m.to(s.dtype)).float() / den


def memory_step(q, k, v, m, z, hq):
    """Retrieves for q [Hq, N, D] and writes k, v [Hkv, N, D] by the delta rule."""
    hkv, n, d = k.shape
    sq, sk = sigma(q).reshape(hkv, hq // hkv * n, d), sigma(k)
    if m is None:
        a_mem, u = torch.zeros(hq, n, d), v
        m, z = torch.zeros(hkv, d, d), torch.zeros(hkv, d)
    else:
        a_mem = retrieve(sq, m, z).reshape(hq, n, d)
        u = (v - retrieve(sk, m, z)).to(v.dtype)
    return a_mem, m + (sk.mT @ u).float(), z + sk.sum(1, dtype=torch.float32)


def gated(a_dot, a_mem, gate):
    return (gate * a_mem + (1 - gate) * a_dot).to(a_dot.dtype)


def segment_loop(q, k, v, beta, n):
    """q [1, Hq, T, D], k, v [1, Hkv, T, D] -> [1, Hq, T, D]."""
    gate, m, z, out = torch.sigmoid(beta)[:, None, None], None, None, torch.empty_like(q)
    for s in range(0, q.shape[2], n):
        qs, ks, vs = (x[:, :, s : s + n] for x in (q, k, v))
        a_dot = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)
        a_mem, m, z = memory_step(qs[0], ks[0], vs[0], m, z, q.shape[1])
        out[0, :, s : s + n] = gated(a_dot[0], a_mem, gate)
    return out


def segments_folded(q, k, v, beta, n):
    """The same with all segments in one SDPA batch."""
    gate, m, z, out = torch.sigmoid(beta)[:, None, None], None, None, torch.empty_like(q)
    fold = lambda x: x[0].unflatten(1, (-1, n)).transpose(0, 1)
    qf, kf, vf = fold(q), fold(k), fold(v)
    a_dot = F.scaled_dot_product_attention(qf, kf, vf, is_causal=True, enable_gqa=True)
    for s in range(qf.shape[0]):
        a_mem, m, z = memory_step(qf[s], kf[s], vf[s], m, z, q.shape[1])
        out[0, :, s * n : (s + 1) * n] = gated(a_dot[s], a_mem, gate)
    return out


def ours(q, k, v, beta, n):
    views = (x.transpose(1, 2) for x in (q, k, v))
    out = infini_attn.infini_attention(*views, beta, segment_len=n, return_state=False)
    return out.transpose(1, 2)


def set_threads(n):
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


def compare(shape, dtype, threads, rounds):
    hq, hkv, d, n, t = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, t, h, d).to(dtype).transpose(1, 2) for h in (hq, hkv, hkv))
    # The baseline gets the layout it likes best.
    q, k, v = (x.contiguous() for x in (q, k, v))
    beta = torch.randn(hq)
    functions = {"ours": ours, "loop": segment_loop, "folded": segments_folded}
    args = (q, k, v, beta, n)
    results = {name: f(*args).double() for name, f in functions.items()}
    for name in ("loop", "folded"):
        error = (results["ours"] - results[name]).norm() / results[name].norm()
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="also append one JSON line per row to this file")
    options = parser.parse_args()
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
          f"infini_attn {infini_attn.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| (Hq, Hkv, D, N, T) | dtype | infini_attn GF/s | torch loop | torch folded "
          "| ratio to the faster | 1-thread CPU: ours | torch | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            r = compare(shape, dtype, options.threads, options.rounds)
            print(f"| {shape} | {r['dtype']} | {r['ours_gflops']:.0f} | {r['loop_gflops']:.0f} "
                  f"| {r['folded_gflops']:.0f} | **{r['ratio']:.2f} ×** | {r['ours_cpu_s']:.3f} s "
                  f"| {r['torch_cpu_s']:.3f} s | {r['torch_cpu_s'] / r['ours_cpu_s']:.2f} × |",
                  flush=True)
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(r) + "\n")


if __name__ == "__main__":
    main()
