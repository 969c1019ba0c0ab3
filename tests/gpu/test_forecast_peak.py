"""The peak that `plan` forecasts is the one that CUDA's allocator counts."""

from __future__ import annotations

import gc

import pytest
import torch
from command_line import needs
from e2ediff_testing import make_batch
from fixtures import TINY

from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.step.assembly import assemble
from e2ediff.step.update import Update

pytestmark = needs("e2ediff-plan", "e2ediff-dsd")

# Peaks of some GiB, beside which workspaces of libraries, which are not forecast, are small.
SIZES = (
    "backbone={name: vit, width: 384, depth: 6, heads: 6, patch: 4, latent_dim: 8, "
    "latent_norm: layer}",
    "data={name: synthetic, size: 64, classes: 4, count: 256}",
    "batch=128",
    "microshards=2",
    "ema=[{name: slow, decay: 0.99}]",
    "objective={name: dsd, decode_noise: {probability: 0.5}}",
)


@pytest.mark.parametrize("recomputed", ["false", "true"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_forecast_peak_is_the_device_s_within_ten_percent(precision, recomputed, cuda) -> None:
    from e2ediff_plan.memory import follow  # of a plugin, which may not be installed

    changes = [f"precision={precision}", f"checkpoint_activations={recomputed}"]
    recipe = parse_recipe(load(), TINY, "tiny", [*SIZES, *changes])
    forecast = follow(recipe, like_cuda=True)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    update = Update(recipe, assemble(recipe, cuda), World(), lambda *_, **__: None)
    made = make_batch(recipe.data.image, recipe.batch)
    batch = Batch(made.x.to(cuda), made.condition.to(cuda))
    update(batch, 0)  # creates the optimizer's state
    torch.cuda.reset_peak_memory_stats()
    update(batch, recipe.batch)
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    assert forecast.peak == pytest.approx(found, rel=0.1)
