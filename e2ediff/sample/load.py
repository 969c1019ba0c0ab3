"""Open a finished or running run for sampling."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

from e2ediff import addresses, terminal
from e2ediff.addresses import Address
from e2ediff.condition import ClassLabels
from e2ediff.data import ImageSpec
from e2ediff.denoiser import Denoiser, Plain
from e2ediff.errors import CheckpointError, Problem, RecipeError, ResourceError
from e2ediff.guidance import Reference
from e2ediff.host.plugins import Host, load
from e2ediff.host.recipe import Recipe, parse_recipe
from e2ediff.loading.classes import other_name
from e2ediff.model.build import (
    build_nets,
    choose_device,
    guidance_problems,
    sampler_problems,
    time_problems,
)
from e2ediff.model.compiler import is_compiler_error, missing_compiler, said_by
from e2ediff.model.inference import (
    ROWS,
    Model,
    Origin,
    Other,
    Precision,
    choose_kernels,
    denoise_once,
)
from e2ediff.model.repeatable import repeatable
from e2ediff.model.weights import load_weights
from e2ediff.monitor.alarm import CollapseDetector
from e2ediff.sample.post_hoc import Basis, reconstruct, stored_weights, width_of
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.manifest import Checkpoint
from e2ediff.store.plugin_files import refuse_other_plugin_files
from e2ediff.store.provenance import refuse_networks
from e2ediff.store.run_directory import RunDirectory

_MAY_CHANGE = ("sampler", "guidance")


def _listed(assignments: Sequence[str]) -> tuple[str, ...]:
    return tuple(assignments)


@attrs.frozen(kw_only=True)
class ModelRef:
    """A set of weights of a run, and how to compute with it; can be sent to other processes.

    `run` is the run's directory, or any URL of one.
    `weights` is `online`, `target`, the name of an average in the recipe's `ema`, or a width to
    reconstruct, as `ema:0.08`; by default the first of `ema`, or the target.
    `checkpoint` is the name of a checkpoint; by default the newest intact one.
    `device` is `auto`, `cpu`, `cuda`, or one of several as `cuda:1`.
    `overrides` are assignments as given to `--set`, to `sampler` and `guidance` alone.
    `rows` is the number of images computed at once; it may change their last bits.
    `precision` is the type that the networks compute in.
    `compile` compiles the networks' blocks when they are first called, which may change last bits.
    `trust` opens the other runs that the recipe of a run names which was not made here.
    """

    run: str = attrs.field(converter=addresses.plain)
    weights: str | None = None
    checkpoint: str | None = None
    device: str = "auto"
    overrides: tuple[str, ...] = attrs.field(default=(), converter=_listed)
    rows: int = ROWS
    precision: Precision = "float32"
    compile: bool = False
    trust: bool = False

    def load(self, host: Host | None = None, warn: Callable[[str], None] | None = None) -> Model:
        """Load the model, in eval mode.

        Args:
            host: Knows the parts; by default everything installed.
            warn: Called with a message for each damaged checkpoint that is skipped, for
                kernels that are not available here, and for latents that have collapsed.

        Raises:
            RunDirectoryError: There is no run there, or it was not made here and its guidance
                names another one, which is neither in `overrides` nor trusted.
            CheckpointError: It has no such checkpoint or weights, they are damaged, or the width
                cannot be reconstructed.
            LatentError: The recipe's backbone has other latents than those weights, or guidance
                uses another run whose latents differ.
            RecipeError: An override is wrong, or guidance uses a network of another interpolant or
                other classes.
            ResourceError: The networks cannot be compiled, as there is no compiler for example.
        """
        host, warn = host or load(), warn or terminal.warn
        device = choose_device(self.device)
        own = _open(host, self, device, warn, "use --checkpoint {}")
        guidance, others = own.guidance, dict[Reference, Other]()
        if guidance is not None:
            self._refuse_strangers(guidance.references)
            for reference in guidance.references:
                ref = ModelRef(
                    run=reference.run or self.run,
                    weights=reference.weights or None,
                    checkpoint=reference.checkpoint or None,
                    precision=self.precision,
                )
                other = _open(host, ref, device, warn, "give the guidance `checkpoint: {}`")
                others[reference] = _other(own, other)
            given: Mapping[Reference, Denoiser] = {r: o.denoiser for r, o in others.items()}
            guidance = guidance.with_references(given)
        model = attrs.evolve(own, guidance=guidance, others=tuple(others.values()))
        return _compiled(model) if self.compile else model

    def _refuse_strangers(self, references: Sequence[Reference]) -> None:
        named = [("guidance", r.run) for r in references if r.run not in ("", self.run)]
        if named and not RunDirectory.open(self.run).is_made_here():
            refuse_networks(self.run, named, self.overrides, trust=self.trust)


def load_model(
    run: Address,
    *,
    host: Host | None = None,
    warn: Callable[[str], None] | None = None,
    **options: Any,
) -> Model:
    """Load the model of a run, in eval mode; options and errors are those of `ModelRef`."""
    return ModelRef(run=run, **options).load(host, warn)


def recipe_of(host: Host, directory: RunDirectory, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe that a run was trained by, with another sampler or guidance.

    Raises:
        RecipeError: An override is wrong, or guidance and sampler do not fit each other.
    """
    _refuse_others(overrides)
    refuse_other_plugin_files(host, directory)
    place = directory.store.where("resolved.yaml")
    recipe = parse_recipe(host, directory.resolved(), place, overrides)
    if found := [*guidance_problems(recipe), *time_problems(recipe)]:
        raise RecipeError(place, found)
    return recipe


def image_of(recipe: Recipe, directory: RunDirectory) -> ImageSpec:
    """Return shape and classes of a run's images, with what training recorded of the classes.

    Raises:
        RunDirectoryError: The record of their names, or of empty ones, is damaged.
    """
    image = recipe.data.image
    names, empty = directory.class_names() or image.class_names, directory.empty_classes()
    return attrs.evolve(image, class_names=names, empty_classes=empty)


def _open(
    host: Host, ref: ModelRef, device: torch.device, warn: Callable[[str], None], use: str
) -> Model:
    """Open a model whose guidance has not been given its networks."""
    directory = RunDirectory.open(ref.run)
    recipe = recipe_of(host, directory, ref.overrides)
    opened = open_checkpoint(directory.store, ref.checkpoint, warn=warn, use=use)
    if found := _collapse(recipe, opened):
        warn(f"{opened.path}: {found}. Do not trust its samples or scores")
    name = ref.weights or recipe.default_weights
    width, known = width_of(name), stored_weights(opened)
    if width is None and name not in known:
        raise CheckpointError(
            f"{opened.path}: no weights '{name}'; it has {', '.join(known)}"
            + (", and any width as ema:0.08" if recipe.post_hoc else "")
        )
    nets, _ = build_nets(recipe, device, frozen=False)
    if unfit := sampler_problems(recipe, nets.online):
        raise RecipeError(directory.store.where("resolved.yaml"), unfit)
    net = nets.online.eval().requires_grad_(requires_grad=False)
    # Where none is recorded, one that does not depend on timing.
    net.kernels_before = {"attention": "sdpa", **opened.kernels}
    with repeatable(deterministic=recipe.deterministic):
        choose_kernels(net, device, ref.precision, warn)
    if width is None:
        load_weights(net, opened, name)
        sha256, latent = opened.sha256(name), opened.latent(name)
    else:
        basis = Basis.open(directory.store, recipe, opened, warn)
        sha256 = reconstruct(net, basis, width, recipe)
        online = opened.latent("online")
        latent = net.contract(online.scale) if online else None
    origin = Origin(
        run=ref.run,
        checkpoint=opened.name,
        weights=name,
        sha256=sha256,
        recipe_sha256=hashlib.sha256(directory.resolved().encode()).hexdigest(),
    )
    image = image_of(recipe, directory)
    return Model(
        recipe, net, origin=origin, rows=ref.rows, precision=ref.precision, latent=latent,
        image=image,
    )  # fmt: skip


def _compiled(model: Model) -> Model:
    """Compile a model's networks by blocks, and call them once to see that it works.

    Raises:
        ResourceError: It does not.
    """
    nets = [model.net, *(other.denoiser.net for other in model.others)]
    failed = missing_compiler(model.device)
    if not all(net.blocks() for net in nets):
        failed = "it needs a backbone whose `blocks` method names its blocks; one here names none"
    if not failed:
        for net in nets:
            for block in net.blocks():
                block.compile()
        model = attrs.evolve(model, compiled=True)
        try:
            denoise_once(model)
        except Exception as error:
            if not is_compiler_error(error):
                raise
            failed = f"the compiler failed: {said_by(error)}"
    if failed:
        raise ResourceError(f"cannot compile: {failed}. Sample without --compile")
    return model


def _collapse(recipe: Recipe, checkpoint: Checkpoint) -> str:
    """Describe since when the latents were collapsed at a checkpoint; "" if they were not."""
    detector = CollapseDetector(recipe.alarm)
    checkpoint.read("alarm", detector.restore)
    return detector.collapsed


def _refuse_others(overrides: Sequence[str]) -> None:
    """Refuse overrides that change anything but sampling, as the weights fix the rest."""
    wrong = [
        Problem(key, "belongs to training and cannot be changed now.", f"--set {i}")
        for i, assignment in enumerate(overrides, start=1)
        if (key := assignment.partition("=")[0].strip()).partition(".")[0] not in _MAY_CHANGE
    ]
    if wrong:
        hint = f"Only {' and '.join(_MAY_CHANGE)} can."
        raise RecipeError("sampling", [attrs.evolve(p, hint=hint) for p in wrong])


def _other(own: Model, found: Model) -> Other:
    """Check that a network used by guidance shares the latents of the model, and return it.

    Args:
        own: The sampled model. Earlier checkpoints and averages of its run are accepted although
            statistics of the latent norm differ, because the weights have changed as well.
        found: The network that guidance uses.

    Raises:
        RecipeError: It has another interpolant or other classes, by number or by name.
        LatentError: It belongs to another run whose latents mean something else.
    """
    recipe, theirs, here, there = own.recipe, found.recipe, own.origin, found.origin
    assert here is not None
    assert there is not None
    known, given = own.image.conditioning, found.image.conditioning
    pairs: list[tuple[str, object, object]] = [
        ("interpolant", theirs.interpolant, recipe.interpolant)
    ]
    if isinstance(known, ClassLabels) and isinstance(given, ClassLabels):
        pairs.append(("classes", given.classes, known.classes))
    else:
        pairs.append(("conditioning", given.title, known.title))
    latents = "Give a run that was trained on the same latents."
    unlike = [(what, f"{a} there, {b} here", latents) for what, a, b in pairs if a != b]
    if differ := other_name(found.image.class_names, own.image.class_names):
        label, a, b = differ
        numbers = "Give a run whose classes have the same numbers."
        unlike.append(("classes", f"{label} is '{a}' there, '{b}' here", numbers))
    for what, text, hint in unlike[:1]:
        text = f"{there.run} has other {what}: {text}."
        raise RecipeError("sampling", [Problem("guidance", text, hint=hint)])
    if os.path.abspath(there.run) != os.path.abspath(here.run):
        us = f"{here.run}, which {there.run} is to guide,"
        found.net.contract().accept(own.net.contract(), us)
    averages = recipe.sampler.averages != "unused" and theirs.objective.trains_averages
    until = theirs.objective.trained_until(theirs.interpolant)
    plain = Plain(found.net, theirs.interpolant, theirs.predicts, averages=averages, until=until)
    return Other(plain, there)
