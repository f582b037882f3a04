"""The summary: at most so many characters, the least valuable lines cut first."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .limits import POOLED

if TYPE_CHECKING:
    from .visit import Visit

NAMES = {"cut": "not done in time", "unrun": "not run"}
WIDEST = 600  # characters of one line
REST = 60  # of what says how many lines were cut


@dataclass
class Section:
    title: str
    lines: list[str]
    keep: int  # lines that are cut only when nothing else is left to cut
    file: str  # of the results, where the rest is
    whole: int = 0  # lines before anything was cut


def text(visit: Visit) -> str:
    # As printed. Cut is first what comes last in `order`.
    sections = {
        "head": Section("", head(visit), 20, "battery.jsonl"),
        "failed": Section("failed", failed(visit), 12, "groups.log"),
        "stages": Section("stages", stages(visit), 8, "battery.jsonl"),
        "sanitizer": Section("compute-sanitizer", sanitizer(visit), 8, "sanitizer.log"),
        "bench": Section("benchmarks", visit.report.get("bench", []), 6, "bench.jsonl"),
        "variants": Section("variants", visit.report.get("variants", []), 12, "variants.jsonl"),
        "compare": Section("against PyTorch", visit.report.get("compare", []), 3, "compare.jsonl"),
        "ncu": Section("ncu", visit.report.get("ncu", []), 2, "ncu.txt"),
    }
    order = ("head", "stages", "failed", "variants", "bench", "sanitizer", "compare", "ncu")
    return fitted(list(sections.values()), [sections[name] for name in reversed(order)],
                  visit.limits.summary)


def fitted(sections: list[Section], cut_first: list[Section], limit: int) -> str:
    for section in sections:
        section.whole = len(section.lines)
        section.lines = [line if len(line) <= WIDEST else line[: WIDEST - 4] + " ..."
                         for line in section.lines]
    size = sum(len(line) + 1 for section in sections for line in section.lines)
    room = limit - sum(len(section.title) + REST for section in sections)
    for keep in (True, False):
        for section in cut_first:
            while size > room and len(section.lines) > section.keep * keep:
                size -= len(section.lines.pop()) + 1
    return "".join(map(shown, sections))[:limit]


def shown(section: Section) -> str:
    cut = section.whole - len(section.lines)
    rest = [f"... {cut} more lines, in {section.file}"] if cut else []
    title = [f"\n{section.title}"] if section.title else []
    return "\n".join(title + section.lines + rest) + "\n" if section.lines or rest else ""


def head(visit: Visit) -> list[str]:
    commit = visit.folder / "commit"
    took = time.monotonic() - visit.begin
    lines = [f"{visit.command} of {visit.seconds:.0f} s, ended after {took:.1f} s; commit "
             + (commit.read_text().strip() if commit.exists() else "unknown")]
    if visit.signal:
        lines.append(f"ended early, by signal {visit.signal}")
    return lines + visit.report.get("card", [])


def failed(visit: Visit) -> list[str]:
    """A line per failure and one per part of its diagnosis; those diagnosed come first."""
    lines = visit.failures + visit.pool.mistakes
    bad = [v for v in visit.verdicts if v.bad]
    for v in sorted(bad, key=lambda v: len(v.notes) < 2):
        case = f"; case {v.case}" if v.case else ""
        lines.append(f"{v.group.name}: {v.kind}: {v.sentence}{case}")
        lines += [f"    {label}: {note}" for label, note in v.notes.items() if note]
    return lines


def stages(visit: Visit) -> list[str]:
    """What was executed and what was not, by stage."""
    lines = []
    for stage in (s for s in visit.stages if s in POOLED and s != "sanitizer"):
        verdicts = [v for v in visit.verdicts if v.group.stage == stage]
        kinds = Counter("failed" if v.bad else v.kind for v in verdicts)
        start, end = visit.spans.get(stage, (0.0, 0.0))
        counts = ", ".join(f"{n} {NAMES.get(kind, kind)}" for kind, n in kinds.items())
        cases = sum(v.cases for v in verdicts)
        if stage in visit.missing:
            lines.append(f"{stage}: not run: {visit.missing[stage]}")
            continue
        lines.append(f"{stage}: {counts or 'no groups'}; {cases} cases, {end - start:.1f} s")
        for kind in ("cut", "unrun", "skipped"):
            some = [v for v in verdicts if v.kind == kind]
            if some:
                names = ", ".join(v.group.name for v in some[:6])
                more = f" and {len(some) - 6} more" if len(some) > 6 else ""
                lines.append(f"    {NAMES.get(kind, kind)}: {names}{more}: {some[0].sentence}")
    return lines


def sanitizer(visit: Visit) -> list[str]:
    wanted = "sanitizer" in visit.stages or any(v.bad for v in visit.verdicts)
    lines = [f"not run: {visit.sanitizer.why}"] if wanted and visit.sanitizer.why else []
    findings = []
    for tool in dict.fromkeys(tool for tool, *_ in visit.sanitized):
        runs = [(group, kind, what) for name, group, kind, what in visit.sanitized if name == tool]
        kinds = Counter(kind for _, kind, _ in runs)
        found = f"{kinds['found']} with reports"
        if tool == "initcheck" and kinds["found"]:
            found += " (to be read: copies take along rows that nobody wrote)"
        none = f"{kinds['none']} without a result"
        lines.append(f"{tool}: {kinds['clean']} groups clean, {found}, {none}")
        for kind in ("found", "none"):
            alike: dict[str, list[tuple[str, str]]] = {}
            for group, _, what in (run for run in runs if run[1] == kind):
                alike.setdefault(re.sub(r"0x\w+|\d+", "#", what), []).append((group.name, what))
            for (name, what), *others in alike.values():
                more = f" and {len(others)} more" if others else ""
                findings.append(f"    {tool}, {name}{more}: {what}")
    return lines + findings
