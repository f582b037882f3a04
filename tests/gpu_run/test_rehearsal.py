"""A visit rehearsed: the bundle as it is packed, on the simulator's driver at tiny shapes, with faults
planted into kernels. Needs what scripts/test sets up: cargo, nvcc and the built driver."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import __main__, tools
from battery.limits import Limits

ROOT = Path(__file__).parents[2]
VARIANTS = sorted((ROOT / "scripts/gpu-variants").glob("*.patch"))
SECONDS = 50
# Shorter ones, for what hangs must be ended and diagnosed within that.
LIMITS = replace(Limits(), kernel=14.0, full=14.0, blocking=8.0)
# Groups in which a planted fault shows, and some that pass.
GROUPS = "merge_partials|::sum_|clear_padding|d192x128|transition_sm90::d64|segment_sm90::d64|" \
    "full::segment_d64|golden"
PASS = ["kernel::segment_sm90::d64", "full::segment_d64", "golden::record"]

# What is planted: texts put before others. merge_partials hangs, sum writes where nothing is,
# clear_padding clears nothing, and segment_transition waits for what it should do itself.
FAULTS = {
    "sm80/merge_partials.cu": {
        "  constexpr int kRows = ": "  volatile int never = 0;\n  while (never == 0) {\n  }\n"},
    "sm80/sum.cu": {
        "  const uint64_t* inputs = ": "  *reinterpret_cast<volatile int*>(uint64_t{16}) = 1;\n"},
    "sm80/clear_padding.cu": {"  if (token >= ": "  if (p.sequences.tokens > 0) return;\n"},
    "sm90/segment_transition.cu": {
        "#include": "#define INFINI_WAIT_POLLS 40\n",
        "    map_tile(shrink, ring.valid());":
            "    ptx::mbarrier_wait_parity(ring.full(0), 1);\n"},
}


def environment(**more: str) -> dict[str, str]:
    target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    driver = Path(target) / "debug"
    assert (driver / "libcuda.so").exists(), "cargo build -p ptxsim-driver comes first"
    return os.environ | {"LD_LIBRARY_PATH": str(driver), "PTXSIM_ARCH": "sm_90a",
                         "INFINI_ATTN_CUDA_ARCHS": "ptx"} | more


def patch(folder: Path, edits: dict[str, dict[str, str]]) -> Path:
    """A patch that puts texts before others, in files of kernels/."""
    for name, texts in edits.items():
        source, new = (ROOT / "kernels" / name).read_text(), folder / "kernels" / name
        new.parent.mkdir(parents=True, exist_ok=True)
        for before, text in texts.items():
            assert before in source, f"{name} has no {before!r}"
            source = source.replace(before, text + before, 1)
        new.write_text(source)
    made = folder / "planted.patch"
    diffs = [subprocess.run(["git", "diff", "--no-index", f"kernels/{name}",
                             str(folder / "kernels" / name)],
                            cwd=ROOT, capture_output=True, text=True).stdout for name in edits]
    made.write_text("".join(diffs).replace(f"b{folder}/kernels", "b/kernels"))
    return made


def head(patch: Path) -> dict[str, str]:
    """What a kept variant says of itself: lines `Word: text` in front of the patch."""
    lines = patch.read_text().split("diff --git")[0].splitlines()
    return dict(line.split(": ", 1) for line in lines if line)


def kept() -> list[str]:
    """The kept variants as arguments; those that others have within are built with these."""
    arguments = []
    for patch in VARIANTS:
        if "Within" not in (said := head(patch)):
            file = patch if "diff --git" in patch.read_text() else ""
            switches = "@" + said["Switches"] if "Switches" in said else ""
            arguments += ["--variant", f"{patch.stem}={file}{switches}"]
    return arguments


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The bundle, with the faults as a variant, another one that only cuts work differently, and those
    that are kept for a card, which visits here do not know of."""
    scratch = tmp_path_factory.mktemp("rehearsal")
    folder = scratch / "bundle"
    planted = patch(scratch, FAULTS)
    subprocess.run([ROOT / "scripts/gpu-bundle", "--dev", "--variant", f"planted={planted}",
                    "--variant", "alone=@shared_by=1", *kept(), folder], env=environment(), check=True)
    tools.unpack(folder)
    lines = (folder / "variants.txt").read_text().splitlines()
    (folder / "variants.txt").write_text("".join(f"{line}\n" for line in lines[:2]))
    (folder / "kept.txt").write_text("".join(f"{line}\n" for line in lines[2:]))
    return folder


def run(bundle: Path, *arguments: str) -> tuple[int, str, float]:
    begin = time.monotonic()
    done = subprocess.run(["./run", *arguments], cwd=bundle, env=environment(),
                          capture_output=True, text=True, timeout=2 * SECONDS)
    summary = (bundle / "results/summary.txt").read_text()
    assert done.stdout.endswith(summary), done.stdout + done.stderr
    return done.returncode, summary, time.monotonic() - begin


def test_planted_faults_are_named_within_the_budget(bundle, monkeypatch):
    bounded = bundle / "kernels/bounded"
    for fatbin in (bundle / "kernels/planted").glob("*/*.fatbin"):
        (bounded / fatbin.parent.name).mkdir(exist_ok=True)
        shutil.copy(fatbin, bounded / fatbin.parent.name)
    # A kernel that no device has the shared memory for.
    table = (bounded / "table.txt").read_text().splitlines()
    lines = [line.split() for line in table]
    for line in lines:
        if line[0] in ("infini_segment_sm80_bf16_d192x128", "infini_segment_sm80_f16_d192x128"):
            line[2] = "999999"
    (bounded / "table.txt").write_text("".join(" ".join(line) + "\n" for line in lines))

    for name, value in environment(INFINI_RESULTS=str(bundle / "results")).items():
        monkeypatch.setenv(name, value)
    # PyTorch, where it is there, would take the simulator for a card.
    monkeypatch.setattr(tools, "importable", lambda name: False)
    begin = time.monotonic()
    assert __main__.main(["battery", str(SECONDS), GROUPS], LIMITS, bundle) == 1
    assert time.monotonic() - begin < SECONDS + 1
    summary = (bundle / "results/summary.txt").read_text()
    assert len(summary) <= 10_000
    verdicts = {}
    for line in summary.splitlines():
        name, _, rest = line.partition(": ")
        verdicts.setdefault(name, rest)
    hang = verdicts["kernel::merge_partials_sm80::any"]
    assert hang.startswith("hang: ") and "infini_merge_partials_sm80_bf16" in hang
    fault = verdicts["kernel::sum_sm80::any"]
    assert fault.startswith("fault: ") and "infini_sum_sm80" in fault
    wrong = verdicts["kernel::clear_padding_sm80::any"]
    assert wrong.startswith("wrong: ") and "padded rows are not 0" in wrong
    refused = verdicts["kernel::segment_sm80::d192x128"]
    assert refused.startswith("fault: ")
    assert "infini_segment_sm80_bf16_d192x128 with 999999 B of shared memory" in refused
    waits = verdicts["kernel::segment_transition_sm90::d64"]
    assert waits.startswith("fault: ")
    assert "a wait in sm90/segment_transition gave up after 40 polls: block (" in waits
    notes = [line for line in summary.splitlines() if line.startswith("    ")]
    assert any(line.startswith("    diagnosis: again: it fails in the same way") for line in notes)
    assert "    portable kernels: passed" in notes
    alone = [line for line in notes if line.startswith("    launch by launch: ")]
    assert any("infini_merge_partials_sm80_bf16" in line for line in alone)
    assert any(" in infini_sum_sm80" in line for line in alone)
    # What has no fault has run and passed.
    events = [json.loads(line) for line in
              (bundle / "results/battery.jsonl").read_text().splitlines()]
    ends = {event["name"]: (event["end"], event["status"]) for event in events}
    assert all(ends[name] == ("exit", 0) for name in PASS), ends
    assert (bundle / "results/golden-sm90.bin").stat().st_size < 1 << 20
    rows = [json.loads(line) for line in
            (bundle / "results/bench.jsonl").read_text().splitlines()]
    assert rows and all(row["us"] > 0 for row in rows)
    files = list((bundle / "results").iterdir())
    assert len(files) <= 8 and sum(file.stat().st_size for file in files) < 10e6


def test_variants_are_checked_and_timed(bundle):
    status, summary, seconds = run(bundle, "variants", "30")
    print(summary)
    assert status == 1 and seconds < 31
    assert "variant planted: not timed: kernel::" in summary
    rows = [json.loads(line) for line in
            (bundle / "results/variants.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in rows} == {"baseline", "alone"}


def test_quick_times_the_first_rows(bundle):
    status, summary, seconds = run(bundle, "quick", "15", "append")
    assert status == 0 and seconds < 16
    rows = [json.loads(line)["operation"] for line in
            (bundle / "results/bench.jsonl").read_text().splitlines()]
    assert [row.split(",")[0] for row in rows] == ["local attention", "decode"]


def test_the_python_package_is_tested(bundle):
    """On the simulator in the place of PyTorch's device; what asks for hardware is skipped."""
    path = {"PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(["./run", "python", "60", "python::(batches|refusals|streams_of)"], cwd=bundle,
                          env=environment(**path), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python: 2 passed, 1 skipped; 2 cases" in done.stdout, done.stdout
    assert "asks for a GPU" in done.stdout


def test_candle_is_tested(bundle):
    """With stand-ins for what candle links, and without them."""
    command = ["./run", "candle", "60", "candle::(layouts|waits|f32)$"]
    run = lambda **more: subprocess.run(command, cwd=bundle, env=environment(**more),
                                        capture_output=True, text=True, timeout=90)
    target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    done = run(LD_LIBRARY_PATH=f"{target}/candle-device/lib")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "candle: 3 passed; 3 cases" in done.stdout, done.stdout
    done = run(LD_LIBRARY_PATH="")
    assert "candle: not run: there is no libcu" in done.stdout, done.stdout


def test_one_case_of_a_group_runs_alone(bundle):
    """As the diagnosis does, under tools and launch by launch."""
    command = ["./device-tests", "--exact", "kernel::append_sm80::any", "--nocapture"]
    run = lambda **more: subprocess.run(command, cwd=bundle, env=environment(**more),
                                        capture_output=True, text=True)
    cases = [line for line in run().stderr.splitlines() if line.startswith("case ")]
    assert len(cases) == 2
    alone = run(INFINI_CASE=cases[1].removeprefix("case "))
    assert alone.returncode == 0 and cases[1] in alone.stderr and cases[0] not in alone.stderr
    assert run(INFINI_CASE="no such case").returncode != 0


@pytest.mark.parametrize("patch", VARIANTS, ids=lambda patch: patch.stem)
def test_kept_variants_pass(bundle, patch):
    said = head(patch)
    assert said["What"] and said["Predicted"] and said["Test"]
    # In the log: what was predicted, and where a card's answer belongs.
    assert f"| `{patch.stem}` |" in (ROOT / "docs/gpu-log.md").read_text()
    if "Within" in said:
        assert "Within" not in head(patch.with_stem(said["Within"]))
        subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, check=True)
        return
    lines = [line.split() for line in (bundle / "kept.txt").read_text().splitlines()]
    folder, switches = next(rest for name, *rest in lines if name == patch.stem)
    changed = [*(bundle / folder).glob("*/*.fatbin")] if folder != "-" else []
    assert changed or switches != "-"
    more = {} if folder == "-" else {"INFINI_KERNELS": folder}
    # Few blocks, so that each takes several tiles.
    more["INFINI_TARGET"] = "multiprocessors=2" + ("" if switches == "-" else "," + switches)
    # The smallest of its groups; a visit runs all that its kernels concern.
    group = said["Test"].split()[0]
    done = subprocess.run(["./device-tests", "--exact", group], cwd=bundle,
                          env=environment(**more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"test {group} ... ok" in done.stdout, done.stderr
