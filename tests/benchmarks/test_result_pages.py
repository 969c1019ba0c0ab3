"""Result pages: what their tables say of a variant over seeds is what its runs' figures give."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"
OTHERWISE = {"no alignment": "none"}
"""Variants that a page names otherwise."""


@pytest.mark.parametrize(
    ("page", "files", "at_least"),
    [
        ("rivals.md", ["rivals.json", "adversary.json"], 140),
        ("collapse.md", ["ladder.json"], 140),
        ("teacher.md", ["teacher.json", "teacher-colour.json"], 36),
    ],
)
def test_every_spread_in_a_table_is_that_of_the_runs(
    page: str, files: list[str], at_least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(RESULTS.parents[1] / "benchmarks"))
    import score

    known: dict[str, set[str]] = {}
    for file in files:
        for row in score.table(json.loads((RESULTS / "data" / file).read_text())).splitlines():
            name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
            known.setdefault(OTHERWISE.get(name, name), set()).update(cells)
    compared = 0
    for row in (RESULTS / page).read_text(encoding="utf-8").splitlines():
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        spreads = [cell for cell in cells if re.fullmatch(r"\S+ ± \S+ \(\S+\.\.\S+\)", cell)]
        if row.startswith("|") and spreads and name in known:
            assert set(spreads) <= known[name], f"{page}: {name}"
            compared += len(spreads)
    assert compared >= at_least
