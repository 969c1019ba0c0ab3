"""A finished or running run, opened for use."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence

import attrs
import torch

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.backbone import Backbone
from e2ediff.data import ImageSpec
from e2ediff.denoiser import Denoiser, Plain
from e2ediff.errors import CheckpointError, Problem, RecipeError
from e2ediff.guidance import Reference
from e2ediff.host.plugins import Host, load
from e2ediff.host.recipe import Recipe, parse_recipe
from e2ediff.latent import LatentContract
from e2ediff.model.build import build_nets, choose_device, guidance_problems
from e2ediff.model.inference import ROWS, Model, Origin, Other, Precision, choose_kernels
from e2ediff.model.weights import load_weights
from e2ediff.sample.post_hoc import Basis, reconstruct, stored_weights, width_of
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.plugin_files import refuse_other_plugin_files
from e2ediff.store.run_directory import RunDirectory

Opened = tuple[Recipe, Backbone, Origin, LatentContract | None, ImageSpec]

_MAY_CHANGE = ("sampler", "guidance")


def load_model(
    run: Address,
    *,
    weights: str | None = None,
    checkpoint: str | None = None,
    device: str = "auto",
    overrides: Sequence[str] = (),
    rows: int = ROWS,
    precision: Precision = "float32",
    host: Host | None = None,
    warn: Callable[[str], None] | None = None,
) -> Model:
    """The model of a run, in eval mode.

    Args:
        run: The run's directory, or any URL of one.
        weights: `online`, `target`, the name of an average in the recipe's `ema`, or a width to
            reconstruct, as `ema:0.08`; by default the first of `ema`, or the target.
        checkpoint: Name of a checkpoint; by default the newest that is whole.
        device: `auto`, `cpu`, `cuda`, or one of several as `cuda:1`.
        overrides: Assignments as given to `--set`, to `sampler` and `guidance` alone.
        rows: Images that are computed at once; it may move their last bits.
        precision: Type that the networks compute in.
        host: What knows the parts; by default everything installed.
        warn: Told of damaged checkpoints that were passed over, and of kernels that are not here.

    Raises:
        RunDirectoryError: There is no run there.
        CheckpointError: It has no such checkpoint or weights, they are damaged, or the width
            cannot be reconstructed.
        LatentError: The recipe's backbone has other latents than those weights.
        RecipeError: An override is wrong, or guidance asks a network of another path or classes.
        LatentError: Guidance asks another run, whose latents are others.
    """
    run = addresses.plain(run)
    host, warn = host or load(), warn or logging.warning
    target = choose_device(device)

    def open_one(
        place: str, checkpoint: str | None, weights: str | None, given: Sequence[str], use: str
    ) -> Opened:
        return _open(host, place, checkpoint, weights, given, target, precision, warn, use)

    use = "use --checkpoint {}"
    recipe, net, origin, latent, image = open_one(run, checkpoint, weights, overrides, use)
    guidance, others = recipe.guidance, dict[Reference, Other]()
    if guidance is not None:
        for reference in guidance.references:
            place = reference.run or run
            named = (reference.checkpoint or None, reference.weights or None)
            found = open_one(place, *named, (), "give the guidance `checkpoint: {}`")
            others[reference] = _other(recipe, net, image, place, run, found)
        given: Mapping[Reference, Denoiser] = {r: o.denoiser for r, o in others.items()}
        guidance = guidance.given(given)
    asked = tuple(others.values())
    return Model(recipe, net, guidance, asked, origin, rows, precision, latent, image)


def recipe_of(host: Host, directory: RunDirectory, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run was trained by, with another sampler or guidance.

    Raises:
        RecipeError: An override is wrong, or guidance and sampler do not fit each other.
    """
    _refuse_others(overrides)
    refuse_other_plugin_files(host, directory)
    place = directory.store.where("resolved.yaml")
    recipe = parse_recipe(host, directory.resolved(), place, overrides)
    if found := guidance_problems(recipe):
        raise RecipeError(place, found)
    return recipe


def image_of(recipe: Recipe, directory: RunDirectory) -> ImageSpec:
    """Shape and classes of a run's images, with the names that its classes had in training.

    Raises:
        RunDirectoryError: The record of the names is damaged.
    """
    image = recipe.data.image
    return attrs.evolve(image, class_names=directory.class_names() or image.class_names)


def _open(
    host: Host,
    run: str,
    checkpoint: str | None,
    weights: str | None,
    overrides: Sequence[str],
    device: torch.device,
    precision: Precision,
    warn: Callable[[str], None],
    use: str,
) -> Opened:
    directory = RunDirectory.open(run)
    recipe = recipe_of(host, directory, overrides)
    opened = open_checkpoint(directory.store, checkpoint, warn=warn, use=use)
    name = weights or (recipe.ema[0].name if recipe.ema else "target")
    width, known = width_of(name), stored_weights(opened)
    if width is None and name not in known:
        raise CheckpointError(
            f"{opened.path}: no weights '{name}'; it has {', '.join(known)}"
            + (", and any width as ema:0.08" if recipe.post_hoc else "")
        )
    nets, _ = build_nets(recipe, device)
    net = nets.online.eval().requires_grad_(requires_grad=False)
    choose_kernels(net, device, precision, warn)
    if width is None:
        load_weights(net, opened, name)
        sha256, latent = opened.sha256(name), opened.latent(name)
    else:
        basis = Basis.open(directory.store, recipe, opened, warn)
        sha256 = reconstruct(net, basis, width, recipe)
        online = opened.latent("online")
        latent = net.contract(online.scale) if online else None
    origin = Origin(
        run=run,
        checkpoint=opened.name,
        weights=name,
        sha256=sha256,
        recipe_sha256=hashlib.sha256(directory.resolved().encode()).hexdigest(),
    )
    return recipe, net, origin, latent, image_of(recipe, directory)


def _refuse_others(overrides: Sequence[str]) -> None:
    """Only what concerns sampling may differ from the recipe that the weights were trained by."""
    wrong = [
        Problem(key, "belongs to training and cannot be changed now.", f"--set {i}")
        for i, assignment in enumerate(overrides, start=1)
        if (key := assignment.partition("=")[0].strip()).partition(".")[0] not in _MAY_CHANGE
    ]
    if wrong:
        hint = f"Only {' and '.join(_MAY_CHANGE)} can."
        raise RecipeError("sampling", [attrs.evolve(p, hint=hint) for p in wrong])


def _other(
    recipe: Recipe, net: Backbone, image: ImageSpec, run: str, own: str, found: Opened
) -> Other:
    """A network that guidance asks, once it is known to keep the contract of these latents.

    Args:
        recipe: That of the run that is sampled.
        net: Its network, whose latents the other is to denoise.
        image: Its images, with the names of their classes.
        run: The other's run.
        own: The run that is sampled. Its own earlier checkpoints and averages are taken though
            statistics of the latent norm differ: the latents have moved, as the weights have.
        found: The other.

    Raises:
        RecipeError: It has another interpolant or other classes, by number or by name.
        LatentError: It is of another run, and latents mean something else there.
    """
    theirs, weak, origin, _, other = found
    here = (recipe.interpolant, recipe.data.image.classes)
    there = (theirs.interpolant, theirs.data.image.classes)
    for what, a, b in zip(("interpolant", "classes"), here, there, strict=True):
        if a != b:
            text = f"{run} has other {what}: {b} there, {a} here."
            hint = "Give a run that was trained on the same latents."
            raise RecipeError("sampling", [Problem("guidance", text, hint=hint)])
    names = zip(other.class_names, image.class_names, strict=False)  # a run may have none
    for label, (a, b) in enumerate(names):
        if a != b:
            text = f"{run} has other classes: {label} is '{a}' there, '{b}' here."
            hint = "Give a run whose classes have the same numbers."
            raise RecipeError("sampling", [Problem("guidance", text, hint=hint)])
    if os.path.abspath(run) != os.path.abspath(own):
        weak.contract().accept(net.contract(), f"{own}, which {run} is to guide,")
    return Other(Plain(weak, theirs.interpolant, theirs.predicts), origin)
