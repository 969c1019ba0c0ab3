"""From a recipe to networks, optimizers and averages."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import nn

from e2ediff.errors import Problem, RecipeError, ResourceError
from e2ediff.host.recipe import Recipe
from e2ediff.objective import Nets
from e2ediff.regularizer import names_of
from e2ediff.run.ema import Average
from e2ediff.run.seeds import derive
from e2ediff.run.step import Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(wanted: str) -> torch.device:
    """The device of a recipe's `device`.

    Raises:
        ResourceError: CUDA is asked for and not there.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "device: cuda is not available here; set `device: auto` or `device: cpu`, or check "
            "the driver with `nvidia-smi`"
        )
    return torch.device(wanted)


@attrs.frozen(eq=False)
class Assembly:
    """What a run trains: the step, one optimizer a phase, and the averages by name."""

    step: Step
    optimizers: Mapping[str, torch.optim.Optimizer]
    averages: Mapping[str, Average]
    choices: Mapping[str, str]

    @property
    def nets(self) -> Nets:
        """The networks that the objective computes with."""
        return self.step.nets


def build_nets(recipe: Recipe, device: torch.device) -> tuple[Nets, Average]:
    """Freshly initialised networks on `device`, and the target's average.

    Weights depend on the recipe's seed alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "weights") % 2**63)
        with torch.device("meta") if device.type == "meta" else torch.device("cpu"):
            online = recipe.backbone.build(recipe.data.image)
            heads = recipe.objective.heads(online)
            # A fixed network is loaded from a file; shapes alone do not need it.
            frozen = nn.ModuleDict() if device.type == "meta" else recipe.objective.frozen(online)
    online, heads, frozen = online.to(device).train(), heads.to(device), frozen.to(device)
    target = Average(online, recipe.target.decay, warmup=recipe.target.warmup)
    nets = Nets(online, target.net, recipe.interpolant, recipe.predicts, heads, frozen)
    return nets, target


def problems(recipe: Recipe) -> list[Problem]:
    """What does not fit together, found without data or memory for weights."""
    found = [
        Problem(f"backbone.{field}", what)
        for field, what in recipe.backbone.problems(recipe.data.image)
    ]
    phases = recipe.objective.phases
    found += [
        Problem(
            f"optimizers.{name}",
            f"the objective has no phase '{name}'; it has {', '.join(phases)}",
        )
        for name in recipe.optimizers
        if name not in phases
    ]
    if recipe.predicts in ("eps", "score"):
        alpha = float(recipe.interpolant.alpha(torch.tensor([recipe.sampler.t_start])))
        if alpha < 0.005:
            what = (
                f"sampling begins at t = {recipe.sampler.t_start:g}, where z_t holds next to "
                f"nothing of the latent and predicts: {recipe.predicts} cannot tell it; set "
                "sampler.t_start: 0.01, or predicts: x0 or v"
            )
            found.append(Problem("sampler.t_start", what))
    if not found:
        nets, _ = build_nets(recipe, torch.device("meta"))
        found += [Problem(where, what) for where, what in recipe.objective.problems(nets)]
        found += _regularizer_problems(recipe, nets)
    return found


def _regularizer_problems(recipe: Recipe, nets: Nets) -> list[Problem]:
    """What keeps regularisers from being computed."""
    found, images = [], recipe.batch // recipe.microshards
    for i, (name, part) in enumerate(
        zip(names_of(recipe.regularizers), recipe.regularizers, strict=True)
    ):
        if images < part.fewest:
            what = (
                f"{name} compares images and needs at least {part.fewest} at once; batch over "
                f"microshards is {images}: raise batch, or lower microshards"
            )
            found.append(Problem(f"regularizers.{i}", what))
            continue
        found += [
            Problem(f"regularizers.{i}.{field}", what)
            for field, what in part.problems(nets, images)
        ]
    return found


def check_fits(recipe: Recipe, source: str) -> None:
    """Raise what `problems` finds.

    Raises:
        RecipeError: Parts of the recipe do not fit one another.
    """
    if found := problems(recipe):
        raise RecipeError(source, found)


def assemble(recipe: Recipe, device: torch.device) -> Assembly:
    """Everything that a run trains, on its device."""
    nets, target = build_nets(recipe, device)
    precision = DTYPES[recipe.precision]
    choices = dict(nets.online.prepare(device, precision))
    nets.target.prepare(device, precision)
    averages = {"target": target}
    for extra in recipe.ema:
        averages[extra.name] = Average(nets.online, extra.decay, warmup=extra.warmup)
        averages[extra.name].net.prepare(device, precision)
    step = Step(recipe.objective, nets, precision, recipe.regularizers)
    optimizers = {}
    for phase in recipe.objective.phases:
        config = recipe.optimizers.get(phase, recipe.optimizer)
        optimizer = config.build(step.named_trained(phase))
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        optimizers[phase] = optimizer
    return Assembly(step, optimizers, averages, choices)
