"""NVIDIA's tools: where they are, compute-sanitizer's commands and what its reports say."""

import os
import re
import shutil
import tarfile
from importlib.util import find_spec
from pathlib import Path

from .pool import Outcome

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OPTIONS = {
    # Accesses past the end of a tensor do not meet its neighbour. The driver is asked for things that
    # need not be there.
    "memcheck": ["--padding", "256", "--report-api-errors", "no"],
    "racecheck": ["--racecheck-num-workers", "1", "--racecheck-deadlock-timeout", "0"],
    # Open segments come back to the host whole, whatever was written.
    "initcheck": ["--check-api-memory-access", "no"],
}
# Where something hangs: waits that nobody ends are named.
DEADLOCKS = ["--racecheck-deadlock-timeout", "5000"]
REFUSALS = r"not supported|[Pp]ermission|Unable to (?:find|load|launch)" \
    r"|[Ff]ailed to (?:initialize|load|launch|connect)"
SUMMARY = r"(?:ERROR|RACECHECK) SUMMARY: (\d+)"
PORTS = range(21_000, 31_000, 20)  # ten for each process, below those the kernel gives out


def find(name: str) -> str | None:
    """In PATH, beside nvcc, and where the toolkit puts it."""
    if path := shutil.which(name):
        return path
    roots = [Path("/usr/local/cuda")]
    if nvcc := shutil.which("nvcc"):
        roots.insert(0, Path(nvcc).resolve().parent.parent)
    places = [root / "bin" / name for root in roots] + [root / name / name for root in roots]
    places += sorted(Path("/opt/nvidia").glob(f"*/*/{name}"), reverse=True)
    return next((str(place) for place in places if place.is_file()), None)


def importable(name: str) -> bool:
    """Whether this Python has a package."""
    return find_spec(name) is not None


def unpack(folder: Path) -> None:
    """The programs, which travel in one archive, unless they are of this one."""
    packed, stamp = folder / "programs.tar.xz", folder / "programs.unpacked"
    if not packed.exists():
        return
    state = packed.stat()
    known = f"{state.st_size} {state.st_mtime_ns}"
    if stamp.exists() and stamp.read_text() == known:
        return
    with tarfile.open(packed) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content, member.name
            program, new = folder / member.name, folder / f"{member.name}.new"
            new.write_bytes(content.read())
            new.chmod(0o755)
            new.replace(program)
    stamp.write_text(known)


def libraries() -> dict[str, str]:
    """Where programs find the CUDA libraries that they link: in PyTorch's packages too."""
    spec = find_spec("nvidia")
    roots = (spec and spec.submodule_search_locations) or []
    folders = sorted(str(lib) for root in roots for lib in Path(root).glob("*/lib"))
    given = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": ":".join([given, *folders] if given else folders)}


class Sanitizer:
    """compute-sanitizer; `why` says what keeps it from being used."""

    def __init__(self):
        self.path = find("compute-sanitizer")
        self.why = "" if self.path else "compute-sanitizer found neither in PATH nor beside nvcc"
        self.runs = 0

    def command(self, tool: str, command: list[str], hangs: bool = False) -> list[str]:
        """Each run with ports of its own: the default ones are enough for ten side by side."""
        port = PORTS[self.runs % len(PORTS)]
        self.runs += 1
        return [str(self.path), "--tool", tool, *OPTIONS.get(tool, []),
                *(DEADLOCKS if hangs and tool == "racecheck" else []), "--print-limit", "10",
                "--launch-timeout", "0", "--check-exit-code", "no", "--port", str(port), *command]

    def refusal(self, outcome: Outcome) -> str:
        """The tool's own sentence where it did not run at all."""
        lines = [line.strip("= ") for line in outcome.text.splitlines() if line.startswith("=====")]
        refused = [line for line in lines if re.search(REFUSALS, line)]
        device = [line for line in refused if "Device not supported" in line]
        whole = outcome.end == "exit" and not re.search(SUMMARY, outcome.text)
        if device or (refused and whole):
            return (device or refused)[0]
        return ""


def report(outcome: Outcome) -> tuple[str, str]:
    """"clean", "found" or "none" (no report), and a sentence."""
    if outcome.end == "unrun":
        return "none", outcome.text
    counts = [int(n) for n in re.findall(SUMMARY, outcome.text)]
    found = findings(outcome.text)
    if sum(counts) or found:
        first = found[0] if found else "see sanitizer.log"
        return "found", f"{sum(counts) or len(found)} reported, first: {first}"
    if not counts:
        how = "" if outcome.end == "exit" else f" in {outcome.seconds:.0f} s"
        return "none", f"no report{how}"
    if not outcome.good:
        return "none", "nothing reported, but the run itself failed"
    return "clean", "clean"


def findings(text: str) -> list[str]:
    """The reports of an output, each in one line: what, where, by whom."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("========="):
            inner = line.removeprefix("=========")
            if not inner.strip():
                blocks.append([])
            elif not re.search(r"COMPUTE-SANITIZER|SUMMARY|was limited|^ Target", inner):
                blocks[-1].append(inner.strip())
    kinds = r"Invalid|Misaligned|Uninitialized|hazard|[Rr]ace|[Bb]arrier|[Dd]eadlock|Program hit" \
        r"|out of range|Address|Illegal|overflow|divergent"
    return ["; ".join(block[:3]) for block in blocks if block and re.search(kinds, block[0])]
