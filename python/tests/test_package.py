"""What the package says about itself: stubs, documentation, README, `python -m`."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import infini_attn
from infini_attn import _core

STUB = ast.parse((Path(infini_attn.__file__).parent / "_core.pyi").read_text())
READMES = [Path(__file__).parents[1] / "README.md", Path(__file__).parents[2] / "README.md"]


def names(body):
    defined = (ast.FunctionDef, ast.ClassDef)
    found = {node.name for node in body if isinstance(node, defined)}
    found |= {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    return {name for name in found if not name.startswith("_")}


def arguments(node):
    every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [a.arg for a in every if a.arg not in ("self", "cls")]


def test_stubs_name_what_there_is():
    public = {name for name in dir(_core) if not name.startswith("_")}
    assert names(STUB.body) == public
    for node in STUB.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            members = {n for n in vars(getattr(_core, node.name)) if not n.startswith("_")}
            assert names(node.body) == members, node.name


def test_stubs_have_the_signatures():
    checked = 0
    for node in ast.walk(STUB):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef) and hasattr(_core, node.name):
            assert arguments(node) == list(inspect.signature(getattr(_core, node.name)).parameters)
            checked += 1
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            owner = getattr(_core, node.name)
            if method.name == "__new__":
                assert arguments(method) == list(inspect.signature(owner).parameters)
            elif not method.name.startswith("_") and callable(getattr(owner, method.name)):
                given = list(inspect.signature(getattr(owner, method.name)).parameters)
                assert arguments(method) == [n for n in given if n != "self"], method.name
                checked += 1
    assert checked > 20


def test_signature_of_the_operator():
    signature = str(inspect.signature(infini_attn.infini_attention))
    assert signature == (
        "(q, k, v, beta, *, segment_len=None, update=None, scale=None, empty_memory=None,"
        " denominator=None, state=None, seq_lens=None, rope=None, positions=None,"
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
