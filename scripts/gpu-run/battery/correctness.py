"""Groups of cases and the sanitizers over them, in one pool."""

from .groups import Group, judge
from .limits import POOLED
from .pool import Outcome, Task
from .tools import TOOLS, report
from .visit import Visit


def run(visit: Visit, stages: tuple[str, ...], until: float) -> None:
    groups = visit.groups(until)
    for stage in stages:
        if stage != "sanitizer":
            submit_stage(visit, stage, [g for g in groups if g.stage == stage])
    if "sanitizer" in stages:
        submit_sanitizers(visit, [g for g in groups if g.stage == "kernel"])
    visit.pool.run(until)


def submit_stage(visit: Visit, stage: str, groups: list[Group]) -> None:
    """Newest kernels first."""
    limits = visit.limits
    seconds = getattr(limits, stage)
    at_once = limits.full_at_once if stage == "full" else limits.at_once
    env = visit.checked(visit.threads(min(at_once, len(groups))))
    for group in groups:
        def then(outcome: Outcome, group: Group = group) -> None:
            verdict = judge(group, outcome)
            visit.verdicts.append(verdict)
            if verdict.bad:
                visit.say(f"{group.name}: {verdict.kind}, {verdict.sentence}")
                visit.diagnosis.consider(verdict)
        rank = (1 + POOLED.index(stage), not group.newest)
        visit.pool.submit(
            Task(stage, group.name, group.command(), seconds, then, env, rank, at_once))


def submit_sanitizers(visit: Visit, groups: list[Group]) -> None:
    if visit.sanitizer.why:
        return
    for number, tool in enumerate(TOOLS):
        for group in groups:
            def then(outcome: Outcome, tool: str = tool, group: Group = group) -> None:
                if not visit.refused(outcome):
                    visit.sanitized.append((tool, group, *report(outcome)))
            command = visit.sanitizer.command(tool, group.command())
            rank = (1 + POOLED.index("sanitizer"), not group.newest, number)
            visit.pool.submit(Task("sanitizer", f"{tool} {group.name}", command,
                                   visit.limits.sanitizer, then, visit.checked(), rank))
