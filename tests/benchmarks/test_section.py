"""Tables of a section: those of the page are its data's, and what they say of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/results/end-to-end.md"
DATA = ROOT / "docs/results/data"
AGAINST = "two_stage, equal"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import section

    return section


@pytest.mark.parametrize(
    ("file", "page", "against"),
    [
        *((file, PAGE, AGAINST) for file in sorted(DATA.glob("end-to-end*.json"))),
        (DATA / "colour.json", ROOT / "docs/results/shootout.md", "two_stage"),
    ],
    ids=lambda value: getattr(value, "stem", None),
)
def test_the_tables_of_a_page_are_those_of_its_data(tables, file, page, against) -> None:
    text = page.read_text(encoding="utf-8")
    for table in tables.section(json.loads(file.read_text()), against).split("\n\n"):
        assert table.strip() in text


def test_losses_over_training_are_found_by_the_share_of_images_seen(tables) -> None:
    history = {
        "images": [0, 16, 160, 320],
        "psnr": [7.0, 20.0, 25.0, 27.0],
        "unexplained@0.5": [1.0, 0.5, 0.2, 0.3],
    }
    said = [found(history) for found, _ in tables.LOSSES.values()]
    assert said == [20.0, 25.0, 27.0, 27.0, 0.2, 0.3]


def test_differences_are_shown_of_two_seeds_or_more(tables) -> None:
    results = json.loads((ROOT / "docs/results/data/end-to-end.json").read_text())
    results["runs"] = [
        run for run in results["runs"] if run["seed"] == 0 or run["objective"] in ("dsd", AGAINST)
    ]
    assert tables.section(results, AGAINST).count("\n| detached |") == 2, "reached and costs"
    assert tables.section(results, AGAINST).count("\n| dsd |") == 3
    results["runs"] = [run for run in results["runs"] if run["seed"] == 0]
    assert "minus" not in tables.section(results, AGAINST)


def test_a_variant_without_runs_to_compare_with_is_refused(tables) -> None:
    file = str(ROOT / "docs/results/data/end-to-end.json")
    refused = CliRunner().invoke(tables.main, [file, "--against", "three"])
    assert refused.exit_code == 1
    assert "no run of 'three' has figures" in refused.output
