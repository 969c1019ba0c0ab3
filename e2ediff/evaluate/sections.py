"""Further scores of a run: of reconstructions, of latents, and of memorisation.

Each records in its own passport the images that it was measured on, which are neither the samples
nor their reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs

from e2ediff.errors import DataError
from e2ediff.evaluate.conventions import Convention
from e2ediff.evaluate.latents import latent_figures
from e2ediff.evaluate.memorisation import closest_pairs, memorisation
from e2ediff.evaluate.passes import Pass, View
from e2ediff.evaluate.passport import Score
from e2ediff.evaluate.reconstruction import reconstruct
from e2ediff.evaluate.reference import open_reference, reference_features
from e2ediff.evaluate.request import Request
from e2ediff.evaluate.resampling import Resampling
from e2ediff.evaluate.subject import Subject
from e2ediff.figure import Better
from e2ediff.host.plugins import Host
from e2ediff.host.structure import unstructure
from e2ediff.metric import FeatureSet, Metric, MetricValue, names_of, prefixed
from e2ediff.model.image_features import network_title
from e2ediff.model.inference import Model
from e2ediff.store.storage import JSON

SECTIONS = ("reconstruction", "latents", "memorisation")
"""What is asked for beside metrics; a run alone has them."""

_LATENTS = 10_000


def options_of(host: Host, metric: Metric) -> dict[str, JSON]:
    """Return a metric's name and options for a passport."""
    found: Any = unstructure(host, metric, Metric)
    return dict(found)


def score_of(
    estimate: MetricValue, decided_by: Mapping[str, JSON], better: Better | None = None
) -> Score:
    """Make a score of a metric's value, with what determines it besides the protocol."""
    e = estimate
    return Score(e.value, e.error, decided_by, e.warnings, e.interval, e.better or better)


@attrs.define(eq=False, slots=False)
class Sections:
    """The sections that a request asks for; work shared between conventions is done once."""

    host: Host
    request: Request
    subject: Subject
    work: Pass
    resampling: Resampling

    def scores(
        self, one: Convention, view: View, made: FeatureSet | None
    ) -> tuple[dict[str, Score], dict[str, JSON]]:
        """Return scores under a convention, and notes on them.

        Args:
            one: The convention.
            view: The convention's view of images.
            made: Features of the samples under this view.

        Raises:
            DataError: The data are too few, too small, or have no classes.
        """
        found: dict[str, Score] = {}
        notes: dict[str, JSON] = {}
        model = self.subject.model
        if model is None:
            return found, notes
        if "reconstruction" in self.request.sections:
            found |= self._reconstruction(model, one, view, notes)
        if "memorisation" in self.request.sections and made is not None:
            found |= self._memorisation(model, view, made, notes)
        if "latents" in self.request.sections:
            found |= self._latents
        return found, notes

    def _reconstruction(
        self, model: Model, one: Convention, view: View, notes: dict[str, JSON]
    ) -> dict[str, Score]:
        network, perceptual = self.request.network, self.request.perceptual
        source = model.recipe.data.open(held_out=True)
        count = min(self.subject.count, len(source))
        compared = [one.adapted(m) for m in self.request.metrics if m.compares]
        for metric in compared:
            if count < metric.min_images():
                raise DataError(
                    f"reconstruction: {count} held-out images, and {type(metric).__name__} needs "
                    f"{metric.min_images()}; leave it out of --metrics, or give more images"
                )
        done = reconstruct(model, source, count, self.work, view, perceptual)
        notes["reconstructed_images"] = count
        of: dict[str, JSON] = {"held_out_sha256": done.sha256, "held_out_images": count}
        found = {}
        for name, estimate in done.figures.items():
            own = perceptual.identity if perceptual and name == perceptual.name else {}
            found[name] = score_of(estimate, {"section": "pairs", **of, **own})
        for metric in compared:
            for name, estimate in self.resampling.measure(
                metric, done.made, done.real, pairs=True
            ).items():
                title = network_title(network)
                full = names_of(metric, name, title, published=network.published)
                decided_by = {**options_of(self.host, metric), "section": "reconstruction", **of}
                score = score_of(estimate, decided_by, metric.better)
                found[prefixed("r", full, score.better)] = score
        return found

    def _memorisation(
        self, model: Model, view: View, made: FeatureSet, notes: dict[str, JSON]
    ) -> dict[str, Score]:
        rows, request = attrs.evolve(self.work, moments=(), rows=("pool",)), self.request
        of: dict[str, JSON] = {"section": "memorisation"}
        sides = []
        for whose, place in (("held_out", "held-out"), ("training", "data")):
            images = open_reference(place, self.host, model.recipe.data)
            sides.append(
                reference_features(
                    images, rows, view, cache=request.cache, processes=request.processes
                )
            )
            of |= {f"{whose}_sha256": images.sha256, f"{whose}_images": sides[-1].count}
        held_out, training = (side.rows["pool"] for side in sides)
        found = memorisation(made.rows["pool"], held_out, training)
        notes["closest_pairs"] = closest_pairs(made.rows["pool"], training)
        return {name: score_of(estimate, of) for name, estimate in found.items()}

    @cached_property
    def _latents(self) -> dict[str, Score]:
        model = self.subject.model
        assert model is not None
        data, count = model.recipe.data, min(self.subject.count, _LATENTS)
        figures, of = latent_figures(model, data.open(), data.open(held_out=True), count)
        return {
            name: score_of(estimate, {"section": "latents", **of[name]})
            for name, estimate in figures.items()
        }
