"""The benchmark of sweeps says how their ranking compares with the full one."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sweep_proxy

    return sweep_proxy


@pytest.fixture
def four(benchmark):
    return [
        benchmark.Candidate(weights="target", settings=(f"guidance.scale={k}",)) for k in range(4)
    ]


def test_rank_correlation_is_spearman_s(benchmark) -> None:
    assert benchmark.rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert benchmark.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 * (1 + 1) / (4 * 15)
    assert benchmark.rank_correlation([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)


def test_a_verdict_names_the_pick_and_what_it_costs(benchmark, four) -> None:
    scores = [0.2, 0.1, 0.3, 0.4]
    proxy = {
        c: {"score": s, "error": 0.01, "tied": s < 0.25} for c, s in zip(four, scores, strict=True)
    }
    full = {
        c: {"KD": kd, "FD": fd}
        for c, kd, fd in zip(four, [2.0, 1.0, 3.0, 4.0], [1.0, 1.5, 4.0, 3.0], strict=True)
    }
    found = benchmark.verdict(proxy, full)
    assert found["picked"] == "target guidance.scale=1"
    assert found["tied"] == 2
    assert found["KD"] == {
        "correlation": pytest.approx(1),
        "best": "target guidance.scale=1",
        "best_is_marked": True,
        "of_best": 1,
    }
    assert found["FD"]["of_best"] == 1.5
    assert found["FD"]["correlation"] == pytest.approx(1 - 6 * 4 / 60)
    text = benchmark.table({16: proxy}, full)
    assert "| 16 | 2 of 4 | 1.00 | 0.60 | yes | 1.500 |" in text
    first = next(line for line in text.splitlines() if "guidance.scale" in line)
    assert first == "| `target guidance.scale=0` | 1.000 | 2.00000 | \\* 0.20000 ± 0.01000 |"


def test_a_candidate_is_the_words_of_a_command(benchmark, four) -> None:
    assert four[2].words == ["--weights", "target", "--set", "guidance.scale=2"]
