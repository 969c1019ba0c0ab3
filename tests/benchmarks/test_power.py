"""The power analysis: its closed forms, against simulation and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from scipy import stats


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import power

    return power


@pytest.mark.parametrize(("deviation", "difference"), [(1.0, 1.0), (2.0, 1.0), (0.5, 1.0)])
def test_so_many_pairs_find_the_difference_in_four_of_five_studies(
    power, deviation, difference
) -> None:
    n = power.seeds_needed(deviation, difference)
    g = torch.Generator().manual_seed(0)
    pairs = difference + deviation * torch.randn(4000, n, generator=g)
    found = stats.ttest_1samp(pairs.numpy(), 0.0, axis=1).pvalue < power.LEVEL
    fewer = stats.ttest_1samp(pairs[:, : n - 1].numpy(), 0.0, axis=1).pvalue < power.LEVEL
    assert found.mean() > 0.78
    assert n == 2 or fewer.mean() < 0.85


def test_variances_of_seeds_and_judges_are_told_apart(power) -> None:
    g = torch.Generator().manual_seed(1)
    seeds, own = 3 * torch.randn(500, 1, generator=g), 10 * torch.randn(1, 4, generator=g)
    said = 50 + seeds + own + 2 * torch.randn(500, 4, generator=g)
    between, rest = power.variances(dict(enumerate(said.tolist())))
    assert between == pytest.approx(9, rel=0.15)
    assert rest == pytest.approx(4, rel=0.1)
    assert power.variances({0: [1.0], 1: [3.0]}) == (2.0, 0.0)


def test_the_command_reads_a_study_and_refuses_one_of_a_single_seed(power, tmp_path) -> None:
    runs = [
        {"objective": name, "seed": seed,
         "figures": {"frechet": 0.0, "psnr": 20.0 + seed, "by_judge": {"frechet": said}}}
        for name, seed, said in [
            ("a", 0, [10.0, 12.0]), ("a", 1, [12.0, 14.0]), ("b", 0, [20.0, 22.0]),
            ("b", 1, [21.0, 23.0]), ("c", 0, [1.0, 1.0]),
        ]
    ]  # fmt: skip
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": [*runs, {"objective": "a", "seed": 2, "problem": "x"}]}))
    done = CliRunner().invoke(power.main, [str(file)])
    assert done.exit_code == 0, done.output
    assert "| a | 2 | 12 | 1.41 | 0 | 1.41, 1.41 |" in done.output
    needed = power.seeds_needed(2**-0.5, 2.15)
    assert f"| a - b | 2 | -9.5 | 0.707 | {needed} |" in done.output
    assert "| c |" not in done.output
    assert (
        "| a | 2 | 20.5 |"
        in CliRunner().invoke(power.main, [str(file), "--figure", "psnr"]).output
    )
    apart = [{**run, "judges": [str(run["seed"])]} for run in runs]
    file.write_text(json.dumps({"runs": apart}))
    pairs = CliRunner().invoke(power.main, [str(file)]).output
    assert "Seeds have different judges" in pairs
    assert f"| a - b | 2 | -9.5 | 0.707 | {needed} |" in pairs
    assert "| a | 2 |" not in pairs, "the spread of judges is unknown"
    file.write_text(json.dumps({"runs": runs[-1:]}))
    refused = CliRunner().invoke(power.main, [str(file)])
    assert refused.exit_code == 1
    assert "no variant has two seeds" in refused.output
