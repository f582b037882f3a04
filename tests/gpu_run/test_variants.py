"""`run variants` on stand-ins."""

import json
from dataclasses import replace

from conftest import LIMITS

D128 = "kernel::segment_attention_sm90::d128"


def variants(bundle, lines: str, files: dict[str, str], groups: dict, **what) -> None:
    (bundle.folder / "variants.txt").write_text(lines)
    for variant, file in files.items():
        path = bundle.folder / "kernels" / variant / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    bundle.plan(groups, **what)


def rows(bundle) -> list[dict]:
    return [json.loads(line) for line in
            (bundle.results / "variants.jsonl").read_text().splitlines()]


def test_a_wrong_variant_is_named_and_not_timed(bundle):
    variants(bundle, """fast kernels/fast -
                        broken kernels/broken -
                        split - split_len=512,arch=sm90""",
             {"fast": "sm90/segment_attention.fatbin", "broken": "sm90/segment_attention.fatbin"},
             {D128: {"do": "wrong", "only_with": ["kernels/broken"]}},
             headline={"kernels/fast": 0.9})
    assert bundle.run("variants", "30") == 1
    text = bundle.summary()
    assert f"variant broken: not timed: {D128}: wrong: relative error 0.3" in text
    assert "5 of 5 rounds in turns" in text
    assert "a: local attention; the baseline's 10 runs are 0.0% apart" in text
    assert "baseline: a 100.0 (1.000), b 20.0 (1.000)" in text
    assert "fast: a 90.0 (0.900), b 18.0 (0.900)" in text
    assert "split: a 100.0 (1.000)" in text
    order = [r["variant"] for r in rows(bundle) if r["round"] == 2 and r["operation"] == "decode"]
    assert order == ["baseline", "fast", "split", "baseline"]
    # The groups of the kernels it replaces; full shapes for switches.
    checked = [(c.get("INFINI_KERNELS"), c.get("INFINI_TARGET"), c["name"]) for c in bundle.calls()]
    assert ("kernels/fast", None, D128) in checked
    full = "full::prefill_d128_n2048"
    assert [c[2] for c in checked if c[1] == "split_len=512,arch=sm90"] == [full]
    assert not any("decode" in name for *_, name in checked)


def test_all_right(bundle):
    variants(bundle, "fast kernels/fast -\n", {"fast": "sm90/segment_attention.fatbin"}, {})
    assert bundle.run("variants", "30") == 0
    assert {r["variant"] for r in rows(bundle)} == {"baseline", "fast"}


def test_a_variant_of_unknown_kernels_is_not_timed(bundle):
    variants(bundle, "odd kernels/odd -\n", {"odd": "sm90/unheard.fatbin"}, {})
    assert bundle.run("variants", "20") == 1
    assert "variant odd: not timed: no group of device-tests has its kernels" in bundle.summary()


def test_one_that_fails_when_timed_leaves_the_others(bundle):
    variants(bundle, "bad kernels/bad -\nfast kernels/fast -\n",
             {"bad": "sm90/segment_attention.fatbin", "fast": "sm90/segment_attention.fatbin"}, {},
             headline={"kernels/bad": None})
    assert bundle.run("variants", "30") == 1
    assert "variant bad: not timed further: status 1, error: no such kernel" in bundle.summary()
    assert len([r for r in rows(bundle) if r["variant"] == "fast"]) == 10


def test_short_time_makes_fewer_rounds(bundle):
    variants(bundle, "fast kernels/fast -\n", {"fast": "sm90/segment_attention.fatbin"}, {})
    assert bundle.run("variants", "9", limits=replace(LIMITS, turn=(1.0, 1.0, 0.2))) == 0
    assert "1 of 5 rounds" in bundle.summary() or "2 of 5 rounds" in bundle.summary()
