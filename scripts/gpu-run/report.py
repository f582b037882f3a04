"""One Markdown page from the JSON lines of a results folder: python report.py FOLDER."""

import json
import sys
from pathlib import Path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cell(value, form):
    return "" if value is None else format(value, form)


def table(head, rows):
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |")
    print()


def steps(folder):
    print("## Steps\n")
    rows = lines(folder / "steps.jsonl")
    table(["step", "", "seconds", ""],
          [[r["step"], "ok" if r["ok"] else "not ok", r["seconds"], r["what"]] for r in rows])


def bench(folder):
    rows = lines(folder / "bench.jsonl")
    if not rows:
        return
    last = {r["operation"]: r for r in rows}.values()
    first = rows[-1]
    print(f"## Benchmarks\n\n{first['device']}; a copy moves {first['copy_gbs']:.0f} GB/s, peak "
          f"{cell(first['peak_tflops'], '.0f') or 'unknown'} TFLOP/s\n")
    table(["operation", "µs", "TFLOP/s", "GB/s", "of the roofline"],
          [[r["operation"], f"{r['us']:.1f}", f"{r['tflops']:.1f}", f"{r['gbs']:.0f}",
            cell(r["roofline"], ".0%")] for r in last])


def compare(folder):
    rows = lines(folder / "compare.jsonl")
    if not rows:
        return
    print("## Against PyTorch\n")
    shapes = {}
    for r in rows:
        if "device" in r:
            print(f"{r['device']}, torch {r['torch']}; a copy moves {r['copy_gbs']:.0f} GB/s\n")
        elif "ours_error" in r:
            print(f"Our output against PyTorch's in float32: error {r['ours_error']:.1e}\n")
        else:
            shapes.setdefault(tuple(r["shape"]), {})[r["way"]] = r
    for shape, ways in shapes.items():
        ours = ways.get("infini_attn", {}).get("us")
        print(f"(Hq, Hkv, D, N, T) = {shape}\n")
        table(["", "ms", "TFLOP/s", "time ÷ ours"],
              [[name, f"{r['us'] / 1e3:.3f}", f"{r['tflops']:.0f}",
                f"{r['us'] / ours:.2f}" if ours else ""] if "us" in r
               else [name, r.get("failed") or r.get("skipped"), "", ""]
               for name, r in ways.items()])
        verdict(ways, ours)


def verdict(ways, ours):
    """The ratios that the project set itself."""
    best = lambda start: min((r["us"] for name, r in ways.items()
                              if name.startswith(start) and "us" in r), default=None)
    if not ours:
        return
    for what, start in (("the eager loop", "loop, eager"), ("the compiled loop", "loop, compiled"),
                        ("PyTorch at its best", "best")):
        if us := best(start):
            print(f"- {us / ours:.2f} times as fast as {what}")
    if local := best("local attention"):
        print(f"- {ours / local:.2f} times the time of PyTorch's local attention alone")
    print()


def main():
    folder = Path(sys.argv[1])
    commit = Path("commit")
    print(f"# Results\n\nCommit {commit.read_text().strip() if commit.exists() else 'unknown'}\n")
    steps(folder)
    bench(folder)
    compare(folder)


if __name__ == "__main__":
    main()
