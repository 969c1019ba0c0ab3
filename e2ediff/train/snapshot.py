"""Collect and restore the content of a checkpoint or of a snapshot of averages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from operator import itemgetter

import attrs
import torch
from torch import Tensor, nn

from e2ediff.backbone import Backbone
from e2ediff.distributed.tensors import whole
from e2ediff.errors import CheckpointError
from e2ediff.host.recipe import Recipe
from e2ediff.model.build import tracked
from e2ediff.model.calibration import calibrate
from e2ediff.model.weights import load_weights
from e2ediff.step.assembly import Assembly
from e2ediff.store.manifest import Checkpoint, count, plain
from e2ediff.store.storage import JSON, Store
from e2ediff.train.optimizer_state import flatten_optimizer, restore_optimizer, usual_state
from e2ediff.train.staging import Staging

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@attrs.frozen(eq=False)
class Snapshot:
    """Tensors by file, and the rest as JSON; `latent` is stored in the manifest."""

    files: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, JSON]


def take(parts: Assembly, calibration: Tensor, staging: Staging, *, keep: bool = True) -> Snapshot:
    """Copy the current weights, averages and optimizers, with split tensors gathered.

    Norm statistics are calibrated for every set of weights, from training images `calibration`
    (M, C, H, W).
    A collective call; processes without `keep` get no tensors.
    """
    nets = parts.nets
    sets = {"online": nets.online, **{name: a.net for name, a in parts.averages.items()}}
    with parts.parallel.whole():
        for net in sets.values():
            calibrate(net, calibration)
        latent = {name: _contract(net, calibration) for name, net in sets.items()}
    held, optimizers = tensors_of(parts)
    files = staging.copy(held, keep=keep)
    state: dict[str, JSON] = {
        "averages": {n: a.updates for n, a in parts.averages.items()},
        "optimizers": optimizers,
        "choices": dict(parts.choices),
        "latent": latent,
    }
    return Snapshot(files, state)


def tensors_of(
    parts: Assembly,
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, JSON]]:
    """Return all tensors of a checkpoint, by file, and other optimizer state, by phase."""
    nets, names = parts.nets, _names(parts)
    held: dict[str, Mapping[str, Tensor]] = {"online": nets.online.state_dict()}
    if len(nets.heads):
        held["heads"] = nets.heads.state_dict()
    held |= {name: average.net.state_dict() for name, average in parts.averages.items()}
    optimizers: dict[str, JSON] = {}
    for phase, optimizer in parts.optimizers.items():
        held[f"optimizer-{phase}"], optimizers[phase] = flatten_optimizer(optimizer, names)
    return held, optimizers


@torch.no_grad()
def _contract(net: Backbone, images: Tensor) -> dict[str, JSON]:
    """Return the latent contract of these weights; images (M, C, H, W) give the scale."""
    free = net.latent.norm == "none"  # the scale can only be measured then
    scale = float(net.encode(images[:256]).std()) if free else 1.0
    return {key: plain(value, key) for key, value in net.contract(scale).as_json().items()}


def put_back(
    parts: Assembly, checkpoint: Checkpoint, device: torch.device, recipe: Recipe
) -> None:
    """Load the weights, averages and optimizers of a checkpoint into an assembly of the recipe.

    Raises:
        CheckpointError: Its tensors do not fit the recipe, or a count is none.
    """
    nets = parts.nets
    modules: dict[str, nn.Module] = {"online": nets.online}
    modules |= {name: average.net for name, average in parts.averages.items()}
    if len(nets.heads):
        modules["heads"] = nets.heads
    for name, module in modules.items():
        load_weights(module, checkpoint, name)
    for name, average in parts.averages.items():
        average.updates = checkpoint.read(
            "averages", partial(_updates, name=name, most=checkpoint.step)
        )
    for phase, optimizer in parts.optimizers.items():
        names, config = _names(parts), recipe.optimizers.get(phase, recipe.optimizer)
        expected = usual_state(config, parts.step.named_trained(phase), names)
        tensors = checkpoint.tensors(f"optimizer-{phase}", device)
        state = checkpoint.read("optimizers", itemgetter(phase))
        try:
            restore_optimizer(optimizer, names, tensors, state, expected)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _updates(found: Mapping[str, object], name: str, most: int) -> int:
    return count(found[name], name, most)


def _names(parts: Assembly) -> dict[nn.Parameter, str]:
    return {p: name for name, p in parts.step.named_parameters()}


def snapshots(store: Store) -> Store:
    """Return the store of a run's snapshots."""
    return store.inside("post_hoc")


def take_snapshot(
    parts: Assembly, recipe: Recipe, *, keep: bool = True
) -> dict[str, dict[str, Tensor]]:
    """Copy the parameters of the averages of `post_hoc`, with split tensors gathered.

    A collective call; processes without `keep` get no tensors.
    """
    assert recipe.post_hoc is not None
    found: dict[str, dict[str, Tensor]] = {}
    for average in tracked(recipe):
        found[average] = held = {}
        for name, value in parts.averages[average].net.named_parameters():
            full = whole(value.detach())
            if keep:
                held[name] = full.to("cpu", _DTYPES[recipe.post_hoc.precision], copy=True)
    return found
