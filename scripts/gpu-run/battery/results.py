"""The results folder: few files, none of them large."""

import json
import time
from pathlib import Path

# Files of every command, and of a stage: those of other stages stay from an earlier command.
ALWAYS = ("battery.jsonl", "groups.log", "summary.txt")
OF_STAGE = {"sanitizer": "sanitizer.log", "bench": "bench.jsonl", "compare": "compare.jsonl",
            "ncu": "ncu.txt", "variants": "variants.jsonl"}


def json_rows(text: str) -> list[dict]:
    """The JSON objects among the lines of a text; one that was cut off is left out."""
    rows = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                pass
    return rows


class Results:
    def __init__(self, folder: Path, file_cap: int, stages: tuple[str, ...]):
        self.folder, self.file_cap, self.begin = folder, file_cap, time.monotonic()
        self.full: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*ALWAYS, *(OF_STAGE[stage] for stage in stages if stage in OF_STAGE)):
            self.path(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / name

    def event(self, **what) -> None:
        at = round(time.monotonic() - self.begin, 2)
        self.append("battery.jsonl", json.dumps({"at": at} | what, ensure_ascii=False) + "\n")

    def log(self, name: str, title: str, text: str, cap: int) -> None:
        """One entry; of a long text the begin and, twice as much, the end."""
        if len(text) > cap:
            cut = len(text) - cap
            text = f"{text[:cap // 3]}\n... {cut} characters cut ...\n{text[-(cap - cap // 3):]}"
        self.append(name, f"==== {title}\n{text.rstrip()}\n\n")

    def append(self, name: str, text: str) -> None:
        if name in self.full:
            return
        with open(self.path(name), "a", encoding="utf-8") as file:
            if file.tell() > self.file_cap:
                self.full.add(name)
                text = "what followed is not kept: this file is as long as it may be\n"
            file.write(text)

    def rows(self, name: str) -> list[dict]:
        path = self.path(name)
        return json_rows(path.read_text(errors="replace")) if path.exists() else []

    def write(self, name: str, text: str) -> None:
        """In one piece: a reader finds the old text or the new one."""
        part = self.path(name).with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(self.path(name))
