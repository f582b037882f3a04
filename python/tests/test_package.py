"""What the package says about itself: stubs, documentation, README, `python -m`."""

import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infini_attn

READMES = [Path(__file__).parents[1] / "README.md", Path(__file__).parents[2] / "README.md"]


def test_stubs_are_what_there_is():
    """Names, signatures and kinds, as mypy's stubtest compares them: of the extension, the one module
    that has stubs."""
    command = [sys.executable, "-m", "mypy.stubtest", "infini_attn._core"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_signature_of_the_operator():
    signature = str(inspect.signature(infini_attn.infini_attention))
    assert signature == (
        "(q, k, v, beta, *, segment_len=None, update=None, scale=None, empty_memory=None,"
        " denominator=None, state=None, slots=None, seq_lens=None, attention_mask=None,"
        " cu_seqlens=None, rope=None, positions=None,"
        " rope_interleaved=False, inplace=False, out=None, return_state=True, return_lse=False,"
        " return_parts=False, bptt_segments=None)"
    )


def test_everything_is_documented():
    for name in infini_attn.__all__:
        thing = getattr(infini_attn, name)
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                assert member.startswith("_") or inspect.getdoc(value), f"{name}.{member}"
    assert "[B, T, Hq, Dk]" in infini_attn.infini_attention.__doc__


def test_python_m():
    command = [sys.executable, "-m", "infini_attn"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == f"infini_attn {infini_attn.__version__}"
    assert re.fullmatch(r"backends: cpu \(.+, \d+ threads\)", lines[1])
    # What is missing, on a machine without a device.
    assert re.fullmatch(r"cuda: (not in this build.*|no usable CUDA device: .+|.+, compute capability .+)", lines[2])


def run_examples(page):
    """Runs the Python on a page from top to bottom, as one program."""
    scope = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(example, page.name, "exec"), scope)


@pytest.mark.parametrize("readme", READMES, ids=["python", "root"])
def test_readme_example(readme, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_examples(readme)
    assert "(1, 1, 8, 64)" in capsys.readouterr().out.replace("torch.Size([1, 1, 8, 64])", "(1, 1, 8, 64)")
    assert (tmp_path / "stream.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_examples_in_pytorch(monkeypatch, capsys):
    # Records as ever, without generating code for a quarter of a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run_examples(READMES[1].parent / "docs/pytorch.md")
    printed = capsys.readouterr().out
    assert "torch.Size([2, 1, 256]) [1301 1301]" in printed and "torch.Size([2, 220])" in printed
