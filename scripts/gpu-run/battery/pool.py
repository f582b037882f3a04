"""Processes with limits: each in a process group of its own, ended with all it started."""

import math
import os
import signal
import subprocess
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from .limits import Limits

KEPT = 256 << 10  # of an output: so much of its begin and of its end


@dataclass
class Task:
    stage: str
    name: str
    command: list[str]
    seconds: float
    then: Callable[["Outcome"], None]
    env: dict[str, str] = field(default_factory=dict)
    rank: tuple = ()  # what is smallest starts first
    at_once: int | None = None  # of its stage
    quiet: float = math.inf  # seconds without output after which it counts as hanging


@dataclass
class Outcome:
    """How a process ended: by itself ("exit"), at its own "limit", "cut" with its phase, for a
    "flood" of output; or "unrun"."""
    task: Task
    end: str
    status: int | None = None
    seconds: float = 0.0
    text: str = ""
    pending: list[str] = field(default_factory=list)
    stuck: bool = False  # survived SIGKILL

    @property
    def good(self) -> bool:
        return self.end == "exit" and self.status == 0


def pending_launches(ring: Path) -> list[str]:
    """Launches the host has not waited for, oldest first: records of 256 bytes, "NUMBER TEXT"."""
    data = ring.read_bytes() if ring.exists() else b""
    records = []
    for start in range(0, len(data), 256):
        record = data[start : start + 256].strip(b"\0 \n").decode(errors="replace")
        number, _, text = record.partition(" ")
        if number.isdigit():
            records.append((int(number), text))
    pending: list[str] = []
    for _, text in sorted(records):
        pending = [] if text == "done" else pending + [text]
    return pending


class Running:
    def __init__(self, task: Task, number: int, scratch: Path, folder: Path, until: float):
        self.task, self.end, self.killed = task, "exit", 0.0
        self.output, self.ring = scratch / f"{number}.out", scratch / f"{number}.ring"
        self.started = self.grown = time.monotonic()
        self.size = 0
        self.until, self.late = min(self.started + task.seconds, until), "limit"
        if self.until == until:
            self.late = "cut"
        with open(self.output, "wb") as output:
            # Not a session of its own: whatever ends this session reaches it.
            self.process = subprocess.Popen(
                task.command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
                env=os.environ | {"INFINI_LAUNCHES": str(self.ring)} | task.env)

    def is_quiet(self, now: float) -> bool:
        """Whether its output has not grown for too long."""
        size = self.output.stat().st_size
        if size > self.size:
            self.size, self.grown = size, now
        return now > self.grown + self.task.quiet

    def kill(self, end: str | None = None) -> None:
        if end:
            self.end, self.killed = end, time.monotonic()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def outcome(self, stuck: bool) -> Outcome:
        with open(self.output, "rb") as file:
            data = file.read(KEPT)
            size = file.seek(0, os.SEEK_END)
            if size > len(data):
                file.seek(max(len(data), size - KEPT))
                data += (b"\n...\n" if size > 2 * KEPT else b"") + file.read()
        text, pending = data.decode(errors="replace"), pending_launches(self.ring)
        self.output.unlink()
        self.ring.unlink(missing_ok=True)
        return Outcome(self.task, self.end, self.process.returncode,
                       time.monotonic() - self.started, text, pending, stuck)


class Pool:
    """Runs tasks side by side. Nothing waits for a process: it is asked, ended, and given up."""

    def __init__(self, limits: Limits, folder: Path, scratch: Path,
                 finished: Callable[[Outcome], None]):
        self.limits, self.folder, self.scratch, self.finished = limits, folder, scratch, finished
        self.queue: list[tuple[tuple, int, Task]] = []
        self.running: list[Running] = []
        self.count = 0
        self.mistakes: list[str] = []  # of the battery's own
        self.over = math.inf  # a signal puts it to now
        self.visit_end = math.inf

    def submit(self, task: Task) -> None:
        self.count += 1
        self.queue.append((task.rank, self.count, task))
        self.queue.sort(key=lambda entry: entry[:2])

    def drop(self, unwanted: Callable[[Task], bool], why: str) -> None:
        """Takes tasks out of the queue; they end as not run."""
        out = [entry for entry in self.queue if unwanted(entry[2])]
        self.queue = [entry for entry in self.queue if entry not in out]
        for _, _, task in out:
            self.finish(Outcome(task, "unrun", text=why))

    def run(self, until: float) -> None:
        """Until all is done, or the time is over and everything was ended: within `dying` seconds
        of `until`, or of `over`."""
        while self.running or self.queue:
            if time.monotonic() >= min(until, self.over) - self.limits.least:
                self.drop(lambda task: True, "no time was left")
            self.start(until)
            time.sleep(0.01)
            for running in list(self.running):
                self.look(running)

    def start(self, until: float) -> None:
        at_work = [r.task.stage for r in self.running]
        for entry in list(self.queue):
            if len(at_work) >= self.limits.at_once:
                return
            task = entry[2]
            if task.at_once and at_work.count(task.stage) >= task.at_once:
                continue
            self.queue.remove(entry)
            at_work.append(task.stage)
            try:
                self.running.append(Running(task, entry[1], self.scratch, self.folder, until))
            except OSError as error:
                self.finish(Outcome(task, "exit", 127, text=f"{task.command[0]}: {error}"))
                return  # that may have changed the queue

    def look(self, running: Running) -> None:
        now = time.monotonic()
        if running.process.poll() is not None:
            running.kill()  # what it left behind
            self.end(running)
        elif running.killed:
            # The driver takes its time to end what ran.
            if now > running.killed + min(self.limits.dying, max(2.0, self.visit_end - now)):
                self.end(running, stuck=True)
        elif now > self.over:
            running.kill("cut")
        elif now > running.until:
            running.kill(running.late)
        elif running.is_quiet(now):
            running.kill("limit")
        elif running.size > self.limits.flood:
            running.kill("flood")

    def end(self, running: Running, stuck: bool = False) -> None:
        self.running.remove(running)
        self.finish(running.outcome(stuck))

    def finish(self, outcome: Outcome) -> None:
        try:
            self.finished(outcome)
            outcome.task.then(outcome)
        except Exception:  # costs what this process told, not the visit
            name, trace = outcome.task.name, traceback.format_exc(limit=-2)
            self.mistakes.append(f"the battery itself, after {name}: {trace[-400:]}")
