"""A step that is not logged queues its work and waits for nothing."""

from __future__ import annotations

import pytest
import torch
from command_line import needs
from e2ediff_testing import make_batch
from tiny_recipe import tiny

from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.step.assembly import assemble
from e2ediff.step.update import Update

pytestmark = [
    needs("e2ediff-dsd"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # is a prototype, it says
]
CASES = {
    "float32": [],
    "bfloat16": ["precision=bfloat16"],
    "recomputed": ["precision=bfloat16", "checkpoint_activations=true"],
    "sgd": ["optimizer=sgd"],
    "spikes": ["guards={spike: skip, window: 3, factor: 100}"],
    "two averages": ["ema=[{name: slow, decay: 0.9}]", "post_hoc={every: 2}"],
    "statistics": ["backbone.latent_norm=batch"],
    "dsd": ["objective={name: dsd, draws: 2, augmentation: {jitter: 0.2}}"],
}


@pytest.mark.parametrize("case", CASES)
def test_an_unlogged_step_waits_for_nothing(case, cuda) -> None:
    recipe = parse_recipe(load(), tiny(microshards="2"), "tiny", [*CASES[case], "steps=100"])
    update = Update(recipe, assemble(recipe, cuda), World(), lambda *_, **__: None)
    made = make_batch(recipe.data.image, recipe.batch)
    batch = Batch(made.x.to(cuda), made.condition.to(cuda))
    for i in range(2):  # which make the optimizer's state, and load kernels
        update(batch, i * recipe.batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(batch, 2 * recipe.batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
