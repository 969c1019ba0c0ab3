"""Result pages: what their tables say is what their data files give."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"
SECTIONS = [
    ("rivals.md", "On Fashion-MNIST", "rivals.json", 188),
    ("rivals.md", "A critic in colour", "adversary.json", 32),
    ("collapse.md", "Latents", "ladder.json", 80),
    ("collapse.md", "Samples", "ladder.json", 102),
    ("teacher.md", "", "teacher.json", 24),
    ("teacher.md", "In colour", "teacher-colour.json", 24),
    ("shootout.md", "Methods that came later", "rivals.json", 55),
    ("shootout.md", "In colour", "colour.json", 155),
]
"""Pages, their sections ('' before all headings), their data, and how many cells have data."""
NAMES = {
    "none": "no alignment",
    "the diffusion decoder": "unified_latents, diffusion decoder",
    "pixels": "unified_latents",
    "the tuned decoder": "detached, tuned decoder",
    "an own one": "detached, own decoder",
    "mean_flow": "mean_flow, one call",
    "weight 0.1": "with a critic, 0.1",
    "weight 0.5": "with a critic, 0.5",
}
"""Variants that pages name otherwise, as they do rungs of the ladder by their number alone."""
AGAINST = {"adversary.json": "detached", "teacher.json": "none", "teacher-colour.json": "none"}
"""With whom the rows of a table that names one variant each are paired."""
FIGURES = {
    "Fréchet distance": "frechet",
    "Fréchet distance of samples": "frechet",
    "of pixels": "pixel_frechet",
    "PSNR, dB": "psnr",
    "label agreement": "agreement",
    "distance of reconstructions": "reconstruction_frechet",
    "sharpness": "sharpness",
}


class Table(NamedTuple):
    """A table of a page."""

    titles: list[str]
    rows: list[list[str]]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(text: str) -> Iterator[Table]:
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        head, _, *rows = block.splitlines()
        yield Table(cells(head), [cells(row) for row in rows])


def section(page: str, heading: str) -> list[Table]:
    parts = re.split(r"^## (.*)$", (RESULTS / page).read_text(encoding="utf-8"), flags=re.M)
    found = dict(zip(["", *parts[1::2]], parts[0::2], strict=True))
    return list(tables(found[heading]))


def data(file: str) -> Any:
    return json.loads((RESULTS / "data" / file).read_text())


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS.parents[1] / "benchmarks"))


@pytest.fixture
def score(benchmarks: None) -> ModuleType:
    import score

    return score


@pytest.fixture
def paired(benchmarks: None) -> ModuleType:
    import paired

    return paired


@pytest.mark.parametrize(("page", "heading", "file", "expected"), SECTIONS, ids=str)
def test_each_cell_of_a_variant_is_that_of_its_runs_in_its_column(
    page: str, heading: str, file: str, expected: int, score: ModuleType
) -> None:
    known = {
        (name, title): cell
        for table in tables(score.table(data(file)))
        for name, *row in table.rows
        for title, cell in zip(table.titles[1:], row, strict=True)
    }
    names = {name for name, _ in known}
    compared = 0
    for table in section(page, heading):
        for name, *row in table.rows:
            whose = NAMES.get(name, name)
            for title, cell in zip(table.titles[1:], row, strict=True):
                if whose not in names or (whose, title) not in known or "; " in cell:
                    continue
                whole = known[whose, title]
                short = re.sub(r" \(.*\)", "", whole)  # a page may leave the range out
                plain = cell.replace(",", "")
                assert plain in (whole, short), f"{name}, {title}"
                compared += 1
    assert compared == expected


def by_seed_and_interval(table: Table, row: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield figure, differences by seed and interval, which stand in one cell or in two."""
    for i, (title, cell) in enumerate(zip(table.titles, row, strict=True)):
        if (figure := FIGURES.get(title.removesuffix(", by seed"))) is None:
            continue
        if title.endswith(", by seed"):
            yield figure, cell, row[i + 1]
        elif "; " in cell:
            yield figure, *cell.split("; ")


@pytest.mark.parametrize(
    ("page", "heading", "file", "rows"),
    [
        ("rivals.md", "On Fashion-MNIST", "rivals.json", 8),
        ("rivals.md", "A critic in colour", "adversary.json", 2),
        ("collapse.md", "Samples", "ladder.json", 10),
        ("teacher.md", "", "teacher.json", 2),
        ("teacher.md", "In colour", "teacher-colour.json", 2),
    ],
)
def test_each_difference_by_seed_and_its_interval_is_that_of_the_runs(
    page: str, heading: str, file: str, rows: int, paired: ModuleType
) -> None:
    results = data(file)
    names = {run["objective"] for run in results["runs"]}

    def variant(said: str) -> str:
        if (said := NAMES.get(said, said)) in names:
            return said
        (found,) = [name for name in names if name.split()[0] == said]
        return found

    compared = 0
    for table in section(page, heading):
        for row in table.rows:
            its = list(by_seed_and_interval(table, row))
            if not its:
                continue
            ours, _, theirs = row[0].partition(" minus ")
            for figure, each, interval in its:
                found = paired.differences(results, figure, variant(theirs or AGAINST[file]))
                values = [*found[variant(ours)][0].values()]
                digits = paired.DIGITS[figure]
                low, high = paired.interval(values)
                assert each == ", ".join(f"{value:+.{digits}f}" for value in values), row[0]
                assert interval == f"{low:+.{digits}f} to {high:+.{digits}f}", row[0]
            compared += 1
    assert compared == rows


def test_the_table_of_the_alarm_is_that_of_its_runs(benchmarks: None) -> None:
    import alarm

    (found,) = tables(alarm.table([alarm.AlarmRecord(**one) for one in data("alarm.json")]))
    shown = next(table for table in section("alarm.md", "") if "alarms" in table.titles)
    assert shown == found


def test_the_distances_by_which_values_were_chosen_are_those_of_the_runs() -> None:
    runs = data("rivals-tune.json")["runs"]
    (table,) = section("rivals.md", "Their values")
    for name, tried, _ in table.rows:
        first = name.removesuffix(", one call").removesuffix(" with a diffusion decoder")
        its = [run["figures"]["frechet"] for run in runs if run["objective"].startswith(first)]
        said = re.findall(r": (\d+\.\d)\b", tried)
        assert sorted(said) == sorted(f"{one:.1f}" for one in its)
