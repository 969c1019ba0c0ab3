"""A step's losses and gradients on the CPU and on the device, from one set of weights and draws.

A device's generator draws other numbers than a CPU's, so here all is drawn on the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import attrs
import torch
from look import Look
from steps import random_batch, read_recipe
from torch import Tensor
from typing_extensions import override

from e2ediff.host.recipe import Recipe
from e2ediff.objective import Draw
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.step.draws import draw_for

_CPU = torch.device("cpu")
_IN256 = (
    *("batch=8", "microshards=1", "backbone.patch=4", "backbone.depth=4"),
    "data={name: fashion_mnist, size: 32}",
)
_CASES = {
    "quickstart": (),
    "dsd_in256_s": _IN256,
    "unite_quickstart": (),
    "jit_quickstart": (),
}


@attrs.frozen(eq=False, kw_only=True)
class DrawnOnCPU(Draw):
    """A draw whose numbers come from a generator of the CPU wherever the step is computed."""

    @override
    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like.device)

    @override
    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.t.device)

    @override
    def further_times(self) -> Tensor:
        return self.times.draw(len(self.t), self.generator, _CPU).to(self.t.device)


class Computed(NamedTuple):
    """The losses of a step, and its gradient as one vector."""

    losses: dict[str, float]
    gradient: Tensor


def run(look: Look) -> None:
    """Note relative differences from the CPU's float32."""
    for name, sets in _CASES.items():
        with look.attempt(recipe=name):
            recipe = read_recipe(look, name, "precision=float32", *sets)
            theirs = _computed(recipe, _CPU)
            for kind in ("float32", "bfloat16"):
                with look.attempt(recipe=name, precision=kind) as row:
                    other = read_recipe(look, name, f"precision={kind}", *sets)
                    ours = _computed(other, torch.device(look.device))
                    gap = {
                        k: abs(ours.losses[k] - v) / max(abs(v), 1e-6)
                        for k, v in theirs.losses.items()
                    }
                    apart = (ours.gradient - theirs.gradient).norm() / theirs.gradient.norm()
                    look.note(
                        **row, losses_gap=max(gap.values()), worst=max(gap, key=gap.__getitem__),
                        gradient_gap=float(apart), losses=ours.losses,
                    )  # fmt: skip


def _computed(recipe: Recipe, device: torch.device) -> Computed:
    parts = assemble(recipe, device)
    _shake(parts)
    drawn = draw_for(recipe, random_batch(recipe, _CPU).condition, "agreement")
    draw = DrawnOnCPU(
        t=drawn.t.to(device),
        condition=drawn.condition.to(device),
        generator=drawn.generator,
        times=drawn.times,
        progress=drawn.progress.to(device),
        label_drop=drawn.label_drop,
    )
    total, losses, _ = parts.step(random_batch(recipe, device), draw, recipe.objective.phases[0])
    total.backward()
    found = [p.grad for p in parts.step.parameters() if p.grad is not None]
    gradient = torch.cat([g.flatten().cpu() for g in found])
    return Computed({name: float(value) for name, value in losses.items()}, gradient)


def _shake(parts: Assembly) -> None:
    """Move all weights from where zero gates stop gradients, alike on every device."""
    with torch.no_grad():
        for net in (parts.nets.online, parts.nets.target, parts.nets.heads):
            g = torch.Generator().manual_seed(0)
            for p in net.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=g).to(p.device))
