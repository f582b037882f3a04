"""Which card this is, and what it gives before any kernel of ours has run."""

import sys
from importlib.util import find_spec

from .groups import last_words
from .pool import Outcome
from .results import json_rows
from .visit import Visit

FIELDS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit," \
    "memory.used,memory.total,temperature.gpu"
NAMES = ("SM", "of at most", "memory", "power", "limit", "used", "of", "°C", "throttled by")
# Newer drivers, older drivers.
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def run(visit: Visit, stages: tuple[str, ...], until: float) -> None:
    lines = visit.report["card"] = [smi(visit, until)]
    outcome = visit.alone("card", ["./cuda-bench", "--card"], until, visit.limits.ask)
    rows = json_rows(outcome.text)
    lines.append(figures(rows[-1]) if rows else f"cuda-bench --card: {why(outcome)}")
    if {"bench", "compare"} & set(visit.stages):
        lines.append(rates(visit, until))


def smi(visit: Visit, until: float) -> str:
    for reasons in REASONS:
        command = ["nvidia-smi", f"--query-gpu={FIELDS},{reasons}", "--format=csv,noheader"]
        outcome = visit.alone("card", command, until, visit.limits.ask)
        if outcome.good and (lines := outcome.text.strip().splitlines()):
            values = [value.strip() for value in lines[0].split(",")]
            shown = [f"{name} {value}" for name, value in zip(NAMES, values[2:])]
            return f"{values[0]}, driver {values[1]}: " + ", ".join(shown)
    return f"nvidia-smi: {why(outcome)}"


def rates(visit: Visit, until: float) -> str:
    if not find_spec("torch"):
        return f"{sys.executable} has no PyTorch"
    script = str(visit.folder / "battery" / "rates.py")
    outcome = visit.alone("card", [sys.executable, script], until, visit.limits.rates)
    rows = json_rows(outcome.text)
    if not rows:
        return f"PyTorch's rates: {why(outcome)}"
    row = rows[-1]
    return (f"torch {row['torch']}: bf16 8192^3 at {row['matmul_tflops']:.0f} TFLOP/s on random "
            f"data, a copy moves {row['copy_gbs']:.0f} GB/s")


def figures(row: dict) -> str:
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in row.items())


def why(outcome: Outcome) -> str:
    """Why a process gave nothing."""
    if outcome.end == "exit":
        return f"status {outcome.status}, {last_words(outcome.text)}"[:300]
    if outcome.end == "unrun":
        return f"not run, {outcome.text}"
    return f"nothing in {outcome.seconds:.0f} s"
