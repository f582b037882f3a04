"""Groups of cases of `device-tests`, `python-tests` and `candle-tests`, and what a run of one says."""

import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field

from .pool import Outcome

# Stages of their own; the rest is run with the full shapes.
STAGES = ("kernel", "table", "python", "candle")
BAD = ("wrong", "fault", "hang", "slow")

# Errors that come from the driver, as the crate, cudarc and panics word them.
DRIVER = r"CUDA: |CUDA_ERROR|DriverError|\b(?:Launch|Driver) \{"


@dataclass(frozen=True)
class Group:
    """`stage::subject[::detail]`, such as `kernel::segment_attention_sm90::d128`."""
    name: str

    @property
    def parts(self) -> list[str]:
        return self.name.split("::")

    @property
    def stage(self) -> str:
        return self.parts[0] if self.parts[0] in STAGES else "full"

    @property
    def subject(self) -> str:
        return self.parts[1] if len(self.parts) > 1 else self.name

    @property
    def detail(self) -> str:
        return "::".join(self.parts[2:])

    @property
    def newest(self) -> bool:
        return self.subject.endswith("_sm90")

    @property
    def portable(self) -> bool:
        return self.subject.endswith("_sm80")

    def command(self) -> list[str]:
        if self.stage == "python":
            return [sys.executable, "python-tests", "--exact", self.name]
        program = "candle-tests" if self.stage == "candle" else "device-tests"
        return [f"./{program}", "--exact", self.name, "--nocapture"]


def listed(text: str) -> list[Group]:
    return [Group(line.removesuffix(": test")) for line in text.splitlines()
            if line.endswith(": test")]


@dataclass
class Verdict:
    group: Group
    kind: str  # passed, skipped, wrong, fault, hang, slow, cut or unrun
    seconds: float = 0.0
    sentence: str = ""
    case: str = ""  # the one that failed, or the last begun
    cases: int = 0
    pending: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)  # the diagnosis

    @property
    def bad(self) -> bool:
        return self.kind in BAD


def described(pending: list[str]) -> str:
    """Launches that were not waited for: the oldest in full, the others by name."""
    if not pending:
        return "no launch was pending"
    names = Counter(text.split(" ")[0] for text in pending[1:])
    others = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in names.items())
    return f"pending {pending[0]}" + (f"; after it {others}" if others else "")


def kernels(pending: list[str]) -> str:
    """All pending kernels but for the copies of tables, without element types."""
    names = {re.sub(r"_(bf16|f16)(?=_|$)", "", text.split(" ")[0]) for text in pending}
    return " ".join(sorted(name for name in names if not name.startswith("infini_table")))


def marked(text: str, word: str) -> list[str]:
    return [line.removeprefix(word).strip() for line in text.splitlines()
            if line.startswith(word)]


def last_words(text: str) -> str:
    """The panic or the error at the end of an output."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for i in reversed(range(len(lines))):
        if "panicked at" in lines[i]:
            return " ".join(lines[i : i + 2])
    errors = [line for line in lines if re.search(r"error|CUDA_", line, re.I)]
    return (errors or lines or ["no output"])[-1]


def split_failure(line: str, cases: list[str]) -> tuple[str, str]:
    """`TEXT: SENTENCE`, where TEXT is one of the cases and may hold colons itself."""
    known = [case for case in cases if line.startswith(case + ":")]
    case = max(known, key=len) if known else line.partition(": ")[0]
    return case, line[len(case) + 1 :].strip()


def judge(group: Group, outcome: Outcome) -> Verdict:
    text, cases = outcome.text, marked(outcome.text, "case ")
    verdict = Verdict(group, "passed", outcome.seconds, cases=len(cases), pending=outcome.pending,
                      case=cases[-1] if cases else "")
    failures = [split_failure(line, cases) for line in marked(text, "failed ")]
    if outcome.end == "unrun":
        verdict.kind, verdict.sentence = "unrun", text
    elif outcome.good and not failures:
        skipped = marked(text, "skipped")
        if skipped and not cases:
            verdict.kind, verdict.sentence = "skipped", skipped[0]
    elif failures:
        verdict.case, verdict.sentence = failures[0]
        # An error of the driver is no value.
        verdict.kind = "fault" if re.search(DRIVER, verdict.sentence) else "wrong"
        if len(failures) > 1:
            verdict.sentence += f" (and {len(failures) - 1} more of {len(cases)} cases)"
        if outcome.end != "exit":
            verdict.sentence += f"; then not done after {outcome.seconds:.0f} s, " \
                + described(outcome.pending)
    elif outcome.end in ("cut", "limit"):
        verdict.kind = unfinished(outcome)
        verdict.sentence = (f"not done after {outcome.seconds:.0f} s, {len(cases)} cases begun; "
                            + described(outcome.pending))
    else:
        verdict.kind, verdict.sentence = "fault", ended(outcome)
    if outcome.stuck:
        verdict.sentence += "; survived SIGKILL and was left behind"
    return verdict


def unfinished(outcome: Outcome) -> str:
    """A launch that is pending at the limit hangs, and so does one that had half of it."""
    late = outcome.end == "limit" or outcome.seconds > outcome.task.seconds / 2
    if late and outcome.pending:
        return "hang"
    return "slow" if outcome.end == "limit" else "cut"


def ended(outcome: Outcome) -> str:
    status = outcome.status or 0
    how = f"status {status}"
    if outcome.end == "flood":
        how = "ended for its endless output"
    elif status < 0:
        how = f"signal {-status} ({signal.strsignal(-status)})"
    told = "".join(f"; {line}" for line in marked(outcome.text, "diagnosis:")[:1])
    return f"{how}: {last_words(outcome.text)}{told}; {described(outcome.pending)}"
