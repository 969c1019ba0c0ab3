"""Recipes of every shape of step, and the steps that the engine takes by them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from fixtures import TINY

from e2ediff.data import Batch
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe, parse_recipe
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.engine import Engine
from e2ediff.train.progress import Progress

CPU = torch.device("cpu")
SIZES = (
    "backbone={name: vit, width: 64, depth: 2, heads: 2, patch: 4, latent_dim: 8, "
    "latent_norm: layer}",
    "data={name: synthetic, size: 32, classes: 4, count: 60}",
    "microshards=2",
    "ema=[{name: slow, decay: 0.99}]",
)
OBJECTIVES = {
    "dsd": ["objective={name: dsd, decode_noise: {probability: 0.5}}"],
    "detached": ["objective={name: detached, draws: 2}"],
    "two_stage": ["objective=two_stage", "backbone.trunks=denoiser_apart"],
}


def recipe_with(host: Host, name: str, *overrides: str) -> Recipe:
    """The recipe with one of OBJECTIVES; skips the test if its plugin is not installed."""
    if name == "dsd":
        pytest.importorskip("e2ediff_dsd", reason="the plugin e2ediff-dsd is not installed")
    return parse_recipe(host, TINY, "tiny", [*SIZES, *OBJECTIVES[name], *overrides])


def engine_of(host: Host, recipe: Recipe, out: Path) -> Engine:
    directory = RunDirectory.create(str(out), recipe.name, "", "", {})
    sources = (recipe.data.open(), recipe.data.open(held_out=True))
    return Engine(host, recipe, directory, CPU, sources, Progress(io.StringIO()))


def take_step(engine: Engine, phase: str, batch: Batch) -> None:
    """Take a step where this phase is the active one."""
    start = round(engine.recipe.objective.span(phase)[0] * engine.recipe.total_images)
    engine.update(batch, start)
