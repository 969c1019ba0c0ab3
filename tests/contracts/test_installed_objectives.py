"""Every objective that is installed, plugins included, in the small recipe of `plugins check`.

An objective that does not fit there as it stands lists what it needs in its `trial`; one that
forgets to fails here, for none is left out.
"""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, parse_recipe
from e2ediff.interpolant import KINDS
from e2ediff.objective import Objective
from e2ediff.run.assembly import build_nets, problems
from e2ediff.testing import make_batch, make_draw
from e2ediff.testing.trials import RECIPE
from e2ediff.times import TimeSampler

HOST = load()
HOST.load_all()
NAMES = HOST.registries["objectives"].names()


def recipe_of(name: str, *changes: str) -> Recipe:
    """The trial's recipe with this objective, and what it needs there."""
    cls = HOST.registries["objectives"].get(name)
    words = [f"objective={name}", *getattr(cls, "trial", ()), *changes]
    return parse_recipe(HOST, RECIPE, "the trial's recipe", words)


@attrs.frozen
class At(TimeSampler):
    """Always the same time."""

    t: float

    def quantile(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.t)


def largest_loss(recipe: Recipe, objective: Objective, t: float) -> float:
    """Of all phases at this time, with networks whose answers are of the order of 1."""
    nets, _ = build_nets(recipe, torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nets.online.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    batch = make_batch(recipe.data.image)
    return max(
        float(loss.detach())
        for phase in objective.phases
        for loss in objective.terms(nets, batch, make_draw(batch, At(t)), phase).losses.values()
    )


def test_the_plugins_of_this_environment_are_all_there() -> None:
    assert not HOST.broken
    assert {entry.name for entry in HOST.entries} == {p.name for p in HOST.plugins} - {"e2ediff"}


@pytest.mark.parametrize("predicts", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_has_no_bound_next_to_noise_is_refused_and_no_other(name, predicts) -> None:
    """At t = 1e-4 an error of order 1 becomes 1e8 where it is divided by alpha^2."""
    recipe = recipe_of(name, f"predicts={predicts}", "sampler.t_start=0.01")
    found = problems(recipe)
    assert {problem.where for problem in found} <= {"predicts"}
    assert bool(found) == (largest_loss(recipe, recipe.objective, 1e-4) > 1e3)
