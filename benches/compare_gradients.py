"""Forward and backward pass of infini_attn against PyTorch's autograd through the baselines of compare.py:
same inputs, dtype, threads and machine, in one run.

    python benches/compare_gradients.py [--threads 2] [--rounds 7] [--json FILE]

Delta rule, float32. Baselines: the loop over segments, all segments in one SDPA call with the memory in
a loop, and everything batched. Rounds take turns; the median counts. Memory is the peak of the resident
set above what was resident before the step, of a process of its own for each. Prints a Markdown table.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import threading
import time

import torch

import compare
import infini_attn.torch

# (Hq, Hkv, D, N, T)
SHAPES = [(8, 8, 64, 512, 8192), (8, 2, 128, 2048, 8192), (4, 4, 16, 64, 4096)]


def segment_loop(q, k, v, beta, n):
    """compare.segment_loop without writing into a tensor, which autograd would copy for every segment."""
    gate, m, z, out = torch.sigmoid(beta)[:, None, None], None, None, []
    for s in range(0, q.shape[2], n):
        o, m, z = compare.segment_step(*(x[:, :, s : s + n] for x in (q, k, v)), gate, m, z)
        out.append(o)
    return torch.cat(out, 1).unsqueeze(0)


def segments_folded(q, k, v, beta, n):
    """compare.segments_folded, likewise."""
    gate, m, z, out = torch.sigmoid(beta)[:, None, None], None, None, []
    qf, kf, vf = (compare.fold(x, n) for x in (q, k, v))
    a_dot = compare.sdpa(qf, kf, vf)
    for s in range(qf.shape[0]):
        a_mem, m, z = compare.memory_step(qf[s], kf[s], vf[s], m, z)
        out.append(compare.gated(a_dot[s], a_mem, gate))
    return torch.cat(out, 1).unsqueeze(0)


def ours(q, k, v, beta, n):
    views = (x.transpose(1, 2) for x in (q, k, v))
    out = infini_attn.torch.infini_attention(*views, beta, segment_len=n, return_state=False)
    return out.transpose(1, 2)


WAYS = {
    "ours": ours,
    "loop": segment_loop,
    "folded": segments_folded,
    "batched": compare.at_its_best,
}


def inputs(shape):
    hq, hkv, d, _, t = shape
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(1, t, h, d).transpose(1, 2) for h in (hq, hkv, hkv, hq))
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(hq))]
    return leaves, upstream


def step(way, shape, leaves, upstream):
    """Seconds of a forward pass and of both."""
    for x in leaves:
        x.grad = None
    start = time.perf_counter()
    out = WAYS[way](*leaves, shape[3])
    middle = time.perf_counter()
    out.backward(upstream)
    return middle - start, time.perf_counter() - start


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak(way, shape, threads, results):
    """MiB that a step takes at most besides its inputs, after one that has loaded everything."""
    torch.set_num_threads(threads)
    small = (*shape[:4], 2 * shape[3])
    step(way, small, *inputs(small))
    leaves, upstream = inputs(shape)
    before, most, over = resident(), 0, threading.Event()

    def watch():
        nonlocal most
        while not over.is_set():
            most = max(most, resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(way, shape, leaves, upstream)
    over.set()
    watcher.join()
    results.put((max(most, resident()) - before) / 2**20)


def memory(way, shape, threads):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=peak, args=(way, shape, threads, results))
    process.start()
    most = results.get()
    process.join()
    return most


def check(shape):
    """Our gradients against autograd's through the loop in float64."""
    leaves, upstream = inputs(shape)
    ours(*leaves, shape[3]).backward(upstream)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    segment_loop(*wide, shape[3]).backward(upstream.double())
    for name, x, w in zip("q k v beta".split(), leaves, wide):
        error = float((x.grad - w.grad).norm() / w.grad.norm())
        assert error < 1e-5, f"{name}: relative RMS error {error:.1e} of shape {shape}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| (Hq, Hkv, D, N, T) | way | forward ms | both ms | × ours | peak MiB |\n|---|---|---|---|---|---|")
    for shape in SHAPES:
        check((*shape[:4], 4 * shape[3]))
        leaves, upstream = inputs(shape)
        times = {way: [] for way in WAYS}
        for _ in range(options.rounds + 1):
            for way in WAYS:
                times[way].append(step(way, shape, leaves, upstream))
        # The first round warms up.
        medians = {w: [statistics.median(x) * 1e3 for x in zip(*t[1:])] for w, t in times.items()}
        for way, (forward, both) in medians.items():
            mib = memory(way, shape, options.threads)
            times_ours = both / medians["ours"][1]
            print(f"| {shape} | {way} | {forward:.1f} | {both:.1f} | {times_ours:.2f} | {mib:.0f} |", flush=True)
            row = dict(shape=shape, way=way, forward_ms=forward, both_ms=both, peak_mib=mib)
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
