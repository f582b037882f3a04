"""Benchmarks, the comparison with PyTorch, and ncu: one process at a time, nothing beside it."""

import csv
import re
import sys
import time

from . import card, tools
from .groups import described
from .limits import ROWS
from .pool import Outcome
from .tools import find
from .visit import Visit

# Kernels, each with the beginning of the headline shapes that run it.
NCU_KERNELS = {"segment_attention": "local attention", "decode": "decode"}
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = ("long_scoreboard", "short_scoreboard", "wait", "barrier", "gmma", "math_pipe_throttle",
          "mio_throttle", "lg_throttle", "tex_throttle", "membar", "sleeping", "branch_resolving",
          "no_instruction", "dispatch_stall", "not_selected")
SHARES = {
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "SM": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
TIME = "gpu__time_duration.sum"
METRICS = [TIME, "smsp__cycles_active.avg", "launch__registers_per_thread",
           "sm__warps_active.avg.pct_of_peak_sustained_active", *SHARES.values(),
           "lts__t_sector_hit_rate.pct", "dram__bytes_read.sum", "dram__bytes_write.sum",
           "smsp__inst_executed.sum", "smsp__issue_active.avg.pct_of_peak_sustained_active",
           *map(STALL.format, STALLS)]


def bench(visit: Visit, stages: tuple[str, ...], until: float) -> None:
    """The rows in one process; after one that hangs or fails a further process goes on."""
    lines = visit.report["bench"] = []
    end = ROWS.get(visit.command, "")
    first, lost = 0, []
    while len(lost) < visit.limits.lost_rows:
        seconds = until - time.monotonic()
        outcome = visit.alone("bench", ["./cuda-bench", "--bench"], until, env={
            "INFINI_BENCH_ROWS": f"{first}..{end}",
            # The rest is for buffers and captures.
            "INFINI_BENCH_SECONDS": str(max(1, int(seconds * 2 / 3))),
            "INFINI_BENCH_JSON": str(visit.results.path("bench.jsonl"))}, quiet=visit.limits.quiet)
        begun = re.findall(r"^row (\d+) (.*)$", outcome.text, re.M)
        if outcome.good or outcome.end in ("cut", "unrun") or not begun:
            break
        number, name = begun[-1]
        lost.append(f"{name}: {card.why(outcome)}; {described(outcome.pending)}")
        first = int(number) + 1
    measured = visit.results.rows("bench.jsonl")
    lines += bench_table(measured)
    complete(visit, "cuda-bench", outcome, lines)
    visit.failures += [f"cuda-bench, {text}" for text in lost]
    if not measured:
        visit.failures.append("cuda-bench: nothing was measured")
    lines.append("after it: " + card.smi(visit, until))


def complete(visit: Visit, what: str, outcome: Outcome, lines: list[str]) -> None:
    """Says why a measurement has less than all rows; to have had no time is no failure."""
    if not outcome.good:
        lines.insert(0, f"not complete: {card.why(outcome)}")
    if outcome.end == "exit" and outcome.status:
        visit.failures.append(f"{what}: {card.why(outcome)}")


def bench_table(rows: list[dict]) -> list[str]:
    table = [f"{'µs':>10} {'TFLOP/s':>8} {'GB/s':>6} {'roofline':>8}"]
    for row in {row["operation"]: row for row in rows}.values():
        share = "unknown" if row.get("roofline") is None else f"{row['roofline']:.0%}"
        table.append(f"{row['us']:10.1f} {row['tflops']:8.1f} {row['gbs']:6.0f} {share:>8}  "
                     f"{row['operation']}")
    return table if rows else ["no rows"]


def compare(visit: Visit, stages: tuple[str, ...], until: float) -> None:
    lines = visit.report["compare"] = []
    if not tools.importable("torch"):
        lines.append(f"not run: {sys.executable} has no PyTorch")
        return
    seconds = (until - time.monotonic()) * 0.9
    outcome = visit.alone("compare", [
        sys.executable, "compare.py", "--device", "cuda", "--ours", "./cuda-bench", "--seconds",
        f"{seconds:.0f}", "--json", str(visit.results.path("compare.jsonl"))], until,
        env={"PYTHONPATH": str(visit.folder / "python" / "package")})
    rows = visit.results.rows("compare.jsonl")
    lines += compare_table(rows)
    visit.failures += [f"compare, ours: {row['failed']}" for row in rows
                       if row.get("way") == "infini_attn" and "failed" in row]
    complete(visit, "compare", outcome, lines)


def compare_table(rows: list[dict]) -> list[str]:
    """Times of PyTorch's ways over ours, a line per shape."""
    lines = [f"torch {row['torch']}: bf16 8192^3 at {row['matmul_tflops']:.0f} TFLOP/s on random "
             f"data, a copy moves {row['copy_gbs']:.0f} GB/s" for row in rows if "device" in row]
    lines += [f"our output against PyTorch's in float32: error {row['ours_error']:.1e}"
              for row in rows if "ours_error" in row]
    shapes: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if "us" in row:
            shapes.setdefault(tuple(row["shape"]), {})[row["way"]] = row["us"]
    for shape, ways in shapes.items():
        ours = ways.pop("infini_attn", None)
        unit = f"ours {ours:.0f} µs; time ÷ ours" if ours else "ours not measured; µs"
        figures = ", ".join(f"{way} {us / ours:.2f}" if ours else f"{way} {us:.0f}"
                            for way, us in ways.items())
        lines.append(f"{shape}: {unit}: {figures}")
    skipped = sum("skipped" in row for row in rows)
    failed = {f"{row['way']}: {row['failed']}" for row in rows if "failed" in row}
    lines += [f"failed: {text}" for text in sorted(failed)]
    return lines + ([f"{skipped} ways not measured: no time was left"] if skipped else [])


def ncu(visit: Visit, stages: tuple[str, ...], until: float) -> None:
    lines = visit.report["ncu"] = []
    path = find("ncu")
    if not path:
        lines.append("not run: ncu found neither in PATH nor beside nvcc")
        return
    for number, (kernel, case) in enumerate(NCU_KERNELS.items()):
        now = time.monotonic()
        part = now + (until - now) / (len(NCU_KERNELS) - number)
        outcome = visit.alone("ncu", [
            path, "--clock-control", "none", "--kernel-name", f"regex:{kernel}",
            "--launch-skip", "1", "--launch-count", "2", "--kill", "yes", "--page", "raw", "--csv",
            "--metrics", ",".join(METRICS), "./cuda-bench", "--headline", "0.1",
            case], part)
        table = ncu_lines(outcome.text)
        refused = re.search(r"==ERROR== .*", outcome.text)
        lines += table or [f"{kernel}: {refused.group() if refused else card.why(outcome)}"]


def ncu_lines(text: str) -> list[str]:
    """A line per profiled launch from ncu's CSV: a row of names, one of units, one per launch."""
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return []
    lines = []
    units = dict(zip(rows[0], rows[1]))
    for values in rows[2:]:
        row = dict(zip(rows[0], values))
        shares = ", ".join(f"{name} {number(row, key):.0f} %" for name, key in SHARES.items()
                           if number(row, key) is not None)
        stalls = {stall: number(row, STALL.format(stall)) or 0 for stall in STALLS}
        worst = sorted(stalls, key=stalls.get, reverse=True)[:4]
        waits = ", ".join(f"{stall} {stalls[stall]:.2f}" for stall in worst)
        lines.append(f"{row.get('Kernel Name')}: {row.get(TIME)} {units.get(TIME)}; {shares}; "
                     f"warps stalled per issue: {waits}")
    return lines


def number(row: dict[str, str], key: str) -> float | None:
    try:
        return float(row[key].replace(",", ""))
    except (KeyError, ValueError):
        return None
