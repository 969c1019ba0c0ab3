"""Build the networks of a recipe, and check that its parts fit one another."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import nn

from e2ediff import addresses
from e2ediff.averaging import Averaging
from e2ediff.backbone import Backbone
from e2ediff.data import ImageSpec
from e2ediff.errors import (
    AbsentDataError,
    DataError,
    Problem,
    RecipeError,
    ResourceError,
    first_line,
)
from e2ediff.host.recipe import Recipe
from e2ediff.losses import PixelLoss
from e2ediff.model.averages import Average
from e2ediff.model.fixed_networks import placed
from e2ediff.model.power_averages import tracked_name
from e2ediff.objective import Nets, Objective
from e2ediff.parts.averages import Power
from e2ediff.regularizer import names_of
from e2ediff.seeds import derive

_TOO_LARGE = "a number of the backbone, or of the objective's networks, is larger than any size"
_OVERFLOWS = re.compile("[Oo]verflow|[Cc]an't allocate|not enough memory|Storage size|too large")
_MOST_TRIED = 100_000  # steps of a sampler whose times are looked at
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(wanted: str, local: int | None = None) -> torch.device:
    """Return a recipe's device; for several processes on a machine, the GPU number `local`.

    Raises:
        ResourceError: CUDA is requested but not available, or has too few GPUs.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "device: cuda is not available here; set `device: auto` or `device: cpu`, or check "
            "the driver with `nvidia-smi`"
        )
    if wanted == "cpu" or local is None:
        return torch.device(wanted)
    if local >= (count := torch.cuda.device_count()):
        raise ResourceError(
            f"process {local} of this machine has no GPU: it has {count}, numbered from 0; start "
            f"at most {count} processes, or set `device: cpu`"
        )
    return torch.device("cuda", local)


def check_precision(
    precision: str, device: torch.device, *, supported: bool | None = None
) -> None:
    """Refuse a precision that the device does not support natively.

    Args:
        precision: The recipe's precision.
        device: The device of the run.
        supported: Whether that device computes in bfloat16; by default, query it.

    Raises:
        ResourceError: The device emulates bfloat16, or lacks it.
    """
    if precision != "bfloat16" or device.type != "cuda":
        return
    if supported is None:
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if not supported:
        raise ResourceError(
            "precision: bfloat16 needs a GPU that computes in it (compute capability 8.0, Ampere, "
            "or newer), and this one does not; set `precision: float32`"
        )


def build_nets(
    recipe: Recipe, device: torch.device, *, frozen: bool = True
) -> tuple[Nets, Average]:
    """Build initialised networks on `device`, and the target's average.

    Weights depend on the recipe's seed alone.
    Without `frozen` the objective's frozen networks, which only training needs, are left out, and
    no file is opened that the recipe names.
    """
    online, heads, others = fresh_nets(recipe, device, frozen=frozen)
    target = Average(online, recipe.target)
    return Nets(online, target.net, recipe.interpolant, recipe.predicts, heads, others), target


def fresh_nets(
    recipe: Recipe, device: torch.device, *, frozen: bool = True
) -> tuple[Backbone, nn.ModuleDict, nn.ModuleDict]:
    """Build the online network, the objective's heads and its frozen networks."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Of a backbone without features a head has no weights, which `problems` refuses by name.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        torch.manual_seed(derive(recipe.seed, "weights") % 2**63)
        with torch.device("meta") if device.type == "meta" else torch.device("cpu"):
            online = recipe.backbone.build(recipe.data.image)
            heads = recipe.objective.heads(online)
            # A frozen network is loaded from a file, which the meta device does not need.
            absent = device.type == "meta" or not frozen
            others = nn.ModuleDict() if absent else _frozen(recipe.objective, online)
    if device.type not in ("cpu", "meta"):  # on the device where they were built
        online, heads, others = online.to(device), heads.to(device), others.to(device)
    return online.train(), heads, others


def _frozen(objective: Objective, online: Backbone) -> nn.ModuleDict:
    """Build an objective's frozen networks; what keeps one from it has its place."""
    try:
        return objective.frozen(online)
    except DataError as error:
        raise placed(error, objective, "objective") from error


def problems(recipe: Recipe) -> list[Problem]:
    """Find parts that do not fit together, without data or memory for weights.

    Raises:
        AbsentDataError: A file that says which shapes the networks have is not here, and nothing
            else is wrong.
    """
    found = unbuilt = [
        Problem(f"backbone.{field}", what)
        for field, what in recipe.backbone.problems(recipe.data.image)
    ]
    phases = recipe.objective.phases
    found = found + [
        Problem(
            f"optimizers.{name}",
            f"the objective has no phase '{name}'; it has {', '.join(phases)}",
        )
        for name in recipe.optimizers
        if name not in phases
    ]
    found += [
        Problem(
            f"optimizers.{name}",
            f"phase '{name}' needs an optimizer of its own; add "
            f"`optimizers: {{{name}: {{name: adamw, lr: 1.0e-4}}}}`",
        )
        for name in recipe.objective.own_optimizers
        if name not in recipe.optimizers
    ]
    found += guidance_problems(recipe)
    found += time_problems(recipe)
    if recipe.objective.trains_guidance and _has_no_null(recipe):
        what = (
            "the objective trains guided velocities, which take the answer without a condition, "
            "and with 0 nothing teaches that; set label_drop: 0.1"
        )
        found.append(Problem("label_drop", what))
    if recipe.parallel == "fsdp2" and recipe.objective.needs_whole_weights:
        what = (
            "the objective uses weights without their gradients in some places, which FSDP2 "
            "cannot keep apart; set parallel: ddp"
        )
        found.append(Problem("parallel", what))
    return found if unbuilt else found + _network_problems(recipe, found)


def _network_problems(recipe: Recipe, others: Sequence[Problem]) -> list[Problem]:
    """Find what does not fit the networks, which can be built; `others` was found before."""
    found = [*_loss_problems(recipe.objective, "objective", recipe.data.image)]
    try:
        nets, _ = build_nets(recipe, torch.device("meta"))
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        if not isinstance(error, MemoryError) and not _OVERFLOWS.search(str(error)):
            raise  # a fault of a plugin, whose place its author has to see
        return [*found, Problem("backbone", f"{_TOO_LARGE}: {first_line(error)}")]
    except DataError as error:  # a teacher's, which says its place itself
        if isinstance(error, AbsentDataError) and not (found or others):
            raise
        place = re.match(r"(objective[.\w]*): (?=.)", str(error))
        what = str(error)[place.end() :] if place else str(error)
        return [*found, Problem(place[1] if place else "objective.features", what)]
    if not nets.online.blocks():
        what = "needs a backbone whose `blocks` method names its blocks; this one names none"
        asked = {
            "compile": recipe.compile == "blocks",
            "checkpoint_activations": recipe.checkpoint_activations,
        }
        found += [Problem(field, what) for field, wanted in asked.items() if wanted]
    if not any(one.where.startswith("objective.") for one in found):  # which tries its losses
        found += [Problem(where, what) for where, what in recipe.objective.problems(nets)]
    found += sampler_problems(recipe, nets.online)
    found += _optimizer_problems(recipe, nets)
    found += _regularizer_problems(recipe, nets)
    return found


def _loss_problems(part: Any, where: str, image: ImageSpec) -> Iterator[Problem]:
    """Find comparisons of images, anywhere in an objective, that images are too small for."""
    if isinstance(part, PixelLoss):
        yield from (Problem(f"{where}.{field}", what) for field, what in part.problems(image))
    elif attrs.has(type(part)):
        for field in attrs.fields(type(part)):
            yield from _loss_problems(getattr(part, field.name), f"{where}.{field.name}", image)


def _has_no_null(recipe: Recipe) -> bool:
    """Whether there are conditions, and the answer without one is never learned."""
    return recipe.label_drop == 0 and recipe.data.image.conditioning.kinds != 1


def guidance_problems(recipe: Recipe) -> list[Problem]:
    """Find conflicts of sampler and guidance, and runs that guidance may not use."""
    if recipe.guidance is None:
        return []
    found = [*recipe.guidance.problems(recipe.sampler)]
    if recipe.objective.trains_guidance:
        what = (
            "the denoiser is trained to be guided, by the objective, and would be guided twice; "
            "set guidance: null"
        )
        return [Problem("guidance", what)]
    if recipe.guidance.asks_null and _has_no_null(recipe):
        what = (
            "it needs the answer without a condition, which nothing teaches with label_drop: 0; "
            "set guidance: null, or train with label_drop: 0.1"
        )
        return [Problem("guidance", what)]
    refused = (addresses.refusal(reference.run) for reference in recipe.guidance.references)
    found += [("run", f"{what}.") for what in refused if what]
    return [Problem(f"guidance.{field}", what) for field, what in found]


def idle_guidance(recipe: Recipe) -> list[str]:
    """Warn of guidance by the answer without a condition, where there is no other."""
    guidance = recipe.guidance
    if guidance is None or not guidance.asks_null or recipe.data.image.conditioning.kinds != 1:
        return []
    return [
        "guidance asks for the answer without a condition, and these images have no classes: both "
        "answers are the same, at twice the work; set guidance: null"
    ]


def time_problems(recipe: Recipe) -> list[Problem]:
    """Find times of sampling that cannot be, and a beginning at which nothing can be predicted."""
    found, sampler = [], recipe.sampler
    if recipe.predicts in ("eps", "score"):
        alpha = float(recipe.interpolant.alpha(torch.tensor([sampler.t_start])))
        if alpha < 0.005:
            what = (
                f"sampling begins at t = {sampler.t_start:g}, where z_t holds almost nothing of "
                f"the latent, so predicts: {recipe.predicts} cannot determine it; set "
                "sampler.t_start: 0.01, or predicts: x0 or v"
            )
            found.append(Problem("sampler.t_start", what))
    if sampler.steps > _MOST_TRIED:
        return found
    try:
        times = sampler.grid(recipe.interpolant)
    except ValueError as error:
        return [*found, Problem("sampler", str(error))]
    except ArithmeticError:
        times = []
    if not times or not all(t < s for t, s in pairwise(times)):
        what = (
            f"its times do not rise in each step: {_few(times)}; take fewer steps, or bring "
            "shift, or rho of the spacing, closer to their defaults"
        )
        found.append(Problem("sampler", what))
    return found


def _few(times: Sequence[float]) -> str:
    shown = ", ".join(f"{t:g}" for t in times[:6])
    return f"{shown}, ..." if len(times) > 6 else shown or "they cannot be computed"


def averages_velocities(recipe: Recipe, net: Backbone) -> bool:
    """Return whether the recipe's denoiser has learned average velocities between two times."""
    return net.second_time and recipe.objective.trains_averages


def sampler_problems(recipe: Recipe, net: Backbone) -> list[Problem]:
    """Find a sampler that asks for what a network does not offer."""
    if recipe.sampler.averages != "needed" or averages_velocities(recipe, net):
        return []
    what = (
        "follows average velocities, which this network has not learned; choose another, such as "
        "euler, or train with backbone.second_time: true, of a backbone that has it, such as vit, "
        "and an objective of average velocities, such as mean_flow"
    )
    return [Problem("sampler", what)]


def _optimizer_problems(recipe: Recipe, nets: Nets) -> list[Problem]:
    """Find parameter groups that do not fit the networks."""
    held = nn.ModuleDict({"online": nets.online, "heads": nets.heads})
    names = [name for name, p in held.named_parameters() if p.requires_grad]
    found, phases = [], recipe.objective.phases
    shared = [phase for phase in phases if phase not in recipe.optimizers]
    configs = {"optimizer": (recipe.optimizer, shared)} if shared else {}
    configs |= {f"optimizers.{p}": (recipe.optimizers[p], [p]) for p in phases if p not in shared}
    for where, (config, its) in configs.items():
        mine = [name for name in names if any(recipe.objective.trains(p, name) for p in its)]
        found += [Problem(f"{where}.{field}", what) for field, what in config.problems(mine)]
    return found


def _regularizer_problems(recipe: Recipe, nets: Nets) -> list[Problem]:
    """Find what keeps regularisers from being computed."""
    found, images = [], recipe.batch // recipe.microshards
    fixed = not nets.online.latent.learned
    if recipe.regularizers and (fixed or not recipe.objective.trains_latents):
        why = (
            "the latents are a fixed function of the image"
            if fixed
            else "the objective trains no encoder through its latents"
        )
        what = f"{why}, so that regularisers would do nothing; leave them out"
        return [Problem("regularizers", what)]
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
    """Raise the problems that `problems` finds.

    Raises:
        RecipeError: Parts of the recipe do not fit one another.
    """
    if found := problems(recipe):
        raise RecipeError(source, found)


def averagings(recipe: Recipe) -> dict[str, Averaging]:
    """Return the laws of a run's averages, by the name of the weights, `post_hoc` last."""
    further = {average.name: average.averaging for average in recipe.ema}
    return {"target": recipe.target, **further, **tracked(recipe)}


def tracked(recipe: Recipe) -> dict[str, Power]:
    """Return the averages that `post_hoc` tracks."""
    widths = recipe.post_hoc.widths if recipe.post_hoc else ()
    return {tracked_name(width): Power(width=width) for width in widths}
