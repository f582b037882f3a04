"""`run battery` and its parts on stand-ins: what is executed, what is said, and when it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from conftest import GROUPS, LIMITS, SOURCES, tools

D128 = "kernel::segment_attention_sm90::d128"
D64 = "kernel::segment_attention_sm90::d64"
KERNEL = "infini_segment_attention_sm90_bf16_d128"


def timed(bundle, *arguments, **changes) -> tuple[int, float]:
    begin = time.monotonic()
    status = bundle.run(*arguments, limits=replace(LIMITS, **changes))
    return status, time.monotonic() - begin


def test_everything_passes(bundle, capsys):
    (bundle.folder / "kernels" / "bounded").mkdir(parents=True)
    bundle.results.mkdir()
    (bundle.results / "bench.jsonl").write_text('{"operation": "of an earlier visit"}\n')
    bundle.plan({})
    assert bundle.run("battery", "20") == 0
    text = bundle.summary()
    assert capsys.readouterr().out.endswith(text)
    for line in ("Stand-in H100, driver 580.1: SM 1980 MHz", "copy_gbs 3000", "790 TFLOP/s",
                 "kernel: 3 passed; 6 cases", "table: 1 passed", "full: 2 passed",
                 "python: 1 passed", "candle: 1 passed",
                 "memcheck: 3 groups clean, 0 with reports", "initcheck: 3 groups clean",
                 "123.4    612.3    810      62%  local attention, 32/8",
                 "error 4.0e-03", "ours 100 µs; time ÷ ours: loop, eager 4.50",
                 "1 ways not measured", "infini_decode: 1.5 us; tensor 6 %"):
        assert line in text, line
    assert "failed" not in text and "earlier visit" not in text
    assert {f.name for f in bundle.results.iterdir()} <= {
        "battery.jsonl", "groups.log", "bench.jsonl", "compare.jsonl", "sanitizer.log", "ncu.txt",
        "summary.txt"}
    groups = [c for c in bundle.calls() if c["name"] in GROUPS and "tool" not in c]
    assert all(c["INFINI_KERNELS"] == "kernels/bounded" for c in groups) and len(groups) == 8
    bench = next(c for c in bundle.calls() if c["name"] == "bench")
    assert bench["kernels"] is None and bench["rows"] == "0.."
    assert bench["at"] >= max(c["at"] for c in groups)
    ports = [c["port"] for c in bundle.calls() if "tool" in c]
    assert len(ports) == len(set(ports)) == 12


def test_what_packages_lack_is_said(bundle, monkeypatch):
    bundle.plan({}, absent="libcublas.so.13")
    monkeypatch.setattr(tools, "importable", lambda name: False)
    assert bundle.run("test", "20") == 0
    text = bundle.summary()
    assert "python: not run: there is no PyTorch\n" in text
    assert "candle: not run: there is no libcublas.so.13\n" in text


def test_candle_finds_libraries_in_pytorchs_packages(bundle, tmp_path, monkeypatch):
    (tmp_path / "site/nvidia/cu13/lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/first")
    assert bundle.run("candle", "20") == 0
    found = {c["name"]: c.get("LD_LIBRARY_PATH", "") for c in bundle.calls()}
    assert found["candle::model"].split(":")[0] == "/first"
    assert str(tmp_path / "site/nvidia/cu13/lib") in found["candle::model"].split(":")


def test_quick_times_two_rows(bundle):
    bundle.plan({})
    assert bundle.run("quick", "10") == 0
    assert "table" not in bundle.summary()
    bench = next(c for c in bundle.calls() if c["name"] == "bench")
    assert bench["rows"] == "0..2"


def test_a_hang_costs_its_group_alone_and_is_explained(bundle):
    hang = {"do": "hang", "portable": "pass"}
    bundle.only({D128: hang, "table::prefill::d128": hang, D64: {"do": "pass"}})
    assert timed(bundle, "test", "20", kernel=2.0)[0] == 1
    text = bundle.summary()
    launch = f"{KERNEL} [132, 1, 1] x 384, cluster 2: prefill [1, 300]"
    assert f"{D128}: hang: not done after 2 s, 2 cases begun; pending {launch}; after it " \
        "infini_key_sums_sm80_bf16; case prefill [1, 300]: larger" in text
    assert f"    launch by launch: not done in 2 s in {launch}\n" in text
    assert "    portable kernels: passed\n" in text
    assert "    memcheck: clean\n" in text and "    racecheck: clean\n" in text
    assert f"    diagnosis: as {D128}\n" in text
    assert "kernel: 1 passed, 1 failed; 4 cases" in text
    blocking = [c for c in bundle.calls() if "CUDA_LAUNCH_BLOCKING" in c]
    assert [c["INFINI_CASE"] for c in blocking] == ["prefill [1, 300]: larger"]


def test_a_crash_names_kernel_and_shape(bundle):
    bundle.only({D128: {"do": "crash", "portable": "crash"}, D64: {"do": "pass"}}, sanitizer="find")
    assert bundle.run("test", "20") == 1
    text = bundle.summary()
    assert f"{D128}: fault: signal 6 (Aborted): thread 'main' panicked at src/cuda/device/mod.rs:1: " \
        f"CUDA_ERROR_ILLEGAL_ADDRESS; pending {KERNEL} [132, 1, 1]" in text
    assert "    portable kernels: fault: signal 6 (Aborted): thread 'main' panicked" in text
    assert "    memcheck: 3 reported, first: Invalid __global__ write of size 2 bytes; at" in text


def test_wrong_values_are_diagnosed_in_the_smallest_case(bundle):
    bundle.only({D128: {"do": "wrong"}, "table::prefill::d128": {"do": "wrong"}})
    assert timed(bundle, "test", "20", at_once=1)[0] == 1
    text = bundle.summary()
    assert f"{D128}: wrong: relative error 0.3 at [0, 130, 1, 65]; " \
        "case prefill [1, 300]: larger" in text
    assert "    diagnosis: the same in every run | columns 64 to 127 of every tile\n" in text
    assert f"    diagnosis: as {D128}\n" in text
    tools = {c["tool"]: c["INFINI_CASE"] for c in bundle.calls() if "tool" in c}
    assert tools == {"memcheck": "prefill [1, 64]: small", "racecheck": "prefill [1, 64]: small"}


def test_what_ignores_sigterm_ends_with_its_children(bundle):
    bundle.only({D128: {"do": "stubborn"}})
    status, took = timed(bundle, "test", "6", kernel=0.5)
    assert status == 1 and took < 6
    child = int((bundle.folder / "child").read_text())
    with pytest.raises(ProcessLookupError):  # or a zombie, where nobody reaps
        os.kill(child, 0)
        if " Z " in open(f"/proc/{child}/stat").read():
            raise ProcessLookupError


def test_what_survives_sigkill_is_left_behind_and_named(bundle, monkeypatch):
    kill, victims = os.killpg, []
    monkeypatch.setattr(os, "killpg", lambda pid, number: victims.append(pid))
    bundle.only({D128: {"do": "hang"}, D64: {"do": "pass"}})
    try:
        status, took = timed(bundle, "test", "5", kernel=0.5, diagnosed=0)
        assert status == 1 and took < 5
        assert f"{D128}: survived SIGKILL and was left behind" in bundle.summary()
        assert "kernel: 1 passed, 1 failed" in bundle.summary()
    finally:
        for pid in set(victims):
            try:
                kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.mark.parametrize("command", ["battery", "test"])
def test_a_slow_card_does_not_break_the_budget(bundle, command):
    bundle.only({f"{stage}::{i}_sm90::d128": {"do": "slow"}
                 for stage in ("kernel", "table", "full") for i in range(6)}, bench_seconds=100)
    status, took = timed(bundle, command, "7", kernel=60.0, table=60.0, full=60.0)
    assert status == 1 and took < 7.5
    assert "not done in time: kernel::" in bundle.summary()
    if command == "battery":
        assert "full: 6 not run" in bundle.summary()
        assert "not complete: " in bundle.summary()
        assert "local attention, 32/8" in bundle.summary()  # the row before it was ended


def test_a_launch_that_hangs_until_the_cut_is_a_failure(bundle):
    bundle.only({D128: {"do": "hang"}, D64: {"do": "pass"}})
    assert timed(bundle, "quick", "6", kernel=4.0, diagnosed=0)[0] == 1
    assert f"{D128}: hang: not done after" in bundle.summary()


def test_no_sanitizer(bundle):
    (bundle.folder / "compute-sanitizer").unlink()
    bundle.plan({})
    assert bundle.run("battery", "15") == 0
    assert bundle.summary().count("compute-sanitizer found neither in PATH nor beside nvcc") == 1


def test_a_sanitizer_that_refuses_is_said_once(bundle):
    bundle.plan({D128: {"do": "crash"}}, sanitizer="refuse")
    assert bundle.run("battery", "15") == 1
    assert bundle.summary().count("Device not supported") == 1
    assert "not run: Error: Device not supported." in bundle.summary()
    assert len([c for c in bundle.calls() if "tool" in c]) <= LIMITS.at_once
    assert "benchmarks" in bundle.summary()


@pytest.mark.parametrize("finds, status", [("find", 1), ("racecheck", 1), ("initcheck", 0)])
def test_a_sanitizer_that_finds(bundle, finds, status):
    bundle.plan({}, sanitizer=finds)
    assert bundle.run("sanitize", "15") == status
    tool = {"find": "memcheck"}.get(finds, finds)
    assert f"{tool}: 0 groups clean, 3 with reports" in bundle.summary()
    assert re.search(rf"    {tool}, kernel::\S+ and 2 more: \d reported", bundle.summary())
    assert ("to be read" in bundle.summary()) == (finds != "racecheck")


def test_the_summary_stays_short(bundle):
    (bundle.folder / "device-tests").write_text(
        """#!/bin/sh
        [ "$1" = --list ] && { seq -f "kernel::g%g_sm90::d128: test" 300; exit; }
        echo "case prefill"
        echo "failed prefill: $(printf "%0700d" 0)"
        exit 101
        """)
    (bundle.folder / "compute-sanitizer").unlink()
    assert timed(bundle, "battery", "30", diagnosed=1)[0] == 1
    text = bundle.summary()
    assert len(text) <= 10_000
    assert "more lines, in groups.log" in text and "kernel: " in text and "Stand-in H100" in text
    assert "123.4" in text
    assert len(list(bundle.results.iterdir())) <= 8


def test_a_flood_of_output_is_ended(bundle):
    bundle.only({D128: {"do": "flood"}, D64: {"do": "pass"}})
    assert timed(bundle, "test", "10", flood=1 << 20, diagnosed=0)[0] == 1
    assert f"{D128}: fault: ended for its endless output" in bundle.summary()
    assert (bundle.results / "groups.log").stat().st_size < 100_000


def test_nothing_executed_is_no_success(bundle):
    bundle.only({D128: {"do": "skip"}})
    assert bundle.run("test", "5") == 1
    assert f"skipped: {D128}: 2 cases: no usable CUDA device" in bundle.summary()


def test_a_mistake_of_the_battery_costs_one_process(bundle, monkeypatch):
    from battery import correctness

    judge = correctness.judge
    mistaken = lambda group, outcome: 1 / 0 if group.name == D128 else judge(group, outcome)
    monkeypatch.setattr(correctness, "judge", mistaken)
    bundle.plan({})
    assert bundle.run("quick", "10") == 1
    assert "kernel: 2 passed" in bundle.summary() and "123.4" in bundle.summary()
    assert f"the battery itself, after {D128}: " in bundle.summary()


def test_a_benchmark_that_hangs_or_crashes_costs_its_row(bundle):
    bundle.plan({}, bench_does={"0": "hang", "1": "crash"})
    assert timed(bundle, "bench", "15", quiet=1.0)[0] == 1
    text = bundle.summary()
    assert re.search(r"cuda-bench, local attention, 32/8: ended after \d s; pending replays of", text)
    assert "cuda-bench, decode, 8 x 1: status -6" in text
    assert "99.9" in text and "flush" in text


def test_wrong_values_before_a_hang_do_not_hide_it(bundle):
    bundle.only({D128: {"do": "wrong_then_hang"}})
    assert timed(bundle, "test", "10", kernel=1.0, diagnosed=0)[0] == 1
    assert re.search(rf"{D128}: wrong: relative error .*; then not done after \d s, pending {KERNEL}",
                     bundle.summary())


def test_a_benchmark_that_fails(bundle):
    bundle.plan({}, bench_fails=True)
    assert bundle.run("bench", "5") == 1
    assert "cuda-bench, flush: status 1, error: not measured: decode" in bundle.summary()


def test_pytorch_is_measured_where_ours_fails(bundle):
    bundle.plan({}, ours={"failed": "the output is wrong: error 2.0e-01"})
    assert bundle.run("compare", "8") == 1
    text = bundle.summary()
    assert "compare, ours: the output is wrong: error 2.0e-01" in text
    assert "ours not measured; µs: loop, eager 450" in text


def test_usage(bundle, capsys):
    for arguments in (["all"], ["battery", "0"], ["battery", "ten"], ["test", "5", "("],
                      ["test", "5", "a", "b"], ["bench", "5", "decode"]):
        assert bundle.run(*arguments) == 2
    assert not bundle.results.exists()


def test_groups_are_chosen_by_an_expression(bundle):
    assert bundle.run("test", "10", "sm90::d64|golden") == 0
    run = {call["name"] for call in bundle.calls()}
    assert {D64, "golden::record"} <= run and not run & {D128, "full::prefill_d128_n2048"}
    assert bundle.run("test", "10", "nothing") == 1
    assert "listed no groups of nothing" in bundle.summary()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_with_a_summary(bundle, number):
    """The real entry, in a process of its own."""
    bundle.plan({D128: {"do": "hang"}})
    for path in (SOURCES / "run", *(SOURCES / "battery").glob("*.py")):
        at = bundle.folder / path.relative_to(SOURCES)
        at.parent.mkdir(exist_ok=True)
        at.write_text(path.read_text())
        at.chmod(0o755)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    run = subprocess.Popen(["./run", "test", "60"], cwd=bundle.folder, stdout=subprocess.PIPE,
                           text=True, env=os.environ | {"PATH": path})
    wait_for(lambda: sum(c["name"] in GROUPS for c in bundle.calls()) >= 6)
    time.sleep(0.3)
    begin = time.monotonic()
    run.send_signal(number)
    out, _ = run.communicate(timeout=10)
    assert time.monotonic() - begin < 4
    assert run.returncode == 128 + number
    assert out.endswith(bundle.summary()) and f"ended early, by signal {number}" in out
    assert "kernel: 2 passed, 1 not done in time" in out


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
