"""Measure the recipe's `scores`: cheap distances of reconstructions and samples in training.

A model with better reconstructions may give worse samples; the two figures side by side show that
before a full evaluation.

Shapes: M images, C H W image.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import attrs
import torch
from torch import Tensor

from e2ediff.backbone import Backbone
from e2ediff.data import Batch, DataSource, to_pixels
from e2ediff.errors import DataError, Problem
from e2ediff.features import FeatureNetwork
from e2ediff.figure import Figure
from e2ediff.host.recipe import Recipe, Scores
from e2ediff.loading.batches import fixed_images
from e2ediff.metric import FeatureSet, Metric, names_of, score_figure, taps_of
from e2ediff.model.fixed_networks import in_a_store, placed, unusable_networks
from e2ediff.model.image_features import features_of, network_title
from e2ediff.model.inference import Model
from e2ediff.monitor.isolation import Isolated, numbers

_BATCH = 64


@attrs.frozen(eq=False)
class Scorer:
    """Fixed held-out images with their features, and the feature network.

    A metric that raises is switched off, and `isolated` keeps the reason.
    `figures` has the declarations of the figures measured so far, by name.
    """

    recipe: Recipe
    settings: Scores
    network: FeatureNetwork
    held_out: Batch
    real: FeatureSet
    isolated: Isolated = attrs.field(factory=Isolated)
    figures: dict[str, Figure] = attrs.field(factory=dict)

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        held_out: DataSource,
        device: torch.device,
        isolated: Isolated | None = None,
    ) -> Scorer | None:
        """Read the images and their features; None if the recipe asks for no scores.

        Raises:
            DataError: The network's weights are missing, or the images too few.
        """
        settings = recipe.scores
        if settings is None:
            return None
        try:
            network = settings.features.build()
        except DataError as error:
            raise placed(error, settings, "scores") from error
        if found := misfits(settings, network):
            raise DataError("; ".join(f"{one.where}: {one.what}" for one in found))
        network = network.to(device)
        kind = recipe.data.image.conditioning
        batch = fixed_images(held_out, kind, settings.images, recipe.seed, "scores", device)
        x = batch.x
        least = max((m.min_images() for m in settings.metrics), default=2)
        if len(x) < least:
            raise DataError(
                f"scores: {len(x)} held-out images, and the metrics need {least}; raise "
                "scores.images, or give more images"
            )
        real = _features(settings, network, x)
        return cls(recipe, settings, network, batch, real, isolated or Isolated())

    def due(self, step: int) -> bool:
        """Return whether this step passed a multiple of `every` images, or is the last one."""
        every, seen = self.settings.every, step * self.recipe.batch
        return seen // every > (seen - self.recipe.batch) // every or (
            step == self.recipe.total_steps
        )

    @torch.no_grad()
    def measure(self, net: Backbone) -> dict[str, float]:
        """Measure figures of reconstructions, `rFD-...`, and of samples, `gFD-...`, by name.

        The network computes in the run's precision.

        Args:
            net: In eval mode, with norm statistics of its own weights.
        """
        r = self.recipe
        # As in previews: guiding networks of other runs may not exist yet.
        guidance = None if r.guidance is None or r.guidance.references else r.guidance
        model = Model(r, net, guidance, precision=r.precision)
        x, of_images = self.held_out.x, self.held_out.condition
        condition = r.data.image.conditioning.in_turn(len(x), of_images)
        found: dict[str, float] = {}
        found |= self._figures("r", model.reconstruct(x))
        found |= self._figures("g", model.sample(condition, seed=r.seed))
        return found

    def _figures(self, kind: str, x: Tensor) -> Mapping[str, float]:
        made = _features(self.settings, self.network, x.to(self.held_out.x.device))
        found: dict[str, float] = {}
        for metric in self.settings.metrics:
            work = partial(self._measured, metric, made, kind)
            found |= self.isolated.call("metric", metric, work, dict[str, float]())
        return found

    def _measured(self, metric: Metric, made: FeatureSet, kind: str) -> dict[str, float]:
        title, published = network_title(self.network), self.network.published
        estimates = metric.measure(made, self.real)
        values = numbers({name: estimate.value for name, estimate in estimates.items()})
        found = {}
        for (name, value), estimate in zip(values.items(), estimates.values(), strict=True):
            score = names_of(metric, name, title, published=published)
            figure = score_figure(kind, score, estimate.better or metric.better)
            self.figures[figure.name], found[figure.name] = figure, value
        return found


def misfits(settings: Scores, network: FeatureNetwork) -> list[Problem]:
    """Find metrics that these features or this number of images do not serve."""
    found, title = [], network_title(network)
    if not settings.metrics:
        found.append(Problem("scores.metrics", "are none; name one, such as fid"))
    least = max((metric.min_images() for metric in settings.metrics), default=2)
    if settings.images < least:
        what = f"{settings.images}, and the metrics need {least}; raise it"
        found.append(Problem("scores.images", what))
    for i, metric in enumerate(settings.metrics):
        name = type(metric).__name__
        if metric.features not in ("", network.family):
            what = f"{name} needs a {metric.features} network in scores.features, not {title}"
            found.append(Problem(f"scores.metrics.{i}", what))
        elif lacking := [tap for tap in _taps(metric) if tap not in network.taps]:
            what = (
                f"{name} needs the features {', '.join(lacking)}, and {title} of scores.features "
                f"has {', '.join(network.taps)}; choose another network, or leave the metric out"
            )
            found.append(Problem(f"scores.metrics.{i}", what))
    return found


def _taps(metric: Metric) -> list[str]:
    moments, rows = taps_of([metric])
    return sorted(moments | rows)


def score_problems(recipe: Recipe) -> list[Problem]:
    """Find scores that cannot be measured here, with the settings to change.

    Reads the weights of their network that lie on this machine.
    """
    settings = recipe.scores
    if settings is None or in_a_store(settings.features):
        return []
    if found := [*unusable_networks(settings, "scores")]:
        return found
    return misfits(settings, settings.features.build())


def _features(settings: Scores, network: FeatureNetwork, x: Tensor) -> FeatureSet:
    batches = (to_pixels(part) for part in torch.split(x, _BATCH))
    return features_of(batches, network, *taps_of(settings.metrics))
