"""Groups of cases and the sanitizers over them, in one pool."""

import sys

from . import tools
from .groups import Group, judge
from .pool import Outcome, Task
from .tools import TOOLS, report
from .visit import Visit

LAST = 4  # after every order()
# The kernels as they are; what looks at every access gets the smallest shapes.
SANITIZED = {"RAYON_NUM_THREADS": "1", "INFINI_SMALL": "1"}


def run(visit: Visit, stages: tuple[str, ...], until: float) -> None:
    groups = visit.groups(until)
    if "compare" in visit.stages and tools.importable("torch"):
        warm_up(visit)
    for stage in stages:
        if stage != "sanitizer":
            submit_stage(visit, stage, [g for g in groups if g.stage == stage])
    if "sanitizer" in stages:
        submit_sanitizers(visit, [g for g in groups if g.stage == "kernel"])
    visit.pool.run(until)


def warm_up(visit: Visit) -> None:
    """PyTorch is gigabytes that come from a cold disk, for the comparison later on."""
    command = [sys.executable, "-c", "import torch, torch._dynamo"]
    visit.pool.submit(Task("warm-up", "import torch", command, visit.limits.table,
                           lambda outcome: None, rank=(1,)))


def submit_stage(visit: Visit, stage: str, groups: list[Group]) -> None:
    """Newest kernels first."""
    limits = visit.limits
    seconds = getattr(limits, stage)
    at_once = getattr(limits, f"{stage}_at_once", limits.at_once)
    env = visit.checked(visit.threads(min(at_once, len(groups))))
    if stage == "candle":
        env |= tools.libraries()
    for group in groups:
        def then(outcome: Outcome, group: Group = group) -> None:
            verdict = judge(group, outcome)
            visit.verdicts.append(verdict)
            if verdict.bad:
                visit.say(f"{group.name}: {verdict.kind}, {verdict.sentence}")
                visit.diagnosis.consider(verdict)
        rank = (order(group), not group.newest)
        visit.pool.submit(
            Task(stage, group.name, group.command(), seconds, then, env, rank, at_once))


def order(group: Group) -> int:
    """What teaches most for its time first; the sanitizers come last."""
    if group.stage == "kernel" or group.subject == "record":
        return 1
    return 3 if group.subject.startswith("prefill") and group.stage == "full" else 2


def submit_sanitizers(visit: Visit, groups: list[Group]) -> None:
    if visit.sanitizer.why:
        return
    for number, tool in enumerate(TOOLS):
        for group in groups:
            def then(outcome: Outcome, tool: str = tool, group: Group = group) -> None:
                if not visit.refused(outcome):
                    visit.sanitized.append((tool, group, *report(outcome)))
            command = visit.sanitizer.command(tool, group.command())
            # What has to be read by somebody comes last.
            rank = (LAST, tool == "initcheck", not group.newest, number)
            visit.pool.submit(Task("sanitizer", f"{tool} {group.name}", command,
                                   visit.limits.sanitizer, then, SANITIZED, rank))
