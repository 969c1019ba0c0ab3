"""What `check` counts is what a real step of the engine takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from real_steps import OBJECTIVES, engine_of, recipe_with, take_step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from e2ediff.data import Batch
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.model.build import build_nets
from e2ediff.objective import Draw
from e2ediff.step.count import count
from e2ediff.step.flops import FlopCounter
from e2ediff.step.shapes import Layout, Shapes, is_meta
from e2ediff.step.step import Step

META = torch.device("meta")


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


def blank_loss(recipe: Recipe, phase: str) -> Tensor:
    """The loss of a step of two images on the meta device."""
    nets, image = build_nets(recipe, META)[0], recipe.data.image
    x = torch.zeros(2, image.channels, image.height, image.width, device=META)
    condition = image.conditioning.null(2, META)
    draw = Draw(
        t=torch.zeros(2, device=META), condition=condition, generator=None, times=recipe.times
    )
    step = Step(recipe.objective, nets, torch.float32, recipe.regularizers)
    return step(Batch(x=x, condition=condition), draw, phase)[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_flops_are_to_the_last_one_those_of_torch_s_counter(host: Host, name: str) -> None:
    """Which computes every call of the same step."""
    recipe = recipe_with(host, name)
    for phase, flops in count(recipe).flops.items():
        counter = FlopCounterMode(display=False)
        with counter:
            blank_loss(recipe, phase).backward()
        assert flops == counter.get_total_flops() / 2


def test_further_blocks_are_counted_without_being_computed(host: Host) -> None:
    computed, totals = set[int](), []
    for depth in (2, 7):
        recipe = recipe_with(host, "detached", f"backbone.depth={depth}")
        with FlopCounter() as counter:
            blank_loss(recipe, "joint").backward()
        computed.add(counter.remembered)
        totals.append(counter.total)
    assert len(computed) == 1
    assert totals[1] > 3 * totals[0]


def test_only_what_follows_from_layouts_is_remembered() -> None:
    """A call that changes its argument, depends on values or shares memory is made each time."""
    a, b = torch.empty(3, 4, device=META), torch.ones(3, 4)
    aten, shapes = torch.ops.aten, Shapes()
    for func, args in [(aten.add_.Tensor, (a, a)), (aten.nonzero.default, (a,)),
                       (aten.t.default, (a,)), (aten.mul.Tensor, (b, b)),
                       (aten.mul.Tensor, (a + 1j, a))]:  # fmt: skip
        assert shapes.key(func, args, {}) is None
    key = shapes.key(aten._unsafe_view.default, (a, [4, 3]), {})
    assert key is not None
    shapes.learn(key, aten._unsafe_view.default(a, [4, 3]), (a,))
    assert shapes.recall(key, Layout.blank) is None


def test_remembered_results_have_the_layouts_of_computed_ones() -> None:
    """Strides and types too, and those that are left out; 2 and 2.0 are told apart."""
    a = torch.empty(3, 4, dtype=torch.bfloat16, device=META).t()
    whole = torch.empty(3, device=META, dtype=torch.int64)
    aten, shapes = torch.ops.aten, Shapes()
    for func, args in [
        (aten.mul.Tensor, (a, 2.0)),
        (aten.mul.Tensor, (whole, 2)),
        (aten.mul.Tensor, (whole, 2.0)),
        (aten.var_mean.correction, (a, [1])),
    ]:
        key = shapes.key(func, args, {})
        assert key is not None
        assert shapes.recall(key, Layout.blank) is None
        out = func(*args)
        shapes.learn(key, out, args)
        again = shapes.recall(key, Layout.blank)
        assert type(again) is type(out)
        pairs = [(again, out)] if isinstance(out, Tensor) else zip(again, out, strict=True)
        for mine, its in pairs:
            assert is_meta(mine)
            assert (mine.shape, mine.stride(), mine.dtype) == (its.shape, its.stride(), its.dtype)
