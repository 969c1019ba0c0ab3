"""Check what differs between a run and its continuation, which must compute the same numbers."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import DataSource
from e2ediff.distributed.launch import same_processes
from e2ediff.errors import CheckpointError, Problem, RecipeError
from e2ediff.host.leaves import leaves
from e2ediff.host.plugin_file import given_files
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe, parse_recipe
from e2ediff.host.structure import unstructure
from e2ediff.host.yaml import Node, parse_yaml
from e2ediff.loading.classes import known_labels, other_name
from e2ediff.model.build import fresh_nets
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.manifest import block, count
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import JSON

# None of these changes a trained number by more than rounding, with two exceptions: the length, on
# which schedules depend, and under `alarm.policy: rollback` the cadence of diagnoses and
# checkpoints, which decides when a run is rolled back, and to where.
_MAY_CHANGE = (
    "name",
    "images",
    "steps",
    "cadence",
    "preview",
    "scores",
    "checkpoint",
    "alarm",
    "guards",
    "trackers",
    "device",
    "compile",
    "checkpoint_activations",
    "parallel",
    "deterministic",
    "diagnostics",
    "requires",
)

# These change what is computed from here on, but what was trained keeps its shape and its meaning:
# they may differ if the user names them. Of an objective and regularizers only numbers.
_BY_FLAG = (
    "optimizer",
    "optimizers",
    "label_drop",
    "times",
    "precision",
    "probe",
    "sampler",
    "guidance",
)
_NUMBERS_BY_FLAG = ("objective", "regularizers")


def continue_command(run: Address, *changes: str) -> str:
    """Return the shortest command that continues a run as this process trains it.

    Args:
        run: The run's directory.
        changes: Assignments, as for `--set`.
    """
    words = ["e2ediff", "run", "--resume", addresses.plain(run), *same_processes()]
    words += plugin_options()
    words += [word for change in changes for word in ("--set", change)]
    return shlex.join(words)


def plugin_options() -> list[str]:
    """Return the options that give another command the plugin files of this one."""
    return [word for file in given_files() for word in ("--plugin", _shortest(file))]


def _shortest(file: str) -> str:
    """Return a path below the current folder relative to it."""
    inside = file.startswith(os.path.join(os.getcwd(), ""))
    return os.path.relpath(file) if inside else file


def describe(sources: Sequence[DataSource]) -> list[JSON]:
    """Return what a checkpoint records of the images: their number, and the hash of their labels.

    The hash is null for a source that would have to read its images to find their labels.
    """
    return [{"images": len(source), "labels": _labels(source)} for source in sources]


def _labels(source: DataSource) -> str | None:
    labels = known_labels(source)
    return None if labels is None else hashlib.sha256(labels.numpy().tobytes()).hexdigest()


def refuse_other_recipe(
    host: Host,
    recipe: Recipe,
    directory: RunDirectory,
    source: Address,
    images: Sequence[DataSource],
    allow: Sequence[str] = (),
) -> dict[str, JSON]:
    """Refuse a recipe that would not compute what the run computed so far.

    A difference is harmless, or may be allowed, or can never be.

    Args:
        host: Knows the parts.
        recipe: The recipe of the continuation.
        directory: The run's directory.
        source: Address of the recipe, for messages.
        images: The continuation's training and held-out images.
        allow: Keys and blocks whose differences are wanted, where that is possible.

    Returns:
        The old and new value of everything that differs, by path in the recipe.

    Raises:
        RecipeError: A value differs that must not, or the images differ, or something that does
            not differ is to be allowed.
    """
    place = directory.store.where("resolved.yaml")
    then = parse_recipe(host, directory.resolved(), place)
    trees = [dict(leaves(unstructure(host, one, Recipe))) for one in (then, recipe)]
    _expand_lists(*trees)
    before, now = ({path: json.dumps(value) for path, value in one.items()} for one in trees)
    differ = [path for path in {**before, **now} if before.get(path) != now.get(path)]
    may_change = {*_MAY_CHANGE, *(f"data.{option}" for option in recipe.data.harmless)}
    changed = [p for p in differ if not {p.partition(".")[0], _option(p)} & may_change]
    possible = _allowable(changed, trees, then, recipe)
    changed = [p for p in changed if not (p in possible and any(_covers(a, p) for a in allow))]
    # Another part has other options, so its name is enough.
    chosen = [path for path in changed if path.endswith(".name") or path == "target.kind"]
    other = tuple(path.removesuffix("name").removesuffix("kind") for path in chosen)
    changed = [p for p in changed if p in chosen or not p.startswith(other)]
    moved = [p for p in changed if _option(p) in {f"data.{o}" for o in recipe.data.movable}]
    why = _unlike(directory, images, sure=not moved)
    same = f"continue this one as it was: {continue_command(directory.path)}"
    hints = dict.fromkeys(changed, f"A run cannot change it. Start another run, or {same}")
    hints |= dict.fromkeys(moved, f"Start another run, or {same}")
    flags = {p: f"--allow-change {p.removesuffix('.name')}" for p in possible}
    hints |= {p: f"To go on with it, add {flag}; or {same}" for p, flag in flags.items()}
    problems = [
        Problem(
            path,
            f"was {before.get(path, 'not given')} in {directory.path}, "
            f"is {now.get(path, 'not given')} here{why if path in moved else ''}.",
            hint=hints[path],
        )
        for path in changed
        if why or path not in moved
    ]
    unused = [key for key in allow if not any(_covers(key, path) for path in differ)]
    listed = ", ".join(differ) or "nothing"
    what = f"is not needed: of the recipe, {listed} differs from {directory.path}."
    problems += [Problem(f"--allow-change {key}", what) for key in unused]
    if why and not moved:
        what = f"has the same address as in {directory.path} but other content{why}."
        hint = "Give it the images that the run began with, or start another run."
        problems.append(Problem("data", what, hint=hint))
    if problems := problems or _renamed(recipe, directory, images):
        raise RecipeError(f"{source} (--resume)", problems)
    return {path: [before.get(path), now.get(path)] for path in differ}


def _covers(key: str, path: str) -> bool:
    """Return whether a key given by a user is this path, or a block that holds it."""
    return path == key or path.startswith(f"{key}.")


def _expand_lists(before: dict[str, object], now: dict[str, object]) -> None:
    """Replace lists of as many blocks in two recipes by the values of their blocks."""
    for path in [path for path in before if before[path] != now.get(path)]:
        old, new = before[path], now.get(path)
        if not (isinstance(old, list) and isinstance(new, list) and len(old) == len(new)):
            continue
        if all(isinstance(item, dict) for item in (*old, *new)):
            del before[path], now[path]
            for tree, items in ((before, old), (now, new)):
                for i, item in enumerate(items):
                    tree.update(leaves(item, f"{path}.{i}"))


def _allowable(
    changed: Sequence[str], trees: Sequence[Mapping[str, object]], then: Recipe, now: Recipe
) -> set[str]:
    """Return the differences that may be allowed."""
    found = set()
    for path in changed:
        block, last = path.partition(".")[0], path.rpartition(".")[2]
        values = [tree.get(path) for tree in trees]
        if block in _NUMBERS_BY_FLAG:
            possible = all(map(_is_numeric, values))
        elif block in ("optimizer", "optimizers"):
            # Another optimizer has another state, and groups hold the state of their parameters.
            possible = last not in ("name", "match") and not any(map(_is_worded, values))
        else:
            possible = block in _BY_FLAG
        if possible:
            found.add(path)
    # Another part has other options: they go with its name.
    names = [p for p in changed if p.endswith(".name") and p not in found]
    found = {p for p in found if not p.startswith(tuple(n.removesuffix("name") for n in names))}
    numbers = {path for path in found if path.startswith(_NUMBERS_BY_FLAG)}
    return found - numbers if numbers and _shapes(then) != _shapes(now) else found


def _is_numeric(value: object) -> bool:
    """Return whether a value is a number, or a list of numbers."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def _is_worded(value: object) -> bool:
    """Return whether a value is a list or block of anything but numbers, such as names."""
    return isinstance(value, list | dict) and bool(value) and not _is_numeric(value)


def _shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all that a recipe trains, by name."""
    online, heads, _ = fresh_nets(recipe, torch.device("meta"))
    nets = nn.ModuleDict({"online": online, "heads": heads})
    return {name: tuple(value.shape) for name, value in nets.state_dict().items()}


def data_block(directory: RunDirectory) -> Node | None:
    """Return the data block of a run's resolved recipe, which has all options of its source."""
    root, _ = parse_yaml(directory.resolved(), directory.store.where("resolved.yaml"))
    return root.value.get("data") if root and isinstance(root.value, dict) else None


def _option(path: str) -> str:
    """Return the path of the block's option to which a value belongs."""
    return ".".join(path.split(".")[:2])


def class_names(recipe: Recipe, training: DataSource) -> tuple[str, ...]:
    """Return a recipe's class names, by label: those of the data, else the recipe's own."""
    return training.class_names or recipe.data.image.class_names


def _renamed(
    recipe: Recipe, directory: RunDirectory, images: Sequence[DataSource]
) -> list[Problem]:
    """Report labels that meant another class in the run; unnamed classes cannot be compared."""
    before = directory.class_names() if images else ()
    now = class_names(recipe, images[0]) if before else ()
    where, hint = directory.path, "Give the images of the run, or start another run."
    if differ := other_name(before, now) if now else None:
        label, old, new = differ
        what = f"class {label} was called {old!r} in {where}, is {new!r} here."
    elif now and len(before) != len(now):
        what = f"had {len(before)} classes in {where}, has {len(now)} here."
    else:
        return []
    return [Problem("data", what, hint=hint)]


def _noted(found: object) -> list[dict[str, Any]]:
    """Read what `describe` returned; empty where it was not recorded."""
    noted = [block(entry, dict, "an entry") for entry in found] if isinstance(found, list) else []
    for entry in noted:
        count(entry["images"], "images")
        if entry["labels"] is not None:
            block(entry["labels"], str, "labels")
    return noted


def _unlike(directory: RunDirectory, images: Sequence[DataSource], *, sure: bool) -> str:
    """Describe how images differ from those of the run's checkpoints; empty if they do not.

    With `sure` the text is also empty where it is unknown whether they differ.
    """
    if not list_checkpoints(directory.store, finished=True):
        return ""  # without checkpoints the run starts again
    # Damaged checkpoints are reported when one is restored.
    try:
        found = open_checkpoint(directory.store, verify=False, warn=lambda text: None)
    except CheckpointError:
        return ""
    noted = found.read("data", _noted)
    if len(noted) != len(images):
        return "" if sure else f", and {found.name} does not record which images it was trained on"
    for kind, old, new in zip(("training", "held-out"), noted, describe(images), strict=True):
        assert isinstance(new, Mapping)
        if old["images"] != new["images"]:
            return f", which holds {new['images']} {kind} images instead of {old['images']}"
        if sure and None in (old["labels"], new["labels"]):
            continue
        if old["labels"] != new["labels"]:
            return f", whose {kind} images have other labels or another order"
        if new["labels"] is None:
            return f", and the labels of {kind} images cannot be compared without reading them"
    return ""
