"""Every objective that is installed, plugins included, in the small recipe of `plugins check`.

An objective that does not fit there as it stands lists what it needs in its `trial`; one that
forgets to fails here, for none is left out.
"""

from __future__ import annotations

import io
import tempfile
from functools import lru_cache

import attrs
import pytest
import torch
from command_line import needs
from e2ediff_testing import check_objective, make_batch, make_draw
from e2ediff_testing.trials import RECIPE
from torch import Tensor

from e2ediff.backbone import Denoise
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, parse_recipe
from e2ediff.interpolant import KINDS
from e2ediff.model.build import build_nets, problems
from e2ediff.objective import Objective
from e2ediff.step.count import count
from e2ediff.store.run_directory import RunDirectory
from e2ediff.times import TimeSampler
from e2ediff.train.engine import Engine
from e2ediff.train.progress import Progress

HOST = load()
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
    if name == "ldm_is_ae":  # whose denoiser ends in its encoder, and must answer with latents
        assert bool(found) == (predicts != "x0")
        return
    assert bool(found) == (largest_loss(recipe, recipe.objective, 1e-4) > 1e3)


@pytest.mark.parametrize("name", NAMES)
def test_an_installed_objective_keeps_its_contract(name) -> None:
    recipe = recipe_of(name)
    check_objective(recipe.objective, recipe.backbone)


def passes_with_a_graph(recipe: Recipe) -> list[tuple[Tensor, list[list[Tensor]]]]:
    """The weighted loss of every phase, and what each of its passes that have a graph gave."""
    objective, (nets, _) = recipe.objective, build_nets(recipe, torch.device("cpu"))
    g, outputs = torch.Generator().manual_seed(0), nets.online.outputs
    with torch.no_grad():  # weights of zero would stop gradients
        for p in [*nets.online.parameters(), *nets.heads.parameters()]:
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    found, batch = [], make_batch(recipe.data.image)

    def recorded(*passes):
        outs = outputs(*passes)
        given = ([out.value, *out.features.values()] for out in outs)
        found[-1].extend(values for values in given if values[0].requires_grad)
        return outs

    nets.online.outputs = recorded
    totals = []
    for phase in objective.phases:
        found.append([])
        totals.append(objective.terms(nets, batch, make_draw(batch), phase).total)
    return list(zip(totals, found, strict=True))


ONLINE = ("objective.target=online", "objective.regress=v", "objective.input_gradient=0")
WASTEFUL = [pytest.param(name, (), id=name) for name in NAMES]
WASTEFUL += [pytest.param("dsd", ONLINE, id="dsd online", marks=needs("e2ediff-dsd"))]


@pytest.mark.parametrize(("name", "changes"), WASTEFUL)
def test_a_pass_builds_a_graph_only_if_a_loss_trains_it(name, changes) -> None:
    for total, passes in passes_with_a_graph(recipe_of(name, *changes)):
        for values in passes:
            grads = torch.autograd.grad(total, values, retain_graph=True, allow_unused=True)
            assert any(grad is not None and grad.any() for grad in grads)


@pytest.mark.parametrize("name", NAMES)
def test_check_counts_the_step_of_every_objective_by_phase(name) -> None:
    """On the meta device, where operators that tests on a CPU never meet may be missing."""
    recipe = recipe_of(name)
    assert not problems(recipe)
    flops = count(recipe).flops
    assert flops.keys() == {*recipe.objective.phases}
    assert all(value > 0 for value in flops.values())


# Cells of an ablation differ in their objective and share their seed.


@attrs.frozen(eq=False)
class Seen:
    """What a step was given, and what it asked the denoiser: `z_t`, `t` and `label`, if it did.

    `rest` is the state of the generator from which everything else is drawn.
    """

    x: Tensor
    t: Tensor
    label: Tensor
    rest: Tensor
    asked: list[Denoise] = attrs.field(factory=list)


@lru_cache
def seen(name: str, *changes: str, seed: int = 0) -> list[Seen]:
    """Two steps of a run of the engine, in the objective's first phase."""
    recipe = recipe_of(name, *changes, f"seed={seed}")
    found, phases = list[Seen](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.create(f"{folder}/run", recipe.name, "", "", {})
        sources = (recipe.data.open(), recipe.data.open(held_out=True))
        quiet = Progress(io.StringIO())
        engine = Engine(HOST, recipe, directory, torch.device("cpu"), sources, quiet)
        step, outputs = engine.parts.step, engine.parts.nets.online.outputs

        def given(module, args):
            batch, draw, phase = args
            phases.append(phase)
            if phase == phases[0]:
                rest = draw.generator.get_state()
                found.append(Seen(batch.x, draw.t, draw.condition.label, rest))

        def asked(*passes):
            if phases[-1] == phases[0]:
                found[-1].asked.extend(p for p in passes if isinstance(p, Denoise))
            return outputs(*passes)

        step.register_forward_pre_hook(given)
        engine.parts.nets.online.outputs = asked
        for batch, number in zip(engine._batches(), range(2), strict=False):
            engine.update(batch, number * recipe.batch)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_cells_of_a_seed_are_given_the_same_images_times_labels_and_noise(name) -> None:
    mine, theirs = seen(name), seen("detached")
    assert len(mine) == len(theirs) == 2
    for a, b in zip(mine, theirs, strict=True):
        for what in ("x", "t", "label", "rest"):
            assert torch.equal(getattr(a, what), getattr(b, what)), what
    for a, b in zip(mine, seen(name, seed=1), strict=True):
        assert not torch.equal(a.t, b.t)
        assert not torch.equal(a.rest, b.rest)


PLAIN = ("objective.augmentation={mask_probability: 0}",)
# Whose first draw from the generator is the noise of the denoiser.
ALIKE = [
    pytest.param("coupled", (), id="coupled"),
    pytest.param("dsd", PLAIN, id="dsd", marks=needs("e2ediff-dsd")),
    pytest.param("unite", (), id="unite", marks=needs("e2ediff-unite")),
    pytest.param("tweedie", (), id="tweedie", marks=needs("e2ediff-rivals")),
    pytest.param("repa_e", (), id="repa_e", marks=needs("e2ediff-rivals")),
]


@pytest.mark.parametrize(("name", "changes"), ALIKE)
def test_cells_of_a_seed_ask_the_denoiser_about_the_same_noise(name, changes) -> None:
    """At the first step weights are equal too, and with them the noised latents, to the bit."""
    mine, theirs = seen(name, *changes)[0].asked[0], seen("detached")[0].asked[0]
    assert torch.equal(mine.t, theirs.t)
    assert torch.equal(mine.condition.label, theirs.condition.label)
    assert torch.equal(mine.z_t, theirs.z_t)
