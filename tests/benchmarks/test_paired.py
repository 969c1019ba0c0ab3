"""Paired comparisons of a study: differences by seed, and intervals that are a t-test's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from scipy import stats

RUNS = [
    {
        "objective": name,
        "seed": seed,
        "figures": {
            "frechet": 0.0,
            "pixel_frechet": value / 2,
            "psnr": 20.0,
            "agreement": 0.5,
            "by_judge": {"frechet": [value - 1, value + 1]},
        },
    }
    for name, seed, value in [
        ("two", 0, 40.0), ("two", 1, 42.0), ("two", 2, 44.0), ("one", 0, 30.0), ("one", 1, 33.0),
        ("one", 2, 33.0), ("one", 3, 0.0), ("alone", 1, 41.0), ("elsewhere", 7, 1.0),
    ]
]  # fmt: skip


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import paired

    return paired


def test_an_interval_is_that_of_a_paired_t_test(paired) -> None:
    ours, theirs = [1.0, 4.0, 2.5, 3.0], [2.0, 2.0, 2.0, 2.5]
    low, high = paired.interval([a - b for a, b in zip(ours, theirs, strict=True)])
    known = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (low, high) == pytest.approx((known.low, known.high))


def test_differences_are_of_shared_seeds_and_sure_ones_are_bold(paired, tmp_path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": [*RUNS, {"objective": "one", "seed": 9, "problem": "x"}]}))
    done = CliRunner().invoke(paired.main, [str(file), "--against", "two"])
    assert done.exit_code == 0, done.output
    low, high = stats.ttest_1samp([-10.0, -9.0, -11.0], 0.0).confidence_interval(0.95)
    sure = f"**{low:+.1f} to {high:+.1f}**"
    assert f"| one | -10.0 | -24% | {sure} | -10.0, -9.0, -11.0 |" in done.output
    assert "| one | -5.0 | -24% |" in done.output, "of pixels"
    assert "| alone | -1.0 | -2% | -inf to +inf | -1.0 |" in done.output
    assert "elsewhere" not in done.output
    assert done.output.count("minus that of two") == 4


def test_a_brief_table_has_a_row_for_each_variant_and_a_column_for_each_figure(
    paired, tmp_path
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": RUNS}))
    asked = [str(file), "--against", "two", "--brief", "--figure", "frechet", "--figure", "psnr"]
    done = CliRunner().invoke(paired.main, asked)
    assert done.exit_code == 0, done.output
    low, high = stats.ttest_1samp([-10.0, -9.0, -11.0], 0.0).confidence_interval(0.95)
    assert done.output.splitlines() == [
        "| minus two | `frechet` | `psnr` |",
        "|---|---|---|",
        f"| one | -10.0, -24% (**{low:+.1f} to {high:+.1f}**) | +0.00 (+0.00 to +0.00) |",
        "| alone | -1.0, -2% (-inf to +inf) | +0.00 (-inf to +inf) |",
    ]


def test_a_variant_that_is_not_there_is_named_with_those_that_are(paired, tmp_path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": RUNS}))
    refused = CliRunner().invoke(paired.main, [str(file), "--against", "three"])
    assert refused.exit_code == 1
    assert "no run of 'three' has figures; there are two, one, alone, elsewhere" in refused.output
