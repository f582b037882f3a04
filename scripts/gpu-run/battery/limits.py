"""Every figure of time, number and size, in one place."""

from dataclasses import dataclass, fields, replace

# What the time is shared by. A phase may last its share of the time that is left, out of its own
# and the later ones: what ends early leaves its time to all that follow. The stages that run
# together in one pool, kernel to sanitizer, are one phase.
SHARES = {"card": 9, "kernel": 15, "table": 17, "full": 8, "python": 5, "candle": 2, "sanitizer": 8,
          "bench": 17, "compare": 11, "ncu": 7, "variants": 90}
POOLED = ("kernel", "table", "full", "python", "candle", "sanitizer")

# Seconds if none are given, and stages.
COMMANDS = {
    "battery": (180, ("card", *POOLED, "bench", "compare", "ncu")),
    "quick": (45, ("card", "kernel", "bench")),
    "test": (120, ("card", "kernel", "table", "full", "python", "candle")),
    "python": (120, ("card", "python")),
    "candle": (120, ("card", "candle")),
    "sanitize": (120, ("card", "sanitizer")),
    "bench": (120, ("card", "bench")),
    "compare": (120, ("card", "compare")),
    "ncu": (60, ("card", "ncu")),
    "variants": (180, ("card", "variants")),
}

# Rows of the benchmarks' table, which begins with what says most.
ROWS = {"quick": 2}


@dataclass(frozen=True)
class Limits:
    # Seconds of one process.
    ask: float = 10.0  # nvidia-smi, --list, --card
    kernel: float = 30.0
    table: float = 45.0
    full: float = 60.0
    python: float = 60.0  # importing PyTorch and compiling for it included
    candle: float = 60.0  # its kernels are compiled by the driver
    sanitizer: float = 30.0
    diagnose: float = 25.0
    blocking: float = 15.0
    portable: float = 15.0
    examine: float = 20.0  # the sanitizer on one failed case
    check: float = 25.0  # a kernel of a variant
    quiet: float = 12.0  # a benchmark that says nothing
    # Seconds of the visit.
    reserve: float = 4.0  # for the summary, after everything was ended
    dying: float = 6.0  # from SIGKILL to giving a process up; less where the visit ends
    least: float = 1.0  # with less than this left nothing is started
    rewrite: float = 2.0  # between two versions of results/summary.txt
    # Seconds of one turn of the variants, without its start: at least, at most, and as guessed.
    turn: tuple[float, float, float] = (0.5, 4.0, 1.5)
    # Numbers.
    at_once: int = 14
    full_at_once: int = 3
    python_at_once: int = 3
    candle_at_once: int = 3
    diagnosed: int = 6
    rounds: int = 5
    lost_rows: int = 4  # benchmarks that hang or fail before no more are begun
    # Bytes and characters.
    summary: int = 10_000
    flood: int = 16 << 20  # output at which a process is ended
    log_passed: int = 4_000  # of a group, in groups.log
    log_failed: int = 32_000
    log_file: int = 2 << 20

    def scaled(self, factor: float) -> "Limits":
        """The same with all seconds multiplied."""
        def scale(value):
            if isinstance(value, tuple):
                return tuple(scale(x) for x in value)
            return value * factor if isinstance(value, float) else value
        return replace(self, **{f.name: scale(getattr(self, f.name)) for f in fields(self)})


def phases(stages: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Stages that run together, and their shares."""
    pooled = tuple(s for s in stages if s in POOLED)
    groups: list[tuple[str, ...]] = []
    for stage in stages:
        group = pooled if stage in POOLED else (stage,)
        if group not in groups:
            groups.append(group)
    return [(group, sum(SHARES[s] for s in group)) for group in groups]
