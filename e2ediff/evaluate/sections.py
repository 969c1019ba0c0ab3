"""Scores of samples; and of a run its reconstructions, its latents, and memorisation.

Each of the latter records the images that it was measured on, which are neither the samples nor
their reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

import attrs

from e2ediff.errors import DataError
from e2ediff.evaluate.conventions import Convention
from e2ediff.evaluate.latents import latent_figures
from e2ediff.evaluate.memorisation import closest_pairs, memorisation
from e2ediff.evaluate.passes import Pass, View
from e2ediff.evaluate.passport import Score, score_of
from e2ediff.evaluate.reconstruction import reconstruct
from e2ediff.evaluate.reference import ReferenceSet, open_reference, reference_features
from e2ediff.evaluate.request import Request
from e2ediff.evaluate.resampling import Resampling
from e2ediff.evaluate.subject import Subject
from e2ediff.host.plugins import Host
from e2ediff.host.structure import unstructure
from e2ediff.metric import FeatureSet, Metric, names_of, prefixed, taps_of
from e2ediff.model.image_features import network_title
from e2ediff.model.inference import Model
from e2ediff.store.storage import JSON

SECTIONS = ("reconstruction", "latents", "memorisation")
"""What is asked for beside metrics; a run alone has them."""

_LATENTS = 10_000


@attrs.define(eq=False, slots=False)
class Sections:
    """The scores that a request asks for; work shared between conventions is done once.

    `say` is called with progress.
    """

    host: Host
    request: Request
    subject: Subject
    work: Pass
    resampling: Resampling
    say: Callable[[str], None]

    def scores(
        self, one: Convention, view: View, made: FeatureSet | None, reference: ReferenceSet | None
    ) -> tuple[dict[str, Score], int, dict[str, JSON]]:
        """Return scores under a convention, the number of images compared with, and notes.

        Args:
            one: The convention.
            view: The convention's view of images.
            made: Features of the samples under this view, if anything needs them.
            reference: What the samples are compared with.

        Raises:
            DataError: The data are too few, too small, or have no classes.
        """
        found, asked, model = dict[str, Score](), self.request.sections, self.subject.model
        notes: dict[str, JSON] = {
            "departs": departures(one, self.subject),
            "reference": reference.place if reference else None,
            "reference_of_convention": one.reference,
            "sources": dict(one.sources),
            "unconfirmed": list(one.unconfirmed),
        }
        if self.request.bootstrap:
            notes["bootstrap"] = self.request.bootstrap
        metrics = [one.adapted(m) for m in self.request.metrics]
        compared = [m for m in metrics if m.compares]
        real = None
        if reference is not None:
            real = self._features(reference, view, *taps_of(compared))
        for metric in metrics:
            assert made is not None
            self.say(f"{one.name}: computing {type(metric).__name__}")
            other = real if metric.compares and real is not None else made
            if other.count and reference is not None:
                _check_count(metric, other.count, f"{reference.place}: {other.count} images")
            found |= self._measured(metric, made, other)
        if model is None:
            return found, real.count if real else 0, notes
        if "reconstruction" in asked:
            found |= self._reconstruction(model, compared, view, notes)
        if "memorisation" in asked and made is not None:
            found |= self._memorisation(model, view, made, notes)
        if "latents" in asked:
            self.say("computing figures of latents")
            found |= self._latents
        return found, real.count if real else 0, notes

    def _features(
        self, of: ReferenceSet, view: View, moments: Collection[str], rows: Collection[str]
    ) -> FeatureSet:
        work = attrs.evolve(self.work, moments=moments, rows=rows)
        cache, processes = self.request.cache, self.request.processes
        total = of.images.count if of.images else 0

        def progress(n: int) -> None:
            self.say(f"reference {of.place}: {n:,} of {total:,} images")

        return reference_features(
            of, work, view, cache=cache, processes=processes, progress=progress
        )

    def _measured(
        self,
        metric: Metric,
        made: FeatureSet,
        real: FeatureSet,
        kind: str = "",
        **images: JSON,
    ) -> dict[str, Score]:
        """Measure a metric; of reconstructions for kind `r`, on the given `images`."""
        options: Any = unstructure(self.host, metric, Metric)
        network, found = self.request.network, {}
        values = self.resampling.measure(metric, made, real, pairs=bool(kind))
        for figure, value in values.items():
            name = names_of(metric, figure, network_title(network), published=network.published)
            better = value.better or metric.better
            name = prefixed(kind, name, better) if kind else name
            found[name] = score_of(attrs.evolve(value, better=better), {**options, **images})
        return found

    def _reconstruction(
        self, model: Model, compared: Sequence[Metric], view: View, notes: dict[str, JSON]
    ) -> dict[str, Score]:
        perceptual = self.request.perceptual
        source = model.recipe.data.open(held_out=True)
        count = min(self.subject.count, len(source))
        for metric in compared:
            _check_count(metric, count, f"reconstruction: {count} held-out images")

        def progress(n: int) -> None:
            self.say(f"reconstructed {n:,} of {count:,} held-out images")

        done = reconstruct(model, source, count, self.work, view, perceptual, progress)
        notes["reconstructed_images"] = count
        of: dict[str, JSON] = {"held_out_sha256": done.sha256, "held_out_images": count}
        found = {}
        for name, value in done.figures.items():
            own = perceptual.identity if perceptual and name == perceptual.name else {}
            found[name] = score_of(value, {"section": "pairs", **of, **own})
        for metric in compared:
            found |= self._measured(
                metric, done.made, done.real, "r", section="reconstruction", **of
            )
        return found

    def _memorisation(
        self, model: Model, view: View, made: FeatureSet, notes: dict[str, JSON]
    ) -> dict[str, Score]:
        of: dict[str, JSON] = {"section": "memorisation"}
        sides = []
        for whose, place in (("held_out", "held-out"), ("training", "data")):
            images = open_reference(place, self.host, model.recipe.data)
            sides.append(self._features(images, view, (), ("pool",)).rows["pool"])
            of |= {f"{whose}_sha256": images.sha256, f"{whose}_images": len(sides[-1])}
        held_out, training = sides
        found = memorisation(made.rows["pool"], held_out, training)
        notes["closest_pairs"] = closest_pairs(made.rows["pool"], training)
        return {name: score_of(value, of) for name, value in found.items()}

    @cached_property
    def _latents(self) -> dict[str, Score]:
        model = self.subject.model
        assert model is not None
        data, count = model.recipe.data, min(self.subject.count, _LATENTS)
        figures, of = latent_figures(model, data.open(), data.open(held_out=True), count)
        return {
            name: score_of(value, {"section": "latents", **of[name]})
            for name, value in figures.items()
        }


def _check_count(metric: Metric, count: int, what: str) -> None:
    if count < metric.min_images():
        raise DataError(
            f"{what}, and {type(metric).__name__} needs {metric.min_images()}; leave it out of "
            "--metrics, or give more images"
        )


def departures(one: Convention, subject: Subject) -> list[str]:
    """List where a score departs from its convention."""
    found = []
    if subject.count != one.count:
        found.append(f"{subject.count} images instead of {one.count}")
    if subject.labels is None:
        found.append("rounding and labels are those of the stored images")
    elif subject.labels != one.labels:
        words = "those of held-out images" if subject.labels == "held_out" else subject.labels
        found.append(f"labels are {words} instead of {one.labels}")
    if subject.chosen:
        found.append(f"samples are of {subject.chosen} alone")
    return found
