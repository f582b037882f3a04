"""`python -m infini_attn.bench`: that what it times computes the same; no times."""

import re

import pytest
import torch

from infini_attn import bench, get_num_threads, set_num_threads


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads(), get_num_threads()
    yield
    torch.set_num_threads(threads[0])
    set_num_threads(threads[1])


SHAPES = [("2,60,4,2,16", 16), ("1,30,2,2,8", 10), ("3,5,3,1,8", 64), ("1,33,4,1,8", 1)]


@pytest.mark.parametrize("dtype", bench.DTYPES)
@pytest.mark.parametrize("shape, segment_len", SHAPES)
def test_both_sides_agree(capsys, shape, segment_len, dtype):
    arguments = ["--shape", shape, "--segment-len", str(segment_len), "--dtype", dtype]
    bench.main([*arguments, "--threads", "1", "--seconds", "0"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\w.*?) \| ([\d.e+-]+) ms \| (\S*) ?\|$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == [bench.OURS, bench.COMPOSED, bench.FULL] * 2, printed
    tolerance = bench.TOLERANCE[bench.DTYPES[dtype]]
    for row in (rows[0], rows[1], rows[3], rows[4]):
        assert float(row[2]) <= 2 * tolerance
    assert f"torch {torch.__version__}, infini_attn" in printed and "1 threads" in printed


def test_wrong_outputs_are_not_timed(monkeypatch):
    right = bench.infini_attention
    monkeypatch.setattr(bench, "infini_attention", lambda *a, **o: right(a[0], a[1], -a[2], a[3], **o))
    with pytest.raises(SystemExit, match="^prefills: the outputs differ, relative error [1-9]"):
        bench.main(["--shape", "1,20,2,2,8", "--segment-len", "8"])


def test_only_what_is_measured_reaches_the_operator(monkeypatch):
    """Which takes no float32 on a device."""
    operator, seen = bench.infini_attention, set()
    spy = lambda q, *others, **options: (seen.add(q.dtype), operator(q, *others, **options))[1]
    monkeypatch.setattr(bench, "infini_attention", spy)
    bench.main(["--shape", "1,20,2,2,8", "--segment-len", "8", "--dtype", "bf16", "--seconds", "0"])
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("arguments, text", [
    ("--shape 1,2", "--shape: 1,2 given, B,T,Hq,Hkv,D expected"),
    ("--shape 1,8,3,2,8", "numbers from 1 and Hkv a divisor of Hq expected"),
    ("--segment-len 0", "numbers from 1"),
    ("--threads 0", "--threads: 0 given, at least 1 expected"),
    ("--device cuda", "--device: cuda given, but PyTorch finds no CUDA device on this machine"),
])
def test_arguments_that_are_refused(capsys, monkeypatch, arguments, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(arguments.split())
    assert text in capsys.readouterr().err
