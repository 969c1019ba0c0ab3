"""The same steps in bfloat16 and in float32: how far losses and weights drift apart."""

from __future__ import annotations

import torch
from look import Look
from steps import numbers, random_batch, read_recipe, stepper


def run(look: Look, name: str = "dsd_in256_s") -> None:
    """Note losses at four steps, the largest relative gaps, and that of the weights."""
    device, steps = torch.device(look.device), 6 if look.tiny else 50
    own = [] if look.tiny else ["batch=64", "microshards=1", "backbone.depth=6"]
    own += ["optimizer.warmup_images=0", "images=1000000"]
    losses: dict[str, list[dict[str, float]]] = {}
    weights: dict[str, torch.Tensor] = {}
    for kind in ("float32", "bfloat16"):
        recipe = read_recipe(look, name, f"precision={kind}", *own)
        step, parts = stepper(recipe, device, look.tiny)
        losses[kind] = [
            numbers(step(random_batch(recipe, device, seed=i % 4), i)) for i in range(steps)
        ]
        held = [p.detach().flatten() for p in parts.nets.online.parameters()]
        weights[kind] = torch.cat(held).cpu()
    a, b = losses["float32"], losses["bfloat16"]
    for i in (0, steps // 5, steps // 2, steps - 1):
        look.note(step=i, **{k: f"{a[i][k]:.5f} / {b[i][k]:.5f}" for k in a[i]})
    for key in a[0]:
        gap = max(abs(x[key] - y[key]) / max(abs(x[key]), 1e-6) for x, y in zip(a, b, strict=True))
        look.note(figure=key, largest_relative_gap=gap)
    apart = (weights["float32"] - weights["bfloat16"]).norm() / weights["float32"].norm()
    look.note(what="weights", relative_gap=float(apart))
