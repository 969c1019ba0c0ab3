"""Reconstruct weights of any width from snapshots of power-function averages.

Snapshots are checkpoints in `post_hoc/` of the run's directory that hold only the parameters of
the averages; they are written, verified and deleted in the same way.
The averages of the opened checkpoint count as its last snapshot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff.averaging import WIDEST
from e2ediff.backbone import Backbone
from e2ediff.errors import CheckpointError, DataError
from e2ediff.host.recipe import Recipe
from e2ediff.loading.bad_images import open_source
from e2ediff.loading.batches import fixed_images
from e2ediff.model.calibration import calibrate
from e2ediff.model.power_averages import TOLERANCE, Point, mixture, reachable, tracked_name
from e2ediff.model.weights import load_weights
from e2ediff.store.checkpoint import list_checkpoints
from e2ediff.store.manifest import Checkpoint, open_one
from e2ediff.store.storage import Store
from e2ediff.train.snapshot import snapshots

PREFIX = "ema:"
"""Weights that begin so are reconstructed: `ema:0.08`."""


def width_of(weights: str) -> float | None:
    """Return the width named by `ema:0.08`; None for a stored set of weights.

    Raises:
        CheckpointError: The text after `ema:` is not a width.
    """
    if not weights.startswith(PREFIX):
        return None
    try:
        width = float(weights.removeprefix(PREFIX))
    except ValueError:
        width = 0.0
    if not 0 < width <= WIDEST:
        raise CheckpointError(
            f"weights {weights!r}: expected a width in (0, {WIDEST:.3f}], as in ema:0.08: an "
            "average's standard deviation over training time, as a share of that time."
        )
    return width


@attrs.frozen
class TrackedAverage:
    """A stored tracked average."""

    point: Point
    checkpoint: Checkpoint

    @property
    def file(self) -> str:
        """Return the name of its file in the checkpoint."""
        return tracked_name(self.point.sigma_rel)


@attrs.frozen
class Basis:
    """The tracked averages up to a checkpoint, its own last."""

    at: Checkpoint
    sources: tuple[TrackedAverage, ...]

    @classmethod
    def open(
        cls, store: Store, recipe: Recipe, at: Checkpoint, warn: Callable[[str], None]
    ) -> Basis:
        """Find the averages; damaged snapshots are left out and reported to `warn`.

        Raises:
            CheckpointError: The run has none.
        """
        if recipe.post_hoc is None:
            raise CheckpointError(
                f"{at.path}: no width can be reconstructed, because the run tracked no profiles. "
                f"It has {', '.join(stored_weights(at))}; train with `post_hoc: {{}}` in the "
                "recipe to have all widths."
            )
        found, place = list[Checkpoint](), snapshots(store)
        for name in list_checkpoints(place):
            try:
                found.append(open_one(place, name, verify=False))
            except CheckpointError as error:
                warn(f"skipped {error}")
        before = [one for one in found if one.step < at.step]
        return cls(
            at,
            tuple(
                TrackedAverage(Point(width, one.step), one)
                for one in [*before, at]
                for width in recipe.post_hoc.widths
                if one.step > 0 and tracked_name(width) in one.files
            ),
        )

    @property
    def points(self) -> list[Point]:
        """Return the stored averages as points."""
        return [source.point for source in self.sources]

    def widths(self) -> list[float]:
        """Return the widths, in thousandths and ascending, that can be reconstructed."""
        return reachable(self.points, self.at.step) if self.sources else []

    def chosen(self, width: float) -> list[tuple[TrackedAverage, float]]:
        """Return the averages to add up for a width, with their coefficients.

        Raises:
            CheckpointError: The stored averages do not determine it.
        """
        wanted = Point(width, self.at.step)
        for source in self.sources:
            if source.point == wanted:
                return [(source, 1.0)]
        if self.at.step == 0 or not self.sources:
            raise CheckpointError(f"{self.at.path}: nothing was averaged before the first step.")
        found = mixture(self.points, wanted)
        if found.error > TOLERANCE:
            raise CheckpointError(self._refusal(width, found.error))
        return list(zip(self.sources, found.coefficients, strict=True))

    def _refusal(self, width: float, error: float) -> str:
        steps = len({p.step for p in self.points})
        tracked = ", ".join(f"{w:g}" for w in sorted({p.sigma_rel for p in self.points}))
        known = self.widths()
        span = f"{known[0]:g} to {known[-1]:g}" if known else "the tracked ones"
        return (
            f"{self.at.path}: width {width:g} cannot be reconstructed: the nearest mixture of "
            f"widths {tracked} at {steps} moment{'s' * (steps > 1)} misses its profile by "
            f"{error:.0%}, and {TOLERANCE:.0%} is the limit. Give {span}; more snapshots (a "
            "smaller `post_hoc.every`) reach further."
        )


def stored_weights(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the sets of weights in a checkpoint."""
    files = checkpoint.files
    return sorted(f for f in files if f != "heads" and not f.startswith("optimizer-"))


def reconstruct(net: Backbone, basis: Basis, width: float, recipe: Recipe) -> str:
    """Load the weights of a width into a network; return a hash of their sources.

    Sums are taken in float64. Buffers are the checkpoint's; a latent norm with statistics is
    calibrated on the training images, as for every set of weights.

    Raises:
        CheckpointError: The width cannot be reached, or a snapshot is damaged.
        DataError: The statistics need training images, which are missing.
    """
    chosen = basis.chosen(width)
    own = tracked_name(recipe.post_hoc.widths[0]) if recipe.post_hoc else "online"
    load_weights(net, basis.at, own)
    with torch.no_grad():
        for name, value in _sums(net, chosen).items():
            net.get_parameter(name).copy_(value)
    if net.latent_norm.has_statistics:
        calibrate(net, _training_images(recipe, width).to(next(net.parameters()).device))
    made_of = [width, basis.at.step, *(s.checkpoint.sha256(s.file) for s, _ in chosen)]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _sums(net: Backbone, chosen: Sequence[tuple[TrackedAverage, float]]) -> Mapping[str, Tensor]:
    sums = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in net.named_parameters()}
    for source, share in chosen:
        tensors = source.checkpoint.tensors(source.file)
        for name, total in sums.items():
            known = name in tensors and tensors[name].dtype in (torch.float32, torch.float16)
            if not known or tensors[name].shape != total.shape:
                raise CheckpointError(
                    f"{source.checkpoint.path}: weights '{source.file}' do not fit the network of "
                    f"the recipe: {name}"
                )
            total.add_(tensors[name].double(), alpha=share)
    return sums


def _training_images(recipe: Recipe, width: float) -> Tensor:
    try:
        source = open_source(recipe.data)
    except DataError as error:
        raise DataError(
            f"weights {PREFIX}{width:g}: the latent norm takes its statistics from training "
            f"images for every reconstructed width, but these cannot be read: {error}"
        ) from error
    cpu = torch.device("cpu")
    kind, count = recipe.data.image.conditioning, recipe.probe.calibration
    return fixed_images(source, kind, count, recipe.seed, "calibration", cpu).x
