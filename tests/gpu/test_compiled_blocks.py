"""Compiled blocks compute the steps of uncompiled ones, also where activations are recomputed."""

from __future__ import annotations

import pytest
import torch
from command_line import needs_dsd
from tiny_recipe import tiny

from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.step.assembly import assemble
from e2ediff.step.update import Update

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_dsd]  # warnings are the compiler's own
RECIPE = tiny(
    data="{name: synthetic, size: 32, classes: 4, count: 64}",
    backbone="{name: vit, width: 128, depth: 2, heads: 2, patch: 4, latent_dim: 4, "
    "latent_norm: layer}",
    objective="dsd",
    microshards="2",
)


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing that another test has compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def figures(device: torch.device, *changes: str) -> list[dict[str, float]]:
    """Losses and gradient norms of three steps."""
    recipe = parse_recipe(load(), RECIPE, "tiny", [f"device={device}", *changes])
    update = Update(recipe, assemble(recipe, device), World(), lambda *_, **__: None)
    g, image = torch.Generator().manual_seed(0), recipe.data.image
    shape = (recipe.batch, image.channels, image.height, image.width)
    x = (torch.rand(shape, generator=g) * 2 - 1).to(device)
    batch = Batch(x=x, condition=image.conditioning.example(recipe.batch).to(device))
    records = [update(batch, i * recipe.batch) for i in range(3)]
    return [{k: float(v) for k, v in record.items()} for record in records]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_compiled_blocks_give_the_losses_of_uncompiled_ones(recomputed, precision, cuda) -> None:
    plain = figures(cuda, f"precision={precision}")
    words = ["compile=blocks", f"checkpoint_activations={str(recomputed).lower()}"]
    made = figures(cuda, f"precision={precision}", *words)
    # A fused kernel leaves out roundings to bfloat16 between its operations.
    near = 1e-3 if precision == "float32" else 0.02
    for ours, theirs in zip(made, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=near, abs=near)
