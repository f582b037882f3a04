"""Random calls of everything public: none panics, changes what it refuses, or keeps memory.

INFINI_ATTN_FUZZ_CALLS and INFINI_ATTN_FUZZ_SEED ask for more of them, or for others. `fuzz.py` makes the
calls and says what must hold, `fuzz_calls.py` has the right ones, `fuzz_values.py` what goes wrong.
"""

import json
import os
import pathlib
import subprocess
import sys

from fuzz_calls import CALLS

import infini_attn
from infini_attn import _core, reference

COUNT = int(os.environ.get("INFINI_ATTN_FUZZ_CALLS", 12_000))
SEED = int(os.environ.get("INFINI_ATTN_FUZZ_SEED", 1))
PROGRAM = pathlib.Path(__file__).with_name("fuzz.py")


def fuzz(folder):
    """The fuzzer in a process of its own, which a crash ends and memory is measured in."""
    command = [sys.executable, PROGRAM, str(SEED), "0", str(COUNT), folder]
    # Python's traceback says more than Rust's.
    options = dict(env={**os.environ, "RUST_BACKTRACE": "0"}, timeout=120 + COUNT // 50)
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
        status, words = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        status, words = "none: it takes too long", ""
    if status != 0:
        number = (folder / "number").read_text().strip() if (folder / "number").exists() else "?"
        raise AssertionError(
            f"call {number} of seed {SEED}, exit status {status}\n{words[-4000:]}\n"
            f"by itself: python {PROGRAM} {SEED} {number} 1"
        )
    return json.loads(done.stdout)


def test_random_calls(tmp_path):
    seen = fuzz(tmp_path)
    assert seen["growth"] < 32 << 20, f"{seen['growth']} B more after the first quarter of the calls"
    if COUNT >= 10_000:
        # The calls are neither all right nor all wrong.
        few = {name: n for name, n in seen["counts"].items() if min(n) < COUNT // 4000}
        assert not few, f"accepted and refused: {few}"
        assert seen["compared"] >= COUNT // 200


def test_everything_public_is_called():
    names = {n for n in infini_attn.__all__ if n not in ("__version__", "reference", "SAFE_GLOBALS")}
    for owner in (infini_attn.Problem, infini_attn.State, infini_attn.KeySums, infini_attn.SegmentMap, reference.State):
        names |= {f"{owner.__name__}.{n}" for n in vars(owner) if not n.startswith("_")}
    names |= {n for n, f in vars(_core).items() if callable(f) and not isinstance(f, type) and not n.startswith("ref")}
    assert names <= CALLS.keys(), names - CALLS.keys()
