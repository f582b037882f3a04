"""Kernel variants against the embedded kernels: checked first, then timed in turns."""

import json
import statistics
import string
import time
from dataclasses import dataclass, field

from .card import why
from .groups import Group, judge
from .pool import Outcome, Task
from .results import json_rows
from .visit import Visit

# Share of the time for the checks, if they need it.
CHECKS = 0.45
BASELINE = "baseline"
# By which switches of the host are checked.
FULL = ("full::prefill_d128_n2048", "full::decode_d128")


@dataclass
class Variant:
    """A line of variants.txt: `NAME FOLDER|- SWITCHES|-`."""
    name: str
    folder: str = "-"
    switches: str = "-"
    wrong: str = ""  # why it is not timed
    us: dict[str, list[float]] = field(default_factory=dict)  # by operation

    def env(self) -> dict[str, str]:
        env = {} if self.folder == "-" else {"INFINI_KERNELS": self.folder}
        return env if self.switches == "-" else env | {"INFINI_TARGET": self.switches}

    def touches(self, group: Group, visit: Visit) -> bool:
        """Whether it replaces the group's kernel; work is cut otherwise only at full shapes."""
        if self.switches != "-" and group.name in FULL:
            return True
        files = (visit.folder / self.folder).glob("*/*.fatbin") if self.folder != "-" else ()
        replaced = {f"{file.stem}_{file.parent.name}" for file in files}
        return group.stage == "kernel" and group.subject in replaced


def run(visit: Visit, stages: tuple[str, ...], until: float) -> None:
    lines = visit.report["variants"] = []
    path = visit.folder / "variants.txt"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    variants = [Variant(*row) for row in rows if len(row) == 3 and not row[0].startswith("#")]
    if not variants:
        lines.append("not run: variants.txt names none")
        return
    now = time.monotonic()
    check(visit, variants, now + CHECKS * (until - now))
    for variant in variants:
        if variant.wrong:
            visit.failures.append(f"variant {variant.name}: {variant.wrong}")
    timed = [Variant(BASELINE)] + [v for v in variants if not v.wrong]
    rounds = take_turns(visit, timed, until)
    lines += table(timed, rounds, visit.limits.rounds)


def check(visit: Visit, variants: list[Variant], until: float) -> None:
    """The groups of the kernels that a variant replaces; one that fails ends it."""
    groups = visit.groups(until)
    for variant in variants:
        touched = [g for g in groups if variant.touches(g, visit)]
        if not touched:
            variant.wrong = "not timed: no group of device-tests has its kernels"
        for group in touched:
            def then(outcome: Outcome, variant: Variant = variant, group: Group = group) -> None:
                verdict = judge(group, outcome)
                if verdict.kind != "passed" and not variant.wrong:
                    case = f"; case {verdict.case}" if verdict.case else ""
                    what = f"{verdict.kind}: {verdict.sentence}{case}"
                    variant.wrong = f"not timed: {group.name}: {what}"
                    visit.pool.drop(lambda task: task.name.startswith(f"{variant.name} "), "")
            visit.pool.submit(Task("check", f"{variant.name} {group.name}", group.command(),
                                   visit.limits.check, then,
                                   {"RAYON_NUM_THREADS": "1"} | variant.env(), (not group.newest,)))
    visit.pool.run(until)


def take_turns(visit: Visit, timed: list[Variant], until: float) -> int:
    """Rounds that fitted: in each the baseline is first and last."""
    least, most, overhead = visit.limits.turn
    turns = timed + timed[:1]
    left = until - time.monotonic()
    seconds = min(most, max(least, left / (visit.limits.rounds * len(turns)) - overhead))
    need = len(turns) * (seconds + overhead)
    for done in range(visit.limits.rounds):
        begin = time.monotonic()
        if begin + need > until:
            return done
        for variant in turns:
            if not variant.wrong:
                turn(visit, variant, done, seconds, until)
        need = time.monotonic() - begin
    return visit.limits.rounds


def turn(visit: Visit, variant: Variant, number: int, seconds: float, until: float) -> None:
    outcome = visit.alone("headline", ["./cuda-bench", "--headline", f"{seconds:.2f}"], until,
                          4 * seconds + visit.limits.ask, variant.env())
    if not outcome.good and outcome.end != "cut":
        variant.wrong = f"not timed further: {why(outcome)}"
        visit.failures.append(f"variant {variant.name}: {variant.wrong}")
    for row in json_rows(outcome.text):
        variant.us.setdefault(row["operation"], []).append(row["us"])
        visit.results.append("variants.jsonl", json.dumps(
            {"round": number, "variant": variant.name} | row) + "\n")


def table(timed: list[Variant], rounds: int, wanted: int) -> list[str]:
    """Medians and their ratio to the baseline's; the baseline's own spread says what is noise."""
    baseline = {operation: statistics.median(us) for operation, us in timed[0].us.items()}
    lines = [f"{rounds} of {wanted} rounds in turns, the baseline first and last in each; median "
             "µs (time ÷ the baseline's)"]
    letters = dict(zip(baseline, string.ascii_letters))
    for operation, us in timed[0].us.items():
        spread = (max(us) - min(us)) / baseline[operation]
        lines.append(f"  {letters[operation]}: {operation}; the baseline's {len(us)} runs are "
                     f"{spread:.1%} apart")
    for variant in timed:
        medians = {o: statistics.median(us) for o, us in variant.us.items() if o in letters}
        cells = [f"{letters[o]} {us:.1f} ({us / baseline[o]:.3f})" for o, us in medians.items()]
        lines.append(f"{variant.name}: " + (", ".join(cells) or "nothing timed"))
    return lines
