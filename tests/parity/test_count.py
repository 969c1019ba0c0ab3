"""What `check` counts is what a real step of the engine takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_steps import OBJECTIVES, engine_of, recipe_with, take_step
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from e2ediff.host.plugins import Host
from e2ediff.step.count import count


@pytest.mark.parametrize("name", OBJECTIVES)
def test_counted_flops_are_those_of_the_engine_s_step(
    host: Host, tmp_path: Path, name: str
) -> None:
    """With attention as plain products: the counter does not know the CPU's fused kernel."""
    recipe = recipe_with(host, name)
    engine = engine_of(host, recipe, tmp_path / "run")
    batch = next(iter(engine._batches()))
    for phase, flops in count(recipe).flops.items():
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            take_step(engine, phase, batch)
        assert flops == pytest.approx(counter.get_total_flops() / recipe.batch, rel=0.02)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_counted_parameters_are_those_that_the_engine_trains(
    host: Host, tmp_path: Path, name: str
) -> None:
    recipe = recipe_with(host, name)
    found, nets = count(recipe), engine_of(host, recipe, tmp_path / "run").parts.nets
    trained = [*nets.online.parameters(), *nets.heads.parameters()]
    assert found.parameters == sum(p.numel() for p in trained)
    assert sum(found.modules.values()) == found.parameters
