"""Which card this is, and what it gives before any kernel of ours has run."""

import os
import re
import subprocess
from pathlib import Path

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


def smi(visit: Visit, until: float) -> str:
    for reasons in REASONS:
        command = ["nvidia-smi", f"--query-gpu={FIELDS},{reasons}", "--format=csv,noheader"]
        outcome = visit.alone("card", command, until, visit.limits.ask)
        if outcome.good and (lines := outcome.text.strip().splitlines()):
            values = [value.strip() for value in lines[0].split(",")]
            shown = [f"{name} {value}" for name, value in zip(NAMES, values[2:])]
            return f"{values[0]}, driver {values[1]}: " + ", ".join(shown)
    return f"nvidia-smi: {why(outcome)}"


class Clocks:
    """nvidia-smi beside everything: it keeps the device open between processes, which would make each
    initialise it anew, and tells what the clocks were meanwhile."""

    def __init__(self, path: Path):
        self.path, self.process = path, None
        command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu",
                   "--format=csv,noheader,nounits", "-l", "1"]
        try:
            with open(path, "wb") as output:
                self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output,
                                                stderr=subprocess.STDOUT, preexec_fn=os.setpgrp)
        except OSError:
            pass

    def end(self) -> list[str]:
        if not self.process:
            return []
        self.process.kill()
        rows = re.findall(r"^([\d.]+), ([\d.]+), (\d+)$", self.path.read_text(), re.M)
        if not rows:
            return []
        clock, power, heat = ([float(x) for x in column] for column in zip(*rows))
        return [f"meanwhile: SM {min(clock):.0f} to {max(clock):.0f} MHz, up to {max(power):.0f} W "
                f"and {max(heat):.0f} °C"]


def figures(row: dict) -> str:
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in row.items())


def why(outcome: Outcome) -> str:
    """Why a process gave nothing."""
    if outcome.end == "exit":
        return f"status {outcome.status}, {last_words(outcome.text)}"[:300]
    if outcome.end == "unrun":
        return f"not run, {outcome.text}"
    return f"ended after {outcome.seconds:.0f} s"
