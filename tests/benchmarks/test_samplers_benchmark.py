"""The samplers' benchmark spends the network calls that it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import needs
from e2ediff_testing import make_nets

from e2ediff.denoiser import Plain
from e2ediff.host.recipe import parse_recipe
from e2ediff.parts.interpolants import Linear

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import samplers

    return samplers


@needs("e2ediff-sampling")
@pytest.mark.parametrize("calls", [5, 12, 25])
def test_every_sampler_gets_as_many_steps_as_the_calls_pay_for(
    benchmark, host, tiny_text, calls
) -> None:
    for case in benchmark.sampler_cases(calls):
        recipe = parse_recipe(host, tiny_text, "tiny", case.overrides)
        if "dopri5" in case.title:
            continue
        spent = []
        for steps in (recipe.sampler.steps, recipe.sampler.steps + 1):
            sampler = type(recipe.sampler)(steps=steps, spacing=recipe.sampler.spacing)
            net = make_nets().online
            f = Plain(net, Linear(), "x0")
            null = net.image.conditioning.null(1)
            sampler.sample(f, torch.zeros(1, 4, 6), null, torch.zeros_like)
            spent.append(f.calls)
        assert spent[0] <= calls < spent[1], case.title


@needs("e2ediff-sampling")
def test_every_guidance_of_the_benchmark_is_a_recipe_s(benchmark, host, tiny_text) -> None:
    cases = benchmark.guidance_cases()
    names = {
        type(parse_recipe(host, tiny_text, "tiny", c.overrides).guidance).__name__ for c in cases
    }
    assert len(names) == 6  # five kinds and none


def test_too_few_calls_are_refused(benchmark) -> None:
    with pytest.raises(ValueError, match="midpoint needs 1 network calls, and 0 are given"):
        benchmark.steps_for("midpoint", 0)


def test_weights_are_those_stored_and_each_width(benchmark) -> None:
    cases = benchmark.weights_cases(["online", "target"], [0.05, 0.289])
    assert [c.weights for c in cases] == ["online", "target", "ema:0.05", "ema:0.289"]
    assert len({c.place for c in cases}) == 4


def test_a_case_is_scored_once(benchmark, tmp_path: Path) -> None:
    case = benchmark.Case(title="euler", place="a")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "a.json").write_text('{"title": "euler", "frechet": 1.5}')
    row = benchmark.measure("no-run", case, 10, 0, tmp_path, 0)
    assert row == {"title": "euler", "frechet": 1.5}
