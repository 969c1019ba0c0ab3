"""Findings as JSON, and as Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from look import short

# Rows with one of these keys are of a table of their own.
_KINDS = {"tokens", "deterministic_mode", "asked", "what"}


@attrs.define
class Entry:
    """What a part found, how it ended and how long it took."""

    part: str
    about: str
    end: str = "left out: no time"
    seconds: float = 0.0
    rows: list[dict[str, Any]] = attrs.field(factory=list)

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Return the findings that are errors."""
        return [row for row in self.rows if row.get("ok") is False or "error" in row]


def write(out: Path, entries: Sequence[Entry]) -> None:
    """Write all that is known so far to `results.json` and `results.md`."""
    listed = [attrs.asdict(entry) for entry in entries]
    (out / "results.json").write_text(json.dumps(listed, indent=1, default=str), encoding="utf-8")
    lines = ["# What was found on the device", ""]
    lines += ["| part | end | seconds | findings | failures |", "| --- | --- | --- | --- | --- |"]
    for one in entries:
        counts = f"{len(one.rows)} | {len(one.failures)}"
        lines.append(f"| {one.part} | {one.end} | {one.seconds:.1f} | {counts} |")
    for one in entries:
        lines += ["", f"## {one.part}", ""]
        lines += [f"{one.about} ({one.end}, {one.seconds:.1f} s)", *_tables(one.rows)]
    (out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one table for each kind of row, which its first key and _KINDS tell."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((next(iter(row), ""), *sorted(_KINDS & set(row))), []).append(row)
    lines = []
    for group in groups.values():
        keys = list(dict.fromkeys(key for row in group for key in row))
        lines += ["", "| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
        for row in group:
            cells = [short(row.get(k, "")).replace("|", "/").replace("\n", " ") for k in keys]
            lines.append("| " + " | ".join(cells) + " |")
    return lines
