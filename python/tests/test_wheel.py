"""The source distribution holds what a build needs. (`scripts/wheel` builds from it, in a minute.)"""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "python/pyproject.toml").exists(), reason="not a checkout")
FOLDERS = ["build", "kernels", "src", "python/src", "python/python"]
FILES = ["Cargo.toml", "Cargo.lock", "build.rs", "python/Cargo.toml", "python/README.md", "LICENSE-MIT"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "maturin", "sdist", "-m", "python/Cargo.toml", "-o", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sources_are_in_it(unpacked):
    command = ["git", "ls-files", *FOLDERS, *FILES]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    names = done.stdout.split()
    assert len(names) > 200 and set(FILES) <= set(names)
    # The Python sources stand beside the README there.
    there = [name.replace("python/python/", "python/") for name in names]
    assert [name for name in there if not (unpacked / name).exists()] == []
    assert not list(unpacked.rglob("*.so"))


def test_sources_include_nothing_that_is_not_in_it(unpacked):
    for folder in ("build", "src", "python/src"):
        for source in (unpacked / folder).rglob("*.rs"):
            for name in re.findall(r'include(?:_str|_bytes)?!\("(.*?)"\)', source.read_text()):
                assert (source.parent / name).exists(), f"{source}: {name}"


def test_cargo_reads_its_manifests(unpacked):
    """Which name targets that are not in it: tests and benches."""
    command = ["cargo", "metadata", "--offline", "--no-deps", "--format-version", "1"]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"name":"infini-attn-python"' in done.stdout
