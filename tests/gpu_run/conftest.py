"""A bundle of stand-ins: executables that follow the contract of the real ones, each group doing
what the test's plan says."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "scripts" / "gpu-run"
sys.path.insert(0, str(SOURCES))

from battery import __main__, correctness, timing, tools  # noqa: E402
from battery.limits import Limits  # noqa: E402

STAND_INS = Path(__file__).parent / "stand_ins"
# A tenth of the seconds, but for what has to end by itself on a busy machine; fewer processes for
# fewer cores.
LIMITS = replace(Limits().scaled(0.1), ask=5.0, kernel=5.0, sanitizer=5.0, diagnose=5.0,
                 portable=5.0, examine=5.0, check=5.0, at_once=4, dying=2.0, turn=(0.01, 0.1, 0.15))


class Bundle:
    def __init__(self, folder: Path):
        self.folder, self.results = folder, folder / "results"
        for stand_in in STAND_INS.iterdir():
            at = folder / stand_in.name
            at.write_text(f"#!{sys.executable} -ES\n" + stand_in.read_text())
            at.chmod(0o755)
        self.plan({})

    def plan(self, groups: dict, **what) -> None:
        """What each group does; by default all pass. And what the tools and benchmarks do."""
        plan = {"groups": {name: {"do": "pass"} for name in GROUPS} | groups} | what
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def only(self, groups: dict, **what) -> None:
        (self.folder / "plan.json").write_text(json.dumps({"groups": groups} | what))

    def calls(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, *arguments: str, limits: Limits = LIMITS) -> int:
        return __main__.main(list(arguments), limits, self.folder)

    def summary(self) -> str:
        return (self.results / "summary.txt").read_text()

    def events(self) -> list[dict]:
        return [json.loads(line) for line in
                (self.results / "battery.jsonl").read_text().splitlines()]


GROUPS = ["kernel::segment_attention_sm90::d64", "kernel::segment_attention_sm90::d128",
          "kernel::decode_sm80::d128", "table::prefill::d128", "full::prefill_d128_n2048",
          "golden::record", "python::generate", "candle::model"]


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    bundle = Bundle(tmp_path)
    monkeypatch.setenv("INFINI_RESULTS", str(bundle.results))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    # Nothing of the machine that the tests run on is found.
    here = lambda name: str(tmp_path / name) if (tmp_path / name).exists() else None
    monkeypatch.setattr(tools, "find", here)
    monkeypatch.setattr(timing, "find", here)
    monkeypatch.setattr(tools, "importable", lambda name: name == "torch")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield bundle
    for number, handler in handlers.items():
        signal.signal(number, handler)
