"""A step costs its networks, and next to nothing else: what it calls is counted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from real_steps import CPU, OBJECTIVES, recipe_with
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.step.assembly import assemble
from e2ediff.step.count import count
from e2ediff.step.draws import training_draw
from e2ediff.step.update import Update, active_phases

ASIDE = {"aten.detach.default", "aten.alias.default", "aten.view.default", "aten.split.Tensor"}


class Calls(TorchDispatchMode):
    """Counts calls of torch's operations that compute something."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) not in ASIDE:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def a_batch(recipe):
    image, g = recipe.data.image, torch.Generator().manual_seed(0)
    x = torch.rand(recipe.batch, image.channels, image.height, image.width, generator=g) * 2 - 1
    return Batch(x=x, condition=image.conditioning.example(recipe.batch))


def engine_step(recipe, batch):
    update = Update(recipe, assemble(recipe, CPU), World(), lambda *_, **__: None)
    return lambda: update(batch, 0)


def hand_written_step(recipe, batch):
    """The step of a script that has the same networks, draws, optimizer and averages."""
    parts, (phase,) = assemble(recipe, CPU), active_phases(recipe, 0)
    optimizer, size = parts.optimizers[phase], recipe.batch // recipe.microshards
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step():
        optimizer.zero_grad(set_to_none=True)
        for shard in range(recipe.microshards):
            part = batch.rows(slice(shard * size, (shard + 1) * size))
            draw = training_draw(recipe, phase, 0, 0, part.condition, shard)
            total, _, _ = parts.step(part, draw, phase)
            (total / recipe.microshards).backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.optimizer.clip)
        optimizer.step()
        with torch.no_grad():
            for average in parts.averages.values():
                torch._foreach_lerp_(
                    [*average.net.parameters()], [*parts.nets.online.parameters()], 0.001
                )

    return step


def calls_of(step):
    step()  # the first one makes the optimizer's state
    with Calls() as calls:
        step()
    return calls.found


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_engine_calls_hardly_more_than_a_hand_written_loop(host, name, shards, norm) -> None:
    own = [f"microshards={shards}", f"backbone.latent_norm={norm}"]
    recipe = recipe_with(host, name, *own)
    batch = a_batch(recipe)
    engine = calls_of(engine_step(recipe, batch))
    script = calls_of(hand_written_step(recipe, batch))
    more = {call: n for call, n in (engine - script).items() if "norm" not in call}
    buffers = 2 if norm == "batch" else 0  # are kept for a step that must not count
    # The norm in pieces, the finite checks, and the figures of each micro-shard.
    assert sum(more.values()) <= 14 + buffers + 6 * shards, more


def test_a_step_of_one_micro_shard_divides_nothing_by_one(host) -> None:
    recipe = recipe_with(host, "detached", "microshards=1")
    engine = calls_of(engine_step(recipe, a_batch(recipe)))
    script = calls_of(hand_written_step(recipe, a_batch(recipe)))
    assert engine["aten.div.Tensor"] < script["aten.div.Tensor"]
    assert engine["aten._foreach_div.Scalar"] == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_floating_point_operations_of_a_step_are_those_that_check_counts(host, name) -> None:
    recipe = recipe_with(host, name)
    step = engine_step(recipe, a_batch(recipe))
    # torch counts attention in its written-out form alone.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    (phase,) = active_phases(recipe, 0)
    assert counter.get_total_flops() == count(recipe).flops[phase] * recipe.batch
