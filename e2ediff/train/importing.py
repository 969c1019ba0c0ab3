"""Begin a run from the weights in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.backbone import Backbone
from e2ediff.errors import CheckpointError, DataError
from e2ediff.features import read_weights
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe, dump_recipe, load_recipe
from e2ediff.host.registry import closest
from e2ediff.latent import LatentContract
from e2ediff.loading.bad_images import open_source
from e2ediff.loading.classes import empty_classes
from e2ediff.model.build import check_fits
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.store.checkpoint import save
from e2ediff.store.environment import describe_environment
from e2ediff.store.exporting import latent_of
from e2ediff.store.manifest import is_finite, plain
from e2ediff.store.plugin_files import copies
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import JSON
from e2ediff.train.continuation import class_names
from e2ediff.train.snapshot import tensors_of

_SHOWN = 40  # lines about names that do not fit


def import_weights(
    host: Host,
    recipe_path: Address,
    file: Address,
    out: Address,
    *,
    overrides: Sequence[str] = (),
    renames: Mapping[str, str] | None = None,
    warn: Callable[[str], None],
) -> str:
    """Make a run at step 0 whose online and averaged weights are those of a file.

    Heads of the objective are initialised as for a new run, and optimizers have no state.

    Args:
        host: Knows the parts.
        recipe_path: The recipe of the network.
        file: A safetensors file, or a `.pt` of nothing but tensors, by names of the network.
        out: The run's directory, which is created.
        overrides: Assignments, as for `--set`.
        renames: Beginnings of names in the file, and what stands there in the network.
        warn: Called with messages on types that are converted, and on images that are not there.

    Returns:
        The run's directory.

    Raises:
        DataError: The file cannot be read.
        CheckpointError: Names, shapes or values do not fit the network; all are listed.
        RunDirectoryError: `out` is not empty.
    """
    recipe = load_recipe(host, addresses.plain(recipe_path), overrides)
    check_fits(recipe, addresses.plain(recipe_path))
    RunDirectory.refuse_taken(out)
    place = addresses.plain(file)
    try:
        found, sha256 = read_weights(place)
    except DataError as error:
        raise DataError(str(error).removeprefix("feature network: ")) from error
    parts = assemble(attrs.evolve(recipe, compile="off"), torch.device("cpu"))
    nets = [parts.nets.online, *(average.net for average in parts.averages.values())]
    fitted = _fitted(parts.nets.online, _renamed(found, renames or {}), place, warn)
    for net in nets:
        net.load_state_dict(fitted)
    files, state = _content(recipe, parts, latent_of(place))
    with addresses.open_file(recipe_path, typed=True) as opened:
        text = opened.read().decode()
    resolved = dump_recipe(host, recipe)
    directory = RunDirectory.create(
        out, recipe.name, text, resolved, _environment(host, recipe, warn), copies(host)
    )
    with directory:
        name = save(directory.store, 0, 0, files, state, keep=0, warn=warn)
        directory.event("imported", file=place, sha256=sha256)
        directory.event("saved", name=name)
        directory.set_status(
            "interrupted", None, f"imported from {place}; not trained yet", last_checkpoint=name
        )
    return directory.path


def _content(
    recipe: Recipe, parts: Assembly, contract: LatentContract | None
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, JSON]]:
    """Return the tensors and the state of a checkpoint before the first step."""
    files, optimizers = tensors_of(parts)
    state: dict[str, JSON] = {
        "averages": dict.fromkeys(parts.averages, 0),
        "optimizers": optimizers,
        "choices": {},  # the run has not been on its device yet
        "alarm": CollapseDetector(recipe.alarm).state(),
    }
    net = parts.nets.online
    # The scale of latents without a norm was measured; without that record none is claimed.
    if net.latent.norm != "none" or contract is not None:
        scale = contract.scale if contract is not None else 1.0
        own = {k: plain(v, k) for k, v in net.contract(scale).as_json().items()}
        state["latent"] = dict.fromkeys(("online", *parts.averages), own)
    return files, state


def _environment(host: Host, recipe: Recipe, warn: Callable[[str], None]) -> dict[str, JSON]:
    """Describe the run's environment, with the names of the classes if its images are there."""
    image = recipe.data.image
    names, empty = image.class_names, tuple[int, ...]()
    try:
        source = open_source(recipe.data)
        names, empty = class_names(recipe, source), empty_classes(source, image)
    except DataError as error:
        warn(f"classes have no names in this run, because its images cannot be read: {error}")
    environment = describe_environment(
        seeds={"seed": recipe.seed},
        plugins={p.distribution or p.name: p.version for p in host.used},
    )
    return {
        **environment, "processes": 1, "class_names": list(names), "empty_classes": list(empty)
    }  # fmt: skip


def _renamed(found: Mapping[str, Tensor], renames: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace the beginnings of names; the longest that fits counts.

    Raises:
        CheckpointError: A beginning fits nothing, or two tensors get one name.
    """
    for old in renames:
        if not any(name.startswith(old) for name in found):
            known = ", ".join(sorted(found)[:3])
            raise CheckpointError(f"--map {old}=...: no name begins so; they are {known}, ...")
    renamed: dict[str, Tensor] = {}
    for name, tensor in found.items():
        fits = sorted((old for old in renames if name.startswith(old)), key=len)
        new = renames[fits[-1]] + name.removeprefix(fits[-1]) if fits else name
        if new in renamed:
            raise CheckpointError(f"--map: two tensors get the name {new!r}")
        renamed[new] = tensor
    return renamed


def _fitted(
    net: Backbone, found: Mapping[str, Tensor], place: str, warn: Callable[[str], None]
) -> dict[str, Tensor]:
    """Return the tensors in the network's types.

    Raises:
        CheckpointError: Names or shapes differ, or a value is not finite; all are listed.
    """
    own = net.state_dict()
    missing = [name for name in own if name not in found]
    wrong = [f"missing: {name} {tuple(own[name].shape)}" for name in missing]
    for name, tensor in sorted(found.items()):
        if name not in own:
            near = closest(name, missing)
            meant = f"; did you mean {near[0]}?" if near else ""
            wrong.append(f"not of the network: {name} {tuple(tensor.shape)}{meant}")
        elif tensor.shape != own[name].shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
        elif tensor.is_floating_point() != own[name].is_floating_point():
            wrong.append(f"{name} is {tensor.dtype}, expected {own[name].dtype}")
        elif not is_finite(tensor):
            wrong.append(f"{name} holds nan or inf")
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise CheckpointError(
            "\n  ".join(
                [f"{place} does not fit the network of the recipe:", *wrong[:_SHOWN], *more]
            )
            + "\n  Give the recipe that they were trained by, or rename with --map OLD=NEW."
        )
    if other := sorted({str(t.dtype) for n, t in found.items() if t.dtype != own[n].dtype}):
        warn(f"{place}: {', '.join(other)} is converted to the network's own type")
    return {name: tensor.to(own[name].dtype) for name, tensor in found.items()}
