"""python -m battery COMMAND [SECONDS [GROUPS]]; `run` starts it."""

import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from . import card, correctness, timing, tools, variants
from .limits import COMMANDS, POOLED, Limits, phases
from .visit import Visit

RUN = {"card": card.run, "bench": timing.bench, "compare": timing.compare, "ncu": timing.ncu,
       "variants": variants.run} | {stage: correctness.run for stage in POOLED}


def main(arguments: list[str], limits: Limits = Limits(), folder: Path = Path.cwd()) -> int:
    command, seconds, only, *rest = [*arguments, "", ""][: max(3, len(arguments))]
    seconds = seconds or str(COMMANDS.get(command, (0,))[0])
    tested = command == "variants" or set(POOLED) & set(COMMANDS.get(command, (0, ()))[1])
    if rest or not (seconds.isdigit() and int(seconds)) or not is_pattern(only) \
            or only and not tested or command not in COMMANDS:
        print(f"run: {' '.join(arguments)} given, one of {', '.join(COMMANDS)}, whole seconds and, "
              "where there are tests, a regular expression expected", file=sys.stderr)
        return 2
    # A process that crashes leaves no image of its memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.environ.setdefault("INFINI_RESULTS", str(folder / "results"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        visit = Visit(folder, Path(scratch), command, int(seconds), limits, only)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, visit.stop)
        tools.unpack(folder)
        clocks = card.Clocks(Path(scratch) / "clocks.csv")
        for group, until in timetable(visit):
            run_phase(visit, group, until)
        visit.report["card"] = visit.report.get("card", []) + clocks.end()
        print("\n" + visit.write(), end="", flush=True)
    return visit.status()


def is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False


def timetable(visit: Visit):
    """Phases and their ends: a share of what is left when each begins."""
    shares = phases(visit.stages)
    for i, (group, share) in enumerate(shares):
        now = time.monotonic()
        later = sum(share for _, share in shares[i:])
        yield group, now + (visit.end - now) * share / later


def run_phase(visit: Visit, stages: tuple[str, ...], until: float) -> None:
    """A mistake in one phase is a failure of it, not the end of the visit."""
    if visit.signal or until - time.monotonic() < visit.limits.least:
        visit.report[stages[0]] = ["not run: no time was left"]
        return
    try:
        RUN[stages[0]](visit, stages, until)
    except Exception:
        trace = traceback.format_exc(limit=-2)[-400:]
        visit.failures.append(f"the battery itself, in {stages[0]}: {trace}")
        visit.pool.run(0.0)
    visit.say(f"{', '.join(stages)}: over")
    visit.write()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
