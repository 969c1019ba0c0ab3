"""How many images a run is scored on: each set has noise of its own, and beginnings agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import trained
from tiny_recipe import tiny

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def sample_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sample_counts

    return sample_counts


def test_a_smaller_set_is_the_beginning_of_the_larger_one(sample_counts, tmp_path) -> None:
    run = str(trained(tmp_path, tiny(data="{name: synthetic, size: 32, count: 64}")))
    judges = tmp_path / "judges"
    found = sample_counts.distances(run, judges, [20, 40], 2, number=1, epochs=1)
    few = sample_counts.distances(run, judges, [20], 2, number=1, epochs=1)
    assert found.keys() == {20, 40}
    assert found[20] == pytest.approx(few[20], rel=1e-4)
    assert len({value for values in found.values() for value in values}) == 4
    words = [run, "--judges", str(judges), "--judge-epochs", "1", "--counts", "20,30"]
    said = CliRunner().invoke(sample_counts.main, [*words, "--sets", "2"])
    assert said.exit_code == 0, said.output
    assert [row.split(" | ")[1] for row in said.output.splitlines()[2:]] == ["20", "30"]


def test_a_run_that_is_not_there_is_named(sample_counts, tmp_path) -> None:
    words = [str(tmp_path / "nowhere"), "--judges", str(tmp_path)]
    said = CliRunner().invoke(sample_counts.main, words)
    assert said.exit_code == 1
    assert "nowhere" in said.output
