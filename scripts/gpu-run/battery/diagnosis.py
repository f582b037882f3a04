"""What is run by itself once a group has failed: the failure alone, and under the tools."""

import re

from .groups import Group, Verdict, described, judge, kernels, marked, split_failure
from .pool import Outcome, Task
from .tools import report

SENTENCE = 240  # characters of a repeated failure
PORTABLE = {"INFINI_TARGET": "arch=sm80"}


class Diagnosis:
    def __init__(self, visit):
        self.visit, self.known = visit, {}

    def consider(self, verdict: Verdict) -> None:
        """Starts a diagnosis, unless the same failure has one or there are enough. What the tests
        of a package find alone is in that package."""
        if verdict.kind == "slow" or verdict.group.stage in ("python", "candle"):
            return
        key = self.key(verdict)
        same = self.known.get(key)
        if same is None and not key[0]:
            # Wrong values in the table of cases, and a kernel of these dimensions has them.
            same = next((v for (_, dims), v in self.known.items() if dims == key[1]), None)
        if same:
            verdict.notes["diagnosis"] = f"as {same.group.name}"
        elif len(self.known) >= self.visit.limits.diagnosed:
            verdict.notes["diagnosis"] = f"none, {len(self.known)} others had one"
        else:
            self.known[key] = verdict
            if verdict.kind == "wrong":
                self.smaller(verdict)
            else:
                self.alone(verdict)

    def key(self, verdict: Verdict) -> tuple[str, str]:
        """What is wrong, as far as it is known, and in which dimensions."""
        group = verdict.group
        if verdict.kind != "wrong":
            return kernels(verdict.pending) or re.sub(r"\d+", "", verdict.sentence), "-"
        if group.stage == "kernel":
            return group.subject, group.detail
        return ("", group.detail) if group.detail else (group.name, "-")

    def run(self, verdict: Verdict, label: str, seconds: float, env: dict[str, str], then,
            command: list[str] | None = None) -> None:
        """One run of the group, first in the pool."""
        def finished(outcome: Outcome) -> None:
            verdict.notes[label] = outcome.text if outcome.end == "unrun" else then(outcome)
        verdict.notes[label] = "cut"
        self.visit.pool.submit(Task(
            "diagnosis", f"{verdict.group.name} {label}", command or verdict.group.command(),
            seconds, finished, self.visit.checked() | env, rank=(0,)))

    def smaller(self, verdict: Verdict) -> None:
        """Wrong values: the smallest case that has them, then that case under the tools."""
        def then(outcome: Outcome) -> str:
            lines = marked(outcome.text, "diagnosis:")
            cases, failed = marked(outcome.text, "case "), marked(outcome.text, "failed ")
            case = split_failure(failed[0], cases)[0] if failed else verdict.case
            self.under_tools(verdict, case)
            return " | ".join(lines) or again(verdict.group, outcome)
        self.run(verdict, "diagnosis", self.visit.limits.diagnose, {"INFINI_DIAGNOSE": "1"}, then)

    def alone(self, verdict: Verdict) -> None:
        """A hang or a fault: the last case with launches that are waited for, under the tools, and
        by the portable kernels."""
        case = {"INFINI_CASE": verdict.case} if verdict.case else {}

        def blocking(outcome: Outcome) -> str:
            # Every launch is waited for: the last one is it.
            last = outcome.pending[-1:]
            return again(verdict.group, outcome) + (f" in {last[0]}" if last else "")

        limits = self.visit.limits
        self.run(verdict, "launch by launch", limits.blocking,
                 case | {"CUDA_LAUNCH_BLOCKING": "1"}, blocking)
        if not verdict.group.portable:
            self.run(verdict, "portable kernels", limits.portable, case | PORTABLE,
                     lambda outcome: again(verdict.group, outcome))
        self.under_tools(verdict, verdict.case)

    def under_tools(self, verdict: Verdict, case: str) -> None:
        """Full shapes at small ones: the tools would not get through them."""
        if self.visit.sanitizer.why:
            return
        env = {"INFINI_CASE": case} if case else {}
        if verdict.group.stage == "full":
            env["INFINI_SMALL"] = "1"
        for tool in ("memcheck", "racecheck"):
            def then(outcome: Outcome) -> str:
                return "" if self.visit.refused(outcome) else report(outcome)[1]
            command = self.visit.sanitizer.command(
                tool, verdict.group.command(), verdict.kind == "hang")
            self.run(verdict, tool, self.visit.limits.examine,
                     env, then, command)


def again(group: Group, outcome: Outcome) -> str:
    """How a repetition ended, in a few words."""
    verdict = judge(group, outcome)
    kind = verdict.kind
    if kind in ("passed", "skipped"):
        return kind
    if kind == "fault":
        return f"fault: {verdict.sentence[:SENTENCE]}"
    if kind in ("hang", "slow", "cut"):
        return f"not done in {outcome.seconds:.0f} s"
    return f"{kind}: {described(outcome.pending)}" if outcome.pending else kind
