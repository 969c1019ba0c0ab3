"""A finished or running run, opened for use."""

from __future__ import annotations

import logging
from collections.abc import Callable

from e2ediff.errors import CheckpointError
from e2ediff.host.plugins import Host, load
from e2ediff.host.recipe import parse_recipe
from e2ediff.run.assembly import DTYPES, build_nets, choose_device
from e2ediff.run.checkpoint import load_weights, open_checkpoint
from e2ediff.run.directory import RunDirectory
from e2ediff.run.generate import Model

_NO_WEIGHTS = ("heads",)


def load_model(
    run: str,
    *,
    weights: str | None = None,
    checkpoint: str | None = None,
    device: str = "auto",
    host: Host | None = None,
    warn: Callable[[str], None] | None = None,
) -> Model:
    """The model of a run, in eval mode.

    Args:
        run: The run's directory, or any URL of one.
        weights: `online`, `target`, or the name of an average in the recipe's `ema`; by default
            the first of `ema`, or the target.
        checkpoint: Name of a checkpoint; by default the newest that is whole.
        device: `auto`, `cpu` or `cuda`.
        host: What knows the parts; by default everything installed.
        warn: Told of damaged checkpoints that were passed over.

    Raises:
        RunDirectoryError: There is no run there.
        CheckpointError: It has no such checkpoint or weights, or they are damaged.
        LatentError: The recipe's backbone has other latents than those weights.
    """
    directory = RunDirectory.open(run)
    place = directory.store.where("resolved.yaml")
    recipe = parse_recipe(host or load(), directory.resolved(), place)
    opened = open_checkpoint(directory.store, checkpoint, warn=warn or logging.warning)
    known = [f for f in opened.files if f not in _NO_WEIGHTS and not f.startswith("optimizer-")]
    name = weights or (recipe.ema[0].name if recipe.ema else "target")
    if name not in known:
        raise CheckpointError(
            f"{opened.path}: no weights '{name}'; it has {', '.join(sorted(known))}"
        )
    target = choose_device(device)
    nets, _ = build_nets(recipe, target)
    load_weights(nets.online, opened, name)
    net = nets.online.eval().requires_grad_(requires_grad=False)
    net.prepare(target, DTYPES["float32"])
    return Model(recipe, net, opened.latent(name))
