"""The benchmark of sweeps says how their ranking compares with the full one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from command_line import needs

from e2ediff.host.plugins import load

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
    assert first == "| `target guidance.scale=0` | 1.00 | 2 | \\* 0.2 ± 0.01 |"


def test_a_candidate_is_the_words_of_a_command(benchmark, four) -> None:
    assert four[2].words == ["--weights", "target", "--set", "guidance.scale=2"]


@needs("e2ediff-features")
def test_the_exported_judge_has_the_judge_s_features(benchmark, tmp_path: Path) -> None:
    """Of grey images that are given as three equal channels of 8 bits."""
    import judge as judges

    judge = judges.Judge().eval()
    block = judges.export_judge(judge, tmp_path / "judge.pt2")
    options = yaml.safe_load(block)
    exported = load().registries["features"].get(options.pop("name"))
    mean, std = (tuple(options.pop(key)) for key in ("mean", "std"))
    network = exported(mean=mean, std=std, **options).build()
    x = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        (found, *_) = network(x.repeat(1, 3, 1, 1).float() / 127.5 - 1)
        wanted, _ = judge(x.float() / 127.5 - 1)
    torch.testing.assert_close(found.flatten(1), wanted)
