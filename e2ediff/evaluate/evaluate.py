"""Evaluate images with every metric in one feature pass, under one or several conventions.

Shapes: n images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata

import attrs
import torch

from e2ediff.data import SourceConfig
from e2ediff.distances import self_test
from e2ediff.distributed.threads import quiet, threads_for
from e2ediff.errors import DataError, PluginError
from e2ediff.evaluate.conventions import Convention
from e2ediff.evaluate.passes import Pass, View, feature_pass
from e2ediff.evaluate.passport import Card, Passport, Score
from e2ediff.evaluate.reference import (
    ReferenceSet,
    open_reference,
    reference_features,
)
from e2ediff.evaluate.request import Request, Say
from e2ediff.evaluate.resampling import Resampling
from e2ediff.evaluate.sections import Sections, options_of, score_of
from e2ediff.evaluate.subject import Subject, run_subject, stored_subject
from e2ediff.features import FeatureNetwork
from e2ediff.host.plugins import Host
from e2ediff.metric import FeatureSet, Metric, names_of, taps_of
from e2ediff.model.build import choose_device
from e2ediff.model.image_features import network_title, weights_sha256
from e2ediff.store.environment import describe_environment
from e2ediff.store.run_directory import is_run
from e2ediff.store.storage import JSON


def default_metrics(host: Host, network: FeatureNetwork) -> list[Metric]:
    """Return every registered metric, with its defaults, whose taps the network offers."""
    found: list[Metric] = []
    for part in host.parts("metrics"):
        try:
            metric = part.cls()
        except TypeError:
            continue  # it has options without defaults, so the user must name it
        assert isinstance(metric, Metric)
        fits = {*metric.moments, *metric.rows} <= {*network.taps}
        if fits and metric.features in ("", network.family):
            found.append(metric)
    return found


def evaluate(host: Host, request: Request, say: Say = quiet, report: Say = quiet) -> list[Card]:
    """Score a run's samples, or stored images; return one card for each convention.

    Args:
        host: Knows the parts.
        request: What to evaluate, and how.
        say: Called with progress.
        report: Called with lines that should stay visible, such as the chosen thread count.

    Raises:
        DataError: Images are missing, too few, of another size, or the metrics do not fit.
        PluginError: A metric does not say whether low or high figures are better.
        ResourceError: The machine's linear algebra is broken.
        E2EDiffError: As loading the run has it.
    """
    self_test()
    _check_metrics(request)
    device = str(choose_device(request.target.device))
    subject = _subject(host, request)
    data = subject.model.recipe.data if subject.model else None
    references = _references(host, request, data)
    least = max([m.min_images() for m in request.metrics], default=1)
    if subject.count < least:
        raise DataError(
            f"{request.target.run}: {subject.count} images, and the metrics need {least}; give "
            "more (--count), or leave metrics out"
        )
    _check_sizes(subject, references.values())
    moments, rows = taps_of(request.metrics)
    rows |= {"pool"} if "memorisation" in request.sections else frozenset()
    resampling = Resampling(sets=request.bootstrap, say=say)
    rows |= resampling.taps(request.metrics)
    work = Pass(
        request.network, moments, rows, request.batch, device,
        choose_threads=request.choose_threads and request.processes > 1,
    )  # fmt: skip
    views = {c.name: View(c.rounding, c.resize) for c in request.conventions}
    if subject.model is None:  # bytes already
        views = {name: View("nearest", v.resize) for name, v in views.items()}
    made: Mapping[View, FeatureSet] = {}
    fixed = not request.choose_threads or request.processes > 1
    with threads_for(
        work.attempt(subject.images), report, torch.device(device), fixed=fixed
    ) as finished:

        def progress(n: int) -> None:
            say(f"{n}/{subject.count} images")
            finished(n)

        if moments or rows:
            made = feature_pass(
                work, subject.images, list(dict.fromkeys(views.values())), subject.count,
                processes=request.processes, progress=progress,
            )  # fmt: skip
        sections = Sections(host, request, subject, work, resampling)
        return [
            _card(host, request, sections, c, views[c.name], made, references.get(c.name))
            for c in request.conventions
        ]


def _check_metrics(request: Request) -> None:
    network = request.network
    for metric in request.metrics:
        if metric.better not in ("low", "high"):
            raise PluginError(
                f"metric {type(metric).__name__}: better is {metric.better!r}; its author must "
                "write 'low' or 'high'"
            )
        if metric.features not in ("", network.family):
            raise DataError(
                f"--metrics: {type(metric).__name__} needs a {metric.features} network, not "
                f"{network_title(network)}; give one with --features '{{name: {metric.features}, "
                "weights: ...}'"
            )
    if request.sections and not is_run(request.target.run):
        raise DataError(
            f"--metrics {','.join(request.sections)}: only a run has them; {request.target.run} "
            "is none"
        )


def _subject(host: Host, request: Request) -> Subject:
    first = request.conventions[0]
    if not is_run(request.target.run):
        if request.target.overrides:
            raise DataError(f"--set: only a run has a sampler; {request.target.run} is none")
        return stored_subject(request.target.run, request.count)
    subject = run_subject(
        host,
        request.target,
        request.count or first.count,
        request.labels or first.labels,
        seed=request.seed,
    )
    if request.labels and subject.labels != request.labels:
        raise DataError("--labels: the run is not conditioned on classes; leave it out")
    return subject


def _references(
    host: Host, request: Request, data: SourceConfig | None
) -> Mapping[str, ReferenceSet]:
    if not any(metric.compares for metric in request.metrics):
        return {}
    opened: dict[str, ReferenceSet] = {}
    found = {}
    for one in request.conventions:
        default = "data" if data is not None else ""
        place = request.references.get(one.name, request.references.get("", default))
        if not place:
            raise DataError(
                f"--reference is missing: {one.name} compares with {one.reference}; give an npz, "
                "a folder of images or a data source"
            )
        if place not in opened:
            opened[place] = open_reference(place, host, data)
        found[one.name] = opened[place]
    return found


def _check_sizes(subject: Subject, references: Iterable[ReferenceSet]) -> None:
    for reference in references:
        images = reference.images
        if images is not None and images.shape[1:] != subject.images.shape[1:]:
            ours, theirs = (f"{s[2]} x {s[1]}" for s in (subject.images.shape, images.shape))
            raise DataError(
                f"{reference.place}: its images have {theirs} pixels, those of "
                f"{subject.images.place} {ours}; a score needs one resolution"
            )


def _card(
    host: Host,
    request: Request,
    sections: Sections,
    one: Convention,
    view: View,
    made: Mapping[View, FeatureSet],
    reference: ReferenceSet | None,
) -> Card:
    subject, work = sections.subject, sections.work
    title, published = network_title(request.network), request.network.published
    scores: dict[str, Score] = {}
    compared = 0
    real: FeatureSet | None = None
    if reference is not None:
        needs = taps_of([m for m in request.metrics if m.compares])
        own = attrs.evolve(work, moments=needs[0], rows=needs[1])
        real = reference_features(
            reference, own, view, cache=request.cache, processes=request.processes
        )
        compared = real.count
    for given in request.metrics:
        metric = one.adapted(given)
        ours = made[view]
        other = real if metric.compares and real is not None else ours
        if other.count and other.count < metric.min_images():
            assert reference is not None
            raise DataError(
                f"{reference.place}: {other.count} images, and {type(metric).__name__} needs "
                f"{metric.min_images()}"
            )
        for name, estimate in sections.resampling.measure(metric, ours, other).items():
            full = names_of(metric, name, title, published=published)
            scores[full] = score_of(estimate, options_of(host, metric), metric.better)
    notes: dict[str, JSON] = {"departs": departures(one, subject)}
    if request.bootstrap:
        notes["bootstrap"] = request.bootstrap
    further, more = sections.scores(one, view, made.get(view))
    scores, notes = scores | further, notes | more
    passport = passport_of(request, subject, one, view, reference, compared)
    return Card("", passport, scores, notes | _described(one, reference))


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
    return found


def _described(one: Convention, reference: ReferenceSet | None) -> dict[str, JSON]:
    return {
        "reference": reference.place if reference else None,
        "reference_of_convention": one.reference,
        "sources": dict(one.sources),
        "unconfirmed": list(one.unconfirmed),
    }


def passport_of(
    request: Request,
    subject: Subject,
    one: Convention,
    view: View,
    reference: ReferenceSet | None,
    compared: int,
) -> Passport:
    """Return the passport of a subject scored against `compared` images of a reference."""
    channels, height, width = subject.images.shape
    protocol: dict[str, JSON] = {
        "convention": one.name,
        "images": subject.count,
        "resolution": f"{width} x {height} x {channels}",
        "rounding": view.rounding if subject.model else "as stored",
        "resize": view.resize,
        "network": network_title(request.network),
        "network_sha256": weights_sha256(request.network),
        "reference_sha256": reference.sha256 if reference else None,
        "reference_images": compared or None,
        **subject.protocol,
    }
    where = describe_environment(device=str(choose_device(request.target.device)))
    machine: dict[str, JSON] = {k: where[k] for k in ("versions", "git", "hardware")}
    machine["libraries"] = {n: metadata.version(n) for n in ("numpy", "pillow", "torchvision")}
    machine["batch"], machine["processes"] = request.batch, request.processes
    machine["target"] = request.target.run
    return Passport(protocol, subject.identity, machine)
