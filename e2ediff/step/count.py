"""Count parameters and FLOPs of a recipe on the meta device."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import nn

from e2ediff.backbone import LatentSpec
from e2ediff.data import Batch
from e2ediff.host.recipe import Recipe
from e2ediff.model.build import averagings, build_nets
from e2ediff.objective import Draw
from e2ediff.step.flops import FlopCounter
from e2ediff.step.step import Step

_META = torch.device("meta")


@attrs.frozen
class Count:
    """Sizes of a recipe.

    `parameters` counts trained parameters, the objective's heads and the class table included,
    averaged copies excluded; `modules` splits them.
    `flops` is by phase, for one image, forward and backward.
    `state_bytes` holds float32 weights, gradients and the averages, without optimizer state, whose
    size depends on the optimizer.
    """

    parameters: int
    modules: Mapping[str, int]
    latent: LatentSpec
    flops: Mapping[str, float]
    state_bytes: int


def count(recipe: Recipe) -> Count:
    """Build on the meta device and count.

    FLOPs are counted over the real step as torch's FlopCounterMode does, which counts matrix
    products, convolutions and attention (two FLOPs a multiply-add), on a batch of two.
    Perceptual networks are left out, as their weights are not read here.
    """
    nets, _ = build_nets(recipe, _META)
    objective = recipe.objective
    step = Step(objective, nets, torch.float32, recipe.regularizers)
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for root in (nets.online, nets.heads)
        for name, module in _modules(root, "heads." if root is nets.heads else "")
    }
    direct = [(n, p) for n, p in nets.online.named_parameters(recurse=False)]
    sizes |= {name: p.numel() for name, p in direct}
    parameters = sum(p.numel() for p in step.parameters())
    image, two = recipe.data.image, 2
    batch = Batch(
        x=torch.zeros(two, image.channels, image.height, image.width, device=_META),
        condition=image.conditioning.null(two, _META),
    )
    draw = Draw(
        t=torch.zeros(two, device=_META),
        condition=batch.condition,
        generator=None,
        times=recipe.times,
    )
    flops = {}
    for phase in objective.phases:
        counter = FlopCounter()
        with counter:
            step(batch, draw, phase)[0].backward()
        step.zero_grad()
        flops[phase] = counter.total / two
    copies = 2 + len(averagings(recipe))
    return Count(
        parameters=parameters,
        modules={name: size for name, size in sizes.items() if size},
        latent=nets.online.latent,
        flops=flops,
        state_bytes=4 * copies * parameters,
    )


def _modules(root: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """Return the children of `root`, with containers expanded once to show trunks and heads."""
    found = []
    for name, child in root.named_children():
        if isinstance(child, nn.ModuleDict):
            found += [(f"{prefix}{name}.{inner}", module) for inner, module in child.items()]
        else:
            found.append((f"{prefix}{name}", child))
    return found
