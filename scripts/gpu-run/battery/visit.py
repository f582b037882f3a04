"""What the parts of a visit share: the bundle, the pool, the results, and what is known so far."""

import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from . import summary, tools
from .diagnosis import Diagnosis
from .groups import BAD, Group, Verdict, listed
from .limits import COMMANDS, POOLED, Limits
from .pool import Outcome, Pool, Task
from .results import Results

BOUNDED = "kernels/bounded"


class Visit:
    def __init__(self, folder: Path, scratch: Path, command: str, seconds: float, limits: Limits,
                 only: str = ""):
        self.folder, self.command, self.seconds = folder, command, seconds
        self.stages, self.only = COMMANDS[command][1], only
        self.begin = time.monotonic()
        self.end = self.begin + seconds - min(limits.reserve, seconds / 4)
        self.results = Results(Path(os.environ["INFINI_RESULTS"]), limits.log_file, self.stages)
        # As many as the cores can serve.
        limits = replace(limits, at_once=min(limits.at_once, max(2, (os.cpu_count() or 1) - 2)))
        self.limits = limits
        self.pool = Pool(limits, folder, scratch, self.finished)
        self.pool.visit_end = self.end
        self.sanitizer, self.diagnosis = tools.Sanitizer(), Diagnosis(self)
        self.written = self.begin
        self.spans: dict[str, tuple[float, float]] = {}  # of the stages, first start and last end
        # What the summary is made of.
        self.verdicts: list[Verdict] = []
        self.sanitized: list[tuple[str, Group, str, str]] = []  # tool, group, kind, sentence
        self.report: dict[str, list[str]] = {}  # lines of card, bench, compare, ncu, variants
        self.missing: dict[str, str] = {}  # why a stage has no groups
        self.failures: list[str] = []  # of what is no group
        self.signal = 0  # that ended the visit

    # ---- processes

    def checked(self, threads: int = 1) -> dict[str, str]:
        """Environment of a test: kernels whose waits end, its share of the cores."""
        env = {"RAYON_NUM_THREADS": str(threads)}
        if (self.folder / BOUNDED).is_dir():
            env["INFINI_KERNELS"] = BOUNDED
        return env

    def threads(self, side_by_side: int) -> int:
        return max(1, (os.cpu_count() or 1) // max(1, side_by_side))

    def alone(self, stage: str, command: list[str], until: float, seconds: float = 1e9,
              env: dict[str, str] | None = None, quiet: float = math.inf) -> Outcome:
        """One process, and nothing beside it."""
        outcomes: list[Outcome] = []
        name = " ".join(command)[:200]
        self.pool.submit(
            Task(stage, name, command, seconds, outcomes.append, env or {}, quiet=quiet))
        self.pool.run(until)
        return outcomes[0]

    def groups(self, until: float) -> list[Group]:
        """The groups of device-tests, and of the packages where there is what they need; none is a
        failure."""
        programs: dict[str, tuple[list[str], dict[str, str]]] = {
            "device-tests": (["./device-tests", "--list", "--format", "terse"], {})}
        if "python" in self.stages:
            if tools.importable("torch"):
                programs["python-tests"] = [sys.executable, "python-tests", "--list"], {}
            else:
                self.missing["python"] = "there is no PyTorch"
        if "candle" in self.stages:
            command = ["./candle-tests", "--list", "--format", "terse"]
            programs["candle-tests"] = command, tools.libraries()
        groups: list[Group] = []
        for name, (command, env) in programs.items():
            outcome = self.alone("list", command, until, self.limits.ask, env)
            found = listed(outcome.text)
            groups += [g for g in found if re.search(self.only, g.name)]
            absent = re.search(r"error while loading shared libraries: (\S+):", outcome.text)
            if absent and name == "candle-tests":
                self.missing["candle"] = f"there is no {absent[1]}"
            elif not found and outcome.end == "exit":
                self.failures.append(f"{name} listed no groups: status {outcome.status}, "
                                     + outcome.text.strip()[-200:])
        if not groups and self.only:
            self.failures.append(f"{' and '.join(programs)} listed no groups of {self.only}")
        return groups

    def finished(self, outcome: Outcome) -> None:
        """After every process: its line in battery.jsonl, its output in a log."""
        task, now = outcome.task, time.monotonic()
        if outcome.end != "unrun":
            start, _ = self.spans.get(task.stage, (now, now))
            self.spans[task.stage] = (min(start, now - outcome.seconds), now)
            log = "groups.log"
            if "compute-sanitizer" in task.command[0]:
                log = "sanitizer.log"
            elif task.stage == "ncu":
                log = "ncu.txt"
            cap = self.limits.log_passed if outcome.good else self.limits.log_failed
            title = f"{task.stage} {task.name}: {outcome.end}, status {outcome.status}, " \
                f"{outcome.seconds:.1f} s"
            pending = "".join(f"pending: {text}\n" for text in outcome.pending[:8])
            self.results.log(log, title, outcome.text + pending, cap)
        self.results.event(stage=task.stage, name=task.name, end=outcome.end,
                           status=outcome.status, seconds=round(outcome.seconds, 2),
                           pending=outcome.pending[:4], stuck=outcome.stuck)
        if outcome.stuck:
            self.failures.append(f"{task.name}: survived SIGKILL and was left behind")
        if now - self.written > self.limits.rewrite:
            self.write()

    def refused(self, outcome: Outcome) -> bool:
        """Whether compute-sanitizer did not run; from then on it is not tried again."""
        if not self.sanitizer.why:
            self.sanitizer.why = self.sanitizer.refusal(outcome)
            if self.sanitizer.why:
                self.pool.drop(lambda task: "compute-sanitizer" in task.command[0], "")
        return bool(self.sanitizer.why)

    # ---- the summary

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:5.1f} s] {text}", flush=True)

    def write(self) -> str:
        self.written, text = time.monotonic(), summary.text(self)
        try:
            self.results.write("summary.txt", text)
        except OSError as error:
            return f"summary.txt: {error}\n{text}"
        return text

    def stop(self, number: int, frame: object) -> None:
        """On a signal: what runs is ended, and the summary follows."""
        self.signal, self.pool.over = number, time.monotonic()

    def status(self) -> int:
        """0 only if nothing failed, and something was executed."""
        if self.signal:
            return 128 + self.signal
        kinds = {v.kind for v in self.verdicts}
        kinds |= {kind for tool, _, kind, _ in self.sanitized if tool != "initcheck"}
        idle = set(POOLED) & set(self.stages) and not kinds & {"passed", "clean"}
        return int(bool(idle or kinds & {*BAD, "found"} or self.failures or self.pool.mistakes))
