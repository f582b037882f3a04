"""What the package says about itself: stubs, documentation, README, `python -m`."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import infini_attn

READMES = [Path(__file__).parents[1] / "README.md", Path(__file__).parents[2] / "README.md"]


def test_stubs_are_what_there_is():
    """Names, signatures and kinds, as mypy's stubtest compares them."""
    command = [sys.executable, "-m", "mypy.stubtest", "infini_attn"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_signature_of_the_operator():
    signature = str(inspect.signature(infini_attn.infini_attention))
    assert signature == (
        "(q, k, v, beta, *, segment_len=None, update=None, scale=None, empty_memory=None,"
        " denominator=None, state=None, slots=None, seq_lens=None, attention_mask=None,"
        " cu_seqlens=None, rope=None, positions=None,"
        " rope_interleaved=False, inplace=False, return_state=True, return_lse=False,"
        " return_parts=False)"
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


@pytest.mark.parametrize("readme", READMES, ids=["python", "root"])
def test_readme_example(readme, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "(1, 1, 8, 64)" in capsys.readouterr().out.replace("torch.Size([1, 1, 8, 64])", "(1, 1, 8, 64)")
    assert (tmp_path / "stream.safetensors").exists()
