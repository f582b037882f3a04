"""What the card gives PyTorch: a bf16 matrix product and a copy, one JSON line."""

import json
import statistics

import torch


def milliseconds(f, rounds: int = 10) -> float:
    """Median, by events; three calls warm up."""
    times = []
    for i in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def main() -> None:
    n, size = 8192, 1 << 30
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = milliseconds(lambda: torch.mm(a, b, out=out))
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    print(json.dumps({"torch": torch.__version__, "matmul_tflops": 2 * n**3 / product / 1e9,
                      "copy_gbs": 2 * size / copy / 1e6}))


if __name__ == "__main__":
    main()
